# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Warnings of runs that will come to little: the number that tells, and what to change. Each comes once in a run."""

import math
from collections.abc import Sized
from statistics import median
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from .monitors.features import ROWS_PER_DIMENSION


if TYPE_CHECKING:
    from .trainer import MIMTrainer

logger = logging.get_logger(__name__)

# The fewest images from which a model can learn more than those images themselves.
FEW_IMAGES = 200
# Half of the shortest run that was seen to pay here (docs/results/elpv.md).
FEW_STEPS = 1000
# Two norms in a row so many times the usual one, of so many before, while the loss is above its least by such a share:
# norms alone grow sevenfold on ELPV when the loss begins to fall.
GRADIENT_GROWTH, GRADIENTS_BEFORE, LOSS_RISE = 5, 5, 0.05
# So little a fall of the loss is none, over so many evaluations that span such a share of the run. While the cosine
# ends every loss is flat, hence the share of the peak that the learning rate must still have.
FLAT_FALL, FLAT_EVALUATIONS, FLAT_SHARE, FLAT_LEARNING_RATE = 0.001, 5, 0.2, 0.1
# On ELPV a good run comes down to 0.04 and 2.7 in its first hundred steps; at ten times its learning rate features
# stay at 0.02 and 1.5, at fifty times at 0.0005 and 1.01.
COLLAPSED_STD, COLLAPSED_RANK = 0.01, 2.0
# Grey levels of 255 that an image or unit varies by at least: less is noise of sensors and compression.
CONSTANT = 2.0
CONSTANT_IMAGES, CONSTANT_UNITS = 0.1, 0.5


class Advice(TrainerCallback):
    """Looks at a run where it starts, logs and evaluates, and warns once of each thing that is wrong."""

    def __init__(self, trainer: "MIMTrainer"):
        self.args, self.images, self.config = trainer.args, trainer.train_dataset, trainer.model.config
        self.has_looked = False
        self.said: set[str] = set()

    def say(self, name: str, message: str | None) -> None:
        """Logs a warning of a kind, if there is one, unless that kind was given before."""
        if message is not None and name not in self.said:
            self.said.add(name)
            logger.warning(message)

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(self.images, Sized):
            self.say("images", too_few_images(len(self.images)))
            self.say("steps", too_few_steps(state.max_steps, len(self.images), args))

    def on_log(self, args, state, control, **kwargs):
        self.say("gradient", growing_gradient(state.log_history, args.learning_rate))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step > 0:
            self.say("collapse", collapse(metrics, args.learning_rate))
            self.say("flat", flat_loss(state.log_history, state.max_steps, args.learning_rate))
        if "eval_feature_std" in metrics and "eval_rankme" not in metrics:
            self.say("rank", f"`eval_rankme` is left out: {_rows_needed(self.config)}")

    def look_at(self, images: torch.Tensor) -> None:
        """Looks at the first evaluated images of a run, `(images, channels, height, width)`, uint8 or in [0, 1]."""
        if not self.has_looked:
            self.has_looked = True
            images = images if images.dtype == torch.uint8 else images.nan_to_num() * 255
            constant = constant_images(images)
            self.say("constant", constant)
            if constant is None:
                self.say("background", constant_units(images, self.config.encoder_stride))


def too_few_images(count: int) -> str | None:
    """What to say of a number of training images."""
    if count >= FEW_IMAGES:
        return None
    return (
        f"There are {count} training images, under {FEW_IMAGES}: a model learns little from so few. Add images, they"
        " need no labels, or go on from trained weights with --model_name_or_path."
    )


def too_few_steps(steps: int, images: int, args) -> str | None:
    """What to say of a number of optimizer steps on a number of images."""
    if steps >= FEW_STEPS:
        return None
    epochs = math.ceil(FEW_STEPS * args.total_batch_size / images)
    more = "--max_steps" if args.max_steps > 0 else f"--num_train_epochs {epochs} (now {args.num_train_epochs:g})"
    return (
        f"The run has {steps} steps for its {images} images, under {FEW_STEPS}: raise {more}, or lower"
        f" --per_device_train_batch_size (now {args.per_device_train_batch_size})."
    )


def growing_gradient(log_history: list[dict], learning_rate: float) -> str | None:
    """What to say of the gradient norms and losses of a log, given the peak of the learning rate."""
    logged = [(entry["grad_norm"], entry["loss"]) for entry in log_history if "grad_norm" in entry]
    before, last = logged[:-2], logged[-2:]
    if len(before) < GRADIENTS_BEFORE:
        return None
    usual, norm = median(norm for norm, _ in before), min(norm for norm, _ in last)
    least, loss = min(loss for _, loss in before), min(loss for _, loss in last)
    if norm <= GRADIENT_GROWTH * usual or loss <= (1 + LOSS_RISE) * least:
        return None
    return (
        f"The gradient norm has grown to {norm:.3g}, over {GRADIENT_GROWTH} times its usual {usual:.3g}, and the loss"
        f" has risen from {least:.3g} to {loss:.3g}: the learning rate is too high. Lower --learning_rate (now"
        f" {learning_rate:.3g}) to a third, lengthen --warmup_steps, or give --max_grad_norm {3 * usual:.2g}."
    )


def flat_loss(log_history: list[dict], max_steps: int, learning_rate: float) -> str | None:
    """What to say of the evaluation losses of a log, given the peak of the learning rate."""
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    rates = [entry["learning_rate"] for entry in log_history if "learning_rate" in entry]
    if not evaluations or not rates or rates[-1] < FLAT_LEARNING_RATE * learning_rate:
        return None
    start = evaluations[-1][0] - FLAT_SHARE * max_steps
    count = max(FLAT_EVALUATIONS, sum(step > start for step, _ in evaluations))
    losses = [loss for _, loss in evaluations]
    if len(losses) <= count or min(losses[-count:]) < (1 - FLAT_FALL) * min(losses[:-count]):
        return None
    return (
        f"The evaluation loss has not fallen since {count} evaluations ({min(losses[:-count]):.4g} before,"
        f" {min(losses[-count:]):.4g} since): a longer run brings nothing as it is. Change --learning_rate (now"
        f" {learning_rate:.3g}), to its threefold or, where the loss has risen, a third, or give fewer steps."
    )


def collapse(metrics: dict[str, float], learning_rate: float) -> str | None:
    """What to say of the results of an evaluation."""
    spread, rank = metrics.get("eval_feature_std", math.inf), metrics.get("eval_rankme", math.inf)
    if spread >= COLLAPSED_STD and rank >= COLLAPSED_RANK:
        return None
    return (
        f"The features of different images are nearly the same (feature_std {spread:.3g}, rankme {rank:.3g}): the"
        f" encoder has collapsed. Lower --learning_rate (now {learning_rate:.3g}) and start anew; if it was so at the"
        " start too, look whether the images differ."
    )


def constant_images(images: torch.Tensor) -> str | None:
    """What to say of uint8 images `(images, channels, height, width)` that show nothing."""
    share = (_deviation(images.float(), (2, 3)) < CONSTANT).float().mean().item()
    if share <= CONSTANT_IMAGES:
        return None
    return (
        f"{share:.0%} of the first {len(images)} evaluated images are nearly constant (they vary by less than"
        f" {CONSTANT:g} of 255 grey levels): leave them out of --train_dir or --dataset_name, and stretch images of"
        " more than 8 bits that use a small part of their range."
    )


def constant_units(images: torch.Tensor, unit: int) -> str | None:
    """What to say of images whose units of `unit` pixels a side are mostly background."""
    units = images.float().unflatten(3, (-1, unit)).unflatten(2, (-1, unit))
    share = (_deviation(units, (3, 5)) < CONSTANT).float().mean().item()
    if share <= CONSTANT_UNITS:
        return None
    return (
        f"{share:.0%} of the mask units of the first {len(images)} evaluated images are nearly constant background,"
        " whose normalised pixels are noise: crop the images to what they show, or give --config_overrides"
        " norm_pix_loss=false."
    )


def _deviation(values: torch.Tensor, pixels: tuple[int, int]) -> torch.Tensor:
    """Standard deviation over two dimensions of pixels, of the channel (dimension 1) that varies most."""
    return values.std(dim=pixels, correction=0).amax(dim=1)


def _rows_needed(config) -> str:
    rows, width = config.unit_grid[0] * config.unit_grid[1], config.hidden_size
    return (
        f"it needs {ROWS_PER_DIMENSION} features for each of their {width} dimensions, which are the units of"
        f" {math.ceil(ROWS_PER_DIMENSION * width / rows)} images here. Evaluate on more images: --validation_dir,"
        " --train_val_split or --probe_dir."
    )
