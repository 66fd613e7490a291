# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Mean intersection over union of class maps, as an `evaluate` module."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import confusion_matrix


_DESCRIPTION = "Intersection over union of the pixels of each class, its mean, and the share of pixels that are right."

_INPUTS = """
Args:
    predictions: class number of each pixel, or maps of these, one for each image.
    references: true class numbers in the same form.
    num_labels: number of classes; default: as many as appear.
    ignore_index: pixels whose reference is this number do not count.
    sample_weight: where predictions and references are numbers, how many pixels each pair stands for; default 1.

Returns:
    `mean_iou`, over the classes that are predicted or true anywhere; `mean_accuracy`, over those that are true
    anywhere; `pixel_accuracy`; and lists by class, `per_class_iou` and `per_class_accuracy`, nan where a class does
    not appear.
"""


class MeanIoU(evaluate.Metric):
    """Counts over all images together: a pixel is as good as another, whichever image it is of."""

    def _info(self):
        number = datasets.Value("int64")
        several = [number, datasets.Sequence(number), datasets.Sequence(datasets.Sequence(number))]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in several],
        )

    def _compute(self, predictions, references, num_labels=None, ignore_index=None, sample_weight=None):
        predicted, true = (
            np.concatenate([np.asarray(part).reshape(-1) for part in parts]) for parts in (predictions, references)
        )
        weights = np.ones(len(true), dtype=np.int64) if sample_weight is None else np.asarray(sample_weight)
        if weights.shape != true.shape:
            raise ValueError(f"`sample_weight` has {len(weights)} numbers for {len(true)} pairs.")
        if ignore_index is not None:
            counts = true != ignore_index
            predicted, true, weights = predicted[counts], true[counts], weights[counts]
        if num_labels is None:
            num_labels = int(max(predicted.max(initial=0), true.max(initial=0))) + 1
        if not len(true):
            return _scores(np.zeros((num_labels, num_labels)))
        beyond = [number for number in (*predicted, *true) if not 0 <= number < num_labels]
        if beyond:
            raise ValueError(f"`num_labels` is {num_labels}, but there is the class number {beyond[0]}.")
        return _scores(confusion_matrix(true, predicted, labels=np.arange(num_labels), sample_weight=weights))


def _scores(counts: np.ndarray) -> dict:
    """Of a confusion matrix: a row for each true class, a column for each predicted one."""
    right, true, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    iou, accuracy = _shares(right, true + predicted - right), _shares(right, true)
    return {
        "mean_iou": _mean(iou),
        "mean_accuracy": _mean(accuracy),
        "pixel_accuracy": float(right.sum() / counts.sum()) if counts.sum() else float("nan"),
        "per_class_iou": iou.tolist(),
        "per_class_accuracy": accuracy.tolist(),
    }


def _shares(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    return np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
