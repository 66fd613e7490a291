# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for images: derived randomness, exact resumption, normalisation on the device, a halt at broken losses."""

import json
import shutil
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from ..compat import CheckpointTrainer
from ..data.image_dataset import EpochShuffle, collate, collate_and_report
from ..data.scaling import scaling_of
from ..data.streams import ImageStream
from ..optimization import no_decay_parameters, parameter_groups
from ..randomness import MODEL, derived_seed
from .card import RunFacts
from .checkpoints import (
    checkpoint_folder,
    explained_if_full,
    last_checkpoint,
    publish,
    remove_unfinished,
    rotate,
    saved_weights,
    unfinished,
)
from .energy import CO2, IMAGES_PER_JOULE, KWH, EnergyCallback, images_per_joule
from .models import channels_of
from .processes import on_main_process
from .record import RECORD, check_same_model, check_same_run, record_of


logger = logging.get_logger(__name__)

# A step that no run reaches.
NEVER = 2**62


def keep_single_precision(plugin: FullyShardedDataParallelPlugin) -> None:
    """Makes FSDP2 sum gradients in single precision and return losses as they are; accelerate's bf16 rounds both.

    Raises:
        `ValueError`: for FSDP1, whose flat parameters leave no part of a model to look at while it trains.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version` is {plugin.fsdp_version}; it must be 2, as in examples/accelerate/fsdp.yaml: version 1"
            " keeps no layer that monitors and rates by layer could find."
        )
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


class NonFiniteLossError(RuntimeError):
    """The loss is not a finite number; on a CPU the weights were not touched by it (see `check_finite`)."""


class _EpochCallback(TrainerCallback):
    """Tells the sampler the epoch: accelerate does not reach it in a resumed run of several processes."""

    sampler: EpochShuffle | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


# How often a run logs where it is not told.
LOGS, SECONDS_BETWEEN_LOGS = 20, 10


def logging_interval(max_steps: int, seconds_per_step: float | None = None) -> int:
    """Steps from one log to the next: `LOGS` a run, more where they would be over `SECONDS_BETWEEN_LOGS` apart."""
    interval = max_steps // LOGS
    if seconds_per_step:
        interval = min(interval, round(SECONDS_BETWEEN_LOGS / seconds_per_step))
    return max(1, interval)


class _LoggingCallback(TrainerCallback):
    """Decides when to log where the arguments leave it open, the same in all processes."""

    # Steps after which time is taken for the first time.
    FIRST_LOOK = 5

    def on_train_begin(self, args, state, control, **kwargs):
        self.interval = logging_interval(state.max_steps)
        self.since, self.start, self.has_looked = state.global_step, time.perf_counter(), False

    def on_step_end(self, args, state, control, **kwargs):
        steps = state.global_step - self.since
        is_first = args.logging_first_step and state.global_step == 1
        control.should_log = is_first or steps >= self.interval or state.global_step >= state.max_steps
        if control.should_log or (steps == self.FIRST_LOOK and not self.has_looked):
            seconds = on_main_process(args, lambda: (time.perf_counter() - self.start) / steps)
            self.interval, self.has_looked = logging_interval(state.max_steps, seconds), True
        if control.should_log:
            self.since, self.start = state.global_step, time.perf_counter()


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

    def steps_and_seconds(self) -> tuple[int, float]:
        """Since it was last asked."""
        measured = self.steps, self.seconds
        self.steps, self.seconds = 0, 0.0
        return measured


class ImageTrainer(CheckpointTrainer):
    """Trains on images that are normalised on the device.

    What is drawn on the device comes from (seed, step, micro-batch, process), and order and augmentation in the
    workers from (seed, epoch, sample): a run that was killed and resumed goes on exactly as if it had not been.

    Args:
        image_processor: images are scaled as it does (`scaling_of`); it is saved beside the model.
        facts: what the model card tells of the run; None = no card.
        kwargs: those of `Trainer`.

    Raises:
        `ValueError`: for `auto_find_batch_size`, since learning rate and order of images follow from the batch.
    """

    def __init__(self, *args, image_processor, facts: RunFacts | None = None, **kwargs):
        self.facts = facts
        # Of streams one process reads for all in evaluation.
        is_read_for_all = isinstance(kwargs.get("eval_dataset"), ImageStream)
        super().__init__(
            *args,
            data_collator=collate_and_report if is_read_for_all else collate,
            processing_class=image_processor,
            **kwargs,
        )
        if self.args.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` is set, but the learning rate and the order of images follow from the batch:"
                " use `auto_batch_size`, which chooses a micro-batch beforehand and keeps the total batch."
            )
        channels = channels_of(self.model.config)
        # On the device once, not in every step.
        self.scaling = scaling_of(image_processor, channels).to(self.args.device)
        self.image_mean, self.image_std = self.scaling.mean, self.scaling.std
        self.train_collator = collate
        self.unreadable: set[str] = set()
        self.throughput = _ThroughputCallback()
        self.add_callback(self.throughput)
        self.epochs = _EpochCallback()
        self.add_callback(self.epochs)
        if self.args.chooses_logging_steps and self.args.logging_strategy == "steps":
            self.add_callback(_LoggingCallback())
        self.energy_of_run: dict[str, float] | None = None
        self.energy = EnergyCallback(self.args.country_iso_code) if self.args.track_energy else None
        if self.energy is not None:
            self.add_callback(self.energy)
        self._micro_batch_of_step = (-1, 0)
        self.waits_to_check = self.args.device.type != "cpu"
        self.broken_step = torch.full((), NEVER, device=self.args.device)

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator; see `keep_single_precision`."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            keep_single_precision(self.accelerator.state.fsdp_plugin)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains; with `track_energy` the results tell kWh, kg of CO2-equivalent and images per joule.

        Args:
            resume_from_checkpoint: a checkpoint of the run that goes on; True = its newest whole one.
            kwargs: those of `Trainer.train`.

        Raises:
            `ValueError`: for a run without a step, and for a checkpoint of another run (see `allow_changes`).
            `NonFiniteLossError`: see `check_finite`.
            `DiskFullError`: when there is no space for a checkpoint.
        """
        self._check_length()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = on_main_process(self.args, lambda: last_checkpoint(self.args.output_dir))
        if resume_from_checkpoint:
            on_main_process(self.args, lambda: check_same_run(resume_from_checkpoint, self))
        if self.args.should_save:
            remove_unfinished(self.args.output_dir)
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.energy is not None:
            self.energy_of_run = self.measured_energy()
            output.metrics.update(self.energy_of_run)
        return output

    def _check_length(self) -> None:
        if self.args.max_steps <= 0 and self.args.num_train_epochs <= 0:
            raise ValueError(
                f"`num_train_epochs` is {self.args.num_train_epochs}: not a single step would be trained."
            )

    def load_checkpoint(self, folder: str) -> None:
        """Gives the model the weights of a checkpoint, and the trainer its state, to evaluate it.

        Raises:
            `ValueError`: when it is the checkpoint of a model of another configuration.
        """
        on_main_process(self.args, lambda: check_same_model(folder, self))
        self.model.load_state_dict(dict(saved_weights(folder, "model*")))
        self.load_state(folder)

    def load_state(self, folder: str) -> None:
        """Gives the trainer the state of a checkpoint, so that results tell the epoch that they belong to."""
        self.state = TrainerState.load_from_json(str(Path(folder, "trainer_state.json")))

    def measured_energy(self) -> dict[str, float]:
        """Energy, emissions and images per joule of the run so far, over all machines; every process takes part."""
        measured = [self.energy.of_this_machine()]
        if self.args.world_size > 1:
            measured = gather_object(measured)
        totals = {name: self.energy.before[name] + sum(part[name] for part in measured) for name in (KWH, CO2)}
        images = (self.state.global_step - self.energy.first_step) * self.args.total_batch_size
        return {**totals, IMAGES_PER_JOULE: images_per_joule(self.energy.images_before + images, totals[KWH])}

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Batches of `train_collator`, on the device; those of a stream come from this process's part of it.

        Raises:
            `ValueError`: when there are not enough images for a batch and only whole ones are trained on.
        """
        args, dataset = self.args, self.train_dataset
        is_stream = isinstance(dataset, ImageStream)
        loader = torch.utils.data.DataLoader(
            dataset,
            args.train_batch_size,
            sampler=None if is_stream else self._training_order(len(dataset)),
            collate_fn=self.train_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            drop_last=args.dataloader_drop_last,
        )
        if is_stream:
            # By itself accelerate would read the whole stream in every process, or in the first one for all.
            return prepare_data_loader(
                loader,
                args.device,
                num_processes=1,
                process_index=0,
                put_on_device=True,
                dispatch_batches=False,
                non_blocking=self.accelerator.dataloader_config.non_blocking,
            )
        loader = self.accelerator.prepare(loader)
        if len(loader) == 0:
            raise ValueError(
                f"`per_device_train_batch_size` is {args.per_device_train_batch_size}, which makes batches of"
                f" {args.train_batch_size * args.world_size} images over all processes, but there are {len(dataset)}"
                " training images, and only whole batches are trained on (`dataloader_drop_last`, `torch_compile`, or"
                " a classifier)."
            )
        return loader

    def _training_order(self, length: int) -> EpochShuffle:
        self.epochs.sampler = self.build_sampler(length)
        return self.epochs.sampler

    def build_sampler(self, length: int) -> EpochShuffle:
        """Order of the training images of a data set of a length."""
        return EpochShuffle(length, self.args.seed)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Names of the parameters that are decayed."""
        kept = no_decay_parameters(model)
        return [name for name, _ in model.named_parameters() if name not in kept]

    def create_optimizer(self, model=None):
        """The arguments' optimizer, with a learning rate for each layer where `layer_decay` is not 1."""
        if self.optimizer is None and self.args.layer_decay != 1:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self.groups_by_layer(model), **options)
        return super().create_optimizer(model)

    def groups_by_layer(self, model=None) -> list[dict]:
        """Groups of parameters as the arguments ask for; see `parameter_groups`."""
        args = self.args
        model = self.model if model is None else model
        return parameter_groups(model, args.learning_rate, args.weight_decay, args.layer_decay)

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images of the data loader -> float images as the image processor makes them, on their device."""
        return self.scaling(self.scaling.unit(pixel_values))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A micro-batch, with every random draw on the device derived from where the run stands."""
        step, micro_batch = self._micro_batch_of_step
        micro_batch = micro_batch + 1 if step == self.state.global_step else 0
        self._micro_batch_of_step = (self.state.global_step, micro_batch)
        torch.manual_seed(derived_seed(self.args.seed, MODEL, *self.step_key()))
        return super().training_step(model, inputs, num_items_in_batch)

    def step_key(self) -> tuple[int, int, int]:
        """Where the run stands: step, micro-batch and process."""
        return (*self._micro_batch_of_step, self.args.process_index)

    def check_finite(self, loss: torch.Tensor) -> None:
        """Stops training at a loss that is not a finite number in any process, if the arguments say so.

        On a CPU at once. On other devices, where looking would mean waiting in every step, the first broken step is
        kept on the device until the next log or checkpoint; no checkpoint is written after it.

        Raises:
            `NonFiniteLossError`: in all processes, naming the step and the last good checkpoint.
        """
        if not self.args.stop_on_nonfinite_loss:
            return
        step = torch.full((), self.state.global_step + 1, device=loss.device)
        broken = torch.where(torch.isfinite(loss.detach()), NEVER, step)
        self.broken_step = torch.minimum(self.broken_step.to(broken.device), broken)
        if not self.waits_to_check:
            self.stop_if_broken()

    def stop_if_broken(self) -> None:
        """Looks whether a loss so far was broken in any process; every process takes part. See `check_finite`."""
        if not self.args.stop_on_nonfinite_loss:
            return
        step = self._first_of_all(self.broken_step)
        if step != NEVER:
            self._stop(f"The loss is not a finite number at step {step}.")

    def _stop_at_broken_weights(self) -> None:
        # They may break in the very step that is saved, before a loss can tell.
        if not self.args.stop_on_nonfinite_loss:
            return
        # Of a model in parts each process looks at its own.
        weights = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in self.model.parameters())
        finite = torch.stack([weight.detach().isfinite().all() for weight in weights]).all()
        step = torch.where(finite, NEVER, self.state.global_step)
        if self._first_of_all(step) != NEVER:
            self._stop(f"The weights are not finite numbers after step {self.state.global_step}.")

    def _first_of_all(self, step: torch.Tensor) -> int:
        """The least value among all processes."""
        if self.args.world_size > 1:
            step = step.clone()
            torch.distributed.all_reduce(step, torch.distributed.ReduceOp.MIN)
        return int(step)

    def _stop(self, reason: str) -> None:
        last = on_main_process(self.args, lambda: last_checkpoint(self.args.output_dir))
        raise NonFiniteLossError(
            f"{reason} Last good checkpoint: {last or 'none was saved yet'}. A lower base_learning_rate or a longer"
            " warm-up helps; --stop_on_nonfinite_loss false goes on regardless."
        )

    def save_checkpoint(self) -> None:
        """Writes a checkpoint aside, gives it its name when it is whole, then deletes those that are too many.

        Raises:
            `NonFiniteLossError`: instead of saving a run that is broken.
            `DiskFullError`: when there is no space for it; the checkpoints before it are as they were.
        """
        self.stop_if_broken()
        self._stop_at_broken_weights()
        if self.energy is not None:
            self.log(self.measured_energy())  # a run that is resumed here counts on from it
        args, state = self.args, self.state
        folder = checkpoint_folder(args.output_dir, state.global_step)
        if best := state.best_global_step:
            best_folder = checkpoint_folder(args.output_dir, best)
            if best == state.global_step or best_folder.exists():
                state.best_model_checkpoint = str(best_folder)
        with self._aside(folder) as aside:
            self.write_checkpoint(str(aside))
            if args.should_save:
                Path(aside, RECORD).write_text(json.dumps(record_of(self), indent=1))
            self.accelerator.wait_for_everyone()
            if args.should_save:
                publish(folder)
        self.accelerator.wait_for_everyone()
        if args.push_to_hub:
            self.push_checkpoint(str(folder))
        if args.should_save:
            rotate(args.output_dir, args.save_total_limit, state.global_step, state.best_model_checkpoint)

    @contextmanager
    def _aside(self, folder: Path):
        """An empty place to write a checkpoint to; nothing is left there when that fails."""
        aside = unfinished(folder)
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with explained_if_full(folder.name, self.args.output_dir):
            try:
                yield aside
            except Exception:
                shutil.rmtree(aside, ignore_errors=True)
                raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole model, also where checkpoints hold it in parts.

        Raises:
            `DiskFullError`: when there is no space for it.
        """
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        is_explained = nullcontext() if _internal_call else explained_if_full("the model", self.args.output_dir)
        with is_explained:
            super().save_model(output_dir, _internal_call)

    def shares_of(self, steps: int, seconds: float) -> dict[str, float]:
        """What took which share of the seconds that so many steps of training took; for subclasses."""
        return {}

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
            steps, seconds = self.throughput.steps_and_seconds()
            if seconds:
                logs["images_per_second"] = round(steps / seconds * self.args.total_batch_size, 1)
                logs.update(self.shares_of(steps, seconds))
            if self.energy is not None:
                logs.update(self.measured_energy())
        if self.args.world_size > 1:
            self.unreadable = set(gather_object(sorted(self.unreadable)))
        if self.unreadable:
            logs["unreadable_images"] = len(self.unreadable)
        super().log(logs, start_time)
