# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for masked image modeling, with monitors of features and pictures of reconstructions."""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sized
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset
from transformers.integrations import TensorBoardCallback

from modeling_greenmim import GreenMIMConfig, MaskPlan
from modeling_greenmim.planning import plan_dense

from ..data.image_dataset import EpochShuffle, ImageDataset, collate
from ..randomness import MASK, derived_torch_generator
from ..runs.arguments import MIMTrainingArguments
from ..runs.card import write_model_card
from ..runs.memory import LossOfBatch
from ..runs.processes import on_main_process
from ..runs.trainer import ImageTrainer
from .advice import Advice
from .collator import MaskedCollator, draw_plan, plan_by_saliency
from .masks import ATTENTIVE
from .monitors import check_metric, measure
from .monitors.features import FeatureReader
from .pictures import drawn_channels, picture_grid, reconstruct
from .teacher import Stopwatch, Teacher, TeacherTargets, resized


# Images that the mean of a teacher's features is taken from.
MEAN_OF = 512


def loss_of_batch(config: GreenMIMConfig, args: MIMTrainingArguments) -> LossOfBatch:
    """The loss of pre-training, to estimate its memory by; see `LossOfBatch`."""
    size, num_units = config.image_height_and_width, config.unit_grid[0] * config.unit_grid[1]
    strategy = "random" if args.mask_strategy == ATTENTIVE else args.mask_strategy

    def with_plan(batch: int, device: torch.device) -> Callable[[nn.Module], torch.Tensor]:
        masks = range(batch if args.mask_per_sample else 1)
        generators = [derived_torch_generator(args.seed, MASK, index) for index in masks]
        plan = draw_plan(config, generators, strategy, args.torch_compile)
        if plan is None:
            plan_dense(config, size, device)  # made here, where tensors have values, and found there
        else:
            plan = plan.to(device)

        def loss_of(model: nn.Module) -> torch.Tensor:
            images = torch.rand(batch, config.num_channels, *size, device=device)
            targets = None
            if config.reconstruction_target == "features":
                targets = torch.rand(batch, num_units, config.target_width, device=device)
            return model(pixel_values=images, plan=plan, targets=targets).loss

        return loss_of

    return with_plan


class MIMTrainer(ImageTrainer):
    """Trains `GreenMIMForPreTraining`; masks are derived from (seed, sample key) in the loader's workers.

    Args:
        teacher: whose features are predicted; None for other targets.
        probe_dataset: images whose features evaluations look at, labelled ones; None = those of the evaluation.
        args, kwargs: those of `ImageTrainer`.

    Raises:
        `ValueError`: where one process sees several GPUs, which `Trainer` would give parts of a batch and whole plans;
            where the model predicts features and there is no teacher, one of other features or on another device; and
            for a `metric_for_best_model` that needs labels where there are none.
    """

    def __init__(self, *args, teacher: Teacher | None = None, probe_dataset: ImageDataset | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        drawn_channels(self.args.picture_channels, self.model.config.num_channels)
        check_metric(self.args.metric_for_best_model, has_labels=probe_dataset is not None)
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
        # Every evaluation uses one mask, drawn as those of training are, but for those that a teacher has a say in.
        generator = derived_torch_generator(self.args.seed, MASK)
        self.evaluation_plan = draw_plan(config, [generator], "random" if strategy == ATTENTIVE else strategy)
        if self.evaluation_plan is not None:
            self.evaluation_plan = self.evaluation_plan.to(self.args.device)
        self.teacher, self.teacher_time = teacher, Stopwatch(self.args.device)
        self._check_teacher()
        self.teacher_targets: TeacherTargets | None = None
        monitored = self.eval_dataset if probe_dataset is None else probe_dataset
        self.feature_reader = None if monitored is None else FeatureReader(monitored)
        self.advice = Advice(self)
        self.add_callback(self.advice)

    def _check_teacher(self):
        config, teacher = self.model.config, self.teacher
        if teacher is None and self.args.mask_strategy == ATTENTIVE:
            raise ValueError(f"`mask_strategy` is {ATTENTIVE!r}, but there is no `teacher` that could attend.")
        if (teacher is not None) != (config.reconstruction_target == "features"):
            needed = "features, so a `teacher` is needed" if teacher is None else "no features of a `teacher`"
            raise ValueError(
                f"`reconstruction_target` is {config.reconstruction_target!r}: the model predicts {needed}."
            )
        if teacher is None:
            return
        if teacher.width != config.target_width:
            raise ValueError(
                f"`teacher` is {teacher.facts.name!r}, with features of width {teacher.width}, but the model predicts"
                f" {config.target_width} values (`target_width`)."
            )
        if teacher.device.type != self.args.device.type:
            raise ValueError(
                f"`teacher` is on {teacher.device.type!r}, but training is on {self.args.device.type!r}; load it with"
                f" device={str(self.args.device)!r}."
            )

    def build_sampler(self, length: int) -> EpochShuffle:
        """Order of the training images; in whole batches for a compiled step, which has one size."""
        batch = self.args.train_batch_size * self.args.world_size if self.args.torch_compile else 1
        return EpochShuffle(length, self.args.seed, multiple_of=batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch of images; in training it stops at a loss that is not finite."""
        self.report_unreadable(inputs["unreadable"])
        pixel_values = self.normalize(inputs["pixel_values"])
        features = None if self.teacher is None else self.features_of(inputs)
        targets = None if features is None else self.teacher_targets(features)
        plan = self.plan_of(inputs, features) if model.training else self.evaluation_plan
        options = {} if targets is not None else self.valid_pixels(inputs["pixel_values"])
        outputs = model(pixel_values=pixel_values, plan=plan, targets=targets, **options)
        if model.training:
            self.check_finite(outputs.loss)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def valid_pixels(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Which pixels of images are data, where some may not be, as an argument of the model."""
        if images.dtype == torch.uint8 or self.model.config.reconstruction_target != "pixels":
            return {}
        return {"valid_pixels": ~images.isnan()}

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images, which may be larger for a teacher -> float images as the model takes them."""
        return super().normalize(resized(pixel_values, self.model.config.image_height_and_width))

    def features_of(self, inputs: dict) -> torch.Tensor:
        """The teacher's features of a batch, `(batch, rows, columns, width)`: those that it brings, or new ones."""
        if self.teacher_targets is None:
            self.teacher_targets = self.build_teacher_targets()
        if "features" in inputs:
            return inputs["features"]
        with self.teacher_time if self.model.training else nullcontext():
            return self.teacher.features(inputs["pixel_values"])

    def plan_of(self, inputs: dict, features: torch.Tensor | None) -> MaskPlan | None:
        """The plan of a batch; of masks that a teacher has a say in, and that lacked its features, it is made here."""
        if "mask_noise" not in inputs:
            return inputs["plan"]
        config, noise = self.model.config, inputs["mask_noise"].cpu()
        return plan_by_saliency(config, features, noise, self.args.torch_compile).to(self.args.device)

    def build_teacher_targets(self) -> TeacherTargets:
        """Targets of the configured loss; the mean that cosines are taken from is kept in the output folder."""
        config = self.model.config
        if config.target_loss != "cosine":
            return TeacherTargets(config.unit_grid, None)
        mean = torch.tensor(on_main_process(self.args, self._mean_of_features))
        return TeacherTargets(config.unit_grid, mean.to(self.args.device))

    def _mean_of_features(self) -> list[float]:
        """Mean of the teacher's features; that of a run that goes on, or is evaluated, lies in its output folder."""
        path, is_new = Path(self.args.output_dir, "teacher_mean.json"), self.state.global_step == 0
        if path.exists() and not (is_new and self.train_dataset is not None):
            return json.loads(path.read_text())
        dataset = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        # Folders are sorted: images from all over the data set stand for it.
        if isinstance(dataset, Sized):
            dataset = Subset(dataset, range(0, len(dataset), math.ceil(len(dataset) / MEAN_OF)))
        total, count = torch.zeros(self.teacher.width, dtype=torch.float64), 0
        samples = itertools.islice(iter(dataset), MEAN_OF)
        while batch := list(itertools.islice(samples, self.args.per_device_eval_batch_size)):
            batch = collate(batch)
            features = batch.get("features")
            if features is None:
                features = self.teacher.features(batch["pixel_values"].to(self.args.device))
            total, count = total + features.double().cpu().mean(dim=(1, 2)).sum(dim=0), count + len(features)
        mean = (total / count).tolist()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mean))
        return mean

    def shares_of(self, steps: int, seconds: float) -> dict[str, float]:
        """The teacher's share of the time of training."""
        if self.teacher is None:
            return {}
        of_step = self.teacher_time.mean_seconds() * self.args.gradient_accumulation_steps
        return {"teacher_share": round(of_step * steps / seconds, 3)}

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
        picture = picture_grid([pixel_values, masked, reconstruction], mean, std, self.args.picture_channels)
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
