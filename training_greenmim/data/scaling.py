# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What an image processor does to the values of pixels, to be done on the device to whole batches."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image


# Processors round to single precision in several steps.
TOLERANCE = 1e-5
# Size of the images that processors are tried on, in pixels.
SIDE = 8


class PixelScaling(NamedTuple):
    """Normalisation of each channel, and the order of channels after it.

    mean, std: for values in [0, 1], `(channels, 1, 1)`, in the order of the image.
    order: the image's channel that becomes each of the model's: `[2, 1, 0]` makes BGR of RGB.
    """

    mean: torch.Tensor
    std: torch.Tensor
    order: list[int]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1], `(..., channels, height, width)` -> what the model takes."""
        scaled = (images - self.mean) / self.std
        return scaled if self.order == sorted(self.order) else scaled[..., self.order, :, :]

    @staticmethod
    def unit(images: torch.Tensor) -> torch.Tensor:
        """Images of the data loader, uint8, or in [0, 1] with nan for no data, -> in [0, 1] with 0 for it.

        The mean, 0 once normalised, would make patches of equal values, whose layer normalisation has no gradient to
        speak of but that of its epsilon: it explodes.
        """
        return images / 255 if images.dtype == torch.uint8 else torch.nan_to_num(images, nan=0.0)

    def to(self, device: torch.device) -> "PixelScaling":
        """The same on another device."""
        return self._replace(mean=self.mean.to(device), std=self.std.to(device))


def scaling_of(image_processor, channels: int) -> PixelScaling:
    """What a processor does to values of images of the right size, found by trying it.

    Processors have settings of their own (`do_normalize`, `rescale_factor`, EfficientNet's `rescale_offset` and
    `include_top`, MobileViT's `do_flip_channel_order`); what comes out is the same for all of them.

    Args:
        image_processor: any of Transformers.
        channels: of the images, 1 (grey) or 3 (RGB).

    Raises:
        `ValueError`: naming the processor, where it does anything else than scale each channel and reorder them.
    """
    if getattr(image_processor, "image_range", None) is not None:  # of ours: of any depth
        mean, std = (
            torch.tensor(numbers)[:, None, None] for numbers in (image_processor.image_mean, image_processor.image_std)
        )
        return PixelScaling(mean, std, list(range(channels)))
    images = np.zeros((channels + 2, SIDE, SIDE, channels), dtype=np.uint8)
    for channel in range(channels):
        images[1 + channel, ..., channel] = 255
    images[-1] = np.random.default_rng(0).integers(0, 256, images.shape[1:])
    values = _processed(image_processor, images)
    if values is None or values.shape != (channels + 2, channels, SIDE, SIDE):
        shape = None if values is None else tuple(values.shape[1:])
        raise _refusal(image_processor, f"makes {shape} of an image of {(channels, SIDE, SIDE)}")
    black, response = values[0, :, 0, 0], values[1:-1, :, 0, 0]  # response: (channel of the image, of the model)
    slopes = response - black
    order = slopes.abs().argmax(dim=0).tolist()
    if sorted(order) != list(range(channels)):
        raise _refusal(image_processor, "mixes channels")
    std, mean = torch.empty(2, channels, 1, 1, dtype=torch.float64)
    for after, before in enumerate(order):
        std[before] = 1 / slopes[before, after]
        mean[before] = -black[after] * std[before]
    scaling = PixelScaling(mean.float(), std.float(), order)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    difference = (scaling(pixels / 255) - values).abs().max()
    if not difference <= TOLERANCE * max(1, values.abs().max()):
        raise _refusal(image_processor, f"does more than scale values: that differs by {difference:.2g}")
    return scaling


def _processed(image_processor, images: np.ndarray) -> torch.Tensor | None:
    """Values that a processor makes of images as they are; None where it makes no pixels of its own images' size."""
    given = [Image.fromarray(image if image.shape[2] == 3 else image[..., 0]) for image in images]
    try:
        batch = image_processor(given, do_resize=False, do_center_crop=False, return_tensors="pt")
        return batch["pixel_values"].double()
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _refusal(image_processor, reason: str) -> ValueError:
    return ValueError(
        f"The image processor of the model, {type(image_processor).__name__}, {reason}. Training scales and reorders"
        " channels, nothing else: a model with another processor is needed."
    )
