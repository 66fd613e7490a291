# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Windows -> groups: how uneven windows of visible tokens fill few groups of equally many slots (paper, section 3.2).

Numbers alone: how many tokens each window holds. Where a mask leaves 4, 3, 3, 2 and 1 tokens in five windows, groups
of 5 slots are filled so:

    window  A A A A . B B B . C C C . D D . E        13 tokens, sizes 4, 3, 3, 2, 1

    slot    0 1 2 3 4   5 6 7 8 9   10 11 12 13 14
    group   A A A A E | B B B D D |  C  C  C  -  -   3 groups, 15 slots, 2 of them padding

The first group takes the largest window, A, and then the largest that fits into the one slot left, E; the second takes
B and D. `pack_windows([0, 1, 1, 2, 1], 5)`, of one window of 1, one of 2, two of 3 and one of 4 tokens, says where
each window starts, `[[], [4], [8], [5, 10], [0]]` by its size, and that there are 3 groups.

Attention in a group compares all its slots, `3 * 5**2 = 75` pairs here instead of `13**2 = 169` in one group; a mask
keeps windows apart. Larger groups have less padding and more pairs: `choose_groups` weighs one against the other. In
the first stage of Swin-B at 224 px 768 tokens are visible; most masks give them 16 groups of 49 slots, 38,416 pairs
instead of 589,824.

Groups are tight, as many and as large as a mask needs, or static: the same shapes for all masks that keep as many
units, so that a training step is compiled once. A mask whose windows pack too badly for them, not seen among 20,000
random ones, gets a second shape, which holds every mask.
"""

import math
from functools import lru_cache

import numpy as np


# A slot moves a query, a key, a value and an output: as costly as attending about this many further keys.
SLOT_COST = 32
# Another packing is tried only where it may lower the cost to this share.
WORTHWHILE = 0.96


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
