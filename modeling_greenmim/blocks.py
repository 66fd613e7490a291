# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What encoders are made of: embeddings, MLPs, blocks, and the run through the stages."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .configuration_greenmim import GreenMIMConfig
from .layout import nested_patches, parts_for_cache
from .plans import GroupPlan, StagePlan
from .precision import GreenMIMLayerNorm


logger = logging.get_logger(__name__)


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


class GreenMIMMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: GreenMIMConfig, width: int, hidden_width: int):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, num_tokens, width)` -> the same."""
        outputs = [self.fc2(self.activation_fn(self.fc1(part))) for part in parts_for_cache(hidden_states)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class GreenMIMPatchEmbeddings(nn.Module):
    """Embeds the visible patches: a gather of units and one matrix product."""

    def __init__(self, config: GreenMIMConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.unit = config.encoder_stride
        self.projection = nn.Linear(config.num_channels * config.patch_size**2, config.embed_dim)

    def forward(
        self, pixel_values: torch.Tensor, visible_units: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, num_tokens, embed_dim)` in nested order, from `dtype`."""
        return self.projection(nested_patches(pixel_values, self.unit, self.patch_size, visible_units).to(dtype))


class GreenMIMEmbeddings(nn.Module):
    """Patch embedding, normalisation and dropout."""

    def __init__(self, config: GreenMIMConfig):
        super().__init__()
        self.patch_embeddings = GreenMIMPatchEmbeddings(config)
        self.norm = GreenMIMLayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, visible_units: torch.Tensor | None) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, num_tokens, embed_dim)` in nested order."""
        # The projection may be quantised: its weight is of another type then, or none.
        return self.dropout(self.norm(self.patch_embeddings(pixel_values, visible_units, self.norm.weight.dtype)))


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
        self.layernorm_before = GreenMIMLayerNorm(width, eps=config.layer_norm_eps)
        self.attention = attention
        self.layernorm_after = GreenMIMLayerNorm(width, eps=config.layer_norm_eps)
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


@dataclass
class EncoderOutput:
    """Tokens in nested order.

    Attributes:
        stage_inputs: what each stage starts from (the first: the embeddings), `(batch, num_tokens, width)`.
        stage_outputs: what each stage ends with, before merging.
        attentions: each stage's weights of its last block, `(batch, heads, num_tokens, num_tokens)`, in raster order;
            None where they are not asked for, empty where nothing keeps them.
    """

    stage_inputs: tuple[torch.Tensor, ...]
    stage_outputs: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...] | None


class GreenMIMEncoder(nn.Module):
    """The stages of a hierarchical encoder, on visible tokens only: what all encoders have in common.

    A new encoder is a file with a stage and a subclass of this class, and a line in `encoders.ENCODERS`. Its
    `stage_class(config, stage, window_size, drop_path_rates)` is a module with

    - `forward(tokens, plan)`: `(batch, num_tokens, width)` and a `StagePlan` -> the same before merging, 0 where
      `plan.inside` is False, and the last block's attention weights or None;
    - `downsample`: module that joins runs of four tokens to one of twice the width; None in the last stage;
    - `raster_weights(weights, plan)`: the weights of the last block in raster order;
    - `blocks`: the blocks, in order. Layer-wise learning rates count them; the merging learns with the last block of
      the stage, whatever else a stage has with the first.

    A module whose parameters are not initialised as linear layers and norms are has a method `draw_weights()`.

    Attributes:
        stage_class: class of the stages.
        shifts_windows: whether the windows of odd blocks are shifted by half a window.
        needs_raster_index: whether stages read `StagePlan.raster_index`, as convolutions do.
        sizes: named sizes, as changes to the default configuration.
    """

    stage_class: type[nn.Module]
    shifts_windows: bool = False
    needs_raster_index: bool = False
    sizes: dict[str, dict] = {}

    def __init__(self, config: GreenMIMConfig):
        super().__init__()
        self.config = config
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        ends = [sum(config.depths[: stage + 1]) for stage in range(len(config.depths))]
        self.layers = nn.ModuleList(
            self.stage_class(config, stage, window_size, rates[ends[stage] - config.depths[stage] : ends[stage]])
            for stage, window_size in enumerate(config.stage_windows)
        )

    @staticmethod
    def layer_depths(config: GreenMIMConfig) -> list[int]:
        """Number of blocks of each stage, which layer-wise learning rates count."""
        return list(config.depths)

    def forward(
        self, hidden_states: torch.Tensor, plans: tuple[StagePlan, ...], output_attentions: bool = False
    ) -> EncoderOutput:
        """Runs all stages on `(batch, num_tokens, embed_dim)` tokens in nested order.

        Where nothing keeps attention weights that are asked for, they are left out with a warning, as in Transformers;
        compiled code does not warn.
        """
        keeps_attentions = output_attentions and self.config._attn_implementation == "eager"
        # A warning would break the graph of what is compiled.
        if output_attentions and not keeps_attentions and not torch.compiler.is_compiling():
            logger.warning_once(
                f"`output_attentions` is True, but attn_implementation {self.config._attn_implementation!r} keeps no"
                ' attention weights: `attentions` is empty. Load the model with attn_implementation="eager".'
            )
        inputs, outputs, attentions = [], [], []
        for stage, plan in zip(self.layers, plans):
            inputs.append(hidden_states)
            hidden_states, weights = stage(hidden_states, plan)
            outputs.append(hidden_states)
            if keeps_attentions:
                attentions.append(stage.raster_weights(weights, plan))
            if stage.downsample is not None:
                hidden_states = stage.downsample(hidden_states)
        return EncoderOutput(tuple(inputs), tuple(outputs), tuple(attentions) if output_attentions else None)
