# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What models say of an image, as objects in its own pixels: boxes and, of instances, masks."""

from dataclasses import dataclass, field

import numpy as np
import torch

from .coco import box_of_mask, encode_mask


# Detections of an image that are kept, as many as COCO counts.
MOST = 100
# Masks are resized so many at a time, which bounds the memory that large images need.
MASKS_AT_ONCE = 8


@dataclass
class Detections:
    """What was found in an image, best first.

    Attributes:
        size: width and height of the image in pixels.
        boxes: `(n, 4)`: left, top, width, height in pixels of the image.
        labels: class numbers, `(n,)`.
        scores: in [0, 1], `(n,)`.
        masks: COCO's run-length codes, for each box; empty where there are none.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: list[dict] = field(default_factory=list)

    def above(self, score: float) -> "Detections":
        """Those of at least a score."""
        kept = np.flatnonzero(self.scores >= score)
        masks = [self.masks[index] for index in kept] if self.masks else []
        return Detections(self.size, self.boxes[kept], self.labels[kept], self.scores[kept], masks)


def boxes_of(outputs, filled: torch.Tensor, sizes: torch.Tensor, canvas: tuple[int, int]) -> list[Detections]:
    """Boxes that a model of object detection with a score for each class (RT-DETR) finds in a batch.

    Args:
        outputs: `logits`, `(batch, queries, classes)`, and `pred_boxes`, `(batch, queries, 4)`: centre, width and
            height as shares of the canvas.
        filled: `(batch, 2)`: height and width of what is no padding.
        sizes: `(batch, 2)`: width and height of the images in pixels.
        canvas: height and width of the batch.
    """
    scores = outputs.logits.float().sigmoid()
    classes = scores.shape[-1]
    scores, places = scores.flatten(1).topk(min(MOST, scores[0].numel()))
    found = []
    for row, (image_filled, size) in enumerate(zip(filled.tolist(), sizes.tolist())):
        queries = places[row] // classes
        centre_x, centre_y, width, height = outputs.pred_boxes[row][queries].double().cpu().unbind(dim=1)
        edges = torch.stack([centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2])
        factors = (canvas[1] * size[0] / image_filled[1], canvas[0] * size[1] / image_filled[0])
        left, right = ((edges[i] * factors[0]).clamp(0, size[0]) for i in (0, 2))
        top, bottom = ((edges[i] * factors[1]).clamp(0, size[1]) for i in (1, 3))
        boxes = torch.stack([left, top, right - left, bottom - top], dim=1).numpy()
        labels = (places[row] % classes).cpu().numpy()
        found.append(Detections(tuple(size), boxes, labels, scores[row].double().cpu().numpy()))
    return found


def instances_of(outputs, filled: torch.Tensor, sizes: torch.Tensor, canvas: tuple[int, int]) -> list[Detections]:
    """Instances that a Mask2Former finds in a batch, scored as in its paper: class times mean of the mask.

    Args:
        outputs: `class_queries_logits`, `(batch, queries, classes + 1)`, and `masks_queries_logits`, `(batch, queries,
            height, width)` at a quarter of the batch's size.
        filled, sizes, canvas: as of `boxes_of`.
    """
    probabilities = outputs.class_queries_logits.float().softmax(dim=-1)[..., :-1]
    classes = probabilities.shape[-1]
    found = []
    for row, size in enumerate(sizes.tolist()):
        scores, places = probabilities[row].flatten().topk(min(MOST, probabilities[row].numel()))
        masks = outputs.masks_queries_logits[row].float()
        entries = []
        for start in range(0, len(places), MASKS_AT_ONCE):
            part = slice(start, start + MASKS_AT_ONCE)
            logits = _in_the_image(masks[places[part] // classes], filled[row].tolist(), size, canvas)
            for place, score, mask in zip(places[part].tolist(), scores[part].tolist(), logits):
                entries.append(_instance(mask, place % classes, score))
        found.append(_sorted([entry for entry in entries if entry is not None], tuple(size)))
    return found


def _in_the_image(masks: torch.Tensor, filled: list[int], size: list[int], canvas: tuple[int, int]) -> torch.Tensor:
    """Logits of masks of the padded image -> of the image in its own pixels.

    They are cut at the canvas' size: the image may end within a pixel of the masks.
    """
    masks = torch.nn.functional.interpolate(masks[None], tuple(canvas), mode="bilinear", align_corners=False)
    kept = masks[:, :, : filled[0], : filled[1]]
    return torch.nn.functional.interpolate(kept, (size[1], size[0]), mode="bilinear", align_corners=False)[0]


def _instance(logits: torch.Tensor, label: int, score: float) -> tuple | None:
    inside = logits > 0
    if not inside.any():
        return None
    score *= logits.sigmoid()[inside].mean().item()
    mask = inside.cpu().numpy()
    left, top, right, bottom = box_of_mask(mask)
    return score, label, (left, top, right - left, bottom - top), encode_mask(mask)


def _sorted(entries: list[tuple], size: tuple[int, int]) -> Detections:
    entries = sorted(entries, key=lambda entry: -entry[0])
    scores, labels, boxes, masks = zip(*entries) if entries else ([], [], [], [])
    return Detections(
        size,
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(scores, dtype=np.float64),
        list(masks),
    )
