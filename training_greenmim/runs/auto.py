# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`--recipe auto`: arguments that follow from the images and the device, each with its reason."""

import logging
import math
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from modeling_greenmim.array_image import ArrayImage

from ..data.readers import DataSource, find_image_column, read_records, undecoded
from ..data.statistics import some_images


logger = logging.getLogger(__name__)

# Gigabytes of decoded images that are kept on the disk without asking.
MOST_DECODED = 10
# Modes of Pillow in which an image has one channel.
GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16B")


class Choice(NamedTuple):
    """The value of an argument, and why it is that."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Facts:
    """What `auto` goes by.

    Args:
        count: images to train on, those less that are held out to evaluate on.
        decoded: gigabytes that they take once decoded, about.
        side: median of the shorter sides of some of them, in pixels.
        channels: of these, the most; 8-bit images of Pillow have 1 or 3.
        gpu_memory: of the first CUDA device in GB; None without, or where the CPU is asked for.
        has_bf16: whether a CPU without such a device computes in bf16 without emulating it.
    """

    count: int
    decoded: float
    side: int
    channels: int
    gpu_memory: float | None
    has_bf16: bool


def look_at(chosen: dict, labelled: bool) -> Facts | None:
    """Counts images, opens some of them, and looks at the device.

    Args:
        chosen: all arguments of a script.
        labelled: whether sub-folders of folders are classes.

    Returns:
        None where no images for training are named.

    Raises:
        `ValueError`: for streams, whose images cannot be counted, and data that cannot be read.
    """
    arguments = SimpleNamespace(**chosen)
    if chosen.get("streaming"):
        raise ValueError("`recipe` is 'auto', which counts images, but `streaming` is set: nobody knows their number.")
    parts = read_records(DataSource.of(arguments), labelled=labelled)
    part = parts.get("train")
    if part is None:
        return None
    column = find_image_column(part.records, arguments.image_column_name)
    records = undecoded(part.records, column)
    images = list(some_images(records, column))
    if not images:
        raise ValueError(f"`{part.argument}` has {len(records)} image(s), none of which could be opened.")
    count = len(records)
    if "validation" not in parts and (arguments.do_eval or arguments.do_predict):
        count -= math.ceil(count * arguments.train_val_split)
    count = min(count, arguments.max_train_samples or count)
    size = statistics.mean(_bytes_of(image) for image in images)
    on_gpu = torch.cuda.is_available() and not arguments.use_cpu
    return Facts(
        count=count,
        decoded=count * size / 1e9,
        side=round(statistics.median(min(image.size) for image in images)),
        channels=max(_channels(image) for image in images),
        gpu_memory=torch.cuda.get_device_properties(0).total_memory / 1e9 if on_gpu else None,
        has_bf16=bool(torch.cpu.get_capabilities().get("amx_bf16")),
    )


def _bytes_of(image) -> int:
    values = image.width * image.height * len(image.getbands())
    return values * image.dtype.itemsize if isinstance(image, ArrayImage) else values


def _channels(image) -> int:
    if isinstance(image, ArrayImage):
        return image.channels
    return 1 if image.mode in GREY_MODES else 3


def shared_choices(facts: Facts) -> dict[str, Choice]:
    """What both scripts choose: whether decoded images are kept on the disk, and the precision of a CPU."""
    reason = f"decoded they take {facts.decoded:.1f} GB, up to {MOST_DECODED} pay"
    choices = {"decode_once": Choice(facts.decoded <= MOST_DECODED, reason)}
    if facts.gpu_memory is None and facts.has_bf16:
        choices["bf16"] = Choice(True, "the processor has bf16 units")
    return choices


class Recipe:
    """Defaults of the recipe that the arguments name; explains itself where it is `auto`.

    Args:
        named: returns the arguments that a named recipe sets, given all arguments as chosen.
        auto: returns those that `auto` chooses, likewise, from the facts.
        labelled: whether sub-folders of folders are classes.
    """

    def __init__(
        self,
        named: Callable[[dict], dict],
        auto: Callable[[Facts, dict], dict[str, Choice]],
        labelled: bool,
    ):
        self.named, self.auto, self.labelled = named, auto, labelled
        self.facts: Facts | None = None
        self.choices: dict[str, Choice] = {}

    def __call__(self, chosen: dict) -> dict:
        """Defaults, given all arguments as chosen.

        Raises:
            `ValueError`: for an unknown recipe, and as `look_at` does.
        """
        if chosen["recipe"] != "auto":
            return self.named(chosen)
        self.facts = look_at(chosen, self.labelled)
        if self.facts is not None:
            self.choices = self.auto(self.facts, chosen)
        if chosen["learning_rate"] is not None:
            self.choices.pop("base_learning_rate", None)
        return {name: choice.value for name, choice in self.choices.items()}

    def explain(self, *arguments) -> None:
        """Logs the flags that `auto` stands for.

        Args:
            *arguments: the dataclasses that were read, in which a flag or a file may have won over a choice.
        """
        if self.facts is None:
            return
        kind = {1: "grey images", 3: "images"}.get(self.facts.channels, f"images of {self.facts.channels} channels")
        logger.info(f"--recipe auto: {self.facts.count} {kind}, shorter side about {self.facts.side} px, stands for")
        for name, (value, reason) in self.choices.items():
            holder = next(one for one in arguments if hasattr(one, name))
            if getattr(holder, name) == value:
                logger.info(f"  --{name} {_as_flag(value)}  ({reason})")
            else:
                logger.info(f"  (not --{name} {_as_flag(value)}: {_as_flag(getattr(holder, name))} is given)")


def _as_flag(value) -> str:
    return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))
