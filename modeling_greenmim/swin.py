# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Swin encoder on visible tokens (Swin Transformer, https://huggingface.co/papers/2103.14030, made sparse)."""

import torch
from torch import nn

from .attention import GreenMIMWindowAttention, raster_attention_weights
from .blocks import GreenMIMBlock, GreenMIMEncoder
from .configuration_greenmim import GreenMIMConfig
from .plans import StagePlan
from .precision import GreenMIMLayerNorm


class GreenMIMPatchMerging(nn.Module):
    """Joins 2x2 tokens: in nested order they are runs of four, and joining is a reshape."""

    def __init__(self, config: GreenMIMConfig, width: int):
        super().__init__()
        self.norm = GreenMIMLayerNorm(4 * width, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, num_tokens, width)` -> `(batch, num_tokens / 4, 2 * width)`."""
        batch, _, width = hidden_states.shape
        return self.reduction(self.norm(hidden_states.reshape(batch, -1, 4 * width)))


class GreenMIMSwinStage(nn.Module):
    """The blocks of one resolution, and the merging that leads to the next."""

    def __init__(self, config: GreenMIMConfig, stage: int, window_size: int, drop_path_rates: list[float]):
        super().__init__()
        width, num_heads = config.stage_widths[stage], config.num_heads[stage]
        self.blocks = nn.ModuleList(
            GreenMIMBlock(config, width, GreenMIMWindowAttention(config, width, num_heads, window_size), rate)
            for rate in drop_path_rates
        )
        is_last = stage == len(config.depths) - 1
        self.downsample = None if is_last else GreenMIMPatchMerging(config, width)

    def forward(self, hidden_states: torch.Tensor, plan: StagePlan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, num_tokens, width)` -> the same before merging, and the last block's attention weights."""
        weights = None
        for index, block in enumerate(self.blocks):
            hidden_states, weights = block(hidden_states, plan.groups[index % 2])
        if plan.inside is not None:
            hidden_states = hidden_states * plan.inside  # merging sees zeros where there is padding
        return hidden_states, weights

    def raster_weights(self, weights: torch.Tensor, plan: StagePlan) -> torch.Tensor:
        """The last block's attention weights in raster order, `(batch, heads, num_tokens, num_tokens)`."""
        return raster_attention_weights(weights, plan.groups[(len(self.blocks) - 1) % 2], plan.raster_order)


class GreenMIMSwinEncoder(GreenMIMEncoder):
    """The stages of a Swin transformer, on visible tokens only."""

    stage_class = GreenMIMSwinStage
    shifts_windows = True
    sizes = {
        "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
        "small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
        "base": {},
        "base-win14": {"window_size": 14},
        "large-win14": {"embed_dim": 192, "num_heads": [6, 12, 24, 48], "window_size": 14},
    }
