# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Confusion matrix, as an `evaluate` module."""

import datasets
import evaluate
from sklearn.metrics import confusion_matrix


_DESCRIPTION = "How often each true class (row) is predicted as each class (column)."

_INPUTS = """
Args:
    predictions: predicted class of each sample, an integer.
    references: true class of each sample, an integer.
    labels: the classes in the order of rows and columns; None = those that occur, sorted.

Returns:
    `confusion_matrix`, integers `(classes, classes)`: a row per true class, a column per predicted one.
"""


class ConfusionMatrix(evaluate.Metric):
    """Counts of predictions per true class."""

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

    def _compute(self, predictions, references, labels=None):
        return {"confusion_matrix": confusion_matrix(references, predictions, labels=labels)}
