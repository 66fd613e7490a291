# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Balanced accuracy, as an `evaluate` module."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import recall_score


_DESCRIPTION = "Mean over the true classes of the share of their samples that is predicted right."

_INPUTS = """
Args:
    predictions: predicted class of each sample, an integer.
    references: true class of each sample, an integer.

Returns:
    `balanced_accuracy`, from 0 to 1; classes without a sample do not count.
"""


class BalancedAccuracy(evaluate.Metric):
    """Mean recall of the classes that `references` hold."""

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
        # Not sklearn's balanced_accuracy_score, which warns at each prediction of a class that has no sample.
        present = np.unique(references)
        recall = recall_score(references, predictions, labels=present, average="macro")
        return {"balanced_accuracy": float(recall)}
