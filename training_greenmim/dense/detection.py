# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for object detection and instance segmentation: evaluation by COCO's metric, predictions as COCO JSON."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from transformers.utils import logging

from ..classification.metrics import load_shipped
from ..data.images import image_name
from ..runs.card import write_detection_card
from .coco import IMAGE_ID, OBJECTS, encode_mask
from .detecting import Detections, boxes_of, instances_of
from .object_pictures import comparison, draw_objects
from .objects import CollateObjects, EveryObjects, mask_of
from .pictures import prediction_names
from .trainer import PICTURE, DenseTrainer


logger = logging.get_logger(__name__)

# The least score of what pictures show.
SHOWN = 0.5


class DetectionTrainer(DenseTrainer):
    """Trains a model of object detection, or of instance segmentation, and evaluates it on whole images.

    Args:
        with_masks: whether the model is a Mask2Former that finds instances, else one that finds boxes.
        category_ids: COCO's number of each class, for predictions.
        kwargs: those of `ImageTrainer`.
    """

    def __init__(self, *args, with_masks: bool, category_ids: list[int], **kwargs):
        super().__init__(*args, **kwargs)
        self.with_masks, self.category_ids = with_masks, category_ids
        self.train_collator = CollateObjects()
        self.data_collator = CollateObjects(self.args.size_divisor or 1)
        self.found: dict[int, Detections] = {}
        self.shown: dict[int, np.ndarray] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a training batch, augmented; it stops at one that is not finite."""
        self.report_unreadable(inputs["unreadable"])
        images, labels = self.augmentation(inputs["pixel_values"]), inputs["labels"]
        if self.with_masks:
            targets = {
                "mask_labels": [one["masks"].float() for one in labels],
                "class_labels": [one["class_labels"] for one in labels],
            }
        else:
            targets = {"labels": labels}
        outputs = model(pixel_values=images, pixel_mask=inputs["pixel_mask"], **targets)
        loss = outputs.loss.mean()  # Mask2Former's has a dimension
        self.check_finite(loss)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Finds objects and keeps them; returns nothing."""
        inputs = self.on_device(inputs)
        self.report_unreadable(inputs["unreadable"])
        images, filled, sizes = inputs["pixel_values"], inputs["filled"], inputs["size"]
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(pixel_values=self.normalize(images), pixel_mask=inputs["pixel_mask"])
        canvas = images.shape[2:]
        if self.with_masks:
            found = instances_of(outputs, filled, sizes, canvas)
        else:
            found = boxes_of(outputs, filled, sizes, canvas)
        for row, (index, is_readable) in enumerate(zip(inputs["index"].tolist(), inputs["readable"].tolist())):
            if is_readable:
                self.found[index] = found[row]
                self._show(index, images[row, :, : filled[row, 0], : filled[row, 1]], found[row])
        return None, None, None

    def _show(self, index: int, image: torch.Tensor, found: Detections) -> None:
        is_drawn = index < self.args.num_pictures and self.is_world_process_zero()
        if not is_drawn and self.predictions_folder is None:
            return
        # In the image's own size.
        pixels = Image.fromarray(self.pixels_to_look_at(image)).resize(found.size, Image.Resampling.BICUBIC)
        pixels = np.array(pixels)
        if is_drawn:
            self.shown[index] = pixels
        if self.predictions_folder is not None:
            picture = draw_objects(pixels, found.above(SHOWN), self.names)
            path = self.predictions_folder / "overlays" / f"{self.prediction_names[index]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """As `Trainer`'s, with COCO's metric where there are annotations, and a picture; it returns no predictions."""
        self.found, self.shown = {}, {}
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.world_size > 1:
            self.found = dict(gather_object(list(self.found.items())))
        dataset = dataloader.dataset
        if dataset.label_column is not None:
            metrics = self.measure(dataset)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self.shown and self.predictions_folder is None:
            self._draw(dataset)
        return output

    def measure(self, dataset: EveryObjects) -> dict[str, float]:
        """COCO's metric of what was found in the images that could be read, of instances by their masks, and how many
        could not."""
        unreadable = len(dataset) - len(self.found)
        counted = {"unreadable": float(unreadable)} if unreadable else {}
        if not self.found:
            return counted
        metric = load_shipped("coco_map")
        for index, found in sorted(self.found.items()):
            metric.add(prediction=_for_metric(found), reference=self._truth(dataset, index))
        return counted | metric.compute(iou_type="segm" if self.with_masks else "bbox", label_names=self.names)

    def _truth(self, dataset: EveryObjects, index: int) -> dict:
        objects, (width, height) = dataset.records[index][OBJECTS], self.found[index].size
        masks = []
        if self.with_masks:
            masks = [json.dumps(encode_mask(mask_of(objects, i, height, width))) for i in range(len(objects["bbox"]))]
        return {
            "boxes": objects["bbox"],
            "labels": objects["category"],
            "areas": objects["area"],
            "iscrowd": objects["iscrowd"],
            "segmentations": masks,
        }

    def _draw(self, dataset: EveryObjects) -> None:
        """Writes images with their true objects and with those found, for the first images."""
        rows = []
        for index, pixels in sorted(self.shown.items()):
            true = None
            if dataset.label_column is not None:
                true = self._true_detections(dataset, index)
            rows.append((pixels, true, self.found[index].above(SHOWN)))
        self.last_picture = os.path.join(self.args.output_dir, PICTURE)
        os.makedirs(self.args.output_dir, exist_ok=True)
        comparison(rows, self.names).save(self.last_picture)

    def _true_detections(self, dataset: EveryObjects, index: int) -> Detections:
        truth = self._truth(dataset, index)
        boxes = np.array(truth["boxes"], dtype=np.float64).reshape(-1, 4)
        masks = [json.loads(mask) for mask in truth["segmentations"]]
        return Detections(self.found[index].size, boxes, np.array(truth["labels"]), np.ones(len(boxes)), masks)

    def save_predictions(self, dataset: EveryObjects, folder: str) -> dict[str, float]:
        """Predicts images and writes `predictions.json`, a list in COCO's format of results, with `images.json`, which
        gives the images and categories their numbers, and `overlays/`.

        Returns:
            Metrics where there are annotations.
        """
        self.predictions_folder, self.prediction_names = Path(folder), prediction_names(dataset)
        self.predictions_folder.mkdir(parents=True, exist_ok=True)
        try:
            metrics = self.predict(dataset).metrics
        finally:
            self.predictions_folder = None
        if self.is_world_process_zero():
            self._write(dataset, Path(folder))
        return metrics

    def _write(self, dataset: EveryObjects, folder: Path) -> None:
        images, results = [], []
        has_ids = IMAGE_ID in dataset.records.column_names
        for index, found in sorted(self.found.items()):
            record = dataset.records[index]
            number = record[IMAGE_ID] if has_ids else index + 1
            name = image_name(record["image"], f"image {index}")
            images.append({"id": number, "file_name": name, "width": found.size[0], "height": found.size[1]})
            for row, (box, label, score) in enumerate(zip(found.boxes, found.labels, found.scores)):
                entry = {"image_id": number, "category_id": self.category_ids[label]}
                entry |= {"bbox": [round(float(value), 2) for value in box], "score": round(float(score), 6)}
                results.append(entry | ({"segmentation": found.masks[row]} if found.masks else {}))
        categories = [{"id": number, "name": name} for number, name in zip(self.category_ids, self.names)]
        (folder / "predictions.json").write_text(json.dumps(results))
        (folder / "images.json").write_text(json.dumps({"images": images, "categories": categories}))

    def create_model_card(self, **kwargs) -> None:
        """Writes README.md with its pictures; called by `push_to_hub` too."""
        if self.facts is not None and self.is_world_process_zero():
            write_detection_card(self, self.facts)


def _for_metric(found: Detections) -> dict:
    return {
        "boxes": found.boxes.tolist(),
        "labels": found.labels.tolist(),
        "scores": found.scores.tolist(),
        "segmentations": [json.dumps(mask) for mask in found.masks],
    }
