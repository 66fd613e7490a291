# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""COCO's mean average precision of boxes or masks, as an `evaluate` module."""

import contextlib
import io
import json

import datasets
import evaluate
import numpy as np
from pycocotools import mask as codes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


_DESCRIPTION = "Mean average precision of object detection as COCO defines it, computed by pycocotools."

_INPUTS = """
Args:
    predictions: for each image `boxes` (left, top, width, height in pixels), `labels` (class numbers), `scores`, and
        `segmentations` (COCO's run-length codes as JSON; an empty list where boxes are judged).
    references: for each image `boxes`, `labels` and `segmentations` likewise, `areas` in pixels and `iscrowd`, 0 or 1.
    iou_type: what overlaps: `bbox` or `segm`.
    label_names: names of the classes for the results; their numbers by default.
    max_detections: of each image that count, those of highest score.

Returns:
    `map`, from 0 to 1: the mean over IoU thresholds 0.5, 0.55, ..., 0.95 and over classes that `references` hold;
    `map_50` and `map_75` at one threshold; `map_small`, `map_medium` and `map_large` of objects below 32 x 32 pixels,
    up to 96 x 96, and above; `mar`, the mean of the largest recalls; `map_of_NAME` and `map_50_of_NAME` of each class.
    What no object of `references` defines is left out.
"""


class CocoMap(evaluate.Metric):
    """Mean average precision of boxes or masks."""

    def _info(self):
        numbers, texts = datasets.List(datasets.Value("float64")), datasets.List(datasets.Value("string"))
        shared = {"boxes": datasets.List(numbers), "labels": datasets.List(datasets.Value("int64"))}
        shared["segmentations"] = texts
        features = {
            "predictions": {**shared, "scores": numbers},
            "references": {**shared, "areas": numbers, "iscrowd": datasets.List(datasets.Value("int64"))},
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, iou_type="bbox", label_names=None, max_detections=100):
        if iou_type not in ("bbox", "segm"):
            raise ValueError(f"`iou_type` is {iou_type!r}; it must be bbox or segm.")
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints tables
            found = _entries(predictions, iou_type, "scores")
            truth = _truth(references, found, iou_type)
            labels = truth.getCatIds()
            # Predictions of classes that `references` do not hold count nowhere.
            found = [one for one in found if one["category_id"] in labels]
            if not found:
                return _nothing_found(labels, label_names)
            judged = COCOeval(truth, truth.loadRes(found), iou_type)
            judged.params.maxDets = [1, 10, max_detections]
            judged.evaluate()
            judged.accumulate()
            # Unlike its own summary, which is for 100 detections only.
            return _results(judged, labels, label_names)


def _truth(references, found: list[dict], iou_type: str) -> COCO:
    truth = COCO()
    entries = _entries(references, iou_type, None)
    masked = entries + found if iou_type == "segm" else []
    sizes = {one["image_id"]: one["segmentation"]["size"] for one in masked}
    truth.dataset = {
        # pycocotools asks for the size of images with masks.
        "images": [
            {"id": number, **dict(zip(("height", "width"), sizes.get(number, ())))}
            for number in range(1, len(references) + 1)
        ],
        # Number 0 stands for none among matches.
        "annotations": [{"id": number, **entry} for number, entry in enumerate(entries, 1)],
        "categories": [{"id": number} for number in sorted({entry["category_id"] for entry in entries})],
    }
    truth.createIndex()
    return truth


def _entries(images, iou_type: str, scores: str | None) -> list[dict]:
    """Objects of all images, as pycocotools takes them."""
    entries = []
    for number, image in enumerate(images, 1):
        for index, (box, label) in enumerate(zip(image["boxes"], image["labels"])):
            entry = {"image_id": number, "category_id": label, "bbox": list(box)}
            if scores:
                entry["score"] = image["scores"][index]
            else:
                entry |= {"area": image["areas"][index], "iscrowd": image["iscrowd"][index]}
            if iou_type == "segm":
                entry["segmentation"] = json.loads(image["segmentations"][index])
                entry["area"] = float(codes.area(entry["segmentation"])) if scores else entry["area"]
                if scores:
                    del entry["bbox"]  # which would take the mask's place
            entries.append(entry)
    return entries


def _nothing_found(labels: list[int], label_names) -> dict[str, float]:
    zeros = dict.fromkeys(("map", "map_50", "map_75", "mar"), 0.0) if labels else {}
    for label in labels:
        zeros |= {f"map_of_{_name(label, label_names)}": 0.0, f"map_50_of_{_name(label, label_names)}": 0.0}
    return zeros


def _results(judged: COCOeval, labels: list[int], label_names) -> dict[str, float]:
    # (thresholds, recalls, classes, areas, numbers of detections); -1 = undefined
    precision, recall = judged.eval["precision"], judged.eval["recall"]
    results = {
        "map": _mean(precision[:, :, :, 0, 2]),
        "map_50": _mean(precision[0, :, :, 0, 2]),
        "map_75": _mean(precision[5, :, :, 0, 2]),
        "map_small": _mean(precision[:, :, :, 1, 2]),
        "map_medium": _mean(precision[:, :, :, 2, 2]),
        "map_large": _mean(precision[:, :, :, 3, 2]),
        "mar": _mean(recall[:, :, 0, 2]),
    }
    for number, label in enumerate(labels):
        name = _name(label, label_names)
        results[f"map_of_{name}"] = _mean(precision[:, :, number, 0, 2])
        results[f"map_50_of_{name}"] = _mean(precision[0, :, number, 0, 2])
    return {name: value for name, value in results.items() if value is not None}


def _mean(values: np.ndarray) -> float | None:
    values = values[values > -1]
    return float(values.mean()) if len(values) else None


def _name(label: int, label_names) -> str:
    return str(label) if label_names is None else label_names[label]
