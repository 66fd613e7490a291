# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Decoders, by name (paper, section 3.3; Masked Autoencoders, https://huggingface.co/papers/2111.06377)."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attend
from .blocks import GreenMIMMLP
from .configuration_greenmim import GreenMIMConfig
from .masking import unit_mask
from .precision import GreenMIMLayerNorm


# Stages that the linear decoder reads, the last ones: of four all but the first, whose features are of edges.
FUSED_STAGES = 3


def sincos_positions(grid: tuple[int, int], width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions of MAE, `(rows * columns, width)`; `width` is divisible by 4.

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines.
    """
    precision = torch.promote_types(dtype, torch.float32)
    frequencies = 10000.0 ** (-torch.arange(width // 4, device=device, dtype=precision) / (width // 4))
    sides = [torch.arange(side, device=device, dtype=precision)[:, None] * frequencies for side in grid]
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in sides)
    shape = (*grid, width // 2)
    positions = torch.cat([columns[None].expand(shape), rows[:, None].expand(shape)], dim=2)
    return positions.flatten(0, 1).to(dtype)


class GreenMIMDecoderAttention(nn.Module):
    """Multi-head attention among all units."""

    is_causal = False

    def __init__(self, config: GreenMIMConfig):
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.num_heads = config.decoder_num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, num_units, width)` -> the same."""
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(hidden_states).chunk(3, dim=-1)
        )
        output, _ = attend(self, query, key, value)
        return self.proj(output.flatten(2))


class GreenMIMDecoderBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: GreenMIMConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.layernorm_before = GreenMIMLayerNorm(width, eps=config.layer_norm_eps)
        self.attention = GreenMIMDecoderAttention(config)
        self.layernorm_after = GreenMIMLayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = GreenMIMMLP(config, width, config.decoder_intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, num_units, width)` -> the same."""
        hidden_states = hidden_states + self.attention(self.layernorm_before(hidden_states))
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


class GreenMIMDecoder(nn.Module):
    """Predicts what is to be known of all units from the latents of the visible ones, each placed at its own unit.

    Args:
        config: configuration of the model.
        output_width: values to predict of each unit.
    """

    predicts_visible_only = False

    def __init__(self, config: GreenMIMConfig, output_width: int):
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_layers = nn.ModuleList(
            GreenMIMDecoderBlock(config) for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = GreenMIMLayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, output_width)

    def draw_weights(self):
        """Draws the mask token from a normal distribution."""
        init.normal_(self.mask_token, std=self.config.initializer_range)

    def forward(
        self,
        latents: torch.Tensor,
        visible_units: torch.Tensor,
        unit_grid: tuple[int, int],
        stage_tokens: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        """Decodes.

        Args:
            latents: `(batch, num_visible, hidden_size)`.
            visible_units: `(1 or batch, num_visible)`, the unit of each latent.
            unit_grid: rows and columns of units.
            stage_tokens: not used.

        Returns:
            `(batch, num_units, output_width)`.
        """
        latents = self.decoder_embed(latents)
        batch, _, width = latents.shape
        hidden_states = self.mask_token.to(latents.dtype).expand(batch, unit_grid[0] * unit_grid[1], width)
        hidden_states = hidden_states.scatter(1, visible_units[:, :, None].expand_as(latents), latents)
        hidden_states = hidden_states + sincos_positions(unit_grid, width, latents.device, latents.dtype)
        for layer in self.decoder_layers:
            hidden_states = self.update(layer, hidden_states, visible_units)
        return self.decoder_pred(self.decoder_norm(hidden_states))

    def update(self, layer: nn.Module, hidden_states: torch.Tensor, visible_units: torch.Tensor) -> torch.Tensor:
        """`(batch, num_units, width)` -> the same after a block."""
        return layer(hidden_states)


class GreenMIMPromptingDecoder(GreenMIMDecoder):
    """MILAN's decoder (https://huggingface.co/papers/2208.06049, section 3.2): its blocks update masked units only.

    Visible units are attended to, but stay as the encoder left them.
    """

    def update(self, layer: nn.Module, hidden_states: torch.Tensor, visible_units: torch.Tensor) -> torch.Tensor:
        """`(batch, num_units, width)` -> the same after a block, visible units unchanged."""
        is_masked = unit_mask(visible_units, hidden_states.shape[1])[:, :, None].bool()
        return torch.where(is_masked, layer(hidden_states), hidden_states)


class GreenMIMLinearDecoder(nn.Module):
    """Linear layers from the last stages to what is to be known of the visible units alone (MaskAlign's alignment).

    The tokens of each of the last three stages are averaged over their unit, normalised and brought to the width of
    the target by a linear layer; the sum is the prediction (https://huggingface.co/papers/2211.08887, section 3.3).

    Args:
        config: configuration of the model.
        output_width: values to predict of each unit.
    """

    predicts_visible_only = True

    def __init__(self, config: GreenMIMConfig, output_width: int):
        super().__init__()
        *earlier, last = config.stage_widths[-FUSED_STAGES:]
        self.stage_norms = nn.ModuleList(GreenMIMLayerNorm(width, eps=config.layer_norm_eps) for width in earlier)
        self.stage_preds = nn.ModuleList(nn.Linear(width, output_width) for width in earlier)
        self.decoder_pred = nn.Linear(last, output_width)

    def forward(
        self,
        latents: torch.Tensor,
        visible_units: torch.Tensor | None,
        unit_grid: tuple[int, int],
        stage_tokens: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Predicts.

        Args:
            latents: `(batch, num_visible, hidden_size)`.
            visible_units, unit_grid: not used.
            stage_tokens: each stage's `(batch, num_visible * tokens of a unit, width)`, in nested order.

        Returns:
            `(batch, num_visible, output_width)`.
        """
        predictions = self.decoder_pred(latents)
        earlier = stage_tokens[-1 - len(self.stage_preds) : -1]
        for tokens, norm, pred in zip(earlier, self.stage_norms, self.stage_preds):
            # Nested order: the tokens of a unit follow one another.
            units = tokens.unflatten(1, (latents.shape[1], -1)).mean(dim=2)
            predictions = predictions + pred(norm(units))
        return predictions


# What `decoder_type` of a configuration names.
DECODERS: dict[str, type[nn.Module]] = {
    "transformer": GreenMIMDecoder,
    "prompting": GreenMIMPromptingDecoder,
    "linear": GreenMIMLinearDecoder,
}
