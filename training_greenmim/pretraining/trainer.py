# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for masked image modeling, with pictures of reconstructions."""

import itertools
import os

import numpy as np
import torch
from transformers.integrations import TensorBoardCallback

from ..data.image_dataset import EpochShuffle, collate
from ..randomness import MASK, derived_torch_generator
from ..runs.card import write_model_card
from ..runs.trainer import ImageTrainer
from .collator import MaskedCollator, draw_plan
from .pictures import picture_grid, reconstruct


class MIMTrainer(ImageTrainer):
    """Trains `GreenMIMForPreTraining`; masks are derived from (seed, sample key) in the loader's workers.

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
        config, strategy = self.model.config, self.args.mask_strategy
        self.train_collator = MaskedCollator(
            config, self.args.seed, self.args.mask_per_sample, self.args.torch_compile, strategy
        )
        # Every evaluation uses one mask, drawn as those of training are.
        generator = derived_torch_generator(self.args.seed, MASK)
        self.evaluation_plan = draw_plan(config, [generator], strategy).to(self.args.device)

    def build_sampler(self, length: int) -> EpochShuffle:
        """Order of the training images; in whole batches for a compiled step, which has one size."""
        batch = self.args.train_batch_size * self.args.world_size if self.args.torch_compile else 1
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
        inputs = self.on_device(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluate(self, *args, **kwargs):
        """Evaluates on the fixed mask, then draws what the model reconstructs, if it reconstructs pixels."""
        metrics = super().evaluate(*args, **kwargs)
        self.last_picture = self.save_reconstructions()
        return metrics

    def save_reconstructions(self) -> str | None:
        """Writes a picture of originals, masked inputs and reconstructions, and sends it to TensorBoard.

        Returns:
            Name of the PNG file; None where there is nothing to draw, as with targets that cannot be turned into
            pixels, or on other processes than the first.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self.eval_dataset is None or self.args.num_pictures == 0 or model.target.to_pixels is None:
            return None
        samples = list(itertools.islice(self.eval_dataset, self.args.num_pictures))
        pixel_values = self.normalize(collate(samples)["pixel_values"].to(self.args.device))
        # Every process takes part: a sharded model computes on all of them.
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.model(pixel_values=pixel_values, plan=self.evaluation_plan)
        if not self.is_world_process_zero():
            return None
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
