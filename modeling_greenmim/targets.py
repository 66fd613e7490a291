# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What pre-training predicts of each mask unit, by name. A new target is a file with a class, and a line here."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from .configuration_greenmim import GreenMIMConfig
from .hog import HogTarget
from .layout import patchify


class ReconstructionTarget(Protocol):
    """What a class in `TARGETS` has; it is made with the configuration of the model.

    Attributes:
        width: values to predict of each unit.
        description: what is predicted, in words of the model card.
        to_pixels: `(predictions, pixel_values)` -> pixels of units, as `patchify` cuts them: predictions
            `(batch, num_units, self.width)` of images as a picture. None where predictions cannot be turned into
            pixels; such a target has no pictures of reconstructions.
    """

    width: int
    description: str
    to_pixels: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None

    def targets(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `(batch, channels, height, width)` -> `(batch, num_units, self.width)`, at least single precision."""


class PixelTarget:
    """The pixels of a unit in (row, column, channel) order, normalised by its own mean and variance if so configured.

    Raises:
        `ValueError`: where a unit has a single value, which has no variance, and is to be normalised.
    """

    def __init__(self, config: GreenMIMConfig):
        self.unit, self.normalizes = config.encoder_stride, config.norm_pix_loss
        self.width = self.unit**2 * config.num_channels
        self.description = "pixels normalised per unit" if self.normalizes else "pixels"
        if self.normalizes and self.width == 1:
            raise ValueError(
                "`norm_pix_loss` is True, but a mask unit of one pixel and one channel is a single value, which has no"
                " variance; set it to False, or choose a larger `patch_size`."
            )

    def targets(self, pixel_values: torch.Tensor, valid_pixels: torch.Tensor | None = None) -> torch.Tensor:
        """Images `(batch, channels, height, width)` -> `(batch, num_units, unit**2 * channels)`.

        Args:
            valid_pixels: booleans of the same shape; a unit is normalised by those values of it that are True.
        """
        patches = self._patches(pixel_values)
        if not self.normalizes:
            return patches
        return (
            normalize_units(patches) if valid_pixels is None else normalize_units_by(patches, self.cut(valid_pixels))
        )

    def cut(self, pixels: torch.Tensor) -> torch.Tensor:
        """Values of pixels, `(batch, channels, height, width)`, as the targets have them."""
        return patchify(pixels, self.unit)

    def to_pixels(self, predictions: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Scales predictions back by the mean and variance of each unit of the images."""
        predictions = predictions.float()
        if not self.normalizes:
            return predictions
        mean, deviation = unit_statistics(self._patches(pixel_values))
        return predictions * deviation + mean

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.cut(pixel_values)
        return patches.to(torch.promote_types(patches.dtype, torch.float32))


class FeatureTarget:
    """Features of each unit that the caller gives, such as those of a teacher: `target_width` values."""

    description = "features"
    to_pixels = None

    def __init__(self, config: GreenMIMConfig):
        self.width = config.target_width

    def targets(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Refuses: these targets are not made of images.

        Raises:
            `ValueError`: always.
        """
        raise ValueError(
            "`targets` is None, but `reconstruction_target` is 'features': give what is to be predicted of each unit,"
            f" of shape (batch, num_units, {self.width})."
        )


# What `reconstruction_target` of a configuration names.
TARGETS: dict[str, type[ReconstructionTarget]] = {
    "pixels": PixelTarget,
    "hog": HogTarget,
    "features": FeatureTarget,
}


def unit_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation `sqrt(variance + 1e-6)` of each unit, `(batch, num_units, 1)`."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def normalize_units(patches: torch.Tensor) -> torch.Tensor:
    """Patches `(batch, num_units, values)` less their unit's mean, divided by its deviation."""
    values = patches.shape[-1]
    # The fused layer normalisation divides by the biased deviation; ours is the unbiased one.
    share = (values - 1) / values
    return nn.functional.layer_norm(patches, (values,), eps=1e-6 * share) * share**0.5


def normalize_units_by(patches: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`normalize_units` by the mean and variance of those values that count, booleans of the same shape."""
    number = counts.sum(dim=-1, keepdim=True)
    mean = (patches * counts).sum(dim=-1, keepdim=True) / number.clamp(min=1)
    centred = patches - mean
    variance = (centred.square() * counts).sum(dim=-1, keepdim=True) / (number - 1).clamp(min=1)
    return centred / (variance + 1e-6).sqrt()
