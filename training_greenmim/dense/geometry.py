# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Crop, scale jitter and flip of an image and of all that is annotated in it, by one value.

A geometry is drawn once for an image. What it does to pixels, class maps, masks of instances and boxes agrees: all
follow the formula of `Geometry`, images bicubic, maps nearest.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from modeling_greenmim.array_image import FullDepth

from ..data.transforms import Geometry, apply_geometry


@dataclass(frozen=True)
class DenseGeometry(Geometry):
    """A `Geometry` whose result lies in the upper left corner of a canvas; the rest of it is padding.

    Args:
        canvas: height and width of the canvas in pixels, no side below that of `size`; None = no padding.
    """

    canvas: tuple[int, int] | None = None

    @property
    def padding(self) -> tuple[int, int]:
        """Rows of padding below, and columns of it on the right."""
        canvas = self.canvas or self.size
        return canvas[0] - self.size[0], canvas[1] - self.size[1]


def draw_crop(
    width: int,
    height: int,
    crop: tuple[int, int],
    generator: np.random.Generator,
    scales: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
) -> DenseGeometry:
    """Scale jitter, a crop of one size, and a flip with probability 1/2.

    The image is scaled by a factor that is uniform in `scales`, and the crop lies anywhere in it; a side that is
    shorter than the crop's is kept whole and padded.

    Args:
        width, height: size of the upright image in pixels.
        crop: height and width of the result in pixels.
    """
    scale = generator.uniform(*scales)
    starts, lengths, sizes = [], [], []
    for side, target in ((height, crop[0]), (width, crop[1])):
        # Whole pixels of the image: resizing these is faster.
        length = min(side, max(1, round(target / scale)))
        starts.append(int(generator.integers(side - length + 1)))
        lengths.append(length)
        sizes.append(target if length < side else min(target, max(1, round(length * scale))))
    (top, left), (rows, columns) = starts, lengths
    is_flipped = bool(generator.random() < 0.5) and flip
    return DenseGeometry((left, top, left + columns, top + rows), tuple(sizes), is_flipped, crop)


def apply_to_image(
    image: Image.Image, geometry: DenseGeometry, channels: int, depth: FullDepth | None = None
) -> torch.Tensor:
    """`(channels, height, width)` of the canvas, as `apply_geometry` makes it; padding is 0, black.

    Arguments and errors as of `apply_geometry`.
    """
    below, right = geometry.padding
    return torch.nn.functional.pad(apply_geometry(image, geometry, channels, depth), (0, right, 0, below))


def apply_to_map(values: np.ndarray, geometry: DenseGeometry, fill: int) -> np.ndarray:
    """Class numbers, or masks of instances, on the canvas: each pixel has the value of the nearest one of the image.

    Args:
        values: `(..., height, width)` of the upright image.
        fill: what padding has.

    Returns:
        `(..., canvas height, canvas width)` of the same type.
    """
    left, top, right, bottom = geometry.box
    rows = _nearest(top, bottom, geometry.size[0], values.shape[-2])
    columns = _nearest(left, right, geometry.size[1], values.shape[-1])
    if geometry.flip:
        columns = columns[::-1]
    kept = values[..., rows[:, None], columns]
    below, beside = geometry.padding
    return np.pad(kept, [(0, 0)] * (values.ndim - 2) + [(0, below), (0, beside)], constant_values=fill)


def _nearest(start: float, stop: float, count: int, side: int) -> np.ndarray:
    """Numbers of the pixels in which the centres of so many pixels lie that fill the range."""
    centres = start + (np.arange(count) + 0.5) * (stop - start) / count
    return np.clip(np.floor(centres).astype(np.int64), 0, side - 1)


def apply_to_boxes(boxes: np.ndarray, geometry: DenseGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Boxes on the canvas, cut to what is kept of the image.

    Args:
        boxes: `(n, 4)`: left, top, right and bottom in pixels of the upright image.

    Returns:
        Boxes `(n, 4)` in pixels of the canvas, float64, and the share of each one's area that is left, `(n,)`: 0 for
        boxes that lie outside, and for those without an area.
    """
    left, top, right, bottom = geometry.box
    height, width = geometry.size
    factors = np.array([width / (right - left), height / (bottom - top)] * 2)
    moved = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) - [left, top, left, top]) * factors
    if geometry.flip:
        moved[:, [0, 2]] = width - moved[:, [2, 0]]
    cut = moved.clip(0, [width, height, width, height])
    before, after = _areas(moved), _areas(cut)
    return cut, np.divide(after, before, out=np.zeros_like(after), where=before > 0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]).clip(0) * (boxes[:, 3] - boxes[:, 1]).clip(0)
