# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of `run_object_detection.py`, and its recipes: named sets of them, which a flag or file may change."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..runs.arguments import check_at_least
from .arguments import DenseDataArguments, DenseModelArguments, DenseTrainingArguments
from .models import is_finished, saved_processing
from .recipes import values_of


# Of batches for finished models whose images keep their aspect, where their processor does not tell.
SIZE_DIVISOR = 32
# Tasks, the heads that serve them, the first of each by default, and the recipe without another.
TASKS = {"detection": ("rt_detr_v2",), "instances": ("mask2former",)}
RECIPES = {
    # RT-DETRv2 on COCO (https://huggingface.co/papers/2407.17140, and its published configuration).
    "rt-detr": {
        "learning_rate": 1e-4,
        "layer_decay": 0.9,
        "weight_decay": 1e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2000,
        "num_train_epochs": 72,
        "max_grad_norm": 0.1,
        "crop_size": 640,
        "scale_range": [0.25, 1.4],
        "color_jitter": 0.3,
    },
    # Mask2Former with a Swin on COCO's instances (https://huggingface.co/papers/2112.01527, section 4.1 and appendix).
    "mask2former": {
        "learning_rate": 1e-4,
        "layer_decay": 0.9,
        "weight_decay": 0.05,
        "lr_scheduler_type": "linear",
        "warmup_steps": 10,
        "num_train_epochs": 50,
        "drop_path_rate": 0.3,
        "max_grad_norm": 0.01,
        "crop_size": 1024,
        "scale_range": [0.1, 2.0],
        "size_divisor": 32,
    },
    "small-data": {
        "learning_rate": 1e-3,
        "layer_decay": 0.9,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "num_train_epochs": 60,
        "drop_path_rate": 0.1,
        "max_grad_norm": 5.0,
        "crop_size": 320,
        "scale_range": [0.75, 1.5],
    },
}
# Heads of Transformers' size take most of the time of a small encoder.
SMALL_HEADS = {
    "detection": "d_model=128,encoder_hidden_dim=128,encoder_ffn_dim=256,decoder_ffn_dim=256,decoder_layers=3"
    ",hidden_expansion=0.5,num_queries=100,num_denoising=50",
    "instances": "hidden_dim=128,feature_size=128,mask_feature_size=128,encoder_layers=2,decoder_layers=4"
    ",dim_feedforward=256,encoder_feedforward_dim=256,num_queries=50",
}
HELP = (
    "Set of arguments: rt-detr and mask2former as published for COCO (for batches of 16), or small-data (the default)"
    " for a few hundred images. Flags and files win over it. Deviations from what was published: layer_decay takes the"
    " place of a tenth of the rate for the whole backbone; rt-detr averages no weights, and crops and shrinks by a"
    " factor in place of crops by overlap, zooming out and batches of several sizes; mask2former's rate falls linearly"
    " where it fell in two steps at the end."
)


def recipe_defaults(chosen: dict) -> dict:
    """Arguments that the chosen recipe sets.

    Args:
        chosen: all arguments as given, with their defaults.

    Raises:
        `ValueError`: for an unknown recipe, and for a checkpoint that is not there.
    """
    name = chosen["recipe"] or "small-data"
    values = values_of(RECIPES, name)
    if chosen["model_name_or_path"] and is_finished(chosen["model_name_or_path"]):
        values |= _sizes_of(chosen["model_name_or_path"])
    elif name == "small-data" and chosen["task"] in SMALL_HEADS:
        values["head_overrides"] = SMALL_HEADS[chosen["task"]]
    if chosen["base_learning_rate"] is not None:
        del values["learning_rate"]
    return values


def _sizes_of(name: str) -> dict:
    """What a finished model brings images to, by its image processor."""
    values = saved_processing(name)
    size = values.get("size") or {}
    if "longest_edge" in size:
        return {"crop_size": size["longest_edge"], "size_divisor": values.get("size_divisor", SIZE_DIVISOR)}
    return {"crop_size": size["height"], "size_divisor": None} if "height" in size else {}


@dataclass
class DetectionModelArguments(DenseModelArguments):
    """Which model finds objects."""

    task: str = field(
        default="detection",
        metadata={"help": "What is found of objects: detection (boxes) or instances (boxes and masks)."},
    )
    head: str | None = field(
        default=None,
        metadata={"help": "What turns features into objects: rt_detr_v2 for detection, mask2former for instances."},
    )
    recipe: str | None = field(default=None, metadata={"help": HELP})

    def __post_init__(self):
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"`task` is {self.task!r}; it must be one of {', '.join(TASKS)}.")
        if self.head is None:
            self.head = TASKS[self.task][0]
        if self.head not in TASKS[self.task]:
            raise ValueError(
                f"`head` is {self.head!r}, but `task` is {self.task!r}, for which there is"
                f" {', '.join(TASKS[self.task])}."
            )


@dataclass
class DetectionDataArguments(DenseDataArguments):
    """Which images and objects are read."""

    train_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of images, in it or in its folder images/, with annotations.json in COCO's format."},
    )
    train_annotations: str | None = field(
        default=None, metadata={"help": "COCO JSON of train_dir, if it is another file than its annotations.json."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same to evaluate on."})
    validation_annotations: str | None = field(default=None, metadata={"help": "COCO JSON of validation_dir."})
    objects_column_name: str = field(
        default="objects",
        metadata={"help": "Column of a data set with bbox (left, top, width, height) and category of each object."},
    )

    def __post_init__(self):
        super().__post_init__()
        for part in ("train", "validation"):
            file = getattr(self, f"{part}_annotations")
            if file and not getattr(self, f"{part}_dir"):
                raise ValueError(
                    f"`{part}_annotations` is {file!r}, but `{part}_dir`, the folder of its images, lacks."
                )


@dataclass
class DetectionTrainingArguments(DenseTrainingArguments):
    """`DenseTrainingArguments` with what detection adds: how images are brought to a size.

    Raises:
        `ValueError`: for values outside their range.
    """

    default_base_learning_rate: ClassVar[float] = 1e-4

    crop_size: int = field(
        default=640, metadata={"help": "Side in pixels of the square that images, or crops of them, are brought to."}
    )
    size_divisor: int | None = field(
        default=None,
        metadata={
            "help": "Keep the aspect of images: their longer side gets crop_size, and batches are padded to multiples"
            " of so many pixels; default: images are stretched to a square, as Transformers' processors do."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "size_divisor")
