# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for masked image modeling, with monitors of features and pictures of reconstructions."""

import itertools
import os
import time

import numpy as np
import torch
from transformers.integrations import TensorBoardCallback

from modeling_greenmim.masking import sample_noise

from ..data.image_dataset import EpochShuffle, ImageDataset, collate
from ..randomness import MASK, derived_torch_generator
from ..runs.card import write_model_card
from ..runs.processes import on_main_process
from ..runs.trainer import ImageTrainer
from .advice import Advice
from .collator import MaskedCollator, plan_from_noise
from .monitors import check_metric, measure
from .monitors.features import FeatureReader
from .pictures import picture_grid, reconstruct


class MIMTrainer(ImageTrainer):
    """Trains `GreenMIMForPreTraining`; masks are derived from (seed, sample key) in the loader's workers.

    Args:
        probe_dataset: images whose features evaluations look at, labelled ones; None = those of the evaluation.
        args, kwargs: those of `ImageTrainer`.

    Raises:
        `ValueError`: where one process sees several GPUs, which `Trainer` would give parts of a batch and whole plans,
            and for a `metric_for_best_model` that needs labels where there are none.
    """

    def __init__(self, *args, probe_dataset: ImageDataset | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        check_metric(self.args.metric_for_best_model, has_labels=probe_dataset is not None)
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
        monitored = self.eval_dataset if probe_dataset is None else probe_dataset
        self.feature_reader = None if monitored is None else FeatureReader(monitored)
        self.advice = Advice(self)
        self.add_callback(self.advice)

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

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As `Trainer`'s, with what the monitors measure and the seconds that they took (`eval_monitors_runtime`)."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self.measure_features() if self.feature_reader is not None else {}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def measure_features(self) -> dict[str, float]:
        """What the monitors find in the features of the model as it is; every process takes part."""
        start = time.perf_counter()
        features = self.feature_reader.read(self)
        found = on_main_process(self.args, lambda: measure(features))
        self.advice.look_at(self.feature_reader.first_images)
        return {**found, "monitors_runtime": round(time.perf_counter() - start, 4)}

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
