# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""How far predictions are from targets, by name: `target_loss` of a configuration."""

from collections.abc import Callable

import torch
from torch import nn


def squared_error(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the last dimension."""
    return nn.functional.mse_loss(predictions, targets, reduction="none").mean(dim=-1)


def smooth_l1(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the last dimension of half the squared error, or of the error less a half where that is over 1."""
    return nn.functional.smooth_l1_loss(predictions, targets, reduction="none").mean(dim=-1)


def cosine_distance(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the last dimension; half the squared distance of L2-normalised vectors."""
    return 1 - nn.functional.cosine_similarity(predictions, targets, dim=-1)


# Functions of (predictions, targets), `(..., values)` each, that return errors `(...)`.
TARGET_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": squared_error,
    "smooth_l1": smooth_l1,
    "cosine": cosine_distance,
}


def reconstruction_loss(
    predictions: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None, kind: str = "mse"
) -> torch.Tensor:
    """Error per unit, averaged over masked units, in at least single precision.

    Args:
        predictions, targets: `(batch, num_units, values)`.
        mask: `(batch, num_units)`, 1 for masked; None = all units count.
        kind: name of the error in `TARGET_LOSSES`.
    """
    targets = targets.to(torch.promote_types(targets.dtype, torch.float32))
    errors = TARGET_LOSSES[kind](predictions.to(targets.dtype), targets)
    return errors.mean() if mask is None else (errors * mask).sum() / mask.sum()
