# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of the scripts: Transformers' own, with the defaults of GreenMIM's recipes, and how they are read."""

import argparse
import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, SchedulerType, TrainingArguments

from ..data.statistics import AUTO, StatisticsSetting
from ..data.tiles import PAGES
from ..pretraining.masks import STRATEGY_NAMES
from .argument_files import SUFFIXES, read_argument_file
from .energy import check_country
from .extras import require
from .models import MODEL_SIZES
from .starts import CHANNEL_RULES


logger = logging.getLogger(__name__)


# What names data; without any a script takes the default photographs.
DATA_NAMES = ("dataset_name", "train_dir", "validation_dir", "test_dir", "probe_dir")


@dataclass
class ModelSourceArguments:
    """Which model a script starts from."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from: a folder or a Hub repository."}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": f"Train from scratch: one of {', '.join(MODEL_SIZES)} (run_mim.py's default: base), a folder or a"
            " Hub repository."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'Changes to the configuration: "image_size=128,depths=[2,2,6],mask_ratio=0.6".'},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: sdpa or eager; default: sdpa where the architecture has it."}
    )
    channel_weights: str = field(
        default="mean",
        metadata={
            "help": "Where config_overrides gives a checkpoint another number of channels, the weights of these: mean"
            " of the old ones, first (the first keep theirs, more start anew) or new."
        },
    )

    def __post_init__(self):
        check_not_empty(self, "model_name_or_path", "config_name")
        if self.channel_weights not in CHANNEL_RULES:
            raise ValueError(
                f"`channel_weights` is {self.channel_weights!r}; it must be one of {', '.join(CHANNEL_RULES)}."
            )


@dataclass
class ImageDataArguments:
    """Which images a script reads.

    Raises:
        `ValueError`: for counts and shares out of range.
    """

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set of the Hub or a local one (a folder of parquet or WebDataset files)."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of images, nested or not; labels are not needed."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of images to evaluate on."})
    train_val_split: float = field(
        default=0.05, metadata={"help": "Share of the training images to evaluate on where there are no others."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Column of the images."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many evaluation images."})
    image_statistics: str = field(
        default=AUTO,
        metadata={
            "help": "What values of images are scaled by: imagenet (8-bit, 1 or 3 channels), measure (range, mean and"
            ' standard deviation of each channel, in full depth), numbers ("range=[0,4095],mean=[0.3],std=[0.2]", the'
            " rest is measured), or auto: what the checkpoint says, imagenet for 8-bit images, measure for others."
        },
    )
    nodata: float | None = field(
        default=None, metadata={"help": "Value that stands for none, such as -9999; nan and infinity always do."}
    )

    pages: str = field(
        default=PAGES[0],
        metadata={"help": f"Pages of TIFF and DICOM files in folders: {', '.join(PAGES)} (all as one image)."},
    )
    tile: int | None = field(
        default=None,
        metadata={"help": "Take images of folders that are larger as a grid of tiles of so many pixels a side."},
    )
    max_image_pixels: int | None = field(
        default=None,
        metadata={
            "help": "Refuse files that are decoded as a whole above twice so many pixels, as Pillow does (its default"
            " is 89 million); they may be made to fill the memory."
        },
    )

    @property
    def statistics(self) -> StatisticsSetting:
        """What `image_statistics` and `nodata` say."""
        return StatisticsSetting.of(self.image_statistics, self.nodata)

    def __post_init__(self):
        check_not_empty(self, *(name for name in DATA_NAMES if hasattr(self, name)))
        StatisticsSetting.of(self.image_statistics, self.nodata)
        if self.pages not in PAGES:
            raise ValueError(f"`pages` is {self.pages!r}; it must be one of {', '.join(PAGES)}.")
        for name in ("pages", "tile"):
            if self.dataset_name and getattr(self, name) not in (None, PAGES[0]):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, which is for folders, but `dataset_name` is"
                    f" {self.dataset_name!r}."
                )
        check_at_least(self, 1, "tile", "max_image_pixels")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"`train_val_split` is {self.train_val_split}; it must be between 0 and 1.")
        check_at_least(self, 1, "max_train_samples", "max_eval_samples")


def check_not_empty(arguments, *names: str) -> None:
    """Refuses empty names, such as unset variables of a shell give; None means that there is no name.

    Raises:
        `ValueError`: naming the argument.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value.strip():
            raise ValueError(f"`{name}` is {value!r}, which names nothing; give a name, or leave it out.")


def check_at_least(arguments, least: int, *names: str) -> None:
    """Refuses numbers that are too small; None means that there is no number.

    Raises:
        `ValueError`: naming the argument.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ValueError(f"`{name}` is {value}; it must be {least} or more.")


def check_start(arguments) -> None:
    """Refuses arguments of a model that name no start or two, and a rate of stochastic depth that is none.

    Raises:
        `ValueError`: naming the arguments.
    """
    start, config = arguments.model_name_or_path, arguments.config_name
    if bool(start) == bool(config):
        raise ValueError(
            f"`model_name_or_path` is {start!r} and `config_name` is {config!r}; exactly one of them is needed: a"
            " checkpoint to start from, or what to build from scratch."
        )
    if not 0 <= arguments.drop_path_rate < 1:
        raise ValueError(f"`drop_path_rate` is {arguments.drop_path_rate}; it must be in [0, 1).")


def check_one_source(arguments) -> None:
    """Refuses a data set beside folders of images.

    Raises:
        `ValueError`: naming both arguments.
    """
    for name in ("train_dir", "validation_dir"):
        if arguments.dataset_name and getattr(arguments, name):
            raise ValueError(
                f"`dataset_name` is {arguments.dataset_name!r} and `{name}` is {getattr(arguments, name)!r}; give one"
                " of them."
            )


def has_bf16() -> bool:
    """Whether there is a CUDA device that computes in bf16, without emulating it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def default_num_workers() -> int:
    """Workers of the data loader: this process's share of the usable cores, at most 8."""
    # Where the system knows no affinity, every core counts as usable.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what every recipe here shares: learning rates per batch, AdamW, precision, workers.

    Raises:
        `ValueError`: when both learning rates are given, and for numbers out of range.
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
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Mixed precision in bf16; default: where a GPU has it, unless --fp16 or the configuration of"
            " `accelerate launch` asks for another. On a machine without GPU it runs there too, as autocast.",
            "nargs": "?",
            "const": True,
        },
    )
    auto_batch_size: bool = field(
        default=False,
        metadata={
            "help": "Choose the largest micro-batch that fits into the free memory by an estimate, and accumulate:"
            " per_device_train_batch_size * gradient_accumulation_steps stays what it is. Not for dense tasks."
        },
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
    picture_channels: list[int] | None = field(
        default=None,
        metadata={
            "help": "Channels, from 1, of the images in pictures: red, green and blue, or one; default: the first."
        },
    )
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay, but of 1-D parameters, bias tables and tokens."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate from each layer to the one below it."}
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
    debug: str = field(
        default="",
        metadata={
            "help": "Alone: show the traceback of an error. With a value: Trainer's underflow_overflow or"
            " tpu_metrics_debug.",
            "nargs": "?",
            "const": "",
        },
    )

    def __post_init__(self):
        self.chooses_logging_steps = self.logging_steps is None
        if self.chooses_logging_steps:
            self.logging_steps = 500  # the parent's default, and that of eval_steps
        self._check_amounts()
        self._choose_precision()
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
        launched = [parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED")]
        if self.auto_batch_size and (self.fsdp or self.deepspeed or any(launched)):
            raise ValueError(
                "`auto_batch_size` is True, but FSDP and DeepSpeed divide a model among processes, which the estimate"
                " knows nothing of; give `per_device_train_batch_size` and `gradient_accumulation_steps` instead."
            )
        given = self.learning_rate
        self.learning_rate = 0.0 if given is None else given  # the parent compares and needs a number
        super().__post_init__()
        if "tensorboard" in self.report_to:
            require("tensorboard", "pictures")
        if given is None:
            if self.base_learning_rate is None:
                self.base_learning_rate = self.default_base_learning_rate
            self.learning_rate = self.scaled(self.base_learning_rate)

    def _check_amounts(self):
        check_at_least(self, 1, "per_device_train_batch_size", "per_device_eval_batch_size")
        check_at_least(self, 1, "gradient_accumulation_steps")
        check_at_least(self, 0, "dataloader_num_workers", "base_learning_rate", "learning_rate", "weight_decay")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` is {self.layer_decay}; it must be in (0, 1].")
        check_at_least(self, 0, "eval_steps")  # 0: every logging_steps
        if self.eval_steps is not None and math.isinf(self.eval_steps):
            raise ValueError(f"`eval_steps` is {self.eval_steps}; it must be finite, or `eval_strategy` no.")
        for strategy, steps in (("logging_strategy", "logging_steps"), ("save_strategy", "save_steps")):
            value = getattr(self, steps)
            if getattr(self, strategy) == "steps" and not 0 < value < math.inf:
                raise ValueError(
                    f"`{steps}` is {value}; it must be above 0 and finite, or `{strategy}` another than steps."
                )
        if self.max_steps != -1:
            check_at_least(self, 1, "max_steps")
        elif self.do_train and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"`num_train_epochs` is {self.num_train_epochs}; it must be above 0 and finite.")

    def _choose_precision(self):
        """bf16 where it is not given and a GPU has it; on the CPU where it is given and there is no GPU."""
        launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.bf16 is None:
            on_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
            self.bf16 = not self.fp16 and launched_with == "no" and not on_cpu and has_bf16()
        if (self.bf16 or self.bf16_full_eval) and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise `TrainingArguments` refuses bf16

    def set_up_logging(self) -> None:
        """Makes the first process log what a run does, and the others errors only."""
        level = logging.INFO if self.should_log else logging.ERROR
        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=level)
        transformers.utils.logging.set_verbosity(self.get_process_log_level())
        precision = {"no": "fp32"}.get(self.mixed_precision, self.mixed_precision)
        logger.info(f"{self.world_size} process(es), this one on {self.device}, precision {precision}")

    def scaled(self, learning_rate: float) -> float:
        """A learning rate that is for `base_batch_size` images -> the one for the total batch."""
        return learning_rate * self.total_batch_size / self.base_batch_size

    @property
    def total_batch_size(self) -> int:
        """Images of one optimizer step, over all processes and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


@dataclass
class MIMTrainingArguments(ImageTrainingArguments):
    """`TrainingArguments` with the defaults of GreenMIM's recipe, and what masked image modeling adds.

    Raises:
        `ValueError`: for numbers out of range, and mask strategies that there are not.
    """

    mask_per_sample: bool = field(
        default=False, metadata={"help": "Draw a mask for each image instead of one for each step and process."}
    )
    mask_strategy: str = field(
        default="random",
        metadata={
            "help": f"How visible units are chosen: {', '.join(STRATEGY_NAMES)} (what stands out for a teacher)."
        },
    )
    num_pictures: int = field(default=4, metadata={"help": "Images in the picture that each evaluation makes."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Linear warm-up: steps, or a share of all steps if below 1."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Maximum gradient norm; 0 = no clipping."})

    def __post_init__(self):
        check_at_least(self, 0, "num_pictures")
        if self.mask_strategy not in STRATEGY_NAMES:
            raise ValueError(
                f"`mask_strategy` is {self.mask_strategy!r}; it must be one of {', '.join(STRATEGY_NAMES)}."
            )
        super().__post_init__()


@dataclass
class ClassificationTrainingArguments(ImageTrainingArguments):
    """`TrainingArguments` with the parts of fine-tuning recipes; `--recipe` sets them together.

    Raises:
        `ValueError`: for values outside their range, and for mixing within a batch of one.
    """

    base_batch_size: ClassVar[int] = 512
    default_base_learning_rate: ClassVar[float] = 1.25e-3

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
        for name in ("min_crop_scale", "crop_pct"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be in (0, 1].")
        if self.repeated_augmentation < 1:
            raise ValueError(f"`repeated_augmentation` is {self.repeated_augmentation}; it must be 1 or more.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; it must be between 0 and 1.")


# Of the many arguments of `TrainingArguments`, those that most runs need; `--help` shows them before the others.
_COMMON = (
    *("output_dir", "do_train", "do_eval", "do_predict", "num_train_epochs", "max_steps", "seed"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("resume_from_checkpoint", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit"),
    *("logging_steps", "report_to", "use_cpu", "fp16", "torch_compile", "push_to_hub", "hub_model_id"),
)


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` whose help shows what is ours first, then what most runs need, then the rest of Trainer's.

    Args:
        dataclass_types: the dataclasses; those with an `_argument_group_name` are groups of their own.
    """

    def __init__(self, dataclass_types: tuple[type, ...]):
        trainers = {one.name for one in fields(TrainingArguments)}
        # What we declare again has another default or meaning.
        ours = {name for one in dataclass_types if issubclass(one, TrainingArguments) for name in _declared(one)}
        self._title_of = dict.fromkeys(trainers - ours, "other arguments of Transformers' Trainer")
        self._title_of |= dict.fromkeys(ours, "training") | dict.fromkeys(_COMMON, "run")
        self._group_of: dict[str, argparse._ArgumentGroup] = {}
        super().__init__(dataclass_types, usage="%(prog)s [FILE.yaml | FILE.json] [--argument value ...]")
        # argparse takes negative numbers with an exponent for flags.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def add_argument(self, *flags, **options) -> argparse.Action:
        """Adds an argument to the group that it belongs to; called for each field of the training arguments."""
        title = self._title_of.get(options.get("dest", flags[0].lstrip("-")))
        if title is None:
            return super().add_argument(*flags, **options)
        if not self._group_of:  # after the groups of the model and the data, which come first
            for name in ("training", "run", "other arguments of Transformers' Trainer"):
                self._group_of[name] = self.add_argument_group(name)
        return self._group_of[title].add_argument(*flags, **options)


def _declared(dataclass_type: type) -> set[str]:
    """Names of the arguments that a class and its parents before `TrainingArguments` declare."""
    ours = dataclass_type.__mro__[: dataclass_type.__mro__.index(TrainingArguments)]
    return {name for one in ours for name in one.__annotations__}


def parse_arguments(
    dataclass_types: tuple[type, ...], argv: list[str], defaults_for: Callable[[dict], dict] = lambda chosen: {}
) -> tuple:
    """Reads flags, or a .json/.yaml file followed by flags that win over it, into dataclasses.

    Args:
        dataclass_types: the dataclasses.
        argv: the command line without the script.
        defaults_for: what else shall be default, given all that was chosen; the file and flags win over it.

    Raises:
        `ValueError`: for a file that is not valid, and for values that the dataclasses refuse.
    """
    parser = ScriptArgumentParser(dataclass_types)
    values, flags = {}, argv
    if argv and argv[0].endswith(SUFFIXES):
        values, flags = read_argument_file(argv[0], dataclass_types), argv[1:]
    parser.set_defaults(**values)
    chosen, unknown = parser.parse_known_args(flags)
    if unknown:
        raise ValueError(f"{unknown} are no arguments of this script; --help lists them.")
    parser.set_defaults(**{**defaults_for(vars(chosen)), **values})
    return parser.parse_args_into_dataclasses(flags)
