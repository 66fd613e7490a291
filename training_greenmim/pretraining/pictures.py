# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what a model reconstructs."""

import numpy as np
import torch
from PIL import Image

from modeling_greenmim.modeling_greenmim import GreenMIMForPreTraining


# Pixels between the pictures of a grid.
GAP = 4


@torch.no_grad()
def reconstruct(
    model: GreenMIMForPreTraining, pixel_values: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked input and reconstruction of normalised images, for targets that have pixels (`to_pixels` is not None).

    The model's target makes pixels of its predictions (normalised ones are scaled back by each unit's own mean and
    variance), and visible units are pasted in.

    Args:
        pixel_values: `(batch, channels, height, width)`.
        logits, mask: the model's outputs for them.

    Returns:
        Two tensors of the same shape; masked units of the first are 0 (the mean colour).
    """
    patches, hidden = model.patchify(pixel_values.float()), mask[..., None].bool()
    predicted = model.target.to_pixels(logits, pixel_values)
    size = tuple(pixel_values.shape[2:])
    masked = model.unpatchify(patches.masked_fill(hidden, 0.0), size)
    return masked, model.unpatchify(torch.where(hidden, predicted, patches), size)


def picture_grid(
    columns: list[torch.Tensor], mean: list[float], std: list[float], chosen: list[int] | None = None
) -> Image.Image:
    """One row per image, one column per kind of picture.

    Args:
        columns: normalised images `(batch, channels, height, width)` each.
        mean, std: what they were normalised with, per channel.
        chosen: channels, from 1, that are drawn as red, green and blue, or one as grey; default: the first three, or
            the first.

    Raises:
        `ValueError`: for channels that there are not.
    """
    shape = (-1, 1, 1)
    mean, std = torch.tensor(mean).view(shape), torch.tensor(std).view(shape)
    images = torch.stack([column.float().cpu() for column in columns], dim=1) * std + mean
    images = (images.clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    images = images[..., drawn_channels(chosen, images.shape[-1])]
    rows, count, height, width, channels = images.shape
    grid = np.full((rows * (height + GAP) - GAP, count * (width + GAP) - GAP, channels), 255, dtype=np.uint8)
    for row in range(rows):
        for column in range(count):
            top, left = row * (height + GAP), column * (width + GAP)
            grid[top : top + height, left : left + width] = images[row, column]
    return Image.fromarray(grid[..., 0] if channels == 1 else grid)


def drawn_channels(chosen: list[int] | None, channels: int) -> list[int]:
    """Numbers, from 0, of the channels that a picture shows; see `picture_grid`.

    Raises:
        `ValueError`: for channels that there are not.
    """
    if chosen is None:
        return [0, 1, 2] if channels >= 3 else [0]
    if len(chosen) not in (1, 3) or not all(1 <= number <= channels for number in chosen):
        raise ValueError(f"`picture_channels` is {chosen}; one channel or three are needed, of 1 to {channels}.")
    return [number - 1 for number in chosen]
