# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""timm's Swin (`swin_*`): Microsoft's, with merging and head in other places. timm's Twins are read by `twins`."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import Checkpoint, Source
from ..writing import save_weights, tokens_with_epsilon
from . import microsoft, twins


NAME, TITLE = "timm", "timm"
BACKBONE_TYPES, OUTPUT = ("swin", "twins"), "file"


def matches(source: Source) -> bool:
    """Whether it is a Swin with timm's head, or whose second stage begins with merging."""
    names = source.weights
    return microsoft.PROJECTION in names and ("head.fc.weight" in names or _begins_with_merging(names))


def read(source: Source) -> Checkpoint:
    """A Swin, with its classifier if it has one. Before version 0.9 timm's stages ended with their merging."""
    weights = _move_merging(source.weights, -1) if _begins_with_merging(source.weights) else source.weights
    weights = {name.replace("head.fc.", "head.", 1): tensor for name, tensor in weights.items()}
    values = {"layer_norm_eps": microsoft.EPSILON, **microsoft.size_of_masks(weights)}
    return Checkpoint(NAME, microsoft.to_ours(weights), values)


def write(model: nn.Module, output: Path) -> Callable:
    """Encoder and classifier of a Swin or Twins."""
    if model.config.backbone_type == "twins":
        return twins.write(model, output)
    weights = _move_merging(microsoft.without_decoder(microsoft.from_ours(model)), 1)
    save_weights({re.sub(r"^head\.", "head.fc.", name): tensor for name, tensor in weights.items()}, output)
    return tokens_with_epsilon(model, lambda name: microsoft.EPSILON)


def _begins_with_merging(weights: dict[str, torch.Tensor]) -> bool:
    return "layers.0.downsample.norm.weight" not in weights and "layers.1.downsample.norm.weight" in weights


def _move_merging(weights: dict[str, torch.Tensor], stages: int) -> dict[str, torch.Tensor]:
    """Merging moved by so many stages: in timm a stage begins with what ends Microsoft's stage before it."""

    def moved(found: re.Match) -> str:
        return f"layers.{int(found[1]) + stages}.downsample."

    return {re.sub(r"^layers\.(\d+)\.downsample\.", moved, name): tensor for name, tensor in weights.items()}
