# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Windows -> groups -> plan: how uneven windows of visible tokens become few dense attention calls.

Each window holds another number of visible tokens. Whole windows are packed into groups of equally many slots (paper,
section 3.2); attention is dense inside a group, and a mask lets through only pairs of one window. A plan depends on
the mask, the grid, the window and the shift alone: it is made once per (stage, shift), on the CPU, in NumPy.

Plans are tight, as many and as large groups as a mask needs, or static: the same shapes for all masks that keep as
many units, so that a training step is compiled once. A mask whose windows pack too badly for them, not seen among
20,000 random ones, gets a second shape, which holds every mask.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch

from .configuration_greenmim import GreenMIMConfig
from .layout import token_places


# A slot moves a query, a key, a value and an output: as costly as attending about this many further keys.
SLOT_COST = 32
# Another packing is tried only where it may lower the cost to this share.
WORTHWHILE = 0.96


@dataclass(frozen=True)
class GroupPlan:
    """Slots of the tokens of one stage for one shift. `plans` is 1 (shared by the batch) or the batch size.

    Attributes:
        token_of_slot: `(plans, num_groups, group_size)` int64, tokens counted through all plans; padding slots hold
            token 0. None when one group holds every token in its own order: nothing moves then.
        slot_of_token: `(plans, num_tokens)` int64, slots counted through all plans; None likewise.
        bias_index: `(plans, num_groups, group_size, group_size)` int32: for a query and a key of one window 1 plus the
            row of the position bias table, `(r_q - r_k + w - 1) * (2w - 1) + (c_q - c_k + w - 1)`; 0 or
            `(2w - 1)**2 + 1` for all other pairs. Padding slots form a window of their own, so that no softmax row is
            empty.
    """

    token_of_slot: torch.Tensor | None
    slot_of_token: torch.Tensor | None
    bias_index: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "GroupPlan":
        """The plan with its index tensors changed."""
        tensors = (self.token_of_slot, self.slot_of_token, self.bias_index)
        return GroupPlan(*(_map(tensor, change) for tensor in tensors))

    @property
    def group_size(self) -> int:
        """Slots of a group."""
        return self.bias_index.shape[2]

    @property
    def num_slots(self) -> int:
        """Slots of all groups of one plan, padding included."""
        return self.bias_index.shape[1] * self.group_size

    @property
    def has_padding(self) -> bool:
        """Whether some slots hold no token."""
        return self.slot_of_token is not None and self.slot_of_token.shape[1] < self.num_slots


def _map(tensor: torch.Tensor | None, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    return None if tensor is None else change(tensor)


def pack_windows(num_windows_of_size: list[int], group_size: int) -> tuple[list[list[int]], int]:
    """Packs windows into groups: into the room left always goes the largest window that fits.

    Which sizes are left is a bit set in a Python integer, so that finding the largest is one operation.

    Args:
        num_windows_of_size: how many windows hold 0, 1, 2, ... tokens; none holds more than `group_size`.

    Returns:
        For each size the first slot of each window of that size (slots counted through all groups), and the number of
        groups.
    """
    left = list(num_windows_of_size)
    left[0] = 0
    sizes_left = sum(1 << size for size, windows in enumerate(left) if windows)
    first_slots: list[list[int]] = [[] for _ in left]
    end = 0  # of the group being filled
    while sizes_left:
        end += group_size
        room = group_size
        while fitting := sizes_left & ((2 << room) - 1):
            size = fitting.bit_length() - 1
            first_slots[size].append(end - room)
            room -= size
            left[size] -= 1
            if not left[size]:
                sizes_left ^= 1 << size
    return first_slots, end // group_size


def choose_groups(counts: np.ndarray, num_tokens: int) -> tuple[int, int, list[list[list[int]]]] | None:
    """Group size of the cheapest packing, for one or more plans that share it.

    The cost of a plan is `slots * (group_size + SLOT_COST)`: attention plus movement, padding included.

    Args:
        counts: tokens of each window, `(plans, num_windows)`.
        num_tokens: tokens of a plan.

    Returns:
        Group size, number of groups, and for each plan the first slots by size of window; None when a single group of
        all tokens, which moves nothing, is cheapest.
    """
    best, best_cost = None, num_tokens**2
    if best_cost <= num_tokens * (1 + SLOT_COST):
        return None
    largest = int(counts.max())
    histograms = [np.bincount(row, minlength=largest + 1).tolist() for row in counts]
    for group_size in range(largest, num_tokens + 1):
        if num_tokens * (group_size + SLOT_COST) >= WORTHWHILE * best_cost:
            break  # larger groups cost more even without padding
        cost_of_group = group_size * (group_size + SLOT_COST)
        if -(-num_tokens // group_size) * cost_of_group >= WORTHWHILE * best_cost:
            continue
        packed = [pack_windows(histogram, group_size) for histogram in histograms]
        num_groups = max(groups for _, groups in packed)
        if num_groups * cost_of_group < best_cost:
            best, best_cost = (group_size, num_groups, [slots for slots, _ in packed]), num_groups * cost_of_group
    return best


@lru_cache(maxsize=256)
def static_groups(num_tokens: int, largest: int) -> tuple[int, int, int] | None:
    """Group size, and numbers of groups that are usually and always enough, by the least usual cost.

    Usually: no fewer than any of 20,000 random masks of 224 px and 4,000 of 448 px needed. Always: where `k` windows
    of the largest size fit into a group of `G` slots, `pack_windows` fills more than `G * k / (k + 1)` of every group
    but the last, since the largest window left out, of `s` tokens, came when at least `k` windows not smaller than it
    were in, of `F` tokens together; so `F >= k * s` and `F + s > G`.

    Args:
        num_tokens: tokens of a plan.
        largest: tokens that a window may hold.

    Returns:
        Group size, usual and sufficient number of groups; None when a single group of all tokens is cheapest.
    """
    best, best_cost = None, num_tokens**2
    for group_size in range(largest, num_tokens):
        fitting = group_size // largest
        sufficient = -(-(num_tokens - 1) * (fitting + 1) // (fitting * group_size))
        usual = min(sufficient, math.ceil(1.25 * -(-num_tokens // group_size)) + 2)
        cost = usual * group_size * (group_size + SLOT_COST)
        if cost < best_cost:
            best, best_cost = (group_size, usual, sufficient), cost
    return best


def pack_statically(counts: np.ndarray, num_tokens: int, largest: int):
    """As `choose_groups`, in groups whose size and number do not depend on the counts but in rare cases."""
    shape = static_groups(num_tokens, largest)
    if shape is None:
        return None
    group_size, usual, sufficient = shape
    packed = [pack_windows(np.bincount(row, minlength=largest + 1).tolist(), group_size) for row in counts]
    num_groups = usual if max(groups for _, groups in packed) <= usual else sufficient
    return group_size, num_groups, [slots for slots, _ in packed]


def plan_groups(
    places: np.ndarray,
    grid: tuple[int, int],
    window_size: int,
    shift: int,
    padded_grid: tuple[int, int] | None = None,
    static: bool = False,
) -> GroupPlan:
    """Plans (shifted) window attention over the tokens at the given places.

    Args:
        places: `row * columns + column` of each token on the stage's (padded) grid, `(plans, num_tokens)`.
        grid: rows and columns of the stage.
        window_size: side `w` of a window in tokens.
        shift: 0, or the shift of the windows (`w // 2` in odd blocks).
        padded_grid: `grid` with padding below and right, whose tokens attend one another only; default: no padding.
        static: whether shapes shall depend on the number of tokens alone; see `static_groups`.
    """
    num_plans, num_tokens = places.shape
    window_of_place, key_of_place, num_windows = _places_of_windows(grid, window_size, shift, padded_grid or grid)
    keys, windows = key_of_place[places], window_of_place[places]
    # Plans are made together: windows, tokens and slots are counted through all plans.
    if num_plans > 1:
        windows = windows + num_windows * np.arange(num_plans)[:, None]
    windows = windows.ravel()
    counts = np.bincount(windows, minlength=num_plans * num_windows)
    counts_of_plans = counts.reshape(num_plans, num_windows)
    if static:
        packing = pack_statically(counts_of_plans, num_tokens, window_size**2)
    else:
        packing = choose_groups(counts_of_plans, num_tokens)
    if packing is None:
        return GroupPlan(None, None, _bias_index(keys[:, None], window_size))

    group_size, num_groups, first_slots = packing
    num_slots = num_groups * group_size
    window_starts = np.zeros_like(counts_of_plans)
    by_size = np.argsort(counts_of_plans, axis=1, kind="stable")
    for plan, slots_by_size in enumerate(first_slots):
        starts = list(chain.from_iterable(slots_by_size))
        window_starts[plan, by_size[plan, num_windows - len(starts) :]] = starts
        window_starts[plan] += plan * num_slots
    # In window order the i-th token comes `i - tokens of the windows before` slots after the start of its window.
    order = np.argsort(windows, kind="stable")
    slots = np.repeat(window_starts.ravel() - (np.cumsum(counts) - counts), counts) + np.arange(len(order))

    slot_of_token, token_of_slot = np.empty_like(order), np.zeros(num_plans * num_slots, dtype=np.int64)
    slot_of_token[order], token_of_slot[slots] = slots, order
    key_of_slot = np.full(num_plans * num_slots, -1, dtype=np.int32)
    key_of_slot[slot_of_token] = keys.ravel()
    shape = (num_plans, num_groups, group_size)
    return GroupPlan(
        torch.from_numpy(token_of_slot.reshape(shape)),
        torch.from_numpy(slot_of_token.reshape(num_plans, num_tokens)),
        _bias_index(key_of_slot.reshape(shape), window_size),
    )


@lru_cache(maxsize=256)
def _places_of_windows(grid, window_size, shift, padded_grid):
    """For each place its window and its key, and the number of windows.

    Differences of keys are bias indices for tokens of one window, and out of the table's range for all others; so is
    the difference of any key and -1.
    """
    offset = (window_size - shift) % window_size
    rows, columns = np.arange(padded_grid[0]) + offset, np.arange(padded_grid[1]) + offset
    window_rows, window_columns = rows // window_size, columns // window_size
    # Windows of padding are numbered apart from those inside the grid.
    window_rows[grid[0] :] += window_rows[-1] + 1
    window_columns[grid[1] :] += window_columns[-1] + 1
    windows = window_rows[:, None] * (window_columns[-1] + 1) + window_columns
    table_size = (2 * window_size - 1) ** 2
    local_keys = rows[:, None] % window_size * (2 * window_size - 1) + columns % window_size
    keys = 2 * table_size * (windows + 1) + local_keys
    num_windows = int(windows[-1, -1]) + 1
    # Sorting is fastest on the smallest type.
    return windows.ravel().astype(np.min_scalar_type(num_windows)), keys.ravel().astype(np.int32), num_windows


def _bias_index(keys: np.ndarray, window_size: int) -> torch.Tensor:
    table_size = (2 * window_size - 1) ** 2
    index = (keys + np.int32(1 + table_size // 2))[..., :, None] - keys[..., None, :]
    return torch.from_numpy(np.clip(index, np.int32(0), np.int32(table_size + 1), out=index))


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs to know of the mask and the input size.

    Attributes:
        grid: rows and columns of the stage.
        groups: plans of the even and of the odd blocks; one and the same where windows are not shifted.
        inside: `(num_tokens, 1)` bool, False for padding; None without padding.
        raster: index for `take_tokens` that puts tokens, without padding, into raster order; None if not asked for.
        padded_grid: `grid` with padding below and right, up to whole units.
        places: `row * columns + column` of each token on the padded grid, `(plans, num_tokens)` int64; None but for
            Twins, whose convolutions need them.
    """

    grid: tuple[int, int]
    groups: tuple[GroupPlan, GroupPlan]
    inside: torch.Tensor | None
    raster: torch.Tensor | None
    padded_grid: tuple[int, int]
    places: torch.Tensor | None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "StagePlan":
        """The plan with its index tensors changed."""
        even, odd = self.groups
        changed = even.map(change)
        return StagePlan(
            self.grid,
            (changed, changed if odd is even else odd.map(change)),
            _map(self.inside, change),
            _map(self.raster, change),
            self.padded_grid,
            _map(self.places, change),
        )


@dataclass(frozen=True)
class MaskPlan:
    """A mask, or one per sample, and the plans of all stages. Models take it instead of a mask.

    It moves as tensors do: a data loader pins it, and it is copied to the device without waiting.

    Attributes:
        visible_units: `(1 or batch, num_visible)` int64, ascending; None when every unit is visible.
        stages: the plan of each stage.
        backbone: type and windows of the encoders that it serves.
    """

    visible_units: torch.Tensor | None
    stages: tuple[StagePlan, ...]
    backbone: tuple[str, tuple[int, ...]]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MaskPlan":
        """The plan with its index tensors changed."""
        stages = tuple(stage.map(change) for stage in self.stages)
        return MaskPlan(_map(self.visible_units, change), stages, self.backbone)

    def to(self, device: torch.device, non_blocking: bool = False) -> "MaskPlan":
        """The plan on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MaskPlan":
        """The plan in memory from which a device can copy on its own."""
        return self.map(torch.Tensor.pin_memory)


def plan_stages(
    visible_units: np.ndarray,
    patch_grid: tuple[int, int],
    window_sizes: tuple[int, ...],
    raster: bool = False,
    is_twins: bool = False,
    static: bool = False,
) -> tuple[StagePlan, ...]:
    """Plans every stage of an encoder for one mask, or for one mask per sample.

    Args:
        visible_units: `(1 or batch, num_visible)`, ascending.
        patch_grid: rows and columns of patches. Units that overhang it right or below hold padding; one mask only
            then.
        window_sizes: window of each stage.
        raster: whether tokens will be put into raster order.
        is_twins: no window is shifted, and convolutions need the tokens' places.
        static: whether shapes shall depend on the number of visible units alone.
    """
    num_stages = len(window_sizes)
    unit_grid = tuple(-(-side // 2 ** (num_stages - 1)) for side in patch_grid)
    stages = []
    for stage, window_size in enumerate(window_sizes):
        side = 2 ** (num_stages - 1 - stage)
        grid = tuple(-(-length // 2**stage) for length in patch_grid)
        padded_grid = (unit_grid[0] * side, unit_grid[1] * side)
        places = token_places(visible_units, unit_grid, side)
        even = odd = plan_groups(places, grid, window_size, 0, padded_grid, static)
        if min(grid) > window_size > 1 and not is_twins:
            odd = plan_groups(places, grid, window_size, window_size // 2, padded_grid, static)
        inside = None
        if grid != padded_grid:
            inside = (places // padded_grid[1] < grid[0]) & (places % padded_grid[1] < grid[1])
        stages.append(
            StagePlan(
                grid,
                (even, odd),
                None if inside is None else torch.from_numpy(inside[0, :, None]),
                _raster_order(places, inside) if raster else None,
                padded_grid,
                torch.from_numpy(places.astype(np.int64)) if is_twins else None,
            )
        )
    return tuple(stages)


def _raster_order(places: np.ndarray, inside: np.ndarray | None) -> torch.Tensor:
    order = np.argsort(places, axis=1, kind="stable")
    if inside is not None:
        order = order[np.take_along_axis(inside, order, axis=1)].reshape(len(places), -1)
    return torch.from_numpy(order + places.shape[1] * np.arange(len(places))[:, None])


def plan_mask(
    config: GreenMIMConfig,
    visible_units: torch.Tensor,
    unit_grid: tuple[int, int] | None = None,
    raster: bool = False,
    static: bool = False,
) -> MaskPlan:
    """Plans a forward pass with one mask, or with one mask per sample, for example in a worker of a data loader.

    Args:
        config: of the model.
        visible_units: `(1 or batch, num_visible)`, ascending, on the CPU.
        unit_grid: rows and columns of mask units; default: those of `config.image_size`.
        raster: whether hidden states or attention weights will be asked for.
        static: whether shapes shall depend on the number of visible units alone, for compiled models. There are then
            more groups than a mask needs.
    """
    patches_per_side = config.encoder_stride // config.patch_size
    patch_grid = tuple(side * patches_per_side for side in unit_grid or config.unit_grid)
    is_twins = config.backbone_type == "twins"
    stages = plan_stages(visible_units.numpy(), patch_grid, config.stage_windows, raster, is_twins, static)
    return MaskPlan(visible_units, stages, backbone_of(config))


def backbone_of(config: GreenMIMConfig) -> tuple[str, tuple[int, ...]]:
    """`MaskPlan.backbone` of a model."""
    return config.backbone_type, config.stage_windows


def plan_all_visible(
    patch_grid: tuple[int, int], window_sizes: tuple[int, ...], device: torch.device, is_twins: bool = False
) -> tuple[StagePlan, ...]:
    """`plan_stages` with every unit visible; it depends on the input size alone and is kept."""
    # What is made while a model is exported belongs to the exporter, which turns it into constants.
    plan = _plan_all_visible.__wrapped__ if torch.compiler.is_exporting() else _plan_all_visible
    return plan(patch_grid, window_sizes, device, is_twins)


@lru_cache(maxsize=64)
def _plan_all_visible(patch_grid, window_sizes, device, is_twins):
    unit = 2 ** (len(window_sizes) - 1)
    num_units = -(-patch_grid[0] // unit) * -(-patch_grid[1] // unit)
    # Tensors made in inference mode could not serve training later.
    with torch.inference_mode(False):
        plans = plan_stages(np.arange(num_units)[None], patch_grid, window_sizes, raster=True, is_twins=is_twins)
        return tuple(plan.map(lambda tensor: tensor.to(device)) for plan in plans)
