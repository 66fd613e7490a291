# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Histograms of oriented gradients as target (MaskFeat, https://huggingface.co/papers/2112.09133)."""

import math

import torch
from torch import nn

from .configuration_greenmim import GreenMIMConfig
from .layout import patchify


ORIENTATIONS = 9
# Side of a cell in pixels.
CELL = 8
# Keeps flat cells at 0, as scikit-image does.
EPSILON = 1e-5


class HogTarget:
    """Histograms of gradient orientations in cells of 8x8 px of each channel, each of Euclidean length 1.

    They are those of scikit-image (`orientations=9, pixels_per_cell=(8, 8), cells_per_block=(1, 1), block_norm="L2"`,
    channel by channel): gradients are central differences over the whole image, across the borders of units, and 0
    across those of the image; a pixel gives the whole length of its gradient to one of 9 bins of 20 degrees, without
    sign; a cell with histogram h is h / sqrt(|h|**2 + 1e-5**2), h a mean over its pixels. A unit's values are in
    (cell row, cell column, channel, orientation) order.

    MaskFeat's code takes Sobel gradients of an image mirrored at its borders instead, may weigh pixels by a Gaussian
    window of 16x16 px, and counts angles from the other axis.

    Histograms are of the normalised `pixel_values`. A channel's mean has no gradient and its standard deviation scales
    all of them, which cancels but for the 1e-5: far below the 3e-4 that one level of one pixel of an 8-bit image makes
    in a cell. So nearly flat cells count as much as others, with what noise they have; cells that are flat are 0.

    Raises:
        `ValueError`: where cells do not fill a unit.
    """

    description = "histograms of oriented gradients in cells of 8x8 px"
    to_pixels = None

    def __init__(self, config: GreenMIMConfig):
        unit = config.encoder_stride
        if unit % CELL:
            raise ValueError(
                f"`reconstruction_target` is 'hog', but a mask unit of {unit}x{unit} px does not consist of cells of"
                f" {CELL}x{CELL} px; choose `patch_size` and `depths` that make its side,"
                f" patch_size * 2 ** (stages - 1), a multiple of {CELL}."
            )
        self.cells = unit // CELL
        self.width = config.num_channels * ORIENTATIONS * self.cells**2

    @torch.no_grad()
    def targets(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `(batch, channels, height, width)` -> `(batch, num_units, cells**2 * channels * 9)`."""
        pixel_values = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        histograms = orientation_histograms(pixel_values)
        histograms = histograms / (histograms.square().sum(dim=2, keepdim=True) + EPSILON**2).sqrt()
        return patchify(histograms.flatten(1, 2), self.cells)


def orientation_histograms(images: torch.Tensor) -> torch.Tensor:
    """Histograms `(batch, channels, 9, cell rows, cell columns)` of images `(batch, channels, height, width)`."""
    across_rows = nn.functional.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
    across_columns = nn.functional.pad(images[..., 2:] - images[..., :-2], (1, 1))
    length = torch.hypot(across_rows, across_columns)
    # Without sign an angle is in [0, pi). Those of the other half are turned round before, not after, `atan2`: a
    # horizontal gradient then has the angle 0 exactly, whichever its sign.
    turned = (across_rows < 0) | ((across_rows == 0) & (across_columns < 0))
    angle = torch.atan2(across_rows.abs(), torch.where(turned, -across_columns, across_columns))
    # Angles just below pi may be rounded to it.
    orientation = (angle * (ORIENTATIONS / math.pi)).long().clamp(max=ORIENTATIONS - 1)
    # A bin at a time: no tensor has nine values of each pixel, and sums have one order on every device.
    bins = [nn.functional.avg_pool2d(length * (orientation == number), CELL) for number in range(ORIENTATIONS)]
    return torch.stack(bins, dim=2)
