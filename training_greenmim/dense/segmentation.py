# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for semantic segmentation: crops in training, whole images in windows in evaluation and prediction."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Mask2FormerForUniversalSegmentation
from transformers.utils import logging

from ..data.image_dataset import EpochShuffle
from ..runs.card import write_segmentation_card
from .metrics import count_pixels, segmentation_metrics
from .models import class_scores
from .pairs import EveryPair, collate_crops, collate_whole
from .pictures import comparison, prediction_names, save_class_map, save_overlay
from .trainer import PICTURE, DenseTrainer
from .windows import score_in_windows


logger = logging.get_logger(__name__)


class SegmentationTrainer(DenseTrainer):
    """Trains a model of semantic segmentation on crops, and evaluates it on whole images of any sizes.

    Metrics are of all pixels together (`metrics/mean_iou`), and `loss` is the cross-entropy of a labelled pixel.

    Args:
        ignore_index: number in masks of pixels that count nowhere.
        kwargs: those of `ImageTrainer`.
    """

    def __init__(self, *args, ignore_index: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_collator, self.data_collator = collate_crops, collate_whole
        self.ignore_index = ignore_index
        self._start_counting()

    def build_sampler(self, length: int) -> EpochShuffle:
        """Order of the training images, in whole batches: batch norm needs no lone image."""
        batch = self.args.train_batch_size * self.args.world_size
        return EpochShuffle(length, self.args.seed, multiple_of=batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a training batch, augmented; it stops at one that is not finite."""
        self.report_unreadable(inputs["unreadable"])
        images, labels = self.augmentation(inputs["pixel_values"]), inputs["labels"].long().clone()
        # The mean over no pixel is no number: a batch without any takes a made-up one, and teaches nothing.
        is_labelled = (labels != self.ignore_index).any()
        labels[0, 0, 0] = torch.where(is_labelled, labels[0, 0, 0], int(self.ignore_index == 0))
        outputs = model(pixel_values=images, **self._targets(labels))
        loss = outputs.loss * is_labelled
        self.check_finite(loss)
        return (loss, outputs) if return_outputs else loss

    def _targets(self, labels: torch.Tensor) -> dict:
        """Class numbers `(batch, height, width)` as the model's forward takes them."""
        if not isinstance(self.model, Mask2FormerForUniversalSegmentation):
            return {"labels": labels}
        # A mask for each class that an image has; what is ignored is in none.
        classes = [image.unique() for image in labels]
        classes = [numbers[numbers != self.ignore_index] for numbers in classes]
        masks = [(image == numbers[:, None, None]).float() for image, numbers in zip(labels, classes)]
        return {"class_labels": classes, "mask_labels": masks}

    def _start_counting(self) -> None:
        size = len(self.names)
        self.counts = torch.zeros(size, size, dtype=torch.int64)
        self.loss_sum, self.rows = 0.0, []

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predicts whole images, counts their pixels, and writes or keeps what pictures need; returns nothing."""
        inputs = self.on_device(inputs)
        self.report_unreadable(inputs["unreadable"])
        size = len(self.names)
        counts = torch.zeros(len(inputs["index"]), size, size, dtype=torch.int64, device=self.args.device)
        losses = torch.zeros(len(inputs["index"]), dtype=torch.float64, device=self.args.device)
        batch = zip(inputs["index"].tolist(), inputs["readable"].tolist(), inputs["pixel_values"], inputs["labels"])
        for row, (index, is_readable, image, labels) in enumerate(batch):
            if is_readable:
                classes = self._predict_image(model, image, labels, counts[row], losses[row])
                self._show(index, image, labels, classes)
        gathered, losses = self.accelerator.gather_for_metrics((counts, losses))
        self.counts += gathered.sum(dim=0).cpu()
        self.loss_sum += losses.sum().item()
        return None, None, None

    @torch.no_grad()
    def _predict_image(self, model, image, labels, counts, loss) -> np.ndarray:
        """Class numbers `(height, width)` of an image; adds to its counts and its loss where it is labelled."""
        classes = torch.empty(image.shape[1:], dtype=torch.int64, device=image.device)
        args = self.args

        def score(windows: torch.Tensor) -> torch.Tensor:
            with self.compute_loss_context_manager():
                return class_scores(model(pixel_values=self.normalize(windows)), windows.shape[2:])

        stripes = score_in_windows(image, score, args.eval_window, args.eval_overlap, args.eval_batch_size)
        for part, scores in stripes:
            classes[part] = scores.argmax(dim=0)
            if labels is not None:
                true = labels[part].long()
                counts += count_pixels(classes[part], true, len(self.names), self.ignore_index)
                loss += nn.functional.cross_entropy(
                    scores[None], true[None], ignore_index=self.ignore_index, reduction="sum"
                )
        return classes.cpu().numpy()

    def _show(self, index: int, image: torch.Tensor, labels: torch.Tensor | None, classes: np.ndarray) -> None:
        is_drawn = index < self.args.num_pictures and self.is_world_process_zero()
        if not is_drawn and self.predictions_folder is None:
            return
        pixels = self.pixels_to_look_at(image)
        if is_drawn:
            self.rows.append((pixels, None if labels is None else labels.cpu().numpy(), classes))
        if self.predictions_folder is not None:
            name = self.prediction_names[index]
            save_class_map(classes, len(self.names), self.predictions_folder / "masks" / f"{name}.png")
            save_overlay(pixels, classes, len(self.names), self.predictions_folder / "overlays" / f"{name}.png")

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """As `Trainer`'s, with metrics of the pixels of all images, and a picture; it returns no predictions."""
        self._start_counting()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = segmentation_metrics(self.counts.numpy(), self.names)
        if metrics:
            metrics["loss"] = self.loss_sum / int(self.counts.sum())
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self.rows and self.predictions_folder is None:
            self._draw()
        return output

    def _draw(self) -> None:
        """Writes images, truth and predictions of the first images, and hands them to TensorBoard."""
        self.last_picture = os.path.join(self.args.output_dir, PICTURE)
        os.makedirs(self.args.output_dir, exist_ok=True)
        comparison(self.rows, self.names, self.ignore_index).save(self.last_picture)

    def save_predictions(self, dataset: EveryPair, folder: str) -> dict[str, float]:
        """Predicts images and writes `masks/`, class numbers with a palette, and `overlays/`, by the images' names.

        Returns:
            Metrics where there are masks.
        """
        self.predictions_folder, self.prediction_names = Path(folder), prediction_names(dataset)
        try:
            return self.predict(dataset).metrics
        finally:
            self.predictions_folder = None

    def create_model_card(self, **kwargs) -> None:
        """Writes README.md with its pictures; called by `push_to_hub` too."""
        if self.facts is not None and self.is_world_process_zero():
            write_segmentation_card(self, self.facts)
