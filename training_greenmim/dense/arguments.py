# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of the scripts of dense tasks."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..runs.arguments import (
    ImageDataArguments,
    ImageTrainingArguments,
    ModelSourceArguments,
    check_at_least,
    check_one_source,
    check_start,
)
from .recipes import HELP


@dataclass
class DenseModelArguments(ModelSourceArguments):
    """Which model is trained for a dense task."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to start from: whatever run_mim.py takes, to which a new head is added, or a finished"
            " folder of this script."
        },
    )
    head_overrides: str | None = field(
        default=None, metadata={"help": 'Changes to the configuration of the head: "hidden_size=128".'}
    )
    drop_path_rate: float = field(default=0.0, metadata={"help": "Stochastic depth of the last block."})
    freeze_stages: int = field(
        default=0, metadata={"help": "Stages, from the first, that do not learn, with the embedding; 0 = none."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace what a finished model has for other classes."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_start(self)
        check_at_least(self, 0, "freeze_stages")


@dataclass
class DenseDataArguments(ImageDataArguments):
    """Which annotated images are read."""

    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images to evaluate on where there are no others."}
    )
    test_dir: str | None = field(
        default=None, metadata={"help": "Folder of images to predict; default: those of evaluation."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("pages", "tile"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, which is for images alone, not for those with annotations."
                )
        check_one_source(self)
        if not (self.dataset_name or self.train_dir or self.validation_dir or self.test_dir):
            raise ValueError("There are no images: give `train_dir`, `validation_dir`, `test_dir` or `dataset_name`.")


@dataclass
class DenseTrainingArguments(ImageTrainingArguments):
    """`TrainingArguments` with what dense tasks share: rates for batches of 16, crops, and colour jitter.

    Raises:
        `ValueError`: for values outside their range.
    """

    base_batch_size: ClassVar[int] = 16
    default_base_learning_rate: ClassVar[float] = 6e-5

    warmup_steps: float = field(
        default=0.1, metadata={"help": "Linear warm-up: steps, or a share of all steps if below 1."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Maximum gradient norm; 0 = no clipping."})
    crop_size: int = field(default=512, metadata={"help": "Side in pixels of the crops that are trained on."})
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={"help": "Images are scaled by a factor between these two before they are cropped."},
    )
    color_jitter: float = field(
        default=0.0, metadata={"help": "Strength of colour jitter: brightness, contrast and saturation by 1 +- it."}
    )
    num_pictures: int = field(default=4, metadata={"help": "Images in the picture that each evaluation makes."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "crop_size")
        check_at_least(self, 0, "num_pictures", "color_jitter")
        if self.auto_batch_size:
            raise ValueError(
                "`auto_batch_size` is True, but the memory of dense heads is not estimated; give"
                " `per_device_train_batch_size` and `gradient_accumulation_steps`."
            )
        if self.decode_once:
            raise ValueError("`decode_once` is True, but images with annotations are decoded as they are needed.")
        scales = self.scale_range
        if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
            raise ValueError(f"`scale_range` is {scales}; it needs two numbers above 0, the smaller one first.")


@dataclass
class SegmentationModelArguments(DenseModelArguments):
    """Which model segments images."""

    head: str | None = field(
        default=None,
        metadata={
            "help": "What turns features into classes: upernet (the default) or mask2former; a finished model keeps"
            " its own."
        },
    )
    recipe: str | None = field(default=None, metadata={"help": HELP})


@dataclass
class SegmentationDataArguments(DenseDataArguments):
    """Which images and masks are read."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with images/ and masks/, whose files have the same names."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same to evaluate on."})
    annotation_column_name: str | None = field(default=None, metadata={"help": "Column of the masks."})
    labels_file: str | None = field(
        default=None,
        metadata={
            "help": "Names of the classes: a text with one a line, or JSON (a list, or numbers and names); default:"
            " labels.txt, labels.json or id2label.json beside the data, or else their numbers."
        },
    )
    ignore_index: int = field(default=255, metadata={"help": "Number in masks of pixels that count nowhere."})


@dataclass
class SegmentationTrainingArguments(DenseTrainingArguments):
    """`DenseTrainingArguments` with what semantic segmentation adds: how large images are evaluated.

    Raises:
        `ValueError`: for values outside their range.
    """

    max_class_share: float = field(
        default=1.0,
        metadata={"help": "Draw another crop while one class covers more than this share of its labelled pixels."},
    )
    eval_window: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the windows that larger images are evaluated and predicted in; 0 = whole"
            " images; default: crop_size."
        },
    )
    eval_overlap: float = field(
        default=1 / 3, metadata={"help": "Share of a window that the next one covers too; scores are averaged there."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 0, "eval_window")
        if self.eval_window is None:
            self.eval_window = self.crop_size
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"`max_class_share` is {self.max_class_share}; it must be in (0, 1].")
        if not 0 <= self.eval_overlap < 1:
            raise ValueError(f"`eval_overlap` is {self.eval_overlap}; it must be in [0, 1).")
        if self.do_train and self.per_device_train_batch_size == 1:
            raise ValueError(
                "`per_device_train_batch_size` is 1, but the head normalises over the batch; two or more are needed."
            )
