# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Official GreenMIM (github.com/LayneH/GreenMIM): encoder and decoder of pre-training, of a Swin or a Twins.

Three things that its weights' names do not show: files of 2022 and 2023 merge patches in different order; the position
encoding of its Twins has no residual; kernels of strided convolutions are stored (out, height, width, in).
"""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from modeling_greenmim import GreenMIMForPreTraining
from modeling_greenmim.decoder import sincos_positions

from ..checkpoint import Checkpoint, CheckpointError, Source
from ..writing import save_weights, tokens_with_epsilon
from . import microsoft, twins


NAME, TITLE = "original", "official GreenMIM"
BACKBONE_TYPES, OUTPUT = ("swin", "twins"), "file"
EPSILON = 1e-6
# Merging order by the ending of `args.model`: the first (sic) is of 2022, the second of 2023.
ORDERS = {"dec5121b1": "row", "dec512b1": "column"}
# Values of the configuration that `args` tells, by their names there: official files the first three, our exports all.
CONFIG_FROM_ARGS = {
    "image_size": "input_size",
    "mask_ratio": "mask_ratio",
    "norm_pix_loss": "norm_pix_loss",
    "decoder_num_attention_heads": "decoder_num_heads",
    "layer_norm_eps": "layer_norm_eps",
}
TWINS_CONFIG_FROM_ARGS = {"num_heads": "num_heads", "window_size": "window_size"}
POSITION_ENCODING = re.compile(r"^pos_block\.\d+\.proj\.0\.weight$")


def matches(source: Source) -> bool:
    """Whether it has a part of the decoder, an official model's name, or a Twins as official GreenMIM stores it."""
    if any(microsoft.is_of_decoder(name) for name in source.weights) or _order_by_name(source):
        return True
    if f"encoder.{twins.PROJECTION}" in source.weights:
        return True
    kernel = source.weights.get("patch_embeds.1.proj.weight")  # joins 2x2 tokens
    return kernel is not None and kernel.ndim == 4 and kernel.shape[1:3] == (2, 2) and kernel.shape[3] != 2


def read(source: Source) -> Checkpoint:
    """The model of pre-training, or its encoder if the file has no decoder."""
    weights = {name.removeprefix("encoder."): tensor for name, tensor in source.weights.items()}
    _check_decoder(weights)
    names, values = CONFIG_FROM_ARGS, {"layer_norm_eps": EPSILON}
    is_twins = twins.PROJECTION in weights
    if is_twins:
        names, values["backbone_type"] = names | TWINS_CONFIG_FROM_ARGS, "twins"
    values |= _size_of_positions(weights)
    values |= {ours: source.args[theirs] for ours, theirs in names.items() if source.args.get(theirs) is not None}
    weights.pop("decoder_pos_embed", None)
    if not is_twins:
        name = source.args.get("model")
        return Checkpoint(NAME, microsoft.to_ours(weights), values, _order_by_name(source), name)
    # Ours adds what the convolution sees to what it computes: the same as a 1 less in the middle of each kernel. Our
    # exports of version 0.1.0 kept the residual; since then they say that they do not.
    if not source.args.get("position_encoding_residual", "layer_norm_eps" in source.args):
        weights = _add_to_centres(weights, -1)
    return Checkpoint(NAME, twins.to_ours(weights, channels_last=True), values)


def write(model: nn.Module, output: Path) -> Callable:
    """A model of pre-training, under the key "model", and under "args" what readers know it by."""
    if not isinstance(model, GreenMIMForPreTraining):
        others = "twins or timm" if model.config.backbone_type == "twins" else "microsoft-swin"
        raise CheckpointError(
            f"The original layout is that of pre-training, but the model is a {type(model).__name__} without decoder;"
            f" export to {others}."
        )
    config = model.config
    if config.reconstruction_target != "pixels" or config.decoder_type != "transformer":
        raise CheckpointError(
            f"The original layout is that of predicting pixels, but the model predicts {config.reconstruction_target}"
            f" by a {config.decoder_type} decoder; export its encoder to timm or another format."
        )
    name, names = f"green_mim_{config.backbone_type}_patch{config.patch_size}_dec512b1", CONFIG_FROM_ARGS
    args = argparse.Namespace(model=name)
    if config.backbone_type == "twins":
        weights = _add_to_centres(twins.from_ours(model, channels_last=True), 1)
        names = names | TWINS_CONFIG_FROM_ARGS
        args.position_encoding_residual = False
    else:
        weights = microsoft.from_ours(model) | microsoft.position_indices(config)
    weights = {name if microsoft.is_of_decoder(name) else f"encoder.{name}": weights[name] for name in weights}
    positions = sincos_positions(config.unit_grid, config.decoder_hidden_size, torch.device("cpu"), torch.float32)
    weights["decoder_pos_embed"] = positions[None]
    vars(args).update({theirs: getattr(config, ours) for ours, theirs in names.items()})
    save_weights({"model": weights, "args": args}, output)
    return tokens_with_epsilon(model, lambda name: EPSILON)


def _order_by_name(source: Source) -> str | None:
    name = str(source.args.get("model", ""))
    return next((order for ending, order in ORDERS.items() if name.endswith(ending)), None)


def _check_decoder(weights: dict[str, torch.Tensor]) -> None:
    """Either no decoder, or what its shape is inferred from."""
    if not any(microsoft.is_of_decoder(name) for name in weights):
        return
    needed = ("mask_token", "decoder_blocks.0.mlp.fc1.weight", "decoder_pred.weight")
    missing = [name for name in needed if name not in weights or weights[name].ndim < 2]
    if missing:
        raise CheckpointError(f"The checkpoint has a part of a decoder: {missing} are missing or of a strange shape.")


def _size_of_positions(weights: dict[str, torch.Tensor]) -> dict:
    """`image_size` of square images, from the decoder's positions, one for each unit, and its pixels of a unit."""
    positions, pixels = weights.get("decoder_pos_embed"), weights.get("decoder_pred.weight")
    if positions is None or pixels is None:
        return {}
    if positions.ndim != 3:
        raise CheckpointError(f"`decoder_pos_embed` has shape {tuple(positions.shape)} instead of (1, units, width).")
    kernel = weights.get(microsoft.PROJECTION, weights.get(twins.PROJECTION))
    if kernel is None or kernel.ndim != 4:
        return {}
    side, unit = math.isqrt(positions.shape[1]), math.isqrt(pixels.shape[0] // kernel.shape[1])
    return {"image_size": side * unit} if side**2 == positions.shape[1] else {}


def _add_to_centres(weights: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    """Adds to the middle of the position encodings' 3x3 kernels, by the names of Twins."""
    weights = dict(weights)
    for name in weights:
        if POSITION_ENCODING.match(name):
            weights[name] = weights[name].clone()
            weights[name][:, :, 1, 1] += value
    return weights
