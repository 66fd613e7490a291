# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Macro F1, as an `evaluate` module."""

import datasets
import evaluate
from sklearn.metrics import f1_score


_DESCRIPTION = "Mean over classes of F1, the harmonic mean of precision and recall."

_INPUTS = """
Args:
    predictions: predicted class of each sample, an integer.
    references: true class of each sample, an integer.

Returns:
    `macro_f1`, from 0 to 1; a class counts when it occurs among references or predictions.
"""


class MacroF1(evaluate.Metric):
    """Unweighted mean of the F1 of each class."""

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
        return {"macro_f1": float(f1_score(references, predictions, average="macro"))}
