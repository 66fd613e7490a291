# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Mask -> plan: which slot each visible token takes, and which slots attend one another (paper, section 3.2).

A plan depends on the mask, the grid, the window and the shift alone: it is made once per (stage, shift), on the CPU,
in NumPy. `packing` chooses the groups, `plans` says what a plan holds.
"""

import operator
import threading
from collections import OrderedDict
from functools import lru_cache
from itertools import chain

import numpy as np
import torch

from .configuration_greenmim import GreenMIMConfig
from .encoders import ENCODERS
from .layout import token_raster_index
from .packing import choose_groups, pack_statically
from .plans import GroupPlan, MaskPlan, StagePlan, bias_index, num_bytes, share_patterns


def plan_groups(
    raster_index: np.ndarray,
    grid: tuple[int, int],
    window_size: int,
    shift: int,
    padded_grid: tuple[int, int] | None = None,
    static: bool = False,
) -> GroupPlan:
    """Plans (shifted) window attention over tokens.

    Args:
        raster_index: that of each token on the stage's (padded) grid, `(plans, num_tokens)`.
        grid: rows and columns of the stage.
        window_size: side `w` of a window in tokens.
        shift: 0, or the shift of the windows (`w // 2` in odd blocks).
        padded_grid: `grid` with padding below and right, whose tokens attend one another only; default: no padding.
        static: whether shapes shall depend on the number of tokens alone; see `static_groups`.
    """
    num_plans, num_tokens = raster_index.shape
    all_windows, all_keys, num_windows = _windows_and_keys(grid, window_size, shift, padded_grid or grid)
    keys, windows = all_keys[raster_index], all_windows[raster_index]
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
        return GroupPlan(None, None, bias_index(keys[:, None], window_size))

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
    key_of_slot, pattern_of_group = key_of_slot.reshape(shape), None
    if num_plans == 1 and num_tokens == len(all_keys):  # with masks hardly two groups are alike
        patterns, pattern_of_group = share_patterns(key_of_slot[0], window_size)
        key_of_slot, pattern_of_group = patterns[None], torch.from_numpy(pattern_of_group)
    return GroupPlan(
        torch.from_numpy(token_of_slot.reshape(shape)),
        torch.from_numpy(slot_of_token.reshape(num_plans, num_tokens)),
        bias_index(key_of_slot, window_size),
        pattern_of_group,
    )


@lru_cache(maxsize=256)
def _windows_and_keys(grid, window_size, shift, padded_grid):
    """For each raster index its window and its key, and the number of windows.

    Differences of keys are rows of the bias table less its middle one for tokens of one window, and out of its range
    for all others; so is the difference of any key and -1.
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


def plan_stages(
    visible_units: np.ndarray,
    patch_grid: tuple[int, int],
    window_sizes: tuple[int, ...],
    raster: bool = False,
    shifts_windows: bool = True,
    needs_raster_index: bool = False,
    static: bool = False,
) -> tuple[StagePlan, ...]:
    """Plans every stage of an encoder for one mask, or for one mask per sample.

    Args:
        visible_units: `(1 or batch, num_visible)`, ascending.
        patch_grid: rows and columns of patches. Units that overhang it right or below hold padding; one mask only
            then.
        window_sizes: window of each stage.
        raster: whether tokens will be put into raster order.
        shifts_windows, needs_raster_index: what the encoder needs, see `GreenMIMEncoder`.
        static: whether shapes shall depend on the number of visible units alone.
    """
    num_stages = len(window_sizes)
    unit_grid = tuple(-(-side // 2 ** (num_stages - 1)) for side in patch_grid)
    stages = []
    for stage, window_size in enumerate(window_sizes):
        side = 2 ** (num_stages - 1 - stage)
        grid = tuple(-(-length // 2**stage) for length in patch_grid)
        padded_grid = (unit_grid[0] * side, unit_grid[1] * side)
        raster_index = token_raster_index(visible_units, unit_grid, side)
        even = odd = plan_groups(raster_index, grid, window_size, 0, padded_grid, static)
        if min(grid) > window_size > 1 and shifts_windows:
            odd = plan_groups(raster_index, grid, window_size, window_size // 2, padded_grid, static)
        inside = None
        if grid != padded_grid:
            inside = (raster_index // padded_grid[1] < grid[0]) & (raster_index % padded_grid[1] < grid[1])
        stages.append(
            StagePlan(
                grid,
                (even, odd),
                None if inside is None else torch.from_numpy(inside[0, :, None]),
                _raster_order(raster_index, inside) if raster else None,
                padded_grid,
                torch.from_numpy(raster_index.astype(np.int64)) if needs_raster_index else None,
            )
        )
    return tuple(stages)


def _raster_order(raster_index: np.ndarray, inside: np.ndarray | None) -> torch.Tensor:
    num_plans, num_tokens = raster_index.shape
    order = np.argsort(raster_index, axis=1, kind="stable")
    if inside is not None:
        order = order[np.take_along_axis(inside, order, axis=1)].reshape(num_plans, -1)
    return torch.from_numpy(order + num_tokens * np.arange(num_plans)[:, None])


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
    encoder = ENCODERS[config.backbone_type]
    stages = plan_stages(
        visible_units.numpy(),
        patch_grid,
        config.stage_windows,
        raster,
        encoder.shifts_windows,
        encoder.needs_raster_index,
        static,
    )
    return MaskPlan(visible_units, stages, backbone_of(config))


def backbone_of(config: GreenMIMConfig) -> tuple[str, tuple[int, ...]]:
    """`MaskPlan.backbone` of a model."""
    return config.backbone_type, config.stage_windows


class PlanCache:
    """Plans by what they depend on: those used last, within a budget of memory.

    Args:
        budget: bytes that plans may take together. The one used last is kept even if it alone takes more.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self._plans: OrderedDict[tuple, tuple[StagePlan, ...]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # of models that serve from several threads

    @property
    def num_bytes(self) -> int:
        """What the plans that are kept take."""
        return self._bytes

    def get(self, key: tuple) -> tuple[StagePlan, ...] | None:
        """The plans of a key; None if they are not kept."""
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
            return self._plans.get(key)

    def put(self, key: tuple, plans: tuple[StagePlan, ...]) -> None:
        """Keeps plans, and gives up those that have not been used for longest."""
        with self._lock:
            if key in self._plans:  # another thread was faster
                return
            self._plans[key] = plans
            self._bytes += num_bytes(plans)
            while self._bytes > self.budget and len(self._plans) > 1:
                self._bytes -= num_bytes(self._plans.popitem(last=False)[1])


# A plan of Swin-B takes 1 MiB at 224 px and 4.6 MiB at 800x1344 px; planning it anew, some 1 and 17 ms. All sizes fit
# whose sides are multiples of 64 up to 576 px, or of 32 where the longer side is 800 px.
DENSE_PLANS = PlanCache(budget=128 * 2**20)


def plan_dense(config: GreenMIMConfig, image_size: tuple[int, int], device: torch.device) -> tuple[StagePlan, ...]:
    """`plan_stages` with every unit visible, on a device.

    Args:
        config: of the model.
        image_size: height and width in pixels; units may overhang it.
    """
    # To a compiler the sides may be symbols; a plan is of one size, and so is what is compiled of it.
    patch_grid = tuple(-(-operator.index(side) // config.patch_size) for side in image_size)
    return _plan_dense(config.backbone_type, patch_grid, config.stage_windows, device)


# A compiled model takes the plan as a constant: nothing is planned when it runs.
@torch.compiler.assume_constant_result
def _plan_dense(
    backbone_type: str, patch_grid: tuple[int, int], window_sizes: tuple[int, ...], device: torch.device
) -> tuple[StagePlan, ...]:
    if torch.compiler.is_exporting():
        # What is made while a model is exported belongs to the exporter, which turns it into constants.
        return _make_dense_plan(backbone_type, patch_grid, window_sizes, device)
    key = (backbone_type, patch_grid, window_sizes, device)
    plans = DENSE_PLANS.get(key)
    if plans is None:
        plans = _make_dense_plan(*key)
        DENSE_PLANS.put(key, plans)
    return plans


def _make_dense_plan(backbone_type, patch_grid, window_sizes, device) -> tuple[StagePlan, ...]:
    unit, encoder = 2 ** (len(window_sizes) - 1), ENCODERS[backbone_type]
    num_units = -(-patch_grid[0] // unit) * -(-patch_grid[1] // unit)
    # Tensors made in inference mode could not serve training later.
    with torch.inference_mode(False):
        plans = plan_stages(
            np.arange(num_units)[None],
            patch_grid,
            window_sizes,
            raster=True,
            shifts_windows=encoder.shifts_windows,
            needs_raster_index=encoder.needs_raster_index,
        )
        return tuple(plan.map(lambda tensor: tensor.to(device)) for plan in plans)
