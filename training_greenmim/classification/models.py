# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image classifiers of any kind, and the image processor that belongs to one."""

import math

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import logging

from ..runs.models import check_overrides
from .probes import linear_head


logger = logging.get_logger(__name__)


def center_cropped(image_processor, config: PreTrainedConfig, share: float):
    """The processor with evaluation's resizing and centre crop, so that pipelines see what was evaluated.

    Processors resize the shorter side and crop squares; images of other sizes are resized without a crop.
    """
    height, width = image_height_and_width(config, image_processor)
    if height != width:
        image_processor.size, image_processor.do_center_crop = {"height": height, "width": width}, False
    else:
        image_processor.size = {"shortest_edge": math.floor(height / share)}
        image_processor.crop_size = {"height": height, "width": width}
        image_processor.do_center_crop = True
    return image_processor


def image_height_and_width(config: PreTrainedConfig, image_processor) -> tuple[int, int]:
    """Size of the images that a model takes, in pixels."""
    size = getattr(config, "image_size", None)
    if size is None:  # convolutional networks have none
        crop = getattr(image_processor, "crop_size", None)
        sizes = dict(crop or image_processor.size)
        size = sizes.get("shortest_edge") or (sizes["height"], sizes["width"])
    return (size, size) if isinstance(size, int) else tuple(size)


def load_classifier(
    name: str,
    label_names: list[str] | None,
    drop_path_rate: float,
    overrides: dict,
    attn_implementation: str,
    ignore_mismatched_sizes: bool = False,
) -> tuple[PreTrainedModel, object, bool]:
    """An image classifier from a checkpoint of GreenMIM or of any model that has one.

    Args:
        name: a folder or a Hub repository.
        label_names: names of the classes; None = the checkpoint's. A head for the same names keeps its order, one for
            others starts anew.
        drop_path_rate: stochastic depth, where the architecture has it.
        overrides: changes to the configuration, such as another `image_size`.
        ignore_mismatched_sizes: whether a head of another size is replaced by a new one.

    Returns:
        The model, its image processor, and whether its head is the checkpoint's own.

    Raises:
        `ValueError`: when the checkpoint is of no image classifier, or overrides change the encoder's widths.
    """
    config = AutoConfig.from_pretrained(name)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"`model_name_or_path` is {name!r}, a checkpoint of model type {config.model_type!r}, which has no image"
            " classifier; GreenMIM's checkpoints or those of any image classifier of Transformers are needed."
        )
    check_overrides(overrides, type(config))
    trained_names = list(config.id2label.values())
    if label_names is not None and set(label_names) == set(trained_names):
        label_names = None  # the head knows them, in its own order
    changes = {"drop_path_rate": drop_path_rate} if hasattr(config, "drop_path_rate") else {}
    changes |= overrides
    if label_names is not None:
        changes |= class_names(label_names)
    config = AutoConfig.from_pretrained(name, **changes)
    model, info = AutoModelForImageClassification.from_pretrained(
        name,
        config=config,
        attn_implementation=attn_implementation,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        output_loading_info=True,
    )
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    if any(key.startswith(f"{model.base_model_prefix}.") for key in mismatched):
        raise ValueError(
            f"`config_overrides` is {overrides}, which changes the shapes of {len(mismatched)} weights of"
            f" `model_name_or_path`, {name!r}; a checkpoint keeps its widths and depths."
        )
    has_own_head = not any(key.startswith("classifier") for key in mismatched | set(info["missing_keys"]))
    if has_own_head and label_names is not None:
        logger.warning(f"The head of {name!r} was trained for {trained_names}, not for {label_names}: it starts anew.")
        linear_head(model).reset_parameters()
    return model, AutoImageProcessor.from_pretrained(name), has_own_head


def class_names(label_names: list[str]) -> dict:
    """`id2label` and `label2id` of a configuration."""
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
