# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Counts of pixels by true and predicted class, and the metrics of them."""

import math

import numpy as np
import torch

from ..classification.metrics import load_shipped


def count_pixels(predicted: torch.Tensor, true: torch.Tensor, num_labels: int, ignore_index: int) -> torch.Tensor:
    """Counts, int64 `(num_labels, num_labels)`: a row for each true class, a column for each predicted one.

    Args:
        predicted, true: class numbers of the same pixels, in any shape.
        ignore_index: pixels whose true number is this one do not count.
    """
    counted = true != ignore_index
    cells = true[counted].long() * num_labels + predicted[counted].long()
    return torch.bincount(cells, minlength=num_labels**2).view(num_labels, num_labels)


def segmentation_metrics(counts: np.ndarray, names: list[str]) -> dict[str, float]:
    """`mean_iou`, `mean_accuracy`, `pixel_accuracy`, and `iou_<name>` of each class that appears.

    Args:
        counts: as of `count_pixels`; empty where no pixel is labelled.
        names: of the classes.
    """
    true, predicted = np.nonzero(counts)
    if not len(true):
        return {}
    scores = load_shipped("mean_iou").compute(
        predictions=predicted.tolist(),
        references=true.tolist(),
        sample_weight=counts[true, predicted].tolist(),
        num_labels=len(names),
    )
    results = {name: scores[name] for name in ("mean_iou", "mean_accuracy", "pixel_accuracy")}
    for name, value in zip(names, scores["per_class_iou"]):
        results[f"iou_{name.replace(' ', '_')}"] = value
    return {name: value for name, value in results.items() if not math.isnan(value)}
