# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Twins-SVT encoder on visible tokens (Twins, https://huggingface.co/papers/2104.13840, made sparse).

Blocks alternate attention in windows, without shift or bias, and global attention to one key per mask unit. In nested
order a unit is a run of tokens, so the strided convolutions of Twins are a reshape and a matrix product.
"""

import torch
from torch import nn

from .attention import GreenMIMWindowAttention, attend, raster_attention_weights
from .blocks import GreenMIMBlock, GreenMIMEncoder
from .configuration_greenmim import GreenMIMConfig
from .plans import StagePlan
from .precision import GreenMIMLayerNorm


class GreenMIMTwinsGlobalAttention(nn.Module):
    """Multi-head attention of every token to one key and value per visible unit.

    Args:
        config: configuration of the model.
        width: channels of the stage.
        num_heads: heads of the stage.
        tokens_per_unit: what a key is made of, by a strided convolution and a normalisation; 1 makes keys of tokens.
    """

    is_causal = False

    def __init__(self, config: GreenMIMConfig, width: int, num_heads: int, tokens_per_unit: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.tokens_per_unit = tokens_per_unit
        self.q = nn.Linear(width, width, bias=config.qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        if tokens_per_unit > 1:
            self.reduction = nn.Linear(tokens_per_unit * width, width)
            self.norm = GreenMIMLayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, plan: StagePlan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, num_tokens, width)` -> the same, and weights `(batch, heads, num_tokens, num_visible)`."""
        query = self._heads(self.q(hidden_states))
        if plan.inside is not None:
            hidden_states = hidden_states * plan.inside  # the convolution sees zeros where there is padding
        if self.tokens_per_unit > 1:
            units = hidden_states.reshape(hidden_states.shape[0], -1, self.tokens_per_unit * hidden_states.shape[2])
            hidden_states = self.norm(self.reduction(units))
        key, value = (self._heads(part) for part in self.kv(hidden_states).chunk(2, dim=-1))
        output, weights = attend(self, query, key, value)
        return self.proj(output.flatten(2)), weights

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch, length, width)` -> `(batch, heads, length, head_dim)`."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class GreenMIMTwinsPositionEncoding(nn.Module):
    """Adds a depth-wise 3x3 convolution that sees zeros where units are masked."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)

    def forward(self, hidden_states: torch.Tensor, plan: StagePlan) -> torch.Tensor:
        """`(batch, num_tokens, width)` -> the same."""
        batch, _, width = hidden_states.shape
        tokens = hidden_states if plan.inside is None else hidden_states * plan.inside
        rows, columns = plan.padded_grid
        index = plan.raster_index[:, :, None].expand_as(tokens)
        grid = tokens.new_zeros(batch, rows * columns, width).scatter(1, index, tokens)
        encoded = self.conv(grid.transpose(1, 2).unflatten(2, plan.padded_grid))
        return hidden_states + encoded.flatten(2).transpose(1, 2).gather(1, index)


class GreenMIMTwinsPatchMerging(nn.Module):
    """Joins 2x2 tokens by a strided convolution and a normalisation."""

    def __init__(self, config: GreenMIMConfig, width: int):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width)
        self.norm = GreenMIMLayerNorm(2 * width, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, num_tokens, width)` -> `(batch, num_tokens / 4, 2 * width)`."""
        batch, _, width = hidden_states.shape
        return self.norm(self.reduction(hidden_states.reshape(batch, -1, 4 * width)))


class GreenMIMTwinsStage(nn.Module):
    """The blocks of one resolution, the position encoding after the first, and the merging that leads to the next."""

    def __init__(self, config: GreenMIMConfig, stage: int, window_size: int, drop_path_rates: list[float]):
        super().__init__()
        width, num_heads = config.stage_widths[stage], config.num_heads[stage]
        stages_left = len(config.depths) - 1 - stage

        def attention(block: int) -> nn.Module:
            if block % 2:
                return GreenMIMTwinsGlobalAttention(config, width, num_heads, 4**stages_left)
            return GreenMIMWindowAttention(config, width, num_heads, window_size, position_bias=False)

        self.blocks = nn.ModuleList(
            GreenMIMBlock(config, width, attention(block), rate) for block, rate in enumerate(drop_path_rates)
        )
        self.position_encoding = GreenMIMTwinsPositionEncoding(width)
        self.downsample = GreenMIMTwinsPatchMerging(config, width) if stages_left else None

    def forward(self, hidden_states: torch.Tensor, plan: StagePlan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, num_tokens, width)` -> the same before merging, and the last block's attention weights."""
        weights = None
        for index, block in enumerate(self.blocks):
            hidden_states, weights = block(hidden_states, plan if index % 2 else plan.groups[0])
            if index == 0:
                hidden_states = self.position_encoding(hidden_states, plan)
        if plan.inside is not None:
            hidden_states = hidden_states * plan.inside  # merging sees zeros where there is padding
        return hidden_states, weights

    def raster_weights(self, weights: torch.Tensor, plan: StagePlan) -> torch.Tensor:
        """The last block's weights in raster order: `(batch, heads, num_tokens, num_tokens or num_visible)`."""
        if len(self.blocks) % 2:
            return raster_attention_weights(weights, plan.groups[0], plan.raster_order)
        tokens = plan.raster_order % weights.shape[2]  # counted in each plan, not through all
        return torch.take_along_dim(weights, tokens[:, None, :, None], dim=2)


class GreenMIMTwinsEncoder(GreenMIMEncoder):
    """The stages of a Twins-SVT, on visible tokens only."""

    stage_class = GreenMIMTwinsStage
    needs_raster_index = True
    sizes = {"twins-large": {}}
