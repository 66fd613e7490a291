# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of the scripts: Transformers' own, with the defaults of GreenMIM's recipes, and how they are read."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import transformers
import yaml
from transformers import HfArgumentParser, SchedulerType, TrainingArguments

from .energy import check_country


def default_num_workers() -> int:
    """Workers of the data loader: this process's share of the usable cores, at most 8."""
    # Where the system knows no affinity, every core counts as usable.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what every recipe here shares: learning rates per batch, AdamW, workers.

    Raises:
        `ValueError`: when both learning rates are given.
    """

    # The total batch that base learning rates are for, and the default of the base learning rate.
    base_batch_size: ClassVar[int] = 256
    default_base_learning_rate: ClassVar[float] = 1.5e-4

    base_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate per 256 (classification: 512) images of the total batch."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate as it is; default: from base_learning_rate and the total batch."},
    )
    stop_on_nonfinite_loss: bool = field(
        default=True, metadata={"help": "Stop at the first loss that is not a finite number."}
    )
    allow_changes: bool = field(
        default=False,
        metadata={"help": "Resume a run with other data, seed, model or recipe than it had; it is not exact then."},
    )
    logging_steps: float | None = field(
        default=None,
        metadata={"help": "Steps from one log to the next; default: 20 logs a run, but one every 10 s in long runs."},
    )
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay, but of 1-D parameters, bias tables and tokens."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Workers of the data loader; default: the process's share of cores, up to 8."}
    )
    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Pin batches in memory; default: where there is a CUDA device."}
    )
    dataloader_persistent_workers: bool = field(default=True, metadata={"help": "Keep workers between epochs."})
    decode_once: bool = field(
        default=False,
        metadata={
            "help": "Decode images once before the first epoch: faster where decoding limits the speed, as with PNGs,"
            " and all decoded images fit on the disk."
        },
    )
    track_energy: bool = field(
        default=False,
        metadata={"help": "Measure energy and emissions of training (codecarbon, offline); needs country_iso_code."},
    )
    country_iso_code: str | None = field(
        default=None, metadata={"help": "Country whose power is used, in three letters, such as DEU."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without gradient; every step uses all of them."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave broken losses out of the log; looking waits for the device each step."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Data sets here have no unused columns."})

    def __post_init__(self):
        self.chooses_logging_steps = self.logging_steps is None
        if self.chooses_logging_steps:
            self.logging_steps = 500  # the parent's default, and that of eval_steps
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_num_workers()
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = torch.cuda.is_available()
        if self.base_learning_rate is not None and self.learning_rate is not None:
            raise ValueError(
                f"`learning_rate` is {self.learning_rate} and `base_learning_rate` is {self.base_learning_rate};"
                " only one of them can be given."
            )
        if self.track_energy:
            check_country(self.country_iso_code)
        if self.accelerator_config is None and self.dataloader_pin_memory:
            self.accelerator_config = {"non_blocking": True}
        given = self.learning_rate
        self.learning_rate = 0.0 if given is None else given  # the parent compares and needs a number
        super().__post_init__()
        if given is None:
            if self.base_learning_rate is None:
                self.base_learning_rate = self.default_base_learning_rate
            self.learning_rate = self.scaled(self.base_learning_rate)

    def set_up_logging(self) -> None:
        """Makes the first process log what a run does, and the others errors only."""
        level = logging.INFO if self.should_log else logging.ERROR
        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=level)
        transformers.utils.logging.set_verbosity(self.get_process_log_level())

    def scaled(self, learning_rate: float) -> float:
        """A learning rate that is for `base_batch_size` images -> the one for the total batch."""
        return learning_rate * self.total_batch_size / self.base_batch_size

    @property
    def total_batch_size(self) -> int:
        """Images of one optimizer step, over all processes and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


@dataclass
class MIMTrainingArguments(ImageTrainingArguments):
    """`TrainingArguments` with the defaults of GreenMIM's recipe, and what masked image modeling adds."""

    mask_per_sample: bool = field(
        default=False, metadata={"help": "Draw a mask for each image instead of one for each step and process."}
    )
    num_pictures: int = field(default=4, metadata={"help": "Images in the picture that each evaluation makes."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Linear warm-up: steps, or a share of all steps if below 1."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Maximum gradient norm; 0 = no clipping."})


@dataclass
class ClassificationTrainingArguments(ImageTrainingArguments):
    """`TrainingArguments` with the parts of fine-tuning recipes; `--recipe` sets them together.

    Raises:
        `ValueError`: for values outside their range, and for mixing within a batch of one.
    """

    base_batch_size: ClassVar[int] = 512
    default_base_learning_rate: ClassVar[float] = 1.25e-3

    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate from each layer to the one below it."}
    )
    min_learning_rate: float = field(
        default=0.0, metadata={"help": "Where the cosine ends; scaled by the batch as base_learning_rate is."}
    )
    warmup_learning_rate: float = field(
        default=0.0, metadata={"help": "Where the warm-up starts; scaled by the batch as base_learning_rate is."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Linear warm-up: steps, or a share of all steps if below 1."}
    )
    max_grad_norm: float = field(default=5.0, metadata={"help": "Maximum gradient norm; 0 = no clipping."})
    lars: bool = field(default=False, metadata={"help": "LARS instead of AdamW: for linear probes in large batches."})
    min_crop_scale: float = field(default=0.08, metadata={"help": "Smallest share of an image's area to crop."})
    crop_pct: float = field(
        default=224 / 256, metadata={"help": "Share of the shorter side that evaluation's centre crop keeps."}
    )
    rand_augment: str | None = field(
        default=None, metadata={"help": 'RandAugment in timm\'s words: "m9-n2-mstd0.5-inc1".'}
    )
    color_jitter: float = field(
        default=0.0, metadata={"help": "Strength of colour jitter; as in timm only where there is no rand_augment."}
    )
    random_erasing: float = field(default=0.0, metadata={"help": "Probability to erase a rectangle of an image."})
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0 = none."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of cutmix; 0 = none."})
    mixup_switch_probability: float = field(
        default=0.5, metadata={"help": "Share of batches for cutmix where mixup is on too."}
    )
    repeated_augmentation: int = field(
        default=1,
        metadata={"help": "How often a batch holds an image, each time augmented anew; epochs keep their size."},
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Average the weights over steps with this decay, and evaluate both."}
    )
    balance: bool = field(default=False, metadata={"help": "Weigh the loss of each class by its inverse frequency."})

    def __post_init__(self):
        super().__post_init__()
        self._check_ranges()
        self._check_schedule()
        if (self.mixup or self.cutmix) and self.per_device_train_batch_size == 1:
            raise ValueError(
                "`per_device_train_batch_size` is 1, but `mixup` and `cutmix` mix images of a batch; two or more are"
                " needed, or --mixup 0 --cutmix 0."
            )

    def _check_schedule(self):
        # The cosine here is GreenMIM's own, the others are Transformers'.
        schedule = self.lr_scheduler_type
        is_cosine = schedule == SchedulerType.COSINE
        without_warmup = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        given = {
            "min_learning_rate": not is_cosine,
            "warmup_learning_rate": not is_cosine,
            "warmup_steps": schedule in without_warmup,
            "lr_scheduler_kwargs": is_cosine,
        }
        for name, is_ignored in given.items():
            value = getattr(self, name)
            if is_ignored and value:
                nothing = "''" if name == "lr_scheduler_kwargs" else "0"
                raise ValueError(
                    f"`{name}` is {value}, but `lr_scheduler_type` is {schedule.value!r}, which has none: give"
                    f" --{name} {nothing}, or another schedule."
                )

    def _check_ranges(self):
        at_most_1 = ("random_erasing", "mixup_switch_probability", "label_smoothing_factor")
        for name in ("color_jitter", "mixup", "cutmix", "min_learning_rate", "warmup_learning_rate", *at_most_1):
            value = getattr(self, name)
            if value < 0 or (name in at_most_1 and value > 1):
                raise ValueError(
                    f"`{name}` is {value}; it must be {'in [0, 1]' if name in at_most_1 else '0 or more'}."
                )
        for name in ("layer_decay", "min_crop_scale", "crop_pct"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be in (0, 1].")
        if self.repeated_augmentation < 1:
            raise ValueError(f"`repeated_augmentation` is {self.repeated_augmentation}; it must be 1 or more.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; it must be between 0 and 1.")


def read_argument_file(argv: list[str]) -> tuple[dict, list[str]]:
    """Takes a leading .json or .yaml file off the arguments: its values, and the flags that are left."""
    if not argv or not argv[0].endswith((".json", ".yaml", ".yml")):
        return {}, argv
    text = Path(argv[0]).read_text()
    values = json.loads(text) if argv[0].endswith(".json") else yaml.safe_load(text)
    return values or {}, argv[1:]


def parse_arguments(
    kinds: tuple[type, ...], argv: list[str], defaults_for: Callable[[dict], dict] = lambda chosen: {}
) -> tuple:
    """Reads flags, or a .json/.yaml file followed by flags that win over it, into dataclasses.

    Args:
        kinds: the dataclasses.
        argv: the command line without the script.
        defaults_for: what else shall be default, given all that was chosen; the file and flags win over it.

    Raises:
        `ValueError`: for names in the file that are no arguments.
    """
    parser = HfArgumentParser(kinds)
    values, flags = read_argument_file(argv)
    unknown = sorted(set(values) - {action.dest for action in parser._actions})
    if unknown:
        raise ValueError(f"{argv[0]} sets {unknown}, which are no arguments of this script.")
    parser.set_defaults(**values)
    parser.set_defaults(**{**defaults_for(vars(parser.parse_known_args(flags)[0])), **values})
    return parser.parse_args_into_dataclasses(flags)
