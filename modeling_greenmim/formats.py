# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Names and layouts of weights in other formats. All are read by way of Microsoft Swin's names, which official
GreenMIM, SimMIM and timm share but for details; Twins' parts that Swin has not keep our names there.
"""

import re

import numpy as np
import torch
from torch import nn

from .layout import token_raster_index as token_places
from .modeling_greenmim import GreenMIMModel
from .resizing import BIAS_TABLE


# Pairs of names, ours first. The first group begins a name, the second may be anywhere in it.
BEGINNINGS = [
    ("greenmim.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("greenmim.embeddings.norm.", "patch_embed.norm."),
    ("greenmim.encoder.layers.", "layers."),
    ("greenmim.layernorm.", "norm."),
    ("classifier.", "head."),
    ("decoder.decoder_layers.", "decoder_blocks."),
    ("decoder.decoder_embed.", "decoder_embed."),
    ("decoder.decoder_norm.", "decoder_norm."),
    ("decoder.decoder_pred.", "decoder_pred."),
    ("decoder.mask_token", "mask_token"),
]
PARTS = [(".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."), (".attention.", ".attn.")]
# Pairs of names within Transformers' Swin, ours first; queries, keys and values are apart there.
SWIN_PARTS = [
    ("attention.proj.", "attention.o_proj."),
    (f"attention.{BIAS_TABLE}", f"attention.relative_position_bias.{BIAS_TABLE}"),
]
PROJECTION = "patch_embed.proj.weight"
# Pairs of patterns of Twins' names and what stands for them here.
TWINS_NAMES = [
    (r"^patch_embeds\.0\.", "patch_embed."),
    (r"^blocks\.(\d+)\.(\d+)\.", r"layers.\1.blocks.\2."),
    (r"\.attn\.sr\.", ".attn.reduction."),
    (r"^pos_block\.(\d+)\.proj\.0\.", r"layers.\1.position_encoding.conv."),
]
REDUCTION = re.compile(r"\.reduction\.weight$")
# Of the four tokens (row, column) that merging joins: where each of (0,0), (1,0), (0,1), (1,1) is in row order.
FROM_ROW_ORDER = [0, 2, 1, 3]
MERGING = re.compile(r"(^|\.)layers\.\d+\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)$")


def _replace(name: str, column: int) -> str:
    """Our name of one of Microsoft's (`column` 0), or the other way round (1)."""
    for pair in BEGINNINGS:
        if name.startswith(pair[1 - column]):
            name = pair[column] + name.removeprefix(pair[1 - column])
            break
    for pair in PARTS:
        name = name.replace(pair[1 - column], pair[column])
    return name


def from_microsoft(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by Microsoft Swin's and official GreenMIM's names -> by those of our models with a head or decoder."""
    return {_replace(name, 0): tensor.flatten(1) if name == PROJECTION else tensor for name, tensor in weights.items()}


def to_microsoft(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of one of our models, by Microsoft Swin's and official GreenMIM's names."""
    config = model.config
    prefix = "greenmim." if isinstance(model, GreenMIMModel) else ""
    weights = {_replace(prefix + name, 1): tensor.detach() for name, tensor in model.state_dict().items()}
    shape = (config.embed_dim, config.num_channels, config.patch_size, config.patch_size)
    return {name: tensor.view(shape) if name == PROJECTION else tensor for name, tensor in weights.items()}


def _move_merging(weights: dict[str, torch.Tensor], stages: int) -> dict[str, torch.Tensor]:
    """Merging moved by so many stages: in timm a stage begins with what ends Microsoft's stage before it."""

    def moved(found: re.Match) -> str:
        return f"layers.{int(found[1]) + stages}.downsample."

    return {re.sub(r"^layers\.(\d+)\.downsample\.", moved, name): tensor for name, tensor in weights.items()}


def from_timm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names -> Microsoft's. Before version 0.9 timm's stages, too, ended with their merging."""
    if "layers.0.downsample.norm.weight" not in weights:
        weights = _move_merging(weights, -1)
    return {name.replace("head.fc.", "head.", 1): tensor for name, tensor in weights.items()}


def to_timm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Microsoft's names -> timm's."""
    return {re.sub(r"^head\.", "head.fc.", name): tensor for name, tensor in _move_merging(weights, 1).items()}


def from_transformers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder, and the classifier if there is one, of a Swin of Transformers, by Microsoft's names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(("decoder.", "swin.embeddings.mask_token", "embeddings.mask_token")):
            continue  # SimMIM's
        name = name if name.startswith("classifier.") else "greenmim." + name.removeprefix("swin.")
        for ours, theirs in SWIN_PARTS:
            name = name.replace(theirs, ours)
        state[name] = tensor
    for name in [name for name in state if ".q_proj." in name]:
        joined = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace(".q_proj.", ".qkv.")] = torch.cat(joined)
    return {_replace(name, 1): tensor for name, tensor in state.items()}


def to_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Microsoft's names -> those of `SwinForImageClassification`."""
    state = {}
    for name, tensor in weights.items():
        name = _replace(name, 0).replace("greenmim.", "swin.", 1)
        for ours, theirs in SWIN_PARTS:
            name = name.replace(ours, theirs)
        if ".attention.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3)):
                state[name.replace(".qkv.", f".{part}_proj.")] = piece
        else:
            state[name] = tensor
    return state


def is_twins(weights: dict[str, torch.Tensor]) -> bool:
    """Whether weights, without the prefix `encoder.`, have the names of a Twins."""
    return "patch_embeds.0.proj.weight" in weights


def from_twins(weights: dict[str, torch.Tensor], channels_last: bool) -> dict[str, torch.Tensor]:
    """Names and layouts of Twins -> Microsoft's, and ours for what Swin has not.

    Args:
        channels_last: where it cannot be seen, whether weights of strided convolutions are stored
            `(out, height, width, in)`, as official GreenMIM does, or `(out, in, height, width)`.
    """
    width = weights["patch_embeds.0.proj.weight"].shape[0]
    first = weights.get("patch_embeds.1.proj.weight")
    if first is not None and width != 2:
        channels_last = first.shape[-1] == width
    converted = {}
    for name, tensor in weights.items():
        if found := re.match(r"patch_embeds\.([1-9]\d*)\.(.+)", name):
            kind = found[2].replace("proj.", "reduction.")
            name = f"layers.{int(found[1]) - 1}.downsample.{kind}"
        for pattern, ours in TWINS_NAMES:
            name = re.sub(pattern, ours, name)
        if REDUCTION.search(name) and tensor.ndim == 4:
            tensor = _to_nested(tensor if channels_last else tensor.permute(0, 2, 3, 1))
        converted[name] = tensor
    return converted


def to_twins(weights: dict[str, torch.Tensor], channels_last: bool) -> dict[str, torch.Tensor]:
    """The inverse of `from_twins`; the decoder's weights keep their names."""
    converted = {}
    for name, tensor in weights.items():
        if REDUCTION.search(name):
            # Merging joins 2x2 tokens; a key is made of a whole unit.
            stage = int(name.split(".")[1])
            side = 2 if ".downsample." in name else _unit_side(weights, stage)
            tensor = _from_nested(tensor, side)
            tensor = tensor if channels_last else tensor.permute(0, 3, 1, 2)
        if found := re.match(r"layers\.(\d+)\.downsample\.(.+)", name):
            name = f"patch_embeds.{int(found[1]) + 1}.{found[2].replace('reduction.', 'proj.')}"
        name = re.sub(r"^patch_embed\.", "patch_embeds.0.", name)
        name = re.sub(r"^layers\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.\2.", name)
        name = re.sub(r"^layers\.(\d+)\.position_encoding\.conv\.", r"pos_block.\1.proj.0.", name)
        converted[name.replace(".attn.reduction.", ".attn.sr.")] = tensor.contiguous()
    return converted


def _unit_side(weights: dict[str, torch.Tensor], stage: int) -> int:
    weight = weights[f"layers.{stage}.blocks.1.attn.reduction.weight"]
    return int((weight.shape[1] // weight.shape[0]) ** 0.5)


def _nested(side: int) -> torch.Tensor:
    """Raster number of each place of a square in nested order."""
    return torch.from_numpy(token_places(np.zeros((1, 1), dtype=np.int64), (1, 1), side)[0]).long()


def _to_nested(kernel: torch.Tensor) -> torch.Tensor:
    """Weight of a strided convolution `(out, height, width, in)` -> of a linear layer on nested tokens."""
    return kernel.flatten(1, 2)[:, _nested(kernel.shape[1])].flatten(1)


def _from_nested(weight: torch.Tensor, side: int) -> torch.Tensor:
    """The inverse of `_to_nested`."""
    places = weight.unflatten(1, (side**2, -1))
    return places[:, _nested(side).argsort()].unflatten(1, (side, side))


def rows_to_columns(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of merging in row order -> those that compute the same in column order."""
    return {
        name: tensor.unflatten(-1, (4, -1))[..., FROM_ROW_ORDER, :].flatten(-2) if MERGING.search(name) else tensor
        for name, tensor in weights.items()
    }
