# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The configuration that weights were made for: what their names and shapes tell, and what has to be assumed."""

import re

import torch

from modeling_greenmim import GreenMIMConfig
from modeling_greenmim.resizing import BIAS_TABLE, window_of_table

from .checkpoint import PROJECTION, Checkpoint, CheckpointError
from .reading import clear_errors


LAYERS = "greenmim.encoder.layers"
# In published models a head has 32 channels, in encoder and decoder, a Twins has windows of 7, and images have 224 px.
HEAD_WIDTH, TWINS_WINDOW, IMAGE_SIZE = 32, 7, 224


def infer_config(checkpoint: Checkpoint, **values) -> tuple[GreenMIMConfig, dict]:
    """The configuration of a checkpoint, and which of its values nothing told, so that they were assumed.

    Args:
        values: what to set otherwise than the checkpoint tells, such as `layer_norm_eps` or `image_size`.

    Raises:
        `CheckpointError`: when weights are missing that tell, or contradict one another.
    """
    weights = checkpoint.weights
    told = {**checkpoint.values, **values}
    encoder = told.get("backbone_type", "swin")
    try:
        shape = _infer_shape(weights)
        attention, assumed = ATTENTION_INFERENCE[encoder](weights, shape)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"The checkpoint is not whole: {error} is missing or has a strange shape.") from error
    inferred = {**shape, **attention}
    assumed["image_size"] = IMAGE_SIZE
    if "decoder.mask_token" in weights:
        inferred |= _infer_decoder(weights)
        assumed["decoder_num_attention_heads"] = max(1, inferred["decoder_hidden_size"] // HEAD_WIDTH)
    if "classifier.weight" in weights and "id2label" not in told:
        inferred["num_labels"] = weights["classifier.weight"].shape[0]
    assumed = {name: value for name, value in assumed.items() if name not in told}
    with clear_errors("The configuration"):
        config = GreenMIMConfig(**{**inferred, **assumed, **told})
    if encoder == "swin":
        _check_windows(config, _windows(weights, len(config.depths)))
    return config, assumed


def _infer_shape(weights: dict[str, torch.Tensor]) -> dict:
    """What all encoders share."""
    embed_dim, channels, patch, _ = weights[PROJECTION].shape
    stages = _count(weights, rf"{LAYERS}\.(\d+)\.blocks")
    return {
        "embed_dim": embed_dim,
        "num_channels": channels,
        "patch_size": patch,
        "depths": [_count(weights, rf"{LAYERS}\.{stage}\.blocks\.(\d+)") for stage in range(stages)],
        "mlp_ratio": weights[f"{LAYERS}.0.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "qkv_bias": f"{LAYERS}.0.blocks.0.attention.qkv.bias" in weights,
    }


def _infer_swin(weights: dict[str, torch.Tensor], shape: dict) -> tuple[dict, dict]:
    """Heads and window from the position bias tables; nothing is assumed."""
    stages = len(shape["depths"])
    heads = [_table(weights, stage).shape[1] for stage in range(stages)]
    return {"num_heads": heads, "window_size": max(_windows(weights, stages))}, {}


def _infer_twins(weights: dict[str, torch.Tensor], shape: dict) -> tuple[dict, dict]:
    """No weight of a Twins tells heads and window: those of published models are assumed."""
    widths = [shape["embed_dim"] * 2**stage for stage in range(len(shape["depths"]))]
    return {}, {"num_heads": [max(1, width // HEAD_WIDTH) for width in widths], "window_size": TWINS_WINDOW}


# By `backbone_type`: function of weights and `_infer_shape` -> values that weights tell, values that are assumed.
ATTENTION_INFERENCE = {"swin": _infer_swin, "twins": _infer_twins}


def _infer_decoder(weights: dict[str, torch.Tensor]) -> dict:
    return {
        "decoder_hidden_size": weights["decoder.mask_token"].shape[-1],
        "decoder_num_hidden_layers": _count(weights, r"decoder\.decoder_layers\.(\d+)"),
        "decoder_intermediate_size": weights["decoder.decoder_layers.0.mlp.fc1.weight"].shape[0],
    }


def _count(weights: dict[str, torch.Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in weights if (found := re.match(pattern, name))), default=-1)


def _table(weights: dict[str, torch.Tensor], stage: int) -> torch.Tensor:
    return weights[f"{LAYERS}.{stage}.blocks.0.attention.{BIAS_TABLE}"]


def _windows(weights: dict[str, torch.Tensor], stages: int) -> list[int]:
    """Window of each stage of a Swin."""
    tables = [_table(weights, stage) for stage in range(stages)]
    windows = [window_of_table(table) for table in tables]
    if None in windows:
        shapes = [tuple(table.shape) for table in tables]
        raise CheckpointError(
            f"The position bias tables have the shapes {shapes}; window w has (2 * w - 1) ** 2 rows."
        )
    return windows


def _check_windows(config: GreenMIMConfig, windows: list[int]) -> None:
    """A stage has the window `window_size`, or its own side where that is smaller. Do the tables agree?"""
    if windows == list(config.stage_windows):
        return
    # A smaller window is the side of its stage's grid, image_size / patch_size / 2**stage: it tells the image size.
    full = max(windows)
    sides = [window << stage for stage, window in enumerate(windows) if window < full]
    side = min(sides, default=full << (len(windows) - 1))
    if windows != [min(full, side >> stage) for stage in range(len(windows))]:
        raise CheckpointError(
            f"The windows of the stages are {windows} in the checkpoint. GreenMIM has one window for all stages, which"
            " shrinks only where a stage is smaller than it, so that no configuration gives these windows; Swins with"
            " windows of their own in each stage (timm's swin_s3_*) cannot be expressed."
        )
    raise CheckpointError(
        f"The windows of the stages are {windows} in the checkpoint, but `window_size` {config.window_size} and images"
        f" of `image_size` {config.image_size} have {list(config.stage_windows)}: give --image_size"
        f" {side * config.patch_size}{'' if sides else ' or more'}."
    )
