# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Window attention among visible tokens, in groups (paper, section 3.2)."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_greenmim import GreenMIMConfig
from .layout import move_tokens, parts_for_cache, split_heads, take_tokens
from .plans import GroupPlan, has_padding, num_groups


# Slots of a group that hold a window of 7.
SMALL_GROUP = 64


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: `(batch, heads, length, head_dim)` -> `(batch, length, heads, head_dim)`, weights."""
    weights = torch.matmul(query, key.transpose(2, 3))
    if attention_mask is None:
        weights = weights * scaling
    else:
        weights = torch.add(attention_mask, weights, alpha=scaling)  # one pass over memory
    weights = nn.functional.softmax(weights, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attend(module: nn.Module, query, key, value, attention_mask=None):
    """Runs the attention implementation that the module's configuration names."""
    implementation = module.config._attn_implementation
    if implementation == "sdpa" and query.device.type == "cpu" and _is_faster_written_out(attention_mask):
        implementation = "eager"
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = module.config.attention_probs_dropout_prob if module.training else 0.0
    return attention(module, query, key, value, attention_mask, dropout=dropout, scaling=query.shape[-1] ** -0.5)


def _is_faster_written_out(attention_mask: torch.Tensor | None) -> bool:
    """Whether a CPU is faster without a fused kernel."""
    if attention_mask is None:
        return False
    # No fused kernel of the CPU has a gradient for the bias; SDPA's fallback makes a training step 7 % slower.
    if attention_mask.requires_grad:
        return True
    # In groups as small as windows of 7 the kernel takes 1.3 to 1.6 times as long as products and softmax in parts of
    # the batch (bf16); in windows of 24 it takes less, and half the memory.
    is_inference = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return is_inference and attention_mask.shape[-1] <= SMALL_GROUP


class GreenMIMWindowAttention(nn.Module):
    """Multi-head attention inside windows. Only queries, keys and values move into slots, and outputs back.

    Args:
        config: configuration of the model.
        width: channels of the stage.
        num_heads: heads of the stage.
        window_size: side of the stage's windows in tokens.
        position_bias: whether a bias for each relative position is learned (Swin) or none (Twins).
    """

    is_causal = False

    def __init__(
        self, config: GreenMIMConfig, width: int, num_heads: int, window_size: int, position_bias: bool = True
    ):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.table_size = (2 * window_size - 1) ** 2
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        table = nn.Parameter(torch.zeros(self.table_size, num_heads)) if position_bias else None
        self.register_parameter("relative_position_bias_table", table)

    def draw_weights(self):
        """Draws the bias table, if there is one, from a truncated normal distribution."""
        if self.relative_position_bias_table is not None:
            init.trunc_normal_(self.relative_position_bias_table, std=self.config.initializer_range)

    def forward(self, hidden_states: torch.Tensor, plan: GroupPlan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, num_tokens, width)` -> the same, and attention weights `(batch, heads * groups, slots, slots)`.

        Groups are folded into the heads, so that one bias serves the batch. Where samples are taken in parts, in
        inference on a CPU, there are no weights, and hooks on `qkv` and `proj` see parts; "eager" takes all at once.
        """
        in_parts = plan.bias_index.shape[0] == 1 and self.config._attn_implementation != "eager"
        parts = parts_for_cache(hidden_states) if in_parts else (hidden_states,)
        bias, outputs = None, []
        for part in parts:
            query, key, value = self._to_heads(part, plan)
            bias = self.bias(plan, query.dtype) if bias is None else bias
            output, weights = attend(self, query, key, value, bias)
            outputs.append(self._from_heads(output, plan))
        return (outputs[0], weights) if len(outputs) == 1 else (torch.cat(outputs), None)

    def _to_heads(self, hidden_states: torch.Tensor, plan: GroupPlan) -> tuple[torch.Tensor, ...]:
        """Tokens -> queries, keys and values `(batch, heads * groups, slots, head_dim)`."""
        # What is moved is least before the projection; but with padding, projecting tokens alone costs less.
        if plan.token_of_slot is not None and not has_padding(plan):
            hidden_states = self._to_slots(hidden_states, plan)
        qkv = self.qkv(hidden_states)
        if has_padding(plan):
            qkv = self._to_slots(qkv, plan)
        return split_heads(qkv, self.num_heads, num_groups(plan))

    def _from_heads(self, output: torch.Tensor, plan: GroupPlan) -> torch.Tensor:
        """Outputs `(batch, slots, heads * groups, head_dim)` -> tokens."""
        output = output.unflatten(2, (self.num_heads, -1)).permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)
        if plan.token_of_slot is not None:
            output = self._to_tokens(output, plan)
        return self.proj(output)

    @staticmethod
    def _to_slots(tokens: torch.Tensor, plan: GroupPlan) -> torch.Tensor:
        """`(batch, num_tokens, channels)` -> `(batch, groups * slots, channels)`; padding slots have no gradient."""
        return move_tokens(tokens, plan.token_of_slot.flatten(1), plan.slot_of_token)

    @staticmethod
    def _to_tokens(slots: torch.Tensor, plan: GroupPlan) -> torch.Tensor:
        """`(batch, groups * slots, channels)` -> `(batch, num_tokens, channels)`."""
        if has_padding(plan):
            return take_tokens(slots, plan.slot_of_token)
        return move_tokens(slots, plan.slot_of_token, plan.token_of_slot.flatten(1))

    def bias(self, plan: GroupPlan, dtype: torch.dtype) -> torch.Tensor:
        """Bias of every pair of slots, -inf across windows: `(plans, heads * groups, slots, slots)`."""
        table = self.relative_position_bias_table
        if table is None:
            table = torch.zeros(self.table_size, self.num_heads, device=plan.bias_index.device)
        table = nn.functional.pad(table.t(), (1, 1), value=-torch.inf)
        bias = table.index_select(1, plan.bias_index.flatten()).unflatten(1, plan.bias_index.shape)
        if plan.pattern_of_group is not None:
            bias = bias.index_select(2, plan.pattern_of_group)
        # Many pairs share an entry: its gradient is summed in the table's own precision.
        return bias.to(dtype).transpose(0, 1).flatten(1, 2)


def raster_attention_weights(weights: torch.Tensor, plan: GroupPlan, raster_order: torch.Tensor) -> torch.Tensor:
    """Attention weights between tokens in raster order, 0 across windows.

    Args:
        weights: `(batch, heads * groups, slots, slots)` as the attention returns them.
        raster_order: `StagePlan.raster_order` of the tokens.

    Returns:
        `(batch, heads, num_tokens, num_tokens)`.
    """
    blocks = weights.unflatten(1, (-1, num_groups(plan))).permute(0, 1, 3, 4, 2)
    pairs = torch.diag_embed(blocks, dim1=2, dim2=4).flatten(4, 5).flatten(2, 3)
    slots = raster_order if plan.slot_of_token is None else plan.slot_of_token.flatten()[raster_order]
    slots = slots % pairs.shape[2]  # counted in each plan, not through all
    pairs = torch.take_along_dim(pairs, slots[:, None, :, None], dim=2)
    return torch.take_along_dim(pairs, slots[:, None, None, :], dim=3)
