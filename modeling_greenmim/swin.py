# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Swin encoder on visible tokens (Swin Transformer, https://huggingface.co/papers/2103.14030, made sparse).

Twins shares its embedding, blocks, MLPs and the run through the stages.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import GreenMIMWindowAttention, raster_attention_weights
from .configuration_greenmim import GreenMIMConfig
from .grouping import GroupPlan, StagePlan
from .layout import nested_patches


class GreenMIMDropPath(nn.Module):
    """Stochastic depth (https://huggingface.co/papers/1603.09382): drops a residual branch per sample in training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """`(batch, ...)` -> the same, some samples 0 and the others scaled up."""
        if self.rate == 0.0 or not self.training:
            return branch
        keep = torch.rand(branch.shape[0], *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * keep.to(branch.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        """Shows the rate."""
        return f"rate={self.rate}"


# Without gradients an MLP on a CPU takes about this many tokens at a time: what lies between its layers then stays in
# the cache, in memory that is used again. 50,176 tokens of width 96 (Swin-T, first stage, 16 images) take 0.10 s, not
# 0.17 s. With gradients it is kept anyway, and a training step is no faster.
CPU_TOKENS = 3136


class GreenMIMMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: GreenMIMConfig, width: int, hidden_width: int):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, num_tokens, width)` -> the same."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or hidden_states.device.type != "cpu":
            return self._transform(hidden_states)
        samples = max(1, CPU_TOKENS // hidden_states.shape[1])
        if hidden_states.shape[0] <= samples:
            return self._transform(hidden_states)
        return torch.cat([self._transform(part) for part in hidden_states.split(samples)])

    def _transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class GreenMIMPatchEmbeddings(nn.Module):
    """Embeds the visible patches: a gather of units and one matrix product."""

    def __init__(self, config: GreenMIMConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.unit = config.encoder_stride
        self.projection = nn.Linear(config.num_channels * config.patch_size**2, config.embed_dim)

    def forward(self, pixel_values: torch.Tensor, visible_units: torch.Tensor | None) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, num_tokens, embed_dim)` in nested order."""
        patches = nested_patches(pixel_values, self.unit, self.patch_size, visible_units)
        return self.projection(patches.to(self.projection.weight.dtype))


class GreenMIMEmbeddings(nn.Module):
    """Patch embedding, normalisation and dropout."""

    def __init__(self, config: GreenMIMConfig):
        super().__init__()
        self.patch_embeddings = GreenMIMPatchEmbeddings(config)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, visible_units: torch.Tensor | None) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, num_tokens, embed_dim)` in nested order."""
        return self.dropout(self.norm(self.patch_embeddings(pixel_values, visible_units)))


class GreenMIMPatchMerging(nn.Module):
    """Joins 2x2 tokens: in nested order they are runs of four, and joining is a reshape."""

    def __init__(self, config: GreenMIMConfig, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, num_tokens, width)` -> `(batch, num_tokens / 4, 2 * width)`."""
        batch, _, width = hidden_states.shape
        return self.reduction(self.norm(hidden_states.reshape(batch, -1, 4 * width)))


class GreenMIMBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block.

    Args:
        config: configuration of the model.
        width: channels of the stage.
        attention: module of (tokens, plan) that returns tokens and attention weights.
        drop_path_rate: rate of stochastic depth.
    """

    def __init__(self, config: GreenMIMConfig, width: int, attention: nn.Module, drop_path_rate: float):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = attention
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = GreenMIMMLP(config, width, int(config.mlp_ratio * width))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = GreenMIMDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, plan: GroupPlan | StagePlan
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, num_tokens, width)` -> the same, and attention weights; the plan is what the attention takes."""
        attended, weights = self.attention(self.layernorm_before(hidden_states), plan)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        transformed = self.mlp(self.layernorm_after(hidden_states))
        if weights is not None and self.gradient_checkpointing:
            weights = weights.detach()  # reentrant checkpointing asks a gradient of every output that may have one
        return hidden_states + self.drop_path(self.dropout(transformed)), weights


class GreenMIMSwinStage(nn.Module):
    """The blocks of one resolution, and the merging that leads to the next."""

    def __init__(self, config: GreenMIMConfig, stage: int, window_size: int, drop_path_rates: list[float]):
        super().__init__()
        width, num_heads = config.embed_dim * 2**stage, config.num_heads[stage]
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
        return raster_attention_weights(weights, plan.groups[(len(self.blocks) - 1) % 2], plan.raster)


@dataclass
class EncoderOutput:
    """Tokens in nested order.

    Attributes:
        stage_inputs: what each stage starts from (the first: the embeddings), `(batch, num_tokens, width)`.
        stage_outputs: what each stage ends with, before merging.
        attentions: each stage's weights of its last block, `(batch, heads, num_tokens, num_tokens)`, in raster order.
    """

    stage_inputs: tuple[torch.Tensor, ...]
    stage_outputs: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...] | None


class GreenMIMSwinEncoder(nn.Module):
    """The stages of a Swin transformer, on visible tokens only."""

    stage_class = GreenMIMSwinStage

    def __init__(self, config: GreenMIMConfig):
        super().__init__()
        self.config = config
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        ends = [sum(config.depths[: stage + 1]) for stage in range(len(config.depths))]
        self.layers = nn.ModuleList(
            self.stage_class(config, stage, window_size, rates[ends[stage] - config.depths[stage] : ends[stage]])
            for stage, window_size in enumerate(config.stage_windows)
        )

    def forward(
        self, hidden_states: torch.Tensor, plans: tuple[StagePlan, ...], output_attentions: bool = False
    ) -> EncoderOutput:
        """Runs all stages on `(batch, num_tokens, embed_dim)` tokens in nested order.

        Raises:
            `ValueError`: when attention weights are asked of an implementation that keeps none.
        """
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"`output_attentions` is True, but attn_implementation {self.config._attn_implementation!r} keeps no"
                ' attention weights; load the model with attn_implementation="eager".'
            )
        inputs, outputs, attentions = [], [], []
        for stage, plan in zip(self.layers, plans):
            inputs.append(hidden_states)
            hidden_states, weights = stage(hidden_states, plan)
            outputs.append(hidden_states)
            if output_attentions:
                attentions.append(stage.raster_weights(weights, plan))
            if stage.downsample is not None:
                hidden_states = stage.downsample(hidden_states)
        return EncoderOutput(tuple(inputs), tuple(outputs), tuple(attentions) if output_attentions else None)
