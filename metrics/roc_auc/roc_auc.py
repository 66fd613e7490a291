# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Area under the ROC curve for two classes, as an `evaluate` module."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import roc_auc_score


_DESCRIPTION = "Probability that a sample of class 1 scores higher than one of class 0, where a tie counts half."

_INPUTS = """
Args:
    prediction_scores: score of each sample, a number, higher where class 1 is likelier.
    references: true class of each sample, 0 or 1.

Returns:
    `roc_auc`, from 0 to 1; NaN unless both classes have samples.

Raises:
    `ValueError`: when a reference is neither 0 nor 1.
"""


class RocAuc(evaluate.Metric):
    """Area under the receiver operating characteristic of two classes."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"prediction_scores": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            format="numpy",
        )

    def _compute(self, prediction_scores, references):
        classes = np.unique(references)
        if not np.isin(classes, (0, 1)).all():
            raise ValueError(f"`references` hold the classes {classes.tolist()}; this metric is for classes 0 and 1.")
        if len(classes) < 2:
            return {"roc_auc": float("nan")}
        return {"roc_auc": float(roc_auc_score(references, prediction_scores))}
