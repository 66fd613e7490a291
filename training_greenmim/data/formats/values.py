# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Values of images that are computed as a part of them is asked for, by `values[top:bottom, left:right]`.

Each class has a `shape`, `(height, width)` or `(height, width, channels)`, and a `dtype`, as `ArrayImage` wants them.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image


def check_size(shape: tuple[int, ...], what: str = "image") -> None:
    """Refuses what has to be decoded as a whole if it is larger than what Pillow decodes.

    Raises:
        `DecompressionBombError`: above twice `PIL.Image.MAX_IMAGE_PIXELS` pixels of at most four values.
    """
    if is_too_large(shape):
        raise Image.DecompressionBombError(
            f"its {what} of the shape {tuple(shape)} exceeds the limit of {2 * Image.MAX_IMAGE_PIXELS} pixels"
            " (PIL.Image.MAX_IMAGE_PIXELS, doubled)"
        )


def is_too_large(shape: tuple[int, ...]) -> bool:
    """Whether `check_size` refuses an image."""
    pixels = max(math.prod(shape[:2]), math.prod(shape) // 4)
    return Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS


class Whole:
    """Values that can only be decoded as a whole, which happens when the first are asked for.

    Args:
        decode: returns the values, of this shape and type.

    Raises:
        `DecompressionBombError`: as in `check_size`.
    """

    def __init__(self, shape: tuple[int, ...], dtype, decode: Callable[[], np.ndarray]):
        check_size(shape)
        self.shape, self.dtype = tuple(shape), np.dtype(dtype).newbyteorder("=")
        self._decode, self._values = decode, None

    def __getitem__(self, part) -> np.ndarray:
        if self._values is None:
            values = self._decode()
            if values.shape != self.shape or not np.can_cast(values.dtype, self.dtype):
                expected = _described(self.shape, self.dtype)
                raise ValueError(f"its header tells of {expected}, it holds {_described(values.shape, values.dtype)}")
            self._values = values.astype(self.dtype, copy=False)
        return self._values[part]


class Native:
    """Values in the order of bytes of this machine."""

    def __init__(self, values):
        self.shape, self.dtype = values.shape, np.dtype(values.dtype).newbyteorder("=")
        self._values = values

    def __getitem__(self, part) -> np.ndarray:
        return self._values[part].astype(self.dtype, copy=False)


class Inverted:
    """Whole numbers from 0 to `highest` where 0 is white."""

    def __init__(self, values, highest: int):
        self.shape, self.dtype = values.shape, values.dtype
        self._values, self._highest = values, np.dtype(values.dtype).type(highest)

    def __getitem__(self, part) -> np.ndarray:
        return self._highest ^ self._values[part] if self.dtype == bool else self._highest - self._values[part]


class Window:
    """The values within a box (left, top, right, bottom) in pixels."""

    def __init__(self, values, box: tuple[int, int, int, int]):
        self._left, self._top, right, bottom = box
        self.shape, self.dtype = (bottom - self._top, right - self._left, *values.shape[2:]), values.dtype
        self._values = values

    def __getitem__(self, part) -> np.ndarray:
        top, bottom, left, right = edges(part, self.shape)
        return self._values[self._top + top : self._top + bottom, self._left + left : self._left + right]


class Upright:
    """Values that lie as a value of the tag Orientation tells, of TIFF and EXIF, turned upright."""

    def __init__(self, values, orientation: int):
        self._values, self._is_transposed = values, orientation >= 5
        self._flips_rows, self._flips_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
        height, width = values.shape[1::-1] if self._is_transposed else values.shape[:2]
        self.shape, self.dtype = (height, width, *values.shape[2:]), values.dtype

    def __getitem__(self, part) -> np.ndarray:
        top, bottom, left, right = edges(part, self.shape)
        if self._flips_rows:
            top, bottom = self.shape[0] - bottom, self.shape[0] - top
        if self._flips_columns:
            left, right = self.shape[1] - right, self.shape[1] - left
        if self._is_transposed:
            values = np.swapaxes(self._values[left:right, top:bottom], 0, 1)
        else:
            values = self._values[top:bottom, left:right]
        return values[:: -1 if self._flips_rows else 1, :: -1 if self._flips_columns else 1]


class Stacked:
    """The channels of several images of one size and type, one after the other.

    Raises:
        `ValueError`: when sizes, channels or types differ.
    """

    def __init__(self, parts: list):
        kinds = {(tuple(part.shape), np.dtype(part.dtype)): number for number, part in reversed([*enumerate(parts)])}
        if len(kinds) > 1:
            (first, _), (other, number) = sorted(kinds.items(), key=lambda item: item[1])[:2]
            raise ValueError(
                f"its pages cannot be channels of one image: page 0 is {_described(*first)}, page {number}"
                f" {_described(*other)}"
            )
        self._parts = parts
        height, width, *channels = parts[0].shape
        self.shape, self.dtype = (height, width, len(parts) * math.prod(channels)), np.dtype(parts[0].dtype)

    def __getitem__(self, part) -> np.ndarray:
        return np.concatenate([np.atleast_3d(values[part]) for values in self._parts], axis=2)


def edges(part: tuple[slice, slice], shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right edge of a part `[top:bottom, left:right]`."""
    (top, bottom, _), (left, right, _) = (index.indices(side) for index, side in zip(part, shape))
    return top, bottom, left, right


def _described(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"{'x'.join(map(str, shape))} of {dtype}"
