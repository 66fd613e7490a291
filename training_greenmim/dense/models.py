# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Models of dense tasks: a new head on what a run starts from, or a finished model."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from modeling_greenmim import GreenMIMBackbone, GreenMIMConfig, GreenMIMImageProcessorPil, GreenMIMModel
from modeling_greenmim.conversion import HEADS, CheckpointError, build_head
from modeling_greenmim.heads_greenmim import backbone_of
from modeling_greenmim.image_processing_greenmim import build_image_processor

from ..compat import without_load_report
from ..runs.models import build_config, changed_config, from_pretrained, parse_overrides, read_config
from ..runs.starts import Start, carry_channels, check_changes, image_processor_of, start_of


logger = logging.get_logger(__name__)

# Of a new head where none is named.
DEFAULT_HEAD = "upernet"


def load_dense_model(
    model_args, auto_classes: tuple, names: list[str] | None
) -> tuple[PreTrainedModel, object, str | None]:
    """A model for a dense task, its image processor, and what it goes on from (None: from scratch).

    Args:
        model_args: `DenseModelArguments` with a `head`.
        auto_classes: of Transformers, that load finished models.
        names: of the classes; None keeps those of a finished model.

    Raises:
        `ValueError`: for checkpoints, heads and overrides that do not fit, and without classes for a new head.
    """
    name = model_args.model_name_or_path
    if name and is_finished(name):
        return _load_finished(model_args, auto_classes, names)
    if names is None:
        given = f"`model_name_or_path` is {name!r}" if name else f"`config_name` is {model_args.config_name!r}"
        raise ValueError(f"{given}, which has no trained head: give `do_train` too.")
    drop_path = {"drop_path_rate": model_args.drop_path_rate}
    if not name:
        config = build_config(model_args.config_name, model_args.config_overrides, drop_path)
        with tempfile.TemporaryDirectory() as folder:
            GreenMIMModel(config).save_pretrained(folder)
            model = _with_head(folder, model_args, names, {}, config)
        return model, build_image_processor(config), None
    with start_of(name, "model_name_or_path") as start:
        overrides = drop_path | parse_overrides(model_args.config_overrides)
        config = changed_config(
            start.config, model_args.config_overrides, drop_path, f"`model_name_or_path` is {name!r}"
        )
        check_changes(start.config, {**start.config, **overrides}, name)
        if config.num_channels == GreenMIMConfig(**start.config).num_channels:
            model = _with_head(start.folder, model_args, names, overrides, config)
        else:
            with tempfile.TemporaryDirectory() as folder:
                _save_with_channels(start, config, model_args.channel_weights, folder)
                model = _with_head(folder, model_args, names, {}, config)
        return model, image_processor_of(start, config), start.origin


def is_finished(name: str) -> bool:
    """Whether a checkpoint is a model with a backbone, and so a head, rather than a backbone alone."""
    return not Path(name).is_file() and "backbone_config" in read_config(name, "model_name_or_path")


def trained_names(name: str) -> list[str]:
    """Names of the classes of a finished model, by their numbers."""
    id2label = read_config(name, "model_name_or_path").get("id2label") or {}
    return [id2label[number] for number in sorted(id2label, key=int)]


def saved_processing(name: str) -> dict:
    """Values of the image processor that was saved with a finished model; none where there is none."""
    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        return {}


def _with_head(folder: str, model_args, names: list[str], overrides: dict, config: GreenMIMConfig) -> PreTrainedModel:
    try:
        head_overrides = parse_overrides(model_args.head_overrides, "head_overrides")
        with without_load_report():
            model = build_head(
                folder, model_args.head or DEFAULT_HEAD, dict(enumerate(names)), overrides, head_overrides
            )
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    if model_args.attn_implementation:
        model.set_attn_implementation(model_args.attn_implementation)
    logger.info(f"A {type(model).__name__} with {len(names)} classes: its head is new.")
    return model


def _save_with_channels(start: Start, config: GreenMIMConfig, rule: str, folder: str) -> None:
    """Writes the encoder of a start for images of other channels."""
    model, _ = from_pretrained(GreenMIMBackbone, start.folder, start.name, config=config, ignore_mismatched_sizes=True)
    carry_channels(model, start, rule)
    model.greenmim.save_pretrained(folder)


def _load_finished(model_args, auto_classes: tuple, names: list[str] | None) -> tuple[PreTrainedModel, object, str]:
    name = model_args.model_name_or_path
    for argument in ("config_overrides", "head_overrides"):
        if getattr(model_args, argument):
            raise ValueError(
                f"`{argument}` is {getattr(model_args, argument)!r}, but `model_name_or_path` is {name!r}, a finished"
                " model, which keeps its configuration."
            )
    config = AutoConfig.from_pretrained(name)
    auto_class = next((one for one in auto_classes if type(config) in one._model_mapping), None)
    if auto_class is None:
        raise ValueError(
            f"`model_name_or_path` is {name!r}, of model type {config.model_type!r}, which is for another task."
        )
    trained_head = next(
        (head for head, kind in HEADS.items() if isinstance(config, kind.model_class.config_class)), None
    )
    if model_args.head not in (None, trained_head):
        raise ValueError(
            f"`head` is {model_args.head!r}, but `model_name_or_path` is {name!r}, a finished model, which keeps its"
            f" head, {trained_head or config.model_type!r}."
        )
    config.backbone_config.drop_path_rate = model_args.drop_path_rate
    trained = [config.id2label[number] for number in range(config.num_labels)]
    if names is not None and names != trained:
        if sorted(names) == sorted(trained):
            raise ValueError(
                f"`model_name_or_path` is {name!r}, which has the classes {trained}, but the data has them in another"
                f" order, {names}: its head would take each for another. Number the data's as the model's are."
            )
        config.id2label, config.label2id = dict(enumerate(names)), {label: i for i, label in enumerate(names)}
    model, new = from_pretrained(
        auto_class,
        name,
        config=config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        attn_implementation=model_args.attn_implementation,
    )
    if names is not None and names != trained and not new.mismatched:
        logger.warning(f"The head of {name!r} was trained for {trained}; it goes on with {names}.")
    return model, GreenMIMImageProcessorPil.from_pretrained(name), f"`{name}`"


def freeze_stages(model: nn.Module, count: int) -> None:
    """Makes the embedding and the first stages of the backbone learn no more; 0 = all learn.

    Raises:
        `ValueError`: for more stages than there are.
    """
    if count == 0:
        return
    backbone = backbone_of(model)
    stages = len(backbone.greenmim.encoder.layers)
    if count > stages:
        raise ValueError(f"`freeze_stages` is {count}; the model has {stages} stages.")
    backbone.freeze_stages(count)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    logger.info(f"`freeze_stages` is {count}: {frozen:,} parameters do not learn.")


def class_scores(outputs, size: tuple[int, int]) -> torch.Tensor:
    """Logits of the classes of each pixel, `(batch, classes, height, width)`, of what a model of segmentation returns.

    Those of mask classification (https://huggingface.co/papers/2107.06278) are the logarithm of the sum over queries
    of class times mask probability.
    """
    if hasattr(outputs, "logits"):
        logits = outputs.logits
        if logits.shape[-2:] != torch.Size(size):
            logits = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits
    masks = outputs.masks_queries_logits.float()
    masks = nn.functional.interpolate(masks, size, mode="bilinear", align_corners=False)
    classes = outputs.class_queries_logits.float().softmax(dim=-1)[..., :-1]
    with torch.autocast(masks.device.type, enabled=False):  # in half precision the smallest one is 0
        return torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid()).clamp(min=1e-8).log()
