# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pixels <-> mask units, and the order of tokens inside a unit.

Inside the encoder tokens are unit-major and *nested*: `(batch, visible units * tokens of a unit, channels)`, where the
tokens of a unit follow a Z-order curve whose runs of four are the 2x2 blocks that patch merging joins, recursively.
The row bit is the lowest, so a run of four is (0,0), (1,0), (0,1), (1,1): the order in which Swin concatenates, and
merging is a reshape. A token's *raster index* is its number in raster order of its stage's grid, `row * columns +
column`; nested order never leaves the model.
"""

from functools import lru_cache

import numpy as np
import torch


def patchify(pixel_values: torch.Tensor, unit: int) -> torch.Tensor:
    """Cuts images `(batch, channels, height, width)` into units `(batch, num_units, unit**2 * channels)`.

    A unit's values are in (row, column, channel) order.
    """
    batch, channels, height, width = pixel_values.shape
    units = pixel_values.reshape(batch, channels, height // unit, unit, width // unit, unit)
    return units.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, unit**2 * channels)


def unpatchify(patches: torch.Tensor, unit: int, height: int, width: int) -> torch.Tensor:
    """Inverse of `patchify`: `(batch, num_units, unit**2 * channels)` -> `(batch, channels, height, width)`."""
    batch = patches.shape[0]
    units = patches.reshape(batch, height // unit, width // unit, unit, unit, -1)
    return units.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def nested_patches(
    pixel_values: torch.Tensor, unit: int, patch_size: int, visible_units: torch.Tensor | None = None
) -> torch.Tensor:
    """Patches of the visible units in nested order.

    Args:
        pixel_values: `(batch, channels, height, width)`.
        visible_units: `(1 or batch, num_visible)` on the device of the images; None = every unit.

    Returns:
        `(batch, num_visible * patches of a unit, channels * patch_size**2)`, each patch in (channel, row, column)
        order, as the weight of a patch-embedding convolution has it.
    """
    batch, channels, height, width = pixel_values.shape
    columns = width // unit
    units = pixel_values.reshape(batch, channels, height // unit, unit, columns, unit)
    if visible_units is None:
        units = units.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    elif visible_units.shape[0] == 1:
        units = units[:, :, visible_units[0] // columns, :, visible_units[0] % columns].transpose(0, 1)
    else:
        samples = torch.arange(batch, device=visible_units.device)[:, None]
        units = units[samples, :, visible_units // columns, :, visible_units % columns]
    # units: (batch, visible, channels, unit, unit). Split both sides into bits, highest first, and let the column and
    # row bit of each level follow one another.
    levels = (unit // patch_size).bit_length() - 1
    units = units.reshape(batch, -1, channels, *[2] * levels, patch_size, *[2] * levels, patch_size)
    row, column = 3, 3 + levels + 1
    bits = [axis for level in range(levels) for axis in (column + level, row + level)]
    units = units.permute(0, 1, *bits, 2, row + levels, column + levels)
    return units.reshape(batch, -1, channels * patch_size**2)


@lru_cache(maxsize=256)
def _nested_raster_index(unit_grid: tuple[int, int], side: int) -> np.ndarray:
    """Raster index of each token of each unit, `(num_units, side**2)`."""
    position = np.arange(side * side)
    rows, columns = np.zeros_like(position), np.zeros_like(position)
    for bit in range(side.bit_length() - 1):
        rows |= (position >> (2 * bit) & 1) << bit
        columns |= (position >> (2 * bit + 1) & 1) << bit
    units = np.arange(unit_grid[0] * unit_grid[1])[:, None]
    rows, columns = units // unit_grid[1] * side + rows, units % unit_grid[1] * side + columns
    return (rows * (unit_grid[1] * side) + columns).astype(np.int32)


def token_raster_index(visible_units: np.ndarray, unit_grid: tuple[int, int], side: int) -> np.ndarray:
    """Raster index of the visible tokens on the grid of a stage whose units have `side * side` tokens.

    Args:
        visible_units: `(masks, num_visible)`.
        unit_grid: rows and columns of units.

    Returns:
        `(masks, num_visible * side**2)`, tokens in nested order.
    """
    return _nested_raster_index(unit_grid, side)[visible_units].reshape(len(visible_units), -1)


def take_tokens(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Picks tokens: `(batch, length, channels)` -> `(batch, count, channels)`.

    Args:
        index: `(1, count)` for the same tokens of every sample, or `(batch, count)` counted through the whole batch.
    """
    if index.shape[0] == 1:
        return tokens.index_select(1, index[0])
    return tokens.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, (tokens.shape[0], -1))


class _MoveTokens(torch.autograd.Function):
    """`take_tokens` whose gradient is taken too: without the scattered sums of `index_select`'s own gradient."""

    @staticmethod
    def forward(tokens, index, inverse):
        return take_tokens(tokens, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return _MoveTokens.apply(grad, inverse, index), None, None


def move_tokens(tokens: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`take_tokens` for an index that holds every token, with a cheaper gradient.

    Args:
        tokens: `(batch, length, channels)`.
        index: `(1 or batch, count)` as `take_tokens` has it.
        inverse: `(1 or batch, length)`, where in the result each token stands. Rows of the result that are not
            named there must have no gradient.
    """
    return _MoveTokens.apply(tokens, index, inverse)


# Without gradients attention and MLPs on a CPU take about this many tokens at a time: what lies between their layers
# then stays in the cache, in memory that is used again. An MLP of 50,176 tokens of width 96 (Swin-T, first stage, 16
# images) takes 0.10 s, not 0.17 s. With gradients it is kept anyway, and a training step is no faster.
CPU_TOKENS = 3136


def parts_for_cache(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The samples of `(batch, num_tokens, channels)` that layers take at a time: on a CPU without gradients few."""
    # What is traced shall hold for other batches.
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if torch.is_grad_enabled() or is_traced or tokens.device.type != "cpu":
        return (tokens,)
    return tokens.split(max(1, CPU_TOKENS // tokens.shape[1]))


class _SplitHeads(torch.autograd.Function):
    """`split_heads`, whose gradient is put together in one copy: autograd's own makes a second one of all of it."""

    @staticmethod
    def forward(qkv, num_heads, num_groups):
        # (batch, groups, slots, 3, heads, head_dim) -> (3, batch, heads, groups, slots, head_dim)
        qkv = qkv.unflatten(2, (3, num_heads, -1)).unflatten(1, (num_groups, -1)).permute(3, 0, 4, 1, 2, 5)
        return qkv.flatten(2, 3).unbind()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.num_heads = inputs[1]

    @staticmethod
    def backward(ctx, *grads):
        grads = [grad.unflatten(1, (ctx.num_heads, -1)).permute(0, 2, 3, 1, 4) for grad in grads]
        return torch.stack(grads, 3).flatten(3).flatten(1, 2), None, None


def split_heads(qkv: torch.Tensor, num_heads: int, num_groups: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, with groups folded into the heads.

    Args:
        qkv: `(batch, groups * slots, 3 * width)`.

    Returns:
        Three times `(batch, heads * groups, slots, head_dim)`.
    """
    return _SplitHeads.apply(qkv, num_heads, num_groups)
