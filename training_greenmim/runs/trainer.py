# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for images: derived randomness, exact resumption, normalisation on the device, a halt at broken losses."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..data.image_dataset import EpochShuffle, ImageDataset, collate, collate_and_report
from ..data.scaling import scaling_of
from ..data.streams import ImageStream
from ..optimization import no_decay_parameters
from ..randomness import MODEL, derived_seed
from .card import RunFacts
from .checkpoints import last_checkpoint
from .energy import CO2, IMAGES_PER_JOULE, KWH, EnergyCallback, images_per_joule


logger = logging.get_logger(__name__)

# A step that no run reaches.
NEVER = 2**62


def keep_single_precision(plugin: FullyShardedDataParallelPlugin) -> None:
    """Makes FSDP2 sum gradients in single precision and return losses as they are; accelerate's bf16 rounds both."""
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


class NonFiniteLossError(RuntimeError):
    """The loss is not a finite number; on a CPU the weights were not touched by it (see `check_finite`)."""


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
        image_processor: images are scaled as it does (`scaling_of`); it is saved beside the model.
        facts: what the model card tells of the run; None = no card.
        kwargs: those of `Trainer`.
    """

    def __init__(self, *args, image_processor, facts: RunFacts | None = None, **kwargs):
        self.facts = facts
        super().__init__(*args, data_collator=collate, processing_class=image_processor, **kwargs)
        channels = getattr(self.model.config, "num_channels", 3)
        # On the device once, not in every step.
        self.scaling = scaling_of(image_processor, channels).to(self.args.device)
        self.image_mean, self.image_std = self.scaling.mean, self.scaling.std
        self.train_collator = collate
        self.unreadable: set[str] = set()
        self.throughput = _ThroughputCallback()
        self.add_callback(self.throughput)
        self.energy_of_run: dict[str, float] | None = None
        self.energy = EnergyCallback(self.args.country_iso_code) if self.args.track_energy else None
        if self.energy is not None:
            self.add_callback(self.energy)
        self._micro_batch_of_step = (-1, 0)
        self.waits_to_check = self.args.device.type != "cpu"
        self.broken_step = torch.full((), NEVER)

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator; see `keep_single_precision`."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            keep_single_precision(self.accelerator.state.fsdp_plugin)

    def train(self, *args, **kwargs):
        """Trains; with `track_energy` the results tell kWh, kg of CO2-equivalent and images per joule."""
        output = super().train(*args, **kwargs)
        if self.energy is not None:
            self.energy_of_run = self.measured_energy()
            output.metrics.update(self.energy_of_run)
        return output

    def measured_energy(self) -> dict[str, float]:
        """Energy, emissions and images per joule of the run so far, over all machines; every process takes part."""
        measured = [self.energy.of_this_machine()]
        if self.args.world_size > 1:
            measured = gather_object(measured)
        totals = {name: self.energy.before[name] + sum(part[name] for part in measured) for name in (KWH, CO2)}
        images = (self.state.global_step - self.energy.first_step) * self.args.total_batch_size
        return {**totals, IMAGES_PER_JOULE: images_per_joule(self.energy.images_before + images, totals[KWH])}

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Batches of `train_collator`; those of a stream come from the part of it that is this process's."""
        if isinstance(self.train_dataset, ImageStream):
            # Not prepared by accelerate, which would read the whole stream in every process.
            return torch.utils.data.DataLoader(
                self.train_dataset,
                self.args.train_batch_size,
                collate_fn=self.train_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                persistent_workers=self.args.dataloader_persistent_workers,
                prefetch_factor=self.args.dataloader_prefetch_factor,
                drop_last=self.args.dataloader_drop_last,
            )
        with self._collating_by(self.train_collator):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None) -> torch.utils.data.DataLoader:
        """Batches for evaluation; of a stream the first process reads them for all."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        handed_on = isinstance(dataset, ImageStream) and self.args.world_size > 1
        with self._collating_by(collate_and_report if handed_on else self.data_collator):
            return super().get_eval_dataloader(eval_dataset)

    @contextmanager
    def _collating_by(self, collator: Callable[[list[dict]], dict]):
        self.data_collator, usual = collator, self.data_collator
        try:
            yield
        finally:
            self.data_collator = usual

    def _prepare_input(self, data):
        """Moves tensors, and what moves itself, such as plans, without waiting where they are pinned."""
        if hasattr(data, "to"):
            return data.to(self.args.device, non_blocking=self.args.dataloader_pin_memory)
        return super()._prepare_input(data)

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
        """uint8 images -> float images as the image processor makes them, on their device."""
        return self.scaling(pixel_values / 255)

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

        On a CPU at once. On other devices, where looking would mean waiting in every step, the first broken step is
        kept on the device until the next log or checkpoint; no checkpoint is written after it.

        Raises:
            `NonFiniteLossError`: naming the step and the last good checkpoint.
        """
        if not self.args.stop_on_nonfinite_loss:
            return
        step = torch.full((), self.state.global_step + 1, device=loss.device)
        broken = torch.where(torch.isfinite(loss.detach()), NEVER, step)
        self.broken_step = torch.minimum(self.broken_step.to(broken.device), broken)
        if not self.waits_to_check:
            self.stop_if_broken()

    def stop_if_broken(self) -> None:
        """Looks whether a loss so far was broken; see `check_finite`."""
        step = self.broken_step.item()
        if step == NEVER:
            return
        last = last_checkpoint(self.args.output_dir)
        raise NonFiniteLossError(
            f"The loss is not a finite number at step {step}. Last good checkpoint:"
            f" {last or 'none was saved yet'}. A lower base_learning_rate or a longer warm-up helps;"
            " --stop_on_nonfinite_loss false goes on regardless."
        )

    def _save_checkpoint(self, *args, **kwargs):
        self.stop_if_broken()
        if self.energy is not None:
            self.log(self.measured_energy())  # a run that is resumed here counts on from it
        super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole model, also where checkpoints hold it in parts."""
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)

    def report_unreadable(self, messages: list[str]) -> None:
        """Logs each unreadable image once and counts it."""
        for message in messages:
            if message not in self.unreadable:
                self.unreadable.add(message)
                logger.warning(f"Skipped an unreadable image ({len(self.unreadable)} so far): {message}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds images per second of training and the number of unreadable images."""
        self.stop_if_broken()
        if "loss" in logs:
            rate = self.throughput.steps_per_second()
            if rate is not None:
                logs["images_per_second"] = round(rate * self.args.total_batch_size, 1)
            if self.energy is not None:
                logs.update(self.measured_energy())
        if self.args.world_size > 1:
            self.unreadable = set(gather_object(sorted(self.unreadable)))
        if self.unreadable:
            logs["unreadable_images"] = len(self.unreadable)
        super().log(logs, start_time)
