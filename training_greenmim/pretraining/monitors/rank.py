# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""RankMe (https://huggingface.co/papers/2210.02885): how many directions the features use."""

import torch

from .features import ROWS_PER_DIMENSION, Features


METRICS = ("rankme",)
NEEDS_LABELS = False
EPSILON = 1e-7


def measure(features: Features) -> dict[str, float]:
    """RankMe of pooled features, or of units where those are too few; nothing where both are."""
    rows = features.pooled if features.units is None else features.units
    if len(rows) < ROWS_PER_DIMENSION * rows.shape[1]:
        return {}
    return {"rankme": rankme(rows)}


def rankme(rows: torch.Tensor) -> float:
    """`exp` of the entropy of normalised singular values of `(rows, width)` features, which are not centred."""
    # From the small matrix of products: many times faster, and precise enough in double precision.
    rows = rows.double().cpu()
    singular = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()
    shares = singular / singular.sum() + EPSILON
    return torch.exp(-(shares * shares.log()).sum()).item()
