# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for images: derived randomness, exact resumption, normalisation on the device, a halt at broken losses."""

import time

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .checkpoints import last_checkpoint
from .data import EpochShuffle, ImageDataset, collate
from .model_card import RunFacts
from .optimization import no_decay_parameters
from .randomness import MODEL, derived_seed


logger = logging.get_logger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss is not a finite number; the weights were not touched by it."""


class _EpochCallback(TrainerCallback):
    """Tells the sampler the epoch: accelerate does not reach it in a resumed run of several processes."""

    def __init__(self, sampler: EpochShuffle):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class _ThroughputCallback(TrainerCallback):
    """Measures seconds and steps of training, leaving out evaluation and saving."""

    def __init__(self):
        self.steps, self.seconds, self.last = 0, 0.0, None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.last is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + now - self.last
        self.last = now

    def on_evaluate(self, args, state, control, **kwargs):
        self.last = None

    def on_save(self, args, state, control, **kwargs):
        self.last = None

    def steps_per_second(self) -> float | None:
        """Since it was last asked."""
        rate = self.steps / self.seconds if self.seconds else None
        self.steps, self.seconds = 0, 0.0
        return rate


class ImageTrainer(Trainer):
    """Trains on uint8 images that are normalised on the device.

    What is drawn on the device comes from (seed, step, micro-batch, process), and order and augmentation in the
    workers from (seed, epoch, sample): a run that was killed and resumed goes on exactly as if it had not been.

    Args:
        image_processor: its mean and standard deviation normalise images; it is saved beside the model.
        facts: what the model card tells of the run; None = no card.
        kwargs: those of `Trainer`.
    """

    def __init__(self, *args, image_processor, facts: RunFacts | None = None, **kwargs):
        self.facts = facts
        super().__init__(*args, data_collator=collate, processing_class=image_processor, **kwargs)
        # On the device once, not in every step.
        statistics = torch.tensor([image_processor.image_mean, image_processor.image_std], device=self.args.device)
        self.image_mean, self.image_std = statistics[..., None, None]
        self.unreadable: set[str] = set()
        self.throughput = _ThroughputCallback()
        self.add_callback(self.throughput)
        self._micro_batch_of_step = (-1, 0)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, ImageDataset):
            return None
        sampler = self.build_sampler(len(dataset))
        self.add_callback(_EpochCallback(sampler))
        return sampler

    def build_sampler(self, length: int) -> EpochShuffle:
        """Order of the training images of a data set of a length."""
        return EpochShuffle(length, self.args.seed)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Names of the parameters that are decayed."""
        kept = no_decay_parameters(model)
        return [name for name, _ in model.named_parameters() if name not in kept]

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """uint8 images -> normalised float images, on their device."""
        return (pixel_values / 255 - self.image_mean) / self.image_std

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A micro-batch, with every random draw on the device derived from where the run stands."""
        step, micro_batch = self._micro_batch_of_step
        micro_batch = micro_batch + 1 if step == self.state.global_step else 0
        self._micro_batch_of_step = (self.state.global_step, micro_batch)
        torch.manual_seed(derived_seed(self.args.seed, MODEL, *self.place()))
        return super().training_step(model, inputs, num_items_in_batch)

    def place(self) -> tuple[int, int, int]:
        """Where the run stands: step, micro-batch and process."""
        return (*self._micro_batch_of_step, self.args.process_index)

    def check_finite(self, loss: torch.Tensor) -> None:
        """Stops training at a loss that is not a finite number, if the arguments say so.

        Raises:
            `NonFiniteLossError`: naming the step and the last good checkpoint.
        """
        if not self.args.stop_on_nonfinite_loss or torch.isfinite(loss):
            return
        last = last_checkpoint(self.args.output_dir)
        raise NonFiniteLossError(
            f"The loss is {loss.item()} at step {self.state.global_step + 1}. Last good checkpoint:"
            f" {last or 'none was saved yet'}. A lower base_learning_rate or a longer warm-up helps;"
            " --stop_on_nonfinite_loss false goes on regardless."
        )

    def report_unreadable(self, messages: list[str]) -> None:
        """Logs each unreadable image once and counts it."""
        for message in messages:
            if message not in self.unreadable:
                self.unreadable.add(message)
                logger.warning(f"Skipped an unreadable image ({len(self.unreadable)} so far): {message}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds images per second of training and the number of unreadable images."""
        if "loss" in logs:
            rate = self.throughput.steps_per_second()
            if rate is not None:
                logs["images_per_second"] = round(rate * self.args.total_batch_size, 1)
        if self.args.world_size > 1:
            self.unreadable = set(gather_object(sorted(self.unreadable)))
        if self.unreadable:
            logs["unreadable_images"] = len(self.unreadable)
        super().log(logs, start_time)
