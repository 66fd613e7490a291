# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Top-k accuracy, as an `evaluate` module."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import top_k_accuracy_score


_DESCRIPTION = "Share of the samples whose true class is among the k classes of highest score."

_INPUTS = """
Args:
    prediction_scores: scores of each sample, a number per class.
    references: true class of each sample, an integer.
    k: how many classes count as right: fewer than there are, which is 3 or more.

Returns:
    `top_{k}_accuracy`, from 0 to 1.

Raises:
    `ValueError`: when `k` does not suit the number of classes.
"""


class TopKAccuracy(evaluate.Metric):
    """Share of samples whose class is among the k likeliest."""

    def _info(self):
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "prediction_scores": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )
        # Arrays, not lists of Python numbers; the constructor allows it for one number per sample only.
        info.format = "numpy"
        return info

    def _compute(self, prediction_scores, references, k=5):
        num_classes = prediction_scores.shape[1]
        if num_classes < 3 or not 0 < k < num_classes:
            raise ValueError(
                f"`k` is {k} with scores of {num_classes} classes; at least 3 classes, and a `k` from 1 to one less"
                " than their number, are right."
            )
        accuracy = top_k_accuracy_score(references, prediction_scores, k=k, labels=np.arange(num_classes))
        return {f"top_{k}_accuracy": float(accuracy)}
