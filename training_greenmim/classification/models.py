# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image classifiers of Transformers, and the image processor that belongs to one."""

import math

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from modeling_greenmim import GreenMIMForImageClassification

from ..data.scaling import scaling_of
from ..data.transforms import EvalTransform
from ..runs.models import check_overrides, from_pretrained
from .probes import head_name


logger = logging.get_logger(__name__)

# Mean difference, for values in [0, 1], between what evaluation and a processor make of a smooth image.
SAME_CROP = 0.01


def as_evaluated(image_processor, config: PreTrainedConfig, share: float):
    """The processor with evaluation's resizing and centre crop, so that pipelines see what was evaluated.

    Processors resize the shorter side and crop squares; images of other sizes are resized without a crop. One that
    crops in a way of its own is reported.

    Args:
        image_processor: is changed.
        config: of the model.
        share: `crop_pct` of evaluation.
    """
    height, width = image_height_and_width(config, image_processor)
    if getattr(image_processor, "image_range", None) is not None:  # of ours, which crops as evaluation does
        image_processor.size, image_processor.crop_pct = {"height": height, "width": width}, share
        return image_processor
    image_processor.do_resize, image_processor.resample = True, Image.Resampling.BICUBIC
    if height != width:
        image_processor.size, image_processor.do_center_crop = {"height": height, "width": width}, False
    elif getattr(image_processor, "crop_pct", None) is not None:  # it resizes to size / crop_pct, then crops
        image_processor.size, image_processor.crop_pct = {"shortest_edge": height}, share
        image_processor.crop_size = {"height": height, "width": width}
    else:
        image_processor.size = {"shortest_edge": math.floor(height / share)}
        image_processor.crop_size = {"height": height, "width": width}
        image_processor.do_center_crop = True
    if not _sees_what_is_evaluated(image_processor, (height, width), getattr(config, "num_channels", 3), share):
        logger.warning(
            f"{type(image_processor).__name__} crops images of other aspects than {height}x{width} px in its own way:"
            " pipelines will see more or less of them than evaluation does."
        )
    return image_processor


def _sees_what_is_evaluated(image_processor, size: tuple[int, int], channels: int, share: float) -> bool:
    # A ramp along each side, 3:2.
    ramps = Image.linear_gradient("L").resize((3 * size[1], 2 * size[0]))
    bands = [ramps, ramps.rotate(90, expand=True).resize(ramps.size), ramps]
    image = Image.merge("RGB", bands) if channels == 3 else bands[1]
    scaling = scaling_of(image_processor, channels)
    expected = scaling(EvalTransform(size, channels, share)(image) / 255)
    found = torch.as_tensor(image_processor(image, return_tensors="pt")["pixel_values"][0])
    if found.shape != expected.shape:
        return False
    return ((found - expected).abs() * scaling.std[scaling.order]).mean() < SAME_CROP


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
    overrides: dict,
    drop_path_rate: float = 0.0,
    ignore_mismatched_sizes: bool = False,
    needs_head: bool = True,
    called: str | None = None,
    **options,
) -> PreTrainedModel:
    """An image classifier from a checkpoint of GreenMIM or of any model that has one.

    Args:
        name: a folder or a Hub repository.
        label_names: names of the classes; None = the checkpoint's, which must have a trained head. A head for the same
            names keeps its order, one for others starts anew.
        overrides: changes to the configuration, such as another `image_size`.
        drop_path_rate: stochastic depth, where the architecture has it.
        ignore_mismatched_sizes: whether a head of another size is replaced by a new one.
        needs_head: whether a checkpoint without a trained head is refused where there are no `label_names`.
        called: what messages call it; default: its name.
        options: more for `from_pretrained`.

    Raises:
        `ValueError`: when the checkpoint is of no image classifier, or of one that does not end with a linear layer or
            takes no images; when overrides change the encoder's widths; when a trained head is needed and lacking.
    """
    called = called or name
    config = AutoConfig.from_pretrained(name)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"`model_name_or_path` is {called!r}, a checkpoint of model type {config.model_type!r}, which has no image"
            " classifier; GreenMIM's checkpoints or those of any image classifier of Transformers are needed."
        )
    check_overrides(overrides, type(config))
    changes = {"drop_path_rate": drop_path_rate} if hasattr(config, "drop_path_rate") else {}
    trained_names = list(config.id2label.values())
    # A head for the same names knows them, in its own order.
    has_new_names = label_names is not None and set(label_names) != set(trained_names)
    if has_new_names:
        changes |= class_names(label_names)
    model, new = from_pretrained(
        AutoModelForImageClassification,
        name,
        called,
        config=AutoConfig.from_pretrained(name, **changes | overrides),
        ignore_mismatched_sizes=True,  # which weights differ decides
        **options,
    )
    if model.main_input_name != "pixel_values":
        raise ValueError(
            f"`model_name_or_path` is {called!r}, a {type(model).__name__}, which takes {model.main_input_name} and no"
            " images."
        )
    head = head_name(model)
    may_differ = (f"{head}.",)
    if isinstance(model, GreenMIMForImageClassification) and "num_channels" in overrides:
        may_differ += ("greenmim.embeddings.patch_embeddings.projection.",)
    widths = [weight for weight in new.mismatched if not weight.startswith(may_differ)]
    if widths:
        raise ValueError(
            f"`config_overrides` is {overrides}, which changes the shapes of {len(widths)} weights of"
            f" `model_name_or_path`, {called!r}; a checkpoint keeps its widths and depths."
        )
    if any(weight.startswith(f"{head}.") for weight in new.mismatched) and not ignore_mismatched_sizes:
        raise ValueError(
            f"`model_name_or_path` is {called!r}, whose head is for {len(trained_names)} classes, not for"
            f" {model.config.num_labels}; --ignore_mismatched_sizes true replaces it by a new one."
        )
    has_own_head = not any(weight.startswith(f"{head}.") for weight in (*new.mismatched, *new.missing))
    if needs_head and label_names is None and not has_own_head:
        raise ValueError(
            f"`model_name_or_path` is {called!r}, which has no trained classifier: give `do_train`, or `mode` knn."
        )
    if has_own_head and has_new_names:
        logger.warning(
            f"The head of {called!r} was trained for {trained_names}, not for {label_names}: it starts anew."
        )
        model.get_submodule(head).reset_parameters()
    return model


def class_names(label_names: list[str]) -> dict:
    """`id2label` and `label2id` of a configuration."""
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
