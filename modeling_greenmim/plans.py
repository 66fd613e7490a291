# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Plans as values: which token goes to which slot of which group, and which pairs of slots attend one another.

`planning` makes them of masks, `attention` and the encoders read them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class GroupPlan:
    """Slots of the tokens of one stage for one shift. `plans` is 1 (shared by the batch) or the batch size.

    Attributes:
        token_of_slot: `(plans, num_groups, group_size)` int64, tokens counted through all plans; padding slots hold
            token 0. None when one group holds every token in its own order: nothing moves then.
        slot_of_token: `(plans, num_tokens)` int64, slots counted through all plans; None likewise.
        bias_index: `(plans, num_groups, group_size, group_size)` int32, see the function `bias_index`. Padding slots
            form a window of their own, so that no softmax row is empty.
        pattern_of_group: `(num_groups,)` int64 where groups that are alike share their index, which `bias_index`
            then holds once: `(1, num_patterns, group_size, group_size)`. None where each group has its own.
    """

    token_of_slot: torch.Tensor | None
    slot_of_token: torch.Tensor | None
    bias_index: torch.Tensor
    pattern_of_group: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "GroupPlan":
        """The plan with its index tensors changed."""
        tensors = (self.token_of_slot, self.slot_of_token, self.bias_index, self.pattern_of_group)
        return GroupPlan(*(_map(tensor, change) for tensor in tensors))

    @property
    def group_size(self) -> int:
        """Slots of a group."""
        return self.bias_index.shape[2]

    @property
    def num_slots(self) -> int:
        """Slots of all groups of one plan, padding included."""
        return num_groups(self) * self.group_size


# No properties: compilers take the plan of a dense model for a constant, of which they read fields alone.


def num_groups(plan: GroupPlan) -> int:
    """Groups of one plan."""
    return 1 if plan.token_of_slot is None else plan.token_of_slot.shape[1]


def has_padding(plan: GroupPlan) -> bool:
    """Whether some slots hold no token."""
    return plan.slot_of_token is not None and plan.slot_of_token.shape[1] < plan.token_of_slot[0].numel()


def bias_index(keys: np.ndarray, window_size: int) -> torch.Tensor:
    """For each query and key 1 plus their row of the position bias table; 0, or the last index, outside a window.

    The table has a row for each difference of coordinates in a window of side `w`: `w = 2` has differences of -1, 0
    and 1 each way, so `(2 * w - 1)**2 = 9` rows. They are numbered `(r_q - r_k + w - 1) * (2 * w - 1) + (c_q - c_k +
    w - 1)`. A column before and one after the table hold -inf, hence the 1:

                                    c_q - c_k
                                    -1   0   1
        index:   0        r_q - r_k -1   1   2   3                  10
                -inf                 0   4   5   6   (row + 1)     -inf
                                     1   7   8   9

    Four slots, of which a and b are in one window, a left of b, c is in another, and the last is padding:

             key   a    b    c   padding
        query a    5    4    0   10
              b    6    5    0   10
              c   10   10    5   10
        padding    0    0    0    5

    A slot meets itself in the middle row, 5. Which of 0 and 10 stands for a pair that does not meet says nothing.

    Args:
        keys: `(..., slots)` int32. Differences of two keys are rows less the middle one for slots of one window, and
            out of the table's range for all others.
        window_size: side `w` of a window in tokens.

    Returns:
        `(..., slots, slots)` int32.
    """
    table_size = (2 * window_size - 1) ** 2
    index = (keys + np.int32(1 + table_size // 2))[..., :, None] - keys[..., None, :]
    return torch.from_numpy(np.clip(index, np.int32(0), np.int32(table_size + 1), out=index))


def share_patterns(keys: np.ndarray, window_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the groups that differ, and for each group which of them it is like.

    Where every unit is visible, most groups are one whole window: of 1,392 groups of Swin-B's first stage at 800x1344
    px 30 differ.

    Args:
        keys: `(num_groups, slots)` int32, as `bias_index` takes them, the slots of a window side by side.
        window_size: side of a window in tokens.

    Returns:
        `(num_patterns, slots)` int32, in which windows are numbered from 0 in each group, and `(num_groups,)` int64.
    """
    span = np.int32(2 * (2 * window_size - 1) ** 2)  # between the keys of two windows
    windows, places = np.divmod(keys, span)
    starts = np.diff(windows, axis=1, prepend=windows[:, :1]) != 0
    keys = np.cumsum(starts, axis=1, dtype=np.int32) * span + places
    rows = keys.view(f"V{keys[0].nbytes}")[:, 0]  # a row as one value
    _, first, pattern_of_group = np.unique(rows, return_index=True, return_inverse=True)
    return keys[first], pattern_of_group


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs to know of the mask and the input size.

    Attributes:
        grid: rows and columns of the stage.
        groups: plans of the even and of the odd blocks; one and the same where windows are not shifted.
        inside: `(num_tokens, 1)` bool, False for padding; None without padding.
        raster_order: index for `take_tokens` that puts tokens, without padding, into raster order; None if not asked
            for.
        padded_grid: `grid` with padding below and right, up to whole units.
        raster_index: that of each token on the padded grid, `(plans, num_tokens)` int64; None but for encoders with
            `needs_raster_index`.
    """

    grid: tuple[int, int]
    groups: tuple[GroupPlan, GroupPlan]
    inside: torch.Tensor | None
    raster_order: torch.Tensor | None
    padded_grid: tuple[int, int]
    raster_index: torch.Tensor | None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "StagePlan":
        """The plan with its index tensors changed."""
        even, odd = self.groups
        changed = even.map(change)
        return StagePlan(
            self.grid,
            (changed, changed if odd is even else odd.map(change)),
            _map(self.inside, change),
            _map(self.raster_order, change),
            self.padded_grid,
            _map(self.raster_index, change),
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


def num_bytes(stages: tuple[StagePlan, ...]) -> int:
    """Memory of the index tensors of plans."""
    sizes = []
    for stage in stages:
        stage.map(lambda tensor: sizes.append(tensor.nbytes) or tensor)
    return sum(sizes)


def _map(tensor: torch.Tensor | None, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    return None if tensor is None else change(tensor)
