# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Top-1 accuracy, as an `evaluate` module."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


_DESCRIPTION = "Share of the samples whose predicted class is the true one."

_INPUTS = """
Args:
    predictions: predicted class of each sample, an integer.
    references: true class of each sample, an integer.

Returns:
    `accuracy`, from 0 to 1.
"""


class Accuracy(evaluate.Metric):
    """Share of right predictions."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            format="numpy",
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(accuracy_score(references, predictions))}
