# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""From a model of ours to another format."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from modeling_greenmim import (
    GreenMIMConfig,
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMModel,
)

from .checkpoint import CheckpointError
from .formats import FORMATS, WRITABLE
from .reading import clear_errors, load_whole


def export_model(folder: str, target: str, output: str) -> float:
    """Writes a model of GreenMIM in another format.

    Args:
        folder: of a GreenMIM model, or a repository's name.
        target: one of `WRITABLE`.
        output: a folder for transformers-swin, else a file; those of timm and Twins may end in .safetensors.

    Returns:
        Relative difference of features that the target's fixed epsilon of layer normalisations makes.

    Raises:
        `CheckpointError`: when the format cannot express the model.
    """
    if target not in WRITABLE:
        raise CheckpointError(f"`to` is {target!r}; formats to export to are {', '.join(WRITABLE)}.")
    needed = FORMATS[target].OUTPUT
    if Path(output).exists() and Path(output).is_dir() != (needed == "folder"):
        raise CheckpointError(f"`output` is {output!r}; {target} needs a {needed}.")
    model = load_model(folder)
    encoder = model.config.backbone_type
    if encoder not in FORMATS[target].BACKBONE_TYPES:
        others = " or ".join(name for name in WRITABLE if encoder in FORMATS[name].BACKBONE_TYPES)
        raise CheckpointError(
            f"`model` {folder!r} is a {encoder.capitalize()}, which {target} cannot express; export it to {others}."
        )
    theirs = FORMATS[target].write(model, Path(output))
    return difference(model, theirs)


def load_model(folder: str) -> nn.Module:
    """`read_model` in single precision, for evaluation."""
    return read_model(folder).float().eval()


def read_model(folder: str) -> nn.Module:
    """The model of a folder, of the class that it was saved as.

    Raises:
        `CheckpointError`: when it is no model of GreenMIM.
    """
    with clear_errors(f"`model` {folder!r}"):
        config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, GreenMIMConfig):
        raise CheckpointError(f"`model` is {folder!r} of model type {config.model_type!r}; a GreenMIM is needed.")
    architecture = (config.architectures or [""])[0]
    classes = {cls.__name__: cls for cls in (GreenMIMForPreTraining, GreenMIMForImageClassification)}
    return load_whole(classes.get(architecture, GreenMIMModel), folder, "model")


@torch.no_grad()
def difference(model: nn.Module, theirs: Callable) -> float:
    """Largest difference of two encoders' last tokens on an image of noise, relative to the largest value.

    Args:
        theirs: function of an image that returns `(1, num_units, hidden_size)`.
    """
    encoder = getattr(model, "greenmim", model)
    height, width = model.config.image_height_and_width
    image = torch.randn(1, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    ours = encoder(image).last_hidden_state
    return ((ours - theirs(image)).abs().max() / ours.abs().max()).item()
