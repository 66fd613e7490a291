# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What pre-training predicts: arguments, and what they mean for the configuration of a model."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..runs.arguments import check_at_least


@dataclass
class TargetArguments:
    """What is predicted.

    Raises:
        `ValueError`: for values that there are not, and for those of a teacher without one.
    """

    _argument_group_name: ClassVar[str] = "target"

    target: str | None = field(
        default=None,
        metadata={"help": "What is predicted: pixels (the default), hog, or teacher: features of a frozen model."},
    )
    mask_ratio: float | None = field(
        default=None, metadata={"help": "Share of units that are hidden; default: 0.75, with teacher_mode align 0.5."}
    )
    loss_on: str | None = field(
        default=None, metadata={"help": "Units whose prediction counts: masked (the default) or all."}
    )
    drop_path_rate: float | None = field(default=None, metadata={"help": "Stochastic depth; default: 0."})
    teacher: str | None = field(
        default=None, metadata={"help": "The frozen model: a folder or a Hub repository of any vision model."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Revision of its Hub repository."})
    teacher_mode: str = field(
        default="align",
        metadata={
            "help": "align: the encoder's features of visible units become those of the teacher, without a decoder;"
            " mask_ratio 0 is plain distillation. predict: a decoder predicts those of hidden units."
        },
    )
    teacher_loss: str = field(
        default="cosine",
        metadata={"help": "cosine: of features less their mean; smooth_l1: of features normalised per unit."},
    )
    teacher_image_size: int | None = field(
        default=None, metadata={"help": "Shorter side of the teacher's images in pixels; default: as it was trained."}
    )
    cache_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder to keep the teacher's features in, of fixed views of each image: the whole, teacher_crops"
            " crops, and their mirror images. The teacher then runs once."
        },
    )
    teacher_crops: int = field(default=0, metadata={"help": "Crops of each image for cache_teacher."})

    def __post_init__(self):
        check_at_least(self, 0, "teacher_crops")
        check_at_least(self, 1, "teacher_image_size")
        self._check_names()
        if self.target == "teacher" and not self.teacher:
            raise ValueError("`target` is 'teacher', but no `teacher` is given: a folder or a Hub repository.")
        for name in ("teacher", "teacher_revision", "teacher_image_size", "cache_teacher"):
            value = getattr(self, name)
            if value is not None and self.target != "teacher":
                raise ValueError(f"`{name}` is {value!r}, but `target` is {self.target or 'pixels'!r}, not 'teacher'.")
        if self.teacher_crops and not self.cache_teacher:
            raise ValueError(
                f"`teacher_crops` is {self.teacher_crops}, but without `cache_teacher` every crop is a new one."
            )
        if self.loss_on is not None and self.target == "teacher" and self.teacher_mode == "align":
            raise ValueError(
                f"`loss_on` is {self.loss_on!r}, but with `teacher_mode` 'align' visible units are predicted, all that"
                " there are; give it with 'predict'."
            )

    def _check_names(self):
        named = {
            "target": ("pixels", "hog", "teacher"),
            "teacher_mode": ("align", "predict"),
            "teacher_loss": ("cosine", "smooth_l1"),
            "loss_on": ("masked", "all"),
        }
        for name, names in named.items():
            value = getattr(self, name)
            if value is not None and value not in names:
                raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(names)}.")

    def config_values(self, before: dict | None = None) -> dict:
        """Values of a configuration that the arguments stand for; the width of a teacher's features stays open, as 1.

        Args:
            before: values of the configuration of a checkpoint to go on from.
        """
        given = {name: getattr(self, name) for name in ("mask_ratio", "loss_on", "drop_path_rate")}
        given = {name: value for name, value in given.items() if value is not None}
        if self.target is None:
            return given
        values = {"reconstruction_target": self.target, "target_width": None, "target_loss": "mse"}
        if self.target == "teacher":
            values = {"reconstruction_target": "features", "target_width": 1, "target_loss": self.teacher_loss}
        if self.target == "teacher" and self.teacher_mode == "align":
            values |= {"decoder_type": "linear", "pooled_loss_weight": 1.0, "mask_ratio": 0.5}
        elif (before or {}).get("decoder_type") == "linear":  # what was aligned has a decoder from here on
            values |= {"decoder_type": "transformer", "pooled_loss_weight": 0.0, "mask_ratio": 0.75}
        return {**values, **given}
