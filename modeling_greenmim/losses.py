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
    predictions: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    kind: str = "mse",
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Error per unit, averaged over masked units, in at least single precision.

    Args:
        predictions, targets: `(batch, num_units, values)`.
        mask: `(batch, num_units)`, 1 for masked; None = all units count.
        kind: name of the error in `TARGET_LOSSES`.
        counts: booleans like targets; values where they are False have no part, nor have units without any other.
    """
    targets = targets.to(torch.promote_types(targets.dtype, torch.float32))
    predictions = predictions.to(targets.dtype)
    if counts is not None:
        return _error_where(counts, predictions, targets, mask, TARGET_LOSSES[kind])
    errors = TARGET_LOSSES[kind](predictions, targets)
    return errors.mean() if mask is None else (errors * mask).sum() / mask.sum()


def _error_where(counts, predictions, targets, mask, error) -> torch.Tensor:
    share = counts.float().mean(dim=-1)
    # Means are over all values of a unit; those that do not count have no error.
    errors = error(predictions * counts, targets * counts) / share.clamp(min=1e-6)
    weights = (share > 0).float() if mask is None else mask * (share > 0)
    return (errors * weights).sum() / weights.sum().clamp(min=1)
