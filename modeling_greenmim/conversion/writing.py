# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What formats need to write files, and to say what their own code computes."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .checkpoint import CheckpointError


def save_weights(content: dict, path: Path) -> None:
    """Writes a `.safetensors` file of plain weights, or one of `torch.save`; makes the folder that it lies in.

    Raises:
        `CheckpointError`: for a `.safetensors` file of more than weights.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        torch.save(content, path)
    elif "model" in content:
        raise CheckpointError(f"`output` is {str(path)!r}; this format is written by torch.save: end it in .pth.")
    else:
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)


def tokens_with_epsilon(model: nn.Module, epsilon: Callable[[str], float]) -> Callable:
    """A function of an image that returns the model's last tokens, normalised with another epsilon.

    Args:
        epsilon: of a layer normalisation, by its name in our encoder, such as "encoder.layers.0.downsample.norm".
    """
    encoder = copy.deepcopy(getattr(model, "greenmim", model))
    for name, module in encoder.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = epsilon(name)
    return lambda image: encoder(image).last_hidden_state
