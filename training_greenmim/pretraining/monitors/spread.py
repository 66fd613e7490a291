# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""How far the features of different images lie apart: near 0 when they have collapsed to one."""

import torch

from .features import Features


METRICS = ("feature_std",)
NEEDS_LABELS = False


def measure(features: Features) -> dict[str, float]:
    """Deviation over images of normalised features, mean over dimensions, times the root of their number.

    So 0 is a collapse and 1 what random directions have (https://huggingface.co/papers/2011.10566, figure 2).
    """
    if len(features.pooled) < 2:
        return {}
    normalised = torch.nn.functional.normalize(features.pooled, dim=1)
    return {"feature_std": (normalised.std(dim=0).mean() * normalised.shape[1] ** 0.5).item()}
