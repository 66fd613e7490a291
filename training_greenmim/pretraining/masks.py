# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Which units a mask leaves visible, by `--mask_strategy`. A new strategy is a function, and a line in the registry.

Each takes the rows and columns of units, how many stay visible, and a generator on the CPU (None: torch's own), and
returns exactly so many visible units, in ascending order, `(1, num_visible)`.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import interpolate

from modeling_greenmim.masking import lowest_units, sample_noise


# The least area of a block as a share of all units, and its least ratio of height to width: BEiT's, of 16 of 14x14.
LEAST_BLOCK = 16 / 196
LEAST_ASPECT = 0.3


def random_units(unit_grid: tuple[int, int], num_visible: int, generator: torch.Generator | None) -> torch.Tensor:
    """Every set of so many units is as likely as any other."""
    return lowest_units(sample_noise(unit_grid[0] * unit_grid[1], generator=generator), num_visible)


def units_outside_blocks(
    unit_grid: tuple[int, int], num_visible: int, generator: torch.Generator | None
) -> torch.Tensor:
    """What blocks leave that mask unit after unit, as in BEiT (https://huggingface.co/papers/2106.08254, algorithm 1).

    A block's area is uniform between the least one and what is still to be masked, its ratio of height to width
    log-uniform between 0.3 and 1 / 0.3, its place uniform; blocks may overlap. BEiT stops at about the number that is
    wanted. Here it is met exactly: of the last block, only the first units in raster order are masked.
    """
    rows, columns = unit_grid
    masked = torch.zeros(rows, columns, dtype=torch.bool)
    least = LEAST_BLOCK * rows * columns
    while missing := rows * columns - num_visible - int(masked.sum()):
        size, aspect, down, right = torch.rand(4, generator=generator).tolist()
        area = least + size * max(0, missing - least)
        ratio = LEAST_ASPECT ** (2 * aspect - 1)
        height = min(rows, max(1, round(math.sqrt(area * ratio))))
        width = min(columns, max(1, round(math.sqrt(area / ratio))))
        top, left = int(down * (rows - height + 1)), int(right * (columns - width + 1))
        block = torch.zeros_like(masked)
        block[top : top + height, left : left + width] = True
        fresh = (block & ~masked).flatten().nonzero()[:missing]
        masked.view(-1)[fresh] = True
    return (~masked).flatten().nonzero().view(1, -1)


def units_on_a_grid(unit_grid: tuple[int, int], num_visible: int, generator: torch.Generator | None) -> torch.Tensor:
    """Units at equal distances, as near as numbers allow, moved at random: MAE's grid-wise sampling, for any ratio.

    The visible units lie in some rows at equal distances, about as far from one another as units of a row are, and
    each row has its share of them, one more or less. All distances are rounded down or up, so the number is met
    exactly, and each unit is visible equally often. With 49 of 14x14 visible it is every other one of every other row.
    """
    rows, columns = unit_grid
    num_rows = round(math.sqrt(num_visible * rows / columns))
    num_rows = min(max(num_rows, math.ceil(num_visible / columns)), rows, num_visible)
    extra, down, right = torch.rand(3, generator=generator).tolist()
    extra = int(extra * num_rows)
    visible = []
    for number in range(num_rows):
        count = ((number + 1) * num_visible + extra) // num_rows - (number * num_visible + extra) // num_rows
        row = int((number + down) * rows / num_rows)
        visible += [row * columns + int((place + right) * columns / count) for place in range(count)]
    return torch.tensor([visible])


# What `mask_strategy` names.
MASK_STRATEGIES: dict[str, Callable[[tuple[int, int], int, torch.Generator | None], torch.Tensor]] = {
    "random": random_units,
    "block": units_outside_blocks,
    "grid": units_on_a_grid,
}

# The strategy that needs a teacher's features beside, and the names of all.
ATTENTIVE = "attentive"
STRATEGY_NAMES = (*MASK_STRATEGIES, ATTENTIVE)


def saliency(features: torch.Tensor, unit_grid: tuple[int, int]) -> torch.Tensor:
    """How far each unit's features are from their mean over the image: what stands out is far from it.

    MaskAlign and MILAN take the attention of a class token, which not every teacher has.

    Args:
        features: of a teacher, `(batch, rows, columns, width)`.
        unit_grid: rows and columns of units.

    Returns:
        `(batch, num_units)`, 0 or more.
    """
    features = features.float()
    distances = (features - features.mean(dim=(1, 2), keepdim=True)).norm(dim=3)[:, None]
    return interpolate(distances, unit_grid, mode="bilinear", antialias=True).flatten(1)


def gumbel_noise(num_units: int, generator: torch.Generator | None) -> torch.Tensor:
    """Noise of Gumbel's distribution, `(1, num_units)`."""
    return -torch.empty(1, num_units).exponential_(generator=generator).log()


def salient_units(scores: torch.Tensor, num_visible: int, noise: torch.Tensor) -> torch.Tensor:
    """Units drawn without replacement, with chances in proportion to their scores (Gumbel's top-k).

    Args:
        scores: `(masks, num_units)`, 0 or more.
        num_visible: units that stay visible.
        noise: Gumbel noise of the same shape.

    Returns:
        `(masks, num_visible)`, ascending.
    """
    return lowest_units(-(scores.clamp(min=1e-12).log() + noise), num_visible)
