# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Range, mean and standard deviation of the values of images: given, or measured on the images themselves."""

import functools
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import yaml
from huggingface_hub.utils import tqdm
from PIL import Image, ImageOps
from transformers.utils import logging

from modeling_greenmim import GreenMIMImageProcessorPil
from modeling_greenmim.array_image import ArrayImage, FullDepth, at_full_depth

from ..randomness import STATISTICS, derived_generator
from ..runs.argument_files import parse_yaml
from ..runs.processes import on_main_process
from .images import UnreadableImageError, image_name, load_image, open_image
from .readers import Part


logger = logging.get_logger(__name__)

# Images that are measured, and of how many the headers tell whether all are 8-bit, grey or colour; of streams, all of
# which is fetched for it, the first ones.
MEASURED_IMAGES, MEASURED_OF_STREAM = 10_000, 1000
SAMPLED_IMAGES, SAMPLED_OF_STREAM = 64, 8
# Values that are kept of all images and channels, and the side of the part of an image that they are drawn from.
MEASURED_VALUES, PART = 2**22, 256
# Values that are compared with a range that a model brings, of each image, and the share outside it that is refused.
CHECKED_VALUES, MOST_OUTSIDE = 256, 0.9
# Percentiles that become 0 and 1.
PERCENTILES = (0.1, 99.9)
# Modes of Pillow with more than 8 bits.
DEEP = ("I", "F")

RULES = AUTO, IMAGENET, MEASURE = "auto", "imagenet", "measure"


class Statistics(NamedTuple):
    """What images of full depth are scaled by.

    image_range: (low, high) of each channel.
    mean, std: of each channel, of values that the range has brought to [0, 1].
    """

    image_range: list[tuple[float, float]]
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class StatisticsSetting:
    """What `--image_statistics` and `--nodata` say.

    Args:
        rule: one of `RULES`; numbers that are given mean `measure` for those that are not.
        given: numbers for each channel, or one for all: `range` (pairs), `mean`, `std`.
        nodata: the value that stands for none.
    """

    rule: str = AUTO
    given: dict[str, list] = field(default_factory=dict)
    nodata: float | None = None

    @classmethod
    def of(cls, text: str, nodata: float | None) -> "StatisticsSetting":
        """Reads a word of `RULES`, or numbers such as "range=[0,4095],mean=[0.3],std=[0.2]".

        Raises:
            `ValueError`: for other text, ranges without an extent and deviations that are not positive.
        """
        if text in RULES:
            return cls(text, {}, nodata)
        wanted = (
            f"`image_statistics` is {text!r}; it must be {', '.join(RULES)}, or some of range=[low,high], mean=[...]"
            " and std=[...], with numbers for each channel (ranges: [[low,high],[low,high]]) or once for all."
        )
        try:
            values = parse_yaml("{" + text.replace("=", ": ") + "}")
            given = {name: np.asarray(value, dtype=float) for name, value in values.items()}
            if not given or set(given) - {"range", "mean", "std"}:
                raise ValueError
            if "range" in given:
                given["range"] = given["range"].reshape(-1, 2)
        except (ValueError, TypeError, yaml.YAMLError):
            raise ValueError(wanted) from None
        edges, deviations = given.get("range", np.array([[0, 1]])), given.get("std", np.ones(1))
        if not (edges[:, 0] < edges[:, 1]).all() or not (deviations > 0).all():
            raise ValueError(f"{wanted} A range goes from a lower to a higher value, and deviations are positive.")
        return cls(MEASURE, {name: np.atleast_1d(numbers).tolist() for name, numbers in given.items()}, nodata)


def set_statistics(
    image_processor, setting: StatisticsSetting, part: Part, column: str, channels: int, args
) -> FullDepth | None:
    """Sets what an image processor scales images by, and tells in which depth they are to be read.

    By the rule `auto` that is what the processor of a checkpoint says, 8 bits with ImageNet's numbers for grey and
    colour images of 8 bits, and measured numbers for others. `measure` measures whatever the images are, `imagenet`
    makes all of them 8-bit.

    Args:
        image_processor: is changed.
        part: images to measure.
        column: of the images.
        channels: that the model takes.
        args: of the run: the first process measures for all.

    Returns:
        None for 8 bits.

    Raises:
        `ValueError`: for processors of other models and channels that the rule does not serve, for images of several
            types, and channels that have one value everywhere.
    """
    is_ours, plain = isinstance(image_processor, GreenMIMImageProcessorPil), channels in (1, 3)
    has_range = is_ours and image_processor.image_range is not None
    if setting.rule == IMAGENET:
        if not plain:
            raise ValueError(f"`image_statistics` is {IMAGENET!r}, which is for 1 or 3 channels, not {channels}.")
        if has_range:
            raise ValueError(
                f"`image_statistics` is {IMAGENET!r}, but the model was trained on values of the range"
                f" {image_processor.image_range}: give {AUTO!r}."
            )
        return None
    if setting.rule == AUTO and has_range:
        if None not in (setting.nodata, image_processor.nodata) and setting.nodata != image_processor.nodata:
            raise ValueError(
                f"`nodata` is {setting.nodata}, but the model was trained with {image_processor.nodata} for it."
            )
        if setting.nodata is not None:
            image_processor.nodata = setting.nodata
        check_values(part, column, channels, image_processor, args)
        depth = depth_of(image_processor)
        logger.info(f"Values are scaled as the checkpoint says: {in_short(list(depth.image_range))} become 0 to 1.")
        return depth
    are_deep = not plain or on_main_process(args, lambda: _are_deep(part, column))
    if setting.rule == AUTO and setting.nodata is None and not (is_ours and are_deep):
        if are_deep:
            warn_of_cut(part)
        return None
    if not is_ours:
        raise ValueError(
            f"`image_statistics` is {setting.rule!r} and `nodata` is {setting.nodata}, which are for our models;"
            f" this one's image processor is a {type(image_processor).__name__}."
        )
    if setting.nodata is None:
        setting = replace(setting, nodata=on_main_process(args, lambda: _told_nodata(part, column)))
    found = on_main_process(args, lambda: _statistics(part, column, channels, setting))
    image_processor.image_range, image_processor.nodata = [list(pair) for pair in found.image_range], setting.nodata
    image_processor.image_mean, image_processor.image_std = found.mean, found.std
    image_processor.do_rescale = False  # by a factor: the range takes its place
    return depth_of(image_processor)


def carry_statistics(source, image_processor) -> None:
    """Gives an image processor of ours what another scales images by."""
    image_processor.image_mean, image_processor.image_std = source.image_mean, source.image_std
    image_processor.image_range, image_processor.nodata = source.image_range, source.nodata
    image_processor.do_rescale = source.do_rescale


def keep_statistics(checkpoint: str, image_processor) -> None:
    """Gives an image processor of ours what a checkpoint of its run scales images by, if that was measured."""
    is_saved = Path(checkpoint, "preprocessor_config.json").exists()
    if is_saved and isinstance(image_processor, GreenMIMImageProcessorPil):
        own = GreenMIMImageProcessorPil.from_pretrained(checkpoint)
        if own.image_range is not None:
            carry_statistics(own, image_processor)


def depth_of(image_processor) -> FullDepth | None:
    """The depth in which an image processor takes images; None for 8 bits."""
    if getattr(image_processor, "image_range", None) is None:
        return None
    return FullDepth(tuple(tuple(pair) for pair in image_processor.image_range), image_processor.nodata)


def warn_of_cut(part: Part) -> None:
    """Tells that a model of 8 bits sees only a part of the values of its images."""
    logger.warning(
        f"`{part.argument}` has images of more than 8 bits, of which this model sees the upper byte: 12 bits in 16"
        " keep 16 levels. A GreenMIM model that is trained on such images sees all of them."
    )


def check_values(part: Part, column: str, channels: int, image_processor, args) -> None:
    """Compares values of some images with what an image processor was made for.

    Args:
        args: of the run: the first process looks for all.

    Raises:
        `ValueError`: when nearly all values lie outside the range of the processor: their scale is another one.
    """
    on_main_process(args, lambda: _check_values(part, column, channels, depth_of(image_processor)))


def _check_values(part: Part, column: str, channels: int, depth: FullDepth | None) -> None:
    if depth is None:
        if channels in (1, 3) and _are_deep(part, column):
            warn_of_cut(part)
        return
    draw, (low, high) = functools.partial(_draw, channels, CHECKED_VALUES, depth.nodata), np.array(depth.image_range).T
    outside, count = 0, 0
    for index, source in enumerate(_some(part.records, column)):
        try:
            values, _ = load_image(source, draw, derived_generator(0, STATISTICS, index))
        except UnreadableImageError:
            continue  # evaluation tells of these
        outside += int(((values < low) | (values > high)).sum())
        count += int(np.isfinite(values).sum())
    if count and outside > MOST_OUTSIDE * count:
        raise ValueError(
            f"`{part.argument}` has values of another scale than the model was trained on: {outside / count:.0%} of"
            f" them lie outside its range, {in_short(list(depth.image_range))}. Bring them to that scale, or train"
            " with `image_statistics` 'measure'."
        )


def _are_deep(part: Part, column: str) -> bool:
    """Whether the headers of some images tell that one of them is not 8-bit grey or colour."""
    images = some_images(part.records, column)
    return any(isinstance(image, ArrayImage) or image.mode[0] in DEEP for image in images)


def _told_nodata(part: Part, column: str) -> float | None:
    """The value that stands for none by the files themselves (GeoTIFF's tag), if they say so."""
    told = (image.info.get("nodata") for image in some_images(part.records, column))
    nodata = next((value for value in told if value is not None and np.isfinite(value)), None)
    if nodata is not None:
        logger.info(f"`{part.argument}`: the files say that {nodata:g} stands for no data.")
    return nodata


def some_images(records, column: str) -> Iterator[Image.Image]:
    """Some images from all over a data set, opened, but for those that cannot be."""
    for source in _some(records, column):
        try:
            yield open_image(source)
        except Exception:  # whatever a decoder raises: training tells of these
            continue


def _some(records, column: str, count: int | None = None):
    """Sources of so many images, from all over a data set; of a stream the first."""
    if isinstance(records, datasets.IterableDataset):
        yield from (record[column] for record in itertools.islice(records, count or SAMPLED_OF_STREAM))
        return
    count = count or SAMPLED_IMAGES
    for index in np.linspace(0, len(records) - 1, min(count, len(records))).astype(int).tolist():
        yield records[index][column]


def _statistics(part: Part, column: str, channels: int, setting: StatisticsSetting) -> Statistics:
    given = {name: _for_each(numbers, channels, name) for name, numbers in setting.given.items()}
    if len(given) == len(Statistics._fields):
        return Statistics(given["range"], given["mean"], given["std"])
    start = time.perf_counter()
    values, types = _values_of(part, column, channels, setting.nodata)
    image_range = given.get("range") or [_range(values[:, channel], channel, part) for channel in range(channels)]
    low, high = np.array(image_range).T
    scaled = ((values - low) / (high - low)).clip(0, 1)
    mean, std = np.nanmean(scaled, axis=0).tolist(), np.nanstd(scaled, axis=0).tolist()
    found = Statistics(image_range, given.get("mean", mean), given.get("std", std))
    if min(found.std) == 0:
        channel = found.std.index(0)
        raise _constant(part, channel, f"no values within its range {image_range[channel]}")
    logger.info(
        f"`{part.argument}`: {types.total():,} images of {', '.join(types)} measured in"
        f" {time.perf_counter() - start:.0f} s; by channel, range {in_short(image_range)}, in it mean"
        f" {in_short(found.mean)} and standard deviation {in_short(found.std)}"
    )
    return found


def _values_of(part: Part, column: str, channels: int, nodata: float | None) -> tuple[np.ndarray, Counter]:
    """Some values of many images, `(values, channels)`, nan for none, and how many images have which type."""
    is_stream = isinstance(part.records, datasets.IterableDataset)
    count = MEASURED_OF_STREAM if is_stream else min(MEASURED_IMAGES, len(part.records))
    each = max(16, MEASURED_VALUES // (count * channels))
    types, examples, parts, unreadable = Counter(), {}, [], []
    draw = functools.partial(_draw, channels, each, nodata)
    for index, source in enumerate(tqdm(_some(part.records, column, count), "Measuring images", count, leave=False)):
        generator = derived_generator(0, STATISTICS, index)
        try:
            values, kind = load_image(source, draw, generator, f"image {index}")
        except UnreadableImageError as error:
            unreadable.append(str(error))
            continue
        types[kind] += 1
        examples.setdefault(kind, image_name(source, f"image {index}"))
        parts.append(values)
    if not parts:
        raise ValueError(f"`{part.argument}` has no image that could be measured: {'; '.join(unreadable[:3])}.")
    if len(types) > 1:
        found = ", ".join(f"{number:,} of {kind} such as {examples[kind]!r}" for kind, number in types.items())
        raise ValueError(
            f"`{part.argument}` has images whose values are of different types, {found}: their scales differ, unless"
            " you know better (DICOM is float32 once it is rescaled). Give images of one type, or all of range, mean"
            " and std in `image_statistics`."
        )
    return np.concatenate(parts), types


def _draw(
    channels: int, count: int, nodata: float | None, source, generator: np.random.Generator
) -> tuple[np.ndarray, str]:
    """Values of pixels drawn from a part of an image, `(count, channels)`, and their type."""
    image = at_full_depth(ImageOps.exif_transpose(open_image(source)), channels)
    width, height = image.size
    top, left = (int(generator.integers(max(1, side - PART + 1))) for side in (height, width))
    values = image.read(top, min(height, top + PART), left, min(width, left + PART)).reshape(-1, image.channels)
    values = values[generator.integers(len(values), size=count)]
    drawn = values.astype(np.float64)
    if nodata is not None:
        drawn[values == nodata] = np.nan  # in the type of the file
    drawn[~np.isfinite(drawn)] = np.nan
    return np.broadcast_to(drawn, (count, channels)).copy(), image.dtype.newbyteorder("=").name


def _range(values: np.ndarray, channel: int, part: Part) -> tuple[float, float]:
    """Robust ends of the values of a channel, or the ends themselves where nearly all values are one."""
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError(f"`{part.argument}`: channel {channel + 1} has no finite value in any image.")
    low, high = np.percentile(values, PERCENTILES).tolist()
    if low == high:
        low, high = float(values.min()), float(values.max())
    if low == high:
        raise _constant(part, channel, f"the value {low:g} everywhere")
    return low, high


def _constant(part: Part, channel: int, what: str) -> ValueError:
    return ValueError(
        f"`{part.argument}`: channel {channel + 1} has {what}, so nothing can be scaled by it. Leave it out of the"
        " images, or give its range and std in `image_statistics`."
    )


def _for_each(numbers: list, channels: int, name: str) -> list:
    if len(numbers) not in (1, channels):
        raise ValueError(
            f"`image_statistics` gives {len(numbers)} values for {name}, but the model takes {channels} channel(s)."
        )
    return numbers * channels if len(numbers) == 1 else numbers


def in_short(numbers: list) -> str:
    """A few numbers or pairs of them, or the first of many."""
    text = ", ".join("-".join(f"{edge:.4g}" for edge in np.atleast_1d(number)) for number in numbers[:4])
    return f"{text}, ..." if len(numbers) > 4 else text
