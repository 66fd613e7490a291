# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What evaluations of pre-training measure on features of whole images. A new monitor is a file and its line here."""

from types import ModuleType

from . import linear_probe, neighbours, rank, spread
from .features import Features


# Each has `METRICS`, the names of what it measures, `NEEDS_LABELS`, and `measure(features)`, which returns numbers by
# these names, without those that such features do not allow.
MONITORS: tuple[ModuleType, ...] = (neighbours, linear_probe, rank, spread)


def measure(features: Features) -> dict[str, float]:
    """What every monitor finds in the features of an evaluation; nothing in features that are not finite numbers."""
    found: dict[str, float] = {}
    if not features.pooled.isfinite().all():
        return found
    for monitor in MONITORS:
        if features.labels is not None or not monitor.NEEDS_LABELS:
            found |= monitor.measure(features)
    return found


def check_metric(name: str | None, has_labels: bool) -> None:
    """Refuses a `metric_for_best_model` that needs labels where there are none.

    Raises:
        `ValueError`: naming what would bring labels.
    """
    if name is None or has_labels:
        return
    if any(monitor.NEEDS_LABELS and name.removeprefix("eval_") in monitor.METRICS for monitor in MONITORS):
        raise ValueError(
            f"`metric_for_best_model` is {name!r}, which needs labelled images: give `probe_dir`, a folder with a"
            " sub-folder for each class, or a data set whose evaluation part has a label column."
        )
