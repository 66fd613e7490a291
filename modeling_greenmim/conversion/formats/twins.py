# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Twins-SVT by its authors (github.com/Meituan-AutoML/Twins, `alt_gvt_*`) and in timm (`twins_svt_*`): the same names.

Official GreenMIM's Twins has these names too, in a layout and with a function of its own: `original`.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from modeling_greenmim.layout import nested_patches

from ..checkpoint import Checkpoint, CheckpointError, Source
from ..writing import save_weights, tokens_with_epsilon
from . import microsoft


NAME, TITLE = "twins", "Twins"
BACKBONE_TYPES, OUTPUT = ("twins",), "file"
PROJECTION = "patch_embeds.0.proj.weight"
# In blocks and at the end; patch embedding, merging and keys have torch's own.
EPSILON = 1e-6
# Pairs of patterns of Twins' names and what stands for them in Microsoft's, and in ours for what Swin has not.
NAMES = [
    (r"^patch_embeds\.0\.", "patch_embed."),
    (r"^blocks\.(\d+)\.(\d+)\.", r"layers.\1.blocks.\2."),
    (r"\.attn\.sr\.", ".attn.reduction."),
    (r"^pos_block\.(\d+)\.proj\.0\.", r"layers.\1.position_encoding.conv."),
]
# The same the other way round.
THEIR_NAMES = [
    (r"^patch_embed\.", "patch_embeds.0."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.\2."),
    (r"\.attn\.reduction\.", ".attn.sr."),
    (r"^layers\.(\d+)\.position_encoding\.conv\.", r"pos_block.\1.proj.0."),
]
# Weights of strided convolutions, which are linear layers here.
STRIDED = re.compile(r"(\.sr|^patch_embeds\.[1-9]\d*\.proj)\.weight$")


def matches(source: Source) -> bool:
    """Whether it has the first patch embedding of a Twins."""
    return PROJECTION in source.weights


def read(source: Source) -> Checkpoint:
    """A Twins, with its classifier if it has one."""
    values = {"backbone_type": "twins", "layer_norm_eps": EPSILON}
    if isinstance(source.args.get("input_size"), int):  # timm's is a list of channels and sides
        values["image_size"] = source.args["input_size"]
    return Checkpoint(NAME, to_ours(source.weights, channels_last=False), values)


def write(model: nn.Module, output: Path) -> Callable:
    """Encoder and classifier."""
    save_weights(microsoft.without_decoder(from_ours(model, channels_last=False)), output)
    return tokens_with_epsilon(model, lambda name: EPSILON if "layernorm" in name else microsoft.EPSILON)


def to_ours(weights: dict[str, torch.Tensor], channels_last: bool) -> dict[str, torch.Tensor]:
    """Weights by the names of Twins, and of official GreenMIM's decoder -> by ours.

    Args:
        channels_last: whether kernels of strided convolutions are stored `(out, height, width, in)`, as official
            GreenMIM does, or `(out, in, height, width)`.
    """
    converted = {}
    for name, tensor in weights.items():
        if STRIDED.search(name):
            tensor = _to_linear(tensor.permute(0, 3, 1, 2) if channels_last else tensor)
        if found := re.match(r"patch_embeds\.([1-9]\d*)\.(.+)", name):
            name = f"layers.{int(found[1]) - 1}.downsample.{found[2].replace('proj.', 'reduction.')}"
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    return microsoft.to_ours(converted)


def from_ours(model: nn.Module, channels_last: bool) -> dict[str, torch.Tensor]:
    """The inverse of `to_ours`, of one of our models."""
    converted = {}
    for name, tensor in microsoft.from_ours(model).items():
        if found := re.match(r"layers\.(\d+)\.downsample\.(.+)", name):
            name = f"patch_embeds.{int(found[1]) + 1}.{found[2].replace('reduction.', 'proj.')}"
        for pattern, replacement in THEIR_NAMES:
            name = re.sub(pattern, replacement, name)
        if STRIDED.search(name):
            kernel = _to_kernel(tensor, merges=name.startswith("patch_embeds."))
            tensor = kernel.permute(0, 2, 3, 1) if channels_last else kernel
        converted[name] = tensor.contiguous()
    return converted


def _to_linear(kernel: torch.Tensor) -> torch.Tensor:
    """Kernel `(out, in, side, side)` of a convolution of stride `side` -> linear layer on `side**2` nested tokens."""
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise CheckpointError(f"The kernel of a strided convolution has the shape {tuple(kernel.shape)}.")
    return nested_patches(kernel, unit=kernel.shape[-1], patch_size=1).flatten(1)


def _to_kernel(weight: torch.Tensor, merges: bool) -> torch.Tensor:
    """The inverse of `_to_linear`; merging joins 2x2 tokens, a key is made of a whole unit of its own width."""
    side = 2 if merges else math.isqrt(weight.shape[1] // weight.shape[0])
    raster = torch.arange(side**2).view(1, 1, side, side)
    nested = nested_patches(raster, unit=side, patch_size=1).flatten()  # raster number of each nested token
    tokens = weight.unflatten(1, (side**2, -1))[:, nested.argsort()]
    return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)
