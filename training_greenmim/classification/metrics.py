# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Metrics of image classification: `evaluate` modules, shipped or from elsewhere, and the picture of confusions."""

import contextlib
import numbers
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
from huggingface_hub import is_offline_mode
from transformers.utils import logging

from ..compat import evaluate_endpoint, evaluate_offline
from ..runs.extras import require


if TYPE_CHECKING:
    # Imported where metrics are loaded: it brings much of SciPy, and other runs do without.
    import evaluate

logger = logging.get_logger(__name__)

# Each is an `evaluate` module `<name>/<name>.py` in the folder of metrics.
SHIPPED_METRICS = ("accuracy", "top_k_accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "confusion_matrix")

# The default k of top-k accuracy; with no more classes than that, every prediction would count as right.
TOP_K = 5

# Samples that a metric is given at a time, as Python numbers.
SAMPLES_AT_A_TIME = 1024

# Seconds to wait for the Hub to answer.
HUB_TIMEOUT = 5

# A picture of more classes than these shows no counts in its cells, and no names; letters of a name beyond these go.
MOST_CLASSES_WITH_COUNTS = 20
MOST_CLASSES_WITH_NAMES = 100
LONGEST_NAME = 24


def default_metrics(num_labels: int) -> list[str]:
    """Names of the shipped metrics that tell something of so many classes."""
    names = ["accuracy", "balanced_accuracy", "macro_f1"]
    if num_labels == 2:
        names.append("roc_auc")
    if num_labels > TOP_K:
        names.append("top_k_accuracy")
    return names


def load_metrics(names: list[str] | None, num_labels: int) -> "list[evaluate.EvaluationModule]":
    """Loads metrics, and tries each on a made-up sample of every class.

    Any number of processes may do so at once. The network is asked only for a metric of the Hub.

    Args:
        names: each a shipped metric, a path of an `evaluate` module (the folder or the file) or a metric of the Hub;
            a shipped one goes before the Hub's of that name. None = those that suit the number of classes. A module
            runs as code: name only what you trust.
        num_labels: number of classes.

    Raises:
        `ValueError`: when a name cannot be loaded, or does not suit class predictions of so many classes.
    """
    metrics = []
    for name in default_metrics(num_labels) if names is None else names:
        metric = _load(name)
        _try_out(metric, name, num_labels)
        metrics.append(metric)
    return metrics


def load_shipped(name: str) -> "evaluate.EvaluationModule":
    """A metric of the folder metrics/."""
    import evaluate

    return evaluate.load(str(_shipped_folder() / name), keep_in_memory=True)


def _load(name: str) -> "evaluate.EvaluationModule":
    import evaluate

    reachable = True
    try:
        if name in SHIPPED_METRICS:
            return load_shipped(name)
        if not _is_name_on_hub(name):
            return evaluate.load(os.path.abspath(name), module_type="metric", keep_in_memory=True)
        reachable = _hub_answers()
        with contextlib.nullcontext() if reachable else evaluate_offline():
            return evaluate.load(name, module_type="metric", keep_in_memory=True)
    # A module is any code and may fail in any way.
    except Exception as error:
        reason = str(error)
        if isinstance(error, FileNotFoundError) and not reachable:
            reason = f"it is not cached, and the Hub at {evaluate_endpoint()} could not be reached"
        raise ValueError(
            f"`metrics` holds {name!r}, which could not be loaded: {reason.rstrip('.')}. Right are {SHIPPED_METRICS},"
            " the path of an `evaluate` module, and the name of a metric on the Hub."
        ) from error


def _shipped_folder() -> Path:
    """The folder of metrics: in the package where the project is installed, beside it in a clone."""
    installed = Path(__file__).parents[1] / "metric_modules"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "metrics"


def _is_name_on_hub(name: str) -> bool:
    # As `evaluate` sees it: a file or folder that holds such a module goes before the Hub's of that name.
    could_be = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not name.endswith(".py")
    return bool(could_be) and not Path(name, Path(name).name + ".py").is_file()


def _hub_answers() -> bool:
    # `evaluate` itself knows nothing of HF_HUB_OFFLINE and waits minutes for a network that swallows its requests.
    if is_offline_mode():
        return False
    import requests  # here, for metrics of the Hub only

    try:
        requests.head(evaluate_endpoint(), timeout=HUB_TIMEOUT)
    except requests.RequestException:
        return False
    return True


def _try_out(metric: "evaluate.EvaluationModule", name: str, num_labels: int) -> None:
    """Computes a metric once, so that one that does not suit fails before training and not after it."""
    try:
        _compute(metric, np.eye(num_labels, dtype=np.float32), np.arange(num_labels))
    except Exception as error:
        raise ValueError(
            f"`metrics` holds {name!r}, which cannot judge predictions of {num_labels} classes: {error}"
        ) from error


def compute_metrics(
    metrics: "list[evaluate.EvaluationModule]",
    logits: np.ndarray,
    labels: np.ndarray,
    readable: np.ndarray | None = None,
) -> dict[str, float]:
    """What metrics say of predictions.

    A metric with an input `prediction_scores` is given scores: the logits where it takes a row per sample, and where
    it takes a number per sample the logit of class 1 less that of class 0. Any other is given `predictions`, the
    classes of highest logit. All are given `references`, the labels.

    Args:
        logits: `(samples, classes)`.
        labels: `(samples,)`, integers.
        readable: `(samples,)`, whether the image could be read; None = all. Others are left out.

    Returns:
        Every result that is a single number; those that are undefined (NaN) are left out and reported once. The number
        of images that could not be read is `unreadable`, that of readable images whose logits are not finite is
        `non_finite`; both are left out of everything else, and where nothing remains there is nothing else.

    Raises:
        `ValueError`: when the shapes do not fit.
    """
    counted, left_out = _counted(logits, labels, readable)
    results = {name: float(number) for name, number in left_out.items() if number}
    if "non_finite" in results:
        logger.warning(f"{left_out['non_finite']} predictions are not finite numbers; metrics leave them out.")
    logits, labels = logits[counted], labels[counted]
    if not len(labels):
        logger.warning_once("There is no metric, because no image has a prediction.")
        return results
    for metric in metrics:
        for key, value in _compute(metric, logits, labels).items():
            if not isinstance(value, numbers.Real):
                continue
            if np.isnan(value):
                logger.warning_once(f"{key} is left out: it is undefined for these labels and predictions.")
            else:
                results[key] = float(value)
    return results


def confusion_matrix(logits: np.ndarray, labels: np.ndarray, readable: np.ndarray | None = None) -> np.ndarray:
    """Counts of predictions, integers `(classes, classes)`: a row per true class, a column per predicted one.

    Args:
        logits, labels, readable: as for `compute_metrics`.
    """
    counted, _ = _counted(logits, labels, readable)
    logits, labels = logits[counted], labels[counted]
    if not len(labels):
        return np.zeros((logits.shape[1], logits.shape[1]), dtype=np.int64)
    inputs = {"predictions": logits.argmax(axis=1), "references": labels}
    return _load("confusion_matrix").compute(**inputs, labels=np.arange(logits.shape[1]))["confusion_matrix"]


def _counted(logits: np.ndarray, labels: np.ndarray, readable: np.ndarray | None) -> tuple[np.ndarray, dict[str, int]]:
    """Which samples count, and how many of the others there are of each sort."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"`logits` have the shape {logits.shape} and `labels` the shape {labels.shape};"
            " (samples, classes) and (samples,) is right."
        )
    if readable is None:
        readable = np.ones(len(labels), dtype=bool)
    counted = readable & np.isfinite(logits).all(axis=1)
    return counted, {"unreadable": int((~readable).sum()), "non_finite": int((readable & ~counted).sum())}


def _compute(metric: "evaluate.EvaluationModule", logits: np.ndarray, labels: np.ndarray) -> dict:
    name, inputs = _input_of(metric, logits)
    for start in range(0, len(labels), SAMPLES_AT_A_TIME):
        part = slice(start, start + SAMPLES_AT_A_TIME)
        # Lists: of these `evaluate` takes scores five times as fast as of rows of arrays.
        metric.add_batch(**{name: inputs[part].tolist()}, references=labels[part].tolist())
    return metric.compute()


def _input_of(metric: "evaluate.EvaluationModule", logits: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and value of what a metric judges."""
    features = metric.features if isinstance(metric.features, datasets.Features) else metric.features[0]
    if "prediction_scores" not in features:
        return "predictions", logits.argmax(axis=1)
    if not isinstance(features["prediction_scores"], datasets.Value):
        return "prediction_scores", logits
    if logits.shape[1] != 2:
        raise ValueError(f"{metric.name} is for two classes, not {logits.shape[1]}.")
    # Orders samples as the probability of class 1 does, without rounding to 1.
    return "prediction_scores", logits[:, 1] - logits[:, 0]


def save_confusion_matrix(matrix: np.ndarray, label_names: list[str], path: str | Path) -> None:
    """Draws a confusion matrix: true classes downwards, predicted ones across, coloured by share of the true class.

    Cells hold their counts where there are few classes; many classes are numbered, not named.

    Args:
        matrix: counts, `(classes, classes)`.
        label_names: name of each class.
        path: of the picture, whose suffix says its format.

    Raises:
        `ValueError`: when matrix and names do not fit.
        `MissingPackageError`: without matplotlib.
    """
    size = len(label_names)
    if matrix.shape != (size, size):
        raise ValueError(
            f"`matrix` has the shape {matrix.shape}, but `label_names` holds {size} names; ({size}, {size}) is right."
        )
    side = min(max(4.5, 0.6 * size), 11)
    figure = require("matplotlib.figure", "pictures").Figure(figsize=(side + 1.5, side + 0.5), layout="constrained")
    axes = figure.subplots()
    # A true class without samples has no shares.
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    if size <= MOST_CLASSES_WITH_NAMES:
        _name_classes(axes, label_names)
    if size <= MOST_CLASSES_WITH_COUNTS:
        for row, column in np.ndindex(size, size):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{matrix[row, column]}", ha="center", va="center", color=color)
    figure.savefig(path, dpi=120)


def _name_classes(axes, label_names: list[str]) -> None:
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in label_names]
    # 7 inches are 500 points; a dollar sign is no formula here.
    style = {"fontsize": min(10, 500 / len(names)), "parse_math": False}
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 3 else 0, **style)
    axes.set_yticks(ticks, names, **style)
