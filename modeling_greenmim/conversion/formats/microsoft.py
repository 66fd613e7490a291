# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Microsoft's Swin (github.com/microsoft/Swin-Transformer), whose names official GreenMIM, SimMIM and timm share.

mmdetection and mmpretrain read its files, too.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from modeling_greenmim import GreenMIMConfig, GreenMIMModel

from ..checkpoint import PROJECTION as OUR_PROJECTION
from ..checkpoint import Checkpoint, CheckpointError, Source
from ..writing import save_weights, tokens_with_epsilon


NAME, TITLE = "microsoft-swin", "Microsoft's Swin"
BACKBONE_TYPES, OUTPUT = ("swin",), "file"
EPSILON = 1e-5  # torch's own
PROJECTION = "patch_embed.proj.weight"
# What models compute anew.
BUFFERS = re.compile(r"(relative_position_index|attn_mask)$")
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


def matches(source: Source) -> bool:
    """Whether it has the patch embedding of a Swin."""
    return PROJECTION in source.weights


def read(source: Source) -> Checkpoint:
    """A Swin, with its classifier if it has one."""
    values = {"layer_norm_eps": EPSILON, **config_values(source.config), **size_of_masks(source.weights)}
    return Checkpoint(NAME, to_ours(source.weights), values)


def write(model: nn.Module, output: Path) -> Callable:
    """Encoder and classifier, under the key "model"."""
    save_weights({"model": without_decoder(from_ours(model)) | position_indices(model.config)}, output)
    return tokens_with_epsilon(model, lambda name: EPSILON)


def to_ours(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names of Microsoft's Swin, and of official GreenMIM's decoder -> by ours, without buffers."""
    return {_replace(name, 0): tensor for name, tensor in weights.items() if not BUFFERS.search(name)}


def from_ours(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of one of our models by those names; the patch embedding as the kernel of a convolution."""
    config = model.config
    prefix = "greenmim." if isinstance(model, GreenMIMModel) else ""
    weights = {prefix + name: tensor.detach() for name, tensor in model.state_dict().items()}
    shape = (config.embed_dim, config.num_channels, config.patch_size, config.patch_size)
    weights[OUR_PROJECTION] = weights[OUR_PROJECTION].view(shape)
    return {_replace(name, 1): tensor for name, tensor in weights.items()}


def _replace(name: str, column: int) -> str:
    """Our name of one of Microsoft's (`column` 0), or the other way round (1)."""
    for pair in BEGINNINGS:
        if name.startswith(pair[1 - column]):
            name = pair[column] + name.removeprefix(pair[1 - column])
            break
    for pair in PARTS:
        name = name.replace(pair[1 - column], pair[column])
    return name


def is_of_decoder(name: str) -> bool:
    """Whether a weight by these names is one of official GreenMIM's decoder."""
    return name == "mask_token" or name.startswith("decoder_")


def without_decoder(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Encoder and classifier only."""
    return {name: tensor for name, tensor in weights.items() if not is_of_decoder(name)}


def config_values(config: dict) -> dict:
    """What the yacs configuration in files of Microsoft's and SimMIM's own `save_checkpoint` tells beside the weights.

    Raises:
        `CheckpointError`: when it scales attention in another way.
    """
    data, model = config.get("DATA", {}), config.get("MODEL", {})
    scale = model.get("SWIN", {}).get("QK_SCALE")
    if scale is not None:
        raise CheckpointError(
            f"The checkpoint scales attention by MODEL.SWIN.QK_SCALE {scale}; here the scale is 1 / sqrt(head width)."
        )
    told = {"image_size": data.get("IMG_SIZE"), "drop_path_rate": model.get("DROP_PATH_RATE")}
    told["hidden_dropout_prob"] = model.get("DROP_RATE")
    return {name: value for name, value in told.items() if value is not None}


def size_of_masks(weights: dict[str, torch.Tensor]) -> dict:
    """`image_size` of square images, from the attention mask of the first stage, if there is one."""
    mask = weights.get("layers.0.blocks.1.attn_mask")  # (windows, tokens, tokens)
    if mask is None or mask.ndim != 3:
        return {}
    side = math.isqrt(mask.shape[0] * mask.shape[1])
    return {"image_size": side * weights[PROJECTION].shape[-1]} if side**2 == mask.shape[0] * mask.shape[1] else {}


def position_indices(config: GreenMIMConfig) -> dict[str, torch.Tensor]:
    """The buffers of each block: for each pair of a window's tokens the row of the position bias table."""
    found = {}
    for stage, window in enumerate(config.stage_windows):
        rows, columns = (side.flatten() for side in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
        index = (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1
        for block in range(config.depths[stage]):
            found[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = index.clone()
    return found
