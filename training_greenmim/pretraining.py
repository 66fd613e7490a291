# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for masked image modeling: masks planned in the data loader, and pictures of reconstructions."""

import itertools
import os

import numpy as np
import torch
from transformers.integrations import TensorBoardCallback

from modeling_greenmim import GreenMIMConfig, MaskPlan, plan_mask
from modeling_greenmim.masking import sample_noise, visible_units_from_noise

from .data import EpochShuffle, collate
from .model_card import write_model_card
from .pictures import picture_grid, reconstruct
from .randomness import MASK, derived_torch_generator
from .trainer import ImageTrainer


def plan_from_noise(config: GreenMIMConfig, noise: torch.Tensor, static: bool = False) -> MaskPlan:
    """Plan of the masks at the configuration's ratio that noise `(masks, num_units)` stands for; see `plan_mask`."""
    visible = visible_units_from_noise(noise, noise.shape[1], noise.shape[0], config.mask_ratio)
    return plan_mask(config, visible, static=static)


class MaskedCollator:
    """Joins training samples to a batch, draws its mask or masks and plans them; it runs in the loader's workers.

    Masks are derived from the seed and the place of a sample in the run, of the first one where a batch shares its
    mask: so they differ between steps and processes, and the number of workers plays no part.

    Args:
        config: of the model.
        seed: what masks are derived from.
        per_sample: whether each image has a mask of its own.
        static: whether the shapes of plans are the same for every mask; see `plan_mask`.
    """

    def __init__(self, config: GreenMIMConfig, seed: int, per_sample: bool = False, static: bool = False):
        self.config, self.seed, self.per_sample, self.static = config, seed, per_sample, static

    def __call__(self, samples: list[dict]) -> dict:
        """What `collate` returns, and `plan`, a `MaskPlan`."""
        rows, columns = self.config.unit_grid
        places = [sample["place"] for sample in (samples if self.per_sample else samples[:1])]
        noise = torch.cat([sample_noise(rows * columns, generator=self.generator(place)) for place in places])
        return {**collate(samples), "plan": plan_from_noise(self.config, noise, self.static)}

    def generator(self, place: tuple[int, ...]) -> torch.Generator:
        """Generator of the mask that is derived from a sample's place."""
        return derived_torch_generator(self.seed, MASK, *place)


class MIMTrainer(ImageTrainer):
    """Trains `GreenMIMForPreTraining`; masks are derived from (seed, place of the batch) in the loader's workers.

    Raises:
        `ValueError`: where one process sees several GPUs, which `Trainer` would give parts of a batch and whole plans.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"`n_gpu` is {self.args.n_gpu}: this process sees several GPUs. Start one process for each with"
                " `accelerate launch`, or choose one with CUDA_VISIBLE_DEVICES=0."
            )
        self.last_picture: str | None = None
        self.train_collator = MaskedCollator(
            self.model.config, self.args.seed, self.args.mask_per_sample, self.args.torch_compile
        )
        # Every evaluation uses one mask.
        rows, columns = self.model.config.unit_grid
        noise = sample_noise(rows * columns, generator=derived_torch_generator(self.args.seed, MASK))
        self.evaluation_plan = plan_from_noise(self.model.config, noise).to(self.args.device)

    def build_sampler(self, length: int) -> EpochShuffle:
        """Order of the training images; in whole batches for a compiled step, which has one size.

        Raises:
            `ValueError`: when there are not enough images for one such batch.
        """
        batch = self.args.train_batch_size * self.args.world_size if self.args.torch_compile else 1
        if length < batch:
            raise ValueError(
                f"`per_device_train_batch_size` is {self.args.per_device_train_batch_size}, which makes batches of"
                f" {batch} images over all processes, but there are {length} training images; `torch_compile` needs"
                " whole batches."
            )
        return EpochShuffle(length, self.args.seed, multiple_of=batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch of uint8 images; in training it stops at a loss that is not finite."""
        self.report_unreadable(inputs["unreadable"])
        pixel_values = self.normalize(inputs["pixel_values"])
        plan = inputs["plan"] if model.training else self.evaluation_plan
        outputs = model(pixel_values=pixel_values, plan=plan)
        if model.training:
            self.check_finite(outputs.loss)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of an evaluation batch; predictions are not kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluate(self, *args, **kwargs):
        """Evaluates on the fixed mask, then draws what the model reconstructs."""
        metrics = super().evaluate(*args, **kwargs)
        self.last_picture = self.save_reconstructions()
        return metrics

    def save_reconstructions(self) -> str | None:
        """Writes a picture of originals, masked inputs and reconstructions, and sends it to TensorBoard.

        Returns:
            Name of the PNG file; None where there is nothing to draw, or on other processes than the first.
        """
        if self.eval_dataset is None or self.args.num_pictures == 0:
            return None
        samples = list(itertools.islice(self.eval_dataset, self.args.num_pictures))
        pixel_values = self.normalize(collate(samples)["pixel_values"].to(self.args.device))
        # Every process takes part: a sharded model computes on all of them.
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.model(pixel_values=pixel_values, plan=self.evaluation_plan)
        if not self.is_world_process_zero():
            return None
        model = self.accelerator.unwrap_model(self.model)
        masked, reconstruction = reconstruct(model, pixel_values, outputs.logits, outputs.mask)
        mean, std = self.image_mean.flatten().tolist(), self.image_std.flatten().tolist()
        picture = picture_grid([pixel_values, masked, reconstruction], mean, std)
        path = os.path.join(self.args.output_dir, "reconstructions", f"step-{self.state.global_step:06d}.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        picture.save(path)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = np.asarray(picture.convert("RGB"))
                callback.tb_writer.add_image("reconstructions", pixels, self.state.global_step, dataformats="HWC")
        return path

    def create_model_card(self, **kwargs) -> None:
        """Writes README.md with its pictures; called by `push_to_hub` too."""
        if self.facts is not None and self.is_world_process_zero():
            write_model_card(self, self.facts)
