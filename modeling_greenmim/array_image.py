# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images that Pillow has no mode for: values of any type, in any number of channels."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .pixels import ARRAY, to_8_bit


Box = tuple[float, float, float, float]

# Values that a large crop reads at once; about as much memory in bytes, times four.
READ_AT_ONCE = 2**24
# Large crops are averaged over blocks until they are this many times what they are resized to, as Pillow does it.
REDUCING_GAP = 2


class ArrayImage(Image.Image):
    """Values `(height, width, channels)` of any type of numbers, where Pillow's images are expected.

    Pipelines take images of Pillow only, turn them upright and convert them to RGB before an image processor sees
    them; this one is upright and stays what it is. Its size is Pillow's, `(width, height)`.

    Args:
        values: an array, or anything with `shape` and `dtype` whose `[top:bottom, left:right]` is one: what is mapped
            into memory, or read from a file as it is asked for. Without a third dimension it is one channel.

    Raises:
        `ValueError`: for other dimensions, no pixels, and values that are no real numbers.
    """

    def __init__(self, values):
        super().__init__()
        if len(values.shape) not in (2, 3) or 0 in values.shape:
            raise ValueError(
                f"an image has the shape (height, width) or (height, width, channels), not {tuple(values.shape)}"
            )
        if np.dtype(values.dtype).kind not in "buif":
            raise ValueError(f"an image has whole or floating-point numbers, not {values.dtype}")
        self.values = values
        self.channels = values.shape[2] if len(values.shape) == 3 else 1
        self._size, self._mode = (values.shape[1], values.shape[0]), ARRAY

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return np.dtype(self.values.dtype)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """A part of the values, `(bottom - top, right - left, channels)`."""
        part = np.asarray(self.values[top:bottom, left:right])
        return part[..., None] if part.ndim == 2 else part

    def getbands(self) -> tuple[str, ...]:
        """Names of the channels: their numbers, from 1."""
        return tuple(str(number) for number in range(1, self.channels + 1))

    @property
    def __array_interface__(self) -> dict:
        # By this NumPy makes an array of an image of Pillow; what it points to has to stay.
        self.values = np.ascontiguousarray(self.values[:, :])
        return self.values.__array_interface__

    def convert(self, mode=None, *args, **kwargs) -> "ArrayImage":
        """Itself: there is nothing to convert to."""
        return self

    def copy(self) -> "ArrayImage":
        """Itself, which nothing changes."""
        return self


class _Converted:
    """Values of which each part is made into another number of channels as it is asked for."""

    def __init__(self, values, channels: int, convert, dtype=None):
        self.shape, self.dtype = (*values.shape[:2], channels), np.dtype(dtype or values.dtype)
        self._values, self._convert = values, convert

    def __getitem__(self, part) -> np.ndarray:
        return self._convert(self._values[part])


def as_array_image(image: Image.Image) -> ArrayImage:
    """The values of an image of Pillow in its own mode, colours of a palette looked up; others as they are."""
    if isinstance(image, ArrayImage):
        return image
    return ArrayImage(np.asarray(image.convert("RGB") if image.mode == "P" else image))


def at_8_bits(image: ArrayImage, channels: int) -> ArrayImage:
    """The grey (one channel) or RGB (three) values of an image, by `to_8_bit`, converted as they are asked for."""
    if image.dtype == np.uint8 and image.channels == channels:
        return image
    mode = "L" if channels == 1 else "RGB"

    def convert(values: np.ndarray) -> np.ndarray:
        return np.asarray(to_8_bit(ArrayImage(values)).convert(mode)).reshape(*values.shape[:2], channels)

    return ArrayImage(_Converted(image.values, channels, convert, np.uint8))


def at_full_depth(image: Image.Image, channels: int) -> ArrayImage:
    """An upright image with all its values, for a model of so many channels.

    8-bit images of Pillow become grey for one channel and RGB for three. Others keep the channels they have, but for
    one of transparency that the model does not take, and a single channel counts for each of three.

    Raises:
        `ValueError`: for images of other channels.
    """
    is_8_bit = not isinstance(image, ArrayImage) and image.mode[0] not in "IF"
    if is_8_bit and channels in (1, 3):
        image = to_8_bit(image).convert("L" if channels == 1 else "RGB")
    image = as_array_image(image)
    if image.info.get("alpha") and image.channels == channels + 1:
        image = ArrayImage(_Converted(image.values, channels, lambda values: values[..., :channels]))
    if image.channels != channels and (image.channels, channels) != (1, 3):
        raise ValueError(
            f"it has {image.channels} channel(s), but the model takes {channels}; arrays are (height, width, channels)"
        )
    return image


def center_crop_box(width: int, height: int, aspect: float, share: float) -> Box:
    """Central crop of a given aspect (width / height) that takes `share` of the largest possible side."""
    crop_width = min(width, height * aspect) * share
    crop_height = crop_width / aspect
    # Rounding must not lead outside.
    left, top = max(0.0, (width - crop_width) / 2), max(0.0, (height - crop_height) / 2)
    return left, top, min(width, left + crop_width), min(height, top + crop_height)


@dataclass(frozen=True)
class FullDepth:
    """How values of any type become numbers in [0, 1]: `(value - low) / (high - low)`, cut off at both ends.

    Args:
        image_range: (low, high) of each channel.
        nodata: the value that stands for none, such as -9999.
    """

    image_range: tuple[tuple[float, float], ...]
    nodata: float | None = None

    def crop(self, image: Image.Image, box: Box, size: tuple[int, int]) -> np.ndarray:
        """The part of an upright image within a box, resized and scaled.

        Args:
            image: of any kind that `at_full_depth` takes.
            box: (left, top, right, bottom) in pixels.
            size: height and width of the result in pixels.

        Returns:
            float32 `(channels, height, width)`; nan where a value that is no data, or not finite, has a part in it.

        Raises:
            `ValueError`: for images of other channels, and of 8 bits where values of the others are larger.
        """
        image = at_full_depth(image, len(self.image_range))
        highest = max(high for _, high in self.image_range)
        if image.dtype == np.uint8 and not 1 < highest <= 255:
            raise ValueError(
                f"it has 8 bits, but `image_range` goes up to {highest:g}. Pipelines cut files to 8 bits: give them"
                " what `open_image` of the image processor opens, or arrays"
            )
        values = crop_and_resize(image, box, size, self.nodata)
        low, high = (np.array(edge, np.float32)[:, None, None] for edge in zip(*self.image_range))
        return ((values - low) / (high - low)).clip(0, 1)


def crop_and_resize(image: ArrayImage, box: Box, size: tuple[int, int], nodata: float | None = None) -> np.ndarray:
    """The part of an image within a box, bicubic, in single precision and not rounded again.

    Only what the box covers is read, and of a large one no more at once than `READ_AT_ONCE` values: blocks of it are
    averaged first, as Pillow's `reducing_gap` does. Arguments and result as of `FullDepth.crop`, but not scaled.
    """
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    factor = max(
        1, min(int((box[2] - box[0]) / size[1] / REDUCING_GAP), int((box[3] - box[1]) / size[0] / REDUCING_GAP))
    )
    part = _reduced(image, (left, top, right, bottom), factor, nodata)
    box = ((box[0] - left) / factor, (box[1] - top) / factor, (box[2] - left) / factor, (box[3] - top) / factor)
    box = (box[0], box[1], min(box[2], part.shape[1]), min(box[3], part.shape[0]))
    if box == (0, 0, size[1], size[0]) and part.shape[:2] == tuple(size):
        return np.ascontiguousarray(part.transpose(2, 0, 1))
    channels = [Image.fromarray(np.ascontiguousarray(part[..., number])) for number in range(image.channels)]
    return np.stack(
        [np.asarray(channel.resize(size[::-1], Image.Resampling.BICUBIC, box=box)) for channel in channels]
    )


def _reduced(image: ArrayImage, box: tuple[int, int, int, int], factor: int, nodata: float | None) -> np.ndarray:
    """Means of blocks of `factor` x `factor` pixels, float32 `(rows, columns, channels)`, read in stripes."""
    left, top, right, bottom = box
    rows = max(1, READ_AT_ONCE // ((right - left) * image.channels * factor)) * factor
    parts = []
    for start in range(top, bottom, rows):
        values = image.read(start, min(bottom, start + rows), left, right)
        with np.errstate(over="ignore"):
            part = values.astype(np.float32)
        if nodata is not None:
            part[values == nodata] = np.nan
        part[~np.isfinite(part)] = np.nan
        parts.append(_block_means(part, factor) if factor > 1 else part)
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _block_means(values: np.ndarray, factor: int) -> np.ndarray:
    """Means of blocks; those at the right and lower edge may be smaller."""
    starts = [np.arange(0, side, factor) for side in values.shape[:2]]
    sums = np.add.reduceat(np.add.reduceat(values, starts[0], axis=0), starts[1], axis=1)
    counts = [np.diff(np.append(start, side)) for start, side in zip(starts, values.shape[:2])]
    return sums / (counts[0][:, None] * counts[1]).astype(np.float32)[..., None]


__all__ = [
    "ArrayImage",
    "FullDepth",
    "as_array_image",
    "at_8_bits",
    "at_full_depth",
    "center_crop_box",
    "crop_and_resize",
]
