# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Recipes of `run_image_classification.py`: named sets of arguments, each of which a flag or file may change."""

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
    " small-data (the default) for a few thousand images, linear (the default with --mode linear) as MAE's. Flags and"
    " files win over it. layer_decay is for GreenMIM only. Deviations from what was published: layer_decay also lowers"
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
        raise ValueError(f"`recipe` is {name!r}; it must be one of {', '.join(RECIPES)}.")
    values = dict(RECIPES[name])
    if chosen["learning_rate"] is not None:
        del values["base_learning_rate"]
    return values
