# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Recipes of `run_image_classification.py`: named sets of arguments, each of which a flag or file may change."""

import math
from pathlib import Path

from ..runs.auto import Choice, Facts, shared_choices
from ..runs.models import read_config
from ..runs.starts import becomes_greenmim


# What SimMIM and GreenMIM fine-tune with (https://huggingface.co/papers/2111.09886, appendix A).
_PUBLISHED = {
    "num_train_epochs": 100,
    "warmup_steps": 0.2,
    "weight_decay": 0.05,
    "max_grad_norm": 5.0,
    "min_crop_scale": 0.08,
    "rand_augment": "m9-n2-mstd0.5-inc1",
    "color_jitter": 0.4,
    "random_erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_switch_probability": 0.5,
    "label_smoothing_factor": 0.1,
}
# `auto` takes the published recipe from so many images on.
MANY_IMAGES = 50_000
# The batch that the rates of `auto` are for.
BATCH = 32
RECIPES = {
    "swin-base": {
        **_PUBLISHED,
        "base_learning_rate": 1.25e-3,
        "layer_decay": 0.9,
        "drop_path_rate": 0.1,
        "min_learning_rate": 2.5e-7,
        "warmup_learning_rate": 2.5e-7,
    },
    "swin-large": {
        **_PUBLISHED,
        "base_learning_rate": 1e-3,
        "layer_decay": 0.8,
        "drop_path_rate": 0.3,
        "min_learning_rate": 3.5e-7,
        "warmup_learning_rate": 2e-7,
    },
    "small-data": {
        "base_learning_rate": 5e-3,
        "drop_path_rate": 0.1,
        "num_train_epochs": 30,
        "warmup_steps": 0.1,
        # Small crops may leave out what the label is about.
        "min_crop_scale": 0.8,
        "balance": True,
    },
    # MAE's linear probe (https://huggingface.co/papers/2111.06377, appendix A.1): lr 0.1 per 256 images.
    "linear": {
        "lars": True,
        "base_learning_rate": 0.2,
        "weight_decay": 0.0,
        "num_train_epochs": 90,
        "warmup_steps": 0.11,
        "max_grad_norm": 0.0,
        "min_crop_scale": 0.2,
    },
}
# How augmentation here differs from timm's, for the help of the recipes.
DEVIATIONS = (
    "RandAugment rounds to 8 bits after an operation where Pillow's enhancements truncate."
    " Its rotations, shears and translations are bicubic with torch's coefficient (-0.75 where Pillow has -0.5)."
    " Posterizing keeps at least one bit."
    " There are only the operations whose severity increases with the magnitude (inc1)."
    " Colour jitter draws the order of its adjustments once a batch, not for each image."
    " Random erasing draws the aspect ratio uniformly from [0.3, 1] or from [1, 1/0.3], with equal chances, instead of"
    " log-uniformly, and clips a rectangle that is larger than the image instead of drawing again."
)
HELP = (
    "Set of arguments: swin-base and swin-large as published (for a total batch of 768, which"
    " per_device_train_batch_size, gradient_accumulation_steps and processes make up; rates follow the batch),"
    " small-data (the default) for a few thousand images, linear (the default with --mode linear) as MAE's, auto: what"
    " the images and the device ask for, told with reasons. Flags and files win over it. layer_decay is for GreenMIM"
    " only. Deviations from what was published: layer_decay also lowers"
    f" the minimum and warm-up rates of lower layers. {DEVIATIONS}"
)


def recipe_defaults(chosen: dict) -> dict:
    """Arguments that the chosen recipe sets.

    Args:
        chosen: all arguments as given, with their defaults.

    Raises:
        `ValueError`: for an unknown recipe.
    """
    name = chosen["recipe"] or ("linear" if chosen["mode"] == "linear" else "small-data")
    if name not in RECIPES:
        raise ValueError(f"`recipe` is {name!r}; it must be one of {', '.join((*RECIPES, 'auto'))}.")
    values = dict(RECIPES[name])
    if chosen["learning_rate"] is not None:
        del values["base_learning_rate"]
    return values


def auto(facts: Facts, chosen: dict) -> dict[str, Choice]:
    """Arguments for the images; docs/recipes.md has the measurements behind each.

    Args:
        chosen: all arguments as given, with their defaults.
    """
    starts = chosen["config_name"] or chosen["model_name_or_path"]
    if chosen["mode"] in ("knn", "embed") or not starts:
        return {}
    if facts.count >= MANY_IMAGES:
        name = "linear" if chosen["mode"] == "linear" else "swin-base"
        reason = f"as recipe {name}, from {MANY_IMAGES:,} images on; not measured here"
        return {name: Choice(value, reason) for name, value in RECIPES[name].items()}
    batch = min(BATCH, 2 ** int(math.log2(max(1, facts.count))))
    steps = facts.count // batch  # whole batches
    choices = {
        "num_train_epochs": Choice(max(8, math.ceil(120 / steps)), "at least 8, and at least 120 steps"),
        "per_device_train_batch_size": Choice(batch, "few images make few steps, so batches are small"),
        "min_crop_scale": Choice(1.0, "what a label is about may lie anywhere in an image"),
        "balance": Choice(True, "classes of few images may differ much in size"),
        **shared_choices(facts),
    }
    return choices | (_linear() if chosen["mode"] == "linear" else _finetune(chosen))


def _linear() -> dict[str, Choice]:
    return {
        "lars": Choice(False, "LARS is for batches of thousands"),
        "base_learning_rate": Choice(0.16, f"0.01 for {BATCH} images with AdamW"),
        "weight_decay": Choice(0.0, "a linear layer on few features needs none"),
    }


def _finetune(chosen: dict) -> dict[str, Choice]:
    choices = {
        "warmup_steps": Choice(0.1, "as recipe small-data"),
        "drop_path_rate": Choice(0.1, "as recipe small-data"),
    }
    name = chosen["model_name_or_path"]
    if not name:
        return choices | {"base_learning_rate": Choice(0.016, f"0.001 for {BATCH} images from scratch")}
    if not becomes_greenmim(name, "model_name_or_path"):
        return choices | {"base_learning_rate": Choice(0.008, f"0.0005 for {BATCH} images: layers have one rate")}
    if _learned_pixels(name):
        rate, decay, reason = 0.048, 0.65, f"0.003 for {BATCH} images at the head"
    else:
        rate, decay = 0.016, 0.5
        reason = f"0.001 for {BATCH} images at the head, for what has learned more than pixels"
    return choices | {
        "base_learning_rate": Choice(rate, reason),
        "layer_decay": Choice(decay, "what is pre-trained changes less the further it is from the head"),
    }


def _learned_pixels(name: str) -> bool:
    """Whether a model was pre-trained here on pixels or their gradients, rather than on features or by labels."""
    values = {} if Path(name).is_file() else read_config(name, "model_name_or_path")
    is_ours = values.get("model_type") == "greenmim"
    return is_ours and values.get("reconstruction_target", "pixels") != "features"
