# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` for image classification: fine-tuning and linear probes, averaged weights, predictions."""

import csv
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.trainer_utils import PredictionOutput, SchedulerType
from transformers.utils import logging

from modeling_greenmim import GreenMIMConfig
from modeling_greenmim.planning import plan_dense

from ..compat import make_next_training_create_a_scheduler
from ..data.image_dataset import EpochShuffle
from ..data.images import image_name
from ..optimization import cosine_schedule, lars
from ..runs.card import write_classifier_card
from ..runs.extras import is_installed, require
from ..runs.memory import LossOfBatch
from ..runs.trainer import ImageTrainer
from .ema import EMACallback, EMATrainerMixin
from .metrics import compute_metrics, confusion_matrix, save_confusion_matrix
from .probes import folded_head


logger = logging.get_logger(__name__)


def loss_of_batch(config: PreTrainedConfig, size: tuple[int, int]) -> LossOfBatch:
    """The loss of classification, to estimate its memory by; see `LossOfBatch`.

    Args:
        config: of the model.
        size: height and width of its images.
    """
    shape = (getattr(config, "num_channels", 3), *size)

    def planned(batch: int, device: torch.device) -> Callable[[nn.Module], torch.Tensor]:
        if isinstance(config, GreenMIMConfig):
            plan_dense(config, size, device)  # made here, where tensors have values, and found there

        def loss_of(model: nn.Module) -> torch.Tensor:
            logits = model(pixel_values=torch.rand(batch, *shape, device=device)).logits.float()
            targets = torch.zeros(batch, dtype=torch.int64, device=device)
            return nn.functional.cross_entropy(logits, targets)

        return loss_of

    return planned


class ClassificationTrainer(EMATrainerMixin, ImageTrainer):
    """Trains an image classifier of Transformers on uint8 images that are augmented and normalised on the device.

    Args:
        metrics: loaded metrics (`load_metrics`).
        class_weights: weight of each class in the training loss; None = all alike.
        kwargs: those of `ImageTrainer`.
    """

    # The loss is a mean over a micro-batch, also where the model could take `num_items_in_batch`.
    loss_is_scaled_for_ga = False

    def __init__(self, *args, metrics: list, class_weights: list[float] | None = None, **kwargs):
        super().__init__(*args, compute_metrics=self.measure, **kwargs)
        self.metrics = metrics
        config, args = self.model.config, self.args
        self.label_names_in_order = [config.id2label[number] for number in range(config.num_labels)]
        self.class_weights = None
        if class_weights is not None:
            self.class_weights = torch.tensor(class_weights, device=args.device)
        self.augmentation, self.mixing = self.normalize, None
        mixes = bool(args.mixup or args.cutmix)
        if mixes or args.rand_augment or args.color_jitter or args.random_erasing:
            require("kornia", "augmentation")
            from .augmentation import BatchAugmentation, Mixing  # here, for other runs do without kornia

            self.augmentation = BatchAugmentation(
                args.rand_augment, args.color_jitter, args.random_erasing, self.scaling
            )
            if mixes:
                self.mixing = Mixing(config.num_labels, args.mixup, args.cutmix, args.mixup_switch_probability)
        if args.ema_decay is not None:
            self.add_callback(EMACallback(args.ema_decay))

    def build_sampler(self, length: int) -> EpochShuffle:
        """Order of the training images, in whole batches: mixing and batch norm need no lone image."""
        batch = self.args.train_batch_size * self.args.world_size
        return EpochShuffle(length, self.args.seed, self.args.repeated_augmentation, multiple_of=batch)

    def create_optimizer(self, model=None):
        """LARS, or the arguments' optimizer, with a learning rate for each layer."""
        if self.optimizer is None and self.args.lars:
            self.optimizer = lars(self.groups_by_layer(model), self.args.learning_rate)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Linear warm-up and cosine, from and to the arguments' rates; any other schedule is Transformers'."""
        args = self.args
        if self.lr_scheduler is None and args.lr_scheduler_type == SchedulerType.COSINE:
            self.lr_scheduler = cosine_schedule(
                self.optimizer if optimizer is None else optimizer,
                args.get_warmup_steps(num_training_steps),
                num_training_steps,
                args.learning_rate,
                args.scaled(args.min_learning_rate),
                args.scaled(args.warmup_learning_rate),
            )
            make_next_training_create_a_scheduler(self)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a training batch of uint8 images, augmented and mixed; it stops at one that is not finite."""
        self.report_unreadable(inputs["unreadable"])
        self._keep_frozen_layers_in_evaluation_mode()
        images, targets = self.augmentation(inputs["pixel_values"]), inputs["labels"]
        if self.mixing is not None:
            images, targets = self.mixing(images, targets)
        outputs = model(pixel_values=images)
        loss = nn.functional.cross_entropy(
            outputs.logits.float(),
            targets,
            weight=self.class_weights,
            label_smoothing=self.args.label_smoothing_factor,
        )
        self.check_finite(loss)
        return (loss, outputs) if return_outputs else loss

    def _keep_frozen_layers_in_evaluation_mode(self) -> None:
        # A frozen encoder drops no path and keeps its statistics; what has no parameters is not frozen.
        if all(parameter.requires_grad for parameter in self.model.parameters()):
            return
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """No loss, but logits, which images were readable, and labels of an evaluation batch."""
        inputs = self.on_device(inputs)
        self.report_unreadable(inputs["unreadable"])
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(pixel_values=self.normalize(inputs["pixel_values"])).logits.float()
        return None, (logits, inputs["readable"]), inputs.get("labels")

    def measure(self, prediction) -> dict[str, float]:
        """Metrics of an evaluation, and its loss: the mean over images that count, however they were batched."""
        logits, readable = prediction.predictions
        metrics = compute_metrics(self.metrics, logits, prediction.label_ids, readable)
        counted = readable & np.isfinite(logits).all(axis=1)
        if counted.any():
            logits, labels = (torch.from_numpy(values[counted]) for values in (logits, prediction.label_ids))
            metrics["loss"] = nn.functional.cross_entropy(logits, labels).item()
        return metrics

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluates the weights, then the averaged ones if there are (metrics named `eval_ema_...`)."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.ema is not None and self.ema.num_updates:
            with self.ema.applied(self.model):
                metrics |= super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_ema")
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As `Trainer`'s, and writes the confusion matrix of labelled images as a picture.

        Its predictions, those of `predict` too, are two arrays: the logits, `(images, classes)`, and which images
        could be read, `(images,)`; the logits of others mean nothing.
        """
        if self.args.world_size > 1:
            self._share_batch_statistics()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        draws = is_installed("matplotlib") and self.is_world_process_zero()
        if output.label_ids is not None and self.compute_metrics is not None and draws:
            path = os.path.join(self.args.output_dir, f"{metric_key_prefix}_confusion_matrix.png")
            os.makedirs(self.args.output_dir, exist_ok=True)
            logits, readable = output.predictions
            counts = confusion_matrix(logits, output.label_ids, readable)
            save_confusion_matrix(counts, self.label_names_in_order, path)
        return output

    def _share_batch_statistics(self) -> None:
        # Each process has those of its own last images; the ones that are saved are the first one's.
        for module in self.model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, src=0)

    def save_averaged_model(self) -> None:
        """Writes the model with averaged weights into the folder `ema` of the output folder, a probe's head folded."""
        with self.ema.applied(self.model), folded_head(self.model):
            # As an internal call: any other would also push the output folder with the averaged weights in it.
            super(EMATrainerMixin, self).save_model(os.path.join(self.args.output_dir, "ema"), _internal_call=True)

    def save_predictions(self, output: PredictionOutput, dataset, path: str) -> None:
        """Writes a CSV file: image, its label if known, the predicted class, and the probability of each class.

        An unreadable image has neither class nor probabilities; where the model's numbers are not finite there is no
        class, and the probabilities are `nan`.
        """
        if not self.is_world_process_zero():
            return
        names = self.label_names_in_order
        logits, readable = output.predictions
        finite = np.isfinite(logits).all(axis=1)
        if not finite[readable].all():
            logger.warning(f"Predictions that are not finite numbers: {int((readable & ~finite).sum())}.")
        probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
        labelled = output.label_ids is not None
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *(["label"] if labelled else []), "prediction", *names])
            for index, row in enumerate(probabilities):
                source = dataset.records[index][dataset.column]
                line = [image_name(source, f"image {index}")]
                if labelled:
                    line.append(names[output.label_ids[index]])
                if not readable[index]:
                    line += [""] * (1 + len(names))
                elif not finite[index]:
                    line += ["", *["nan"] * len(names)]
                else:
                    line += [names[row.argmax()], *(f"{value:.6f}" for value in row)]
                writer.writerow(line)

    def create_model_card(self, **kwargs) -> None:
        """Writes README.md with its pictures; called by `push_to_hub` too."""
        if self.facts is not None and self.is_world_process_zero():
            write_classifier_card(self, self.facts)
