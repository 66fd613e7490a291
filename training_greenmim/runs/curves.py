# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The loss of a run as a picture."""

from typing import TYPE_CHECKING

from .extras import require


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_curve(log_history: list[dict]) -> "Figure":
    """Training and evaluation loss over steps, from the log of `Trainer`.

    Raises:
        `MissingPackageError`: without matplotlib.
    """
    figure = require("matplotlib.figure", "pictures").Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation, fixed mask", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure
