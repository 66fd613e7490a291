# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""In which order a file merges patches, by what its model reconstructs of photographs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps

from modeling_greenmim import GreenMIMForPreTraining
from modeling_greenmim.image_processing_greenmim import build_image_processor
from modeling_greenmim.losses import reconstruction_loss
from modeling_greenmim.masking import sample_noise
from modeling_greenmim.pixels import to_8_bit

from .checkpoint import CheckpointError
from .reading import clear_errors


ORDERS = ("row", "column")
# Where the decoder puts latents: each at its own unit, or at that of another visible one, as the published code does.
PLACEMENTS = ("own", "scrambled")
MASKS, MAX_PHOTOGRAPHS = 8, 8
# An order is told by losses that are lower under every mask, and by so much, and than those of predicting 0.
MARGIN = 0.01


@dataclass(frozen=True)
class OrderLosses:
    """Losses of reconstruction by the order of merging and the placement of latents.

    Attributes:
        of_masks: for each (order, placement) the loss under each mask, `(MASKS,)`.
        of_zeros: loss of predicting 0, the mean of a target: what has learned nothing is no better, `(MASKS,)`.
        num_views: how many images were measured.
    """

    of_masks: dict[tuple[str, str], torch.Tensor]
    of_zeros: torch.Tensor
    num_views: int

    def order(self) -> str | None:
        """The order that the losses tell, each with the placement that suits it; None where they tell neither."""
        best = {order: self.of_masks[order, self._placement(order)] for order in ORDERS}
        for order, other in (ORDERS, ORDERS[::-1]):
            if (best[order] < (1 - MARGIN) * torch.minimum(best[other], self.of_zeros)).all():
                return order
        return None

    def _placement(self, order: str) -> str:
        return min(PLACEMENTS, key=lambda placement: self.of_masks[order, placement].mean())

    def table(self) -> str:
        """The mean losses as a small table."""
        lines = [
            f"Loss of reconstruction ({self.num_views} views of photographs, {MASKS} masks; predicting 0:"
            f" {self.of_zeros.mean():.4f}), by where the decoder puts latents:",
            f"{'order of merging':<18}{'own place':>11}{'scrambled':>11}",
        ]
        for order in ORDERS:
            losses = [self.of_masks[order, placement].mean() for placement in PLACEMENTS]
            lines.append(f"{order:<18}" + "".join(f"{loss:>11.4f}" for loss in losses))
        return "\n".join(lines)


@torch.no_grad()
def measure_orders(models: dict[str, GreenMIMForPreTraining], photographs: list[Image.Image]) -> OrderLosses:
    """Losses of a model that predicts pixels, converted under each of `ORDERS`; all see the same views and masks."""
    config = models["row"].config
    images = [view for photograph in photographs for view in square_views(photograph)]
    pixel_values = build_image_processor(config)(images, return_tensors="pt").pixel_values
    targets = models["row"].target.targets(pixel_values)
    generator = torch.Generator().manual_seed(0)
    losses = {(order, placement): [] for order in ORDERS for placement in PLACEMENTS}
    of_zeros = []
    for _ in range(MASKS):
        noise = sample_noise(targets.shape[1], generator=generator)
        for order in ORDERS:
            encoded = models[order].greenmim(pixel_values, noise=noise)
            visible = encoded.visible_units
            if order == ORDERS[0]:
                shuffle = torch.randperm(visible.shape[1], generator=generator)
                of_zeros.append(reconstruction_loss(torch.zeros_like(targets), targets, encoded.mask))
            for placement, units in zip(PLACEMENTS, (visible, visible[:, shuffle])):
                logits = models[order].decoder(encoded.last_hidden_state, units, config.unit_grid)
                losses[order, placement].append(reconstruction_loss(logits, targets, encoded.mask))
    return OrderLosses({key: torch.stack(of) for key, of in losses.items()}, torch.stack(of_zeros), len(images))


def square_views(photograph: Image.Image) -> list[Image.Image]:
    """The squares at both ends and in the middle of a photograph, as high as it; one of a square."""
    width, height = photograph.size
    side = min(width, height)
    places = dict.fromkeys((int(share * (width - side)), int(share * (height - side))) for share in (0, 0.5, 1))
    return [photograph.crop((left, top, left + side, top + side)) for left, top in places]


def read_photographs(folder: str | Path | None = None) -> list[Image.Image]:
    """The first images of a folder by name, at most `MAX_PHOTOGRAPHS`; default: the two that scikit-learn brings.

    Raises:
        `CheckpointError`: for a folder without images, or with one that cannot be read.
    """
    if folder is None:
        from sklearn.datasets import load_sample_images  # slow to import

        return [Image.fromarray(pixels) for pixels in load_sample_images().images]
    with clear_errors(f"`photographs` {str(folder)!r}"):
        known = Image.registered_extensions()
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in known)
        photographs = [to_8_bit(ImageOps.exif_transpose(Image.open(path))) for path in paths[:MAX_PHOTOGRAPHS]]
    if not photographs:
        raise CheckpointError(f"`photographs` is {str(folder)!r}, a folder without images that Pillow reads.")
    return photographs
