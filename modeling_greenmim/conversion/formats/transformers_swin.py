# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Transformers' Swin: folders of `SwinModel`, `SwinForImageClassification` and `SwinForMaskedImageModeling`."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTImageProcessorPil,
)

from modeling_greenmim import GreenMIMConfig, GreenMIMModel
from modeling_greenmim.image_processing_greenmim import build_image_processor
from modeling_greenmim.resizing import BIAS_TABLE

from ..checkpoint import PROJECTION, Checkpoint, CheckpointError, Source
from ..reading import clear_errors, load_whole


NAME, TITLE = "transformers-swin", "Transformers' Swin"
BACKBONE_TYPES, OUTPUT = ("swin",), "folder"
CLASSES = {
    cls.__name__: cls for cls in (SwinModel, SwinForImageClassification, SwinForMaskedImageModeling, SwinBackbone)
}
# Pairs of names, ours first; queries, keys and values are apart there.
NAMES = [
    ("attention.proj.", "attention.o_proj."),
    (f"attention.{BIAS_TABLE}", f"attention.relative_position_bias.{BIAS_TABLE}"),
]
# Values of the configuration that mean the same in both.
NO_WEIGHT_TELLS = (
    "image_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "layer_norm_eps",
)
WEIGHTS_TELL = (
    "patch_size",
    "num_channels",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "mlp_ratio",
    "qkv_bias",
)


def matches(source: Source) -> bool:
    """Whether it is a folder."""
    return source.path.is_dir()


def read(source: Source) -> Checkpoint:
    """The encoder, and the classifier if there is one."""
    folder = source.path
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"`checkpoint` is {str(folder)!r}, a folder without config.json; name the file in it.")
    with clear_errors(f"`checkpoint` {str(folder)!r}"):
        config = AutoConfig.from_pretrained(folder)
    if config.model_type != "swin":
        raise CheckpointError(
            f"`checkpoint` {str(folder)!r} is a folder of model type {config.model_type!r}; only 'swin' is converted."
        )
    if config.use_absolute_embeddings:
        raise CheckpointError(
            f"`checkpoint` {str(folder)!r} adds absolute position embeddings, which GreenMIM has not."
        )
    model = _load(folder, (config.architectures or [None])[0])
    values = {name: getattr(config, name) for name in (*NO_WEIGHT_TELLS, "problem_type")}
    if isinstance(model, SwinForImageClassification):
        values |= {"id2label": config.id2label, "label2id": config.label2id}
    return Checkpoint(NAME, to_ours(model), values)


def _load(folder: Path, architecture: str | None) -> nn.Module:
    """A model of the class that the configuration names; where it names none, as old ones, of the first that fits."""
    if architecture is not None:
        return load_whole(CLASSES.get(architecture, SwinModel), folder, "checkpoint")
    for model_class in CLASSES.values():
        try:
            return load_whole(model_class, folder, "checkpoint")
        except CheckpointError as error:
            refused = error
    raise refused


def write(model: nn.Module, output: Path) -> Callable:
    """A folder of `SwinForImageClassification`, or of `SwinModel` for models without classifier."""
    swin = SwinForImageClassification(swin_config(model.config)).eval()
    state = from_ours(model)
    has_head = "classifier.weight" in state
    if not has_head:
        swin.classifier = nn.Identity()
    swin.load_state_dict(state)
    (swin if has_head else swin.swin).save_pretrained(output)
    _image_processor(model).save_pretrained(output)
    return lambda image: swin.swin(image).last_hidden_state


def to_ours(model: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder, and the classifier if there is one, of a Swin of Transformers, by our names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(("decoder.", "swin.embeddings.mask_token", "embeddings.mask_token")):
            continue  # SimMIM's
        if name.startswith("hidden_states_norms."):  # of a backbone: the last stage's is the encoder's own
            _, stage, kind = name.split(".")
            if stage != model.stage_names[-1]:
                continue
            name = f"layernorm.{kind}"
        name = name if name.startswith("classifier.") else "greenmim." + name.removeprefix("swin.")
        for ours, theirs in NAMES:
            name = name.replace(theirs, ours)
        state[name] = tensor
    for name in [name for name in state if ".q_proj." in name]:
        joined = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace(".q_proj.", ".qkv.")] = torch.cat(joined)
    return state


def from_ours(model: nn.Module) -> dict[str, torch.Tensor]:
    """Encoder and classifier of one of our models, by the names of `SwinForImageClassification`."""
    config, state = model.config, {}
    prefix = "greenmim." if isinstance(model, GreenMIMModel) else ""
    for name, tensor in model.state_dict(prefix=prefix).items():
        if name.startswith("decoder."):
            continue
        if name == PROJECTION:
            tensor = tensor.unflatten(1, (config.num_channels, config.patch_size, config.patch_size))
        name = name.replace("greenmim.", "swin.", 1)
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        if ".attention.qkv." in name:
            pieces = zip("qkv", tensor.chunk(3), strict=True)
            state |= {name.replace(".qkv.", f".{part}_proj."): piece for part, piece in pieces}
        else:
            state[name] = tensor
    return state


def swin_config(config: GreenMIMConfig) -> SwinConfig:
    """Transformers' configuration of the same Swin.

    Raises:
        `CheckpointError`: when Transformers' Swin cannot express it.
    """
    windows = config.stage_windows
    if set(windows) != {config.window_size}:
        raise CheckpointError(
            f"Transformers' Swin has one window for all stages, but `window_size` {config.window_size} at `image_size`"
            f" {config.image_size} gives windows {list(windows)}: it keeps position bias tables of the full window and"
            " fails on smaller grids. Export to microsoft-swin or timm, which shrink windows, or load the model with"
            f" window_size={min(windows)} (tables are interpolated) and export that."
        )
    values = {name: getattr(config, name) for name in (*NO_WEIGHT_TELLS, *WEIGHTS_TELL, "initializer_range")}
    return SwinConfig(**values, encoder_stride=config.encoder_stride, id2label=config.id2label)


def _image_processor(model: nn.Module) -> ViTImageProcessorPil:
    """That of the model's folder, or the one that goes with its configuration, as a class of Transformers."""
    try:
        processor = AutoImageProcessor.from_pretrained(model.name_or_path)
    except OSError:  # saved without one
        processor = build_image_processor(model.config)
    return ViTImageProcessorPil(**processor.to_dict())
