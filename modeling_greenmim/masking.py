# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Which mask units are visible: sampling masks and validating those of callers (paper, section 3.1).

Visible units are numbered in raster order and listed ascending, as an int64 tensor `(masks, num_visible)` on the CPU,
where planning happens; `masks` is 1 for a mask that the whole batch shares, else the batch size.
"""

from numbers import Real

import torch

from .configuration_greenmim import count_visible_units


def sample_noise(num_units: int, num_masks: int = 1, generator: torch.Generator | None = None) -> torch.Tensor:
    """Uniform noise per unit, `(num_masks, num_units)`, on the CPU: planning then waits for no device."""
    return torch.rand(num_masks, num_units, generator=generator)


def visible_units_from_noise(noise: torch.Tensor, num_units: int, batch_size: int, mask_ratio: float) -> torch.Tensor:
    """Keeps the units of lowest noise.

    Args:
        noise: `(1 or batch_size, num_units)`; one row serves the whole batch.
        mask_ratio: share of units to mask.

    Returns:
        Visible units, `(1 or batch_size, num_visible)`.

    Raises:
        `ValueError`: for another shape, or a ratio that leaves nothing visible or nothing masked.
    """
    if noise.ndim != 2 or not _fits(noise.shape[0], batch_size) or noise.shape[1] != num_units:
        raise ValueError(
            f"`noise` has shape {tuple(noise.shape)}, but this input needs (1 or {batch_size}, {num_units}):"
            " one row per mask, at least one, and one value per mask unit."
        )
    return lowest_units(noise.cpu(), checked_num_visible(num_units, mask_ratio))


def checked_num_visible(num_units: int, mask_ratio: float) -> int:
    """How many units a mask leaves visible.

    Raises:
        `ValueError`: for a ratio that leaves nothing visible or nothing masked.
    """
    if not isinstance(mask_ratio, Real) or not 0 <= mask_ratio <= 1:
        raise ValueError(f"`mask_ratio` is {mask_ratio!r}, but it must be between 0 and 1.")
    num_visible = count_visible_units(num_units, mask_ratio)
    if not 0 < num_visible < num_units:
        raise ValueError(
            f"`mask_ratio` is {mask_ratio}, but of {num_units} units it leaves {num_visible} visible;"
            " at least one must be visible and one masked."
        )
    return num_visible


def lowest_units(noise: torch.Tensor, num_visible: int) -> torch.Tensor:
    """Units of lowest noise in each row of `(masks, num_units)`, ascending, `(masks, num_visible)`."""
    return noise.argsort(dim=1, stable=True)[:, :num_visible].sort(dim=1).values


def visible_units_from_mask(
    bool_masked_pos: torch.Tensor, unit_grid: tuple[int, int], patches_per_side: int, batch_size: int
) -> torch.Tensor:
    """Reads a caller's mask.

    Args:
        bool_masked_pos: `(1 or batch_size, num_units)` or, at patch granularity as Transformers' `run_mim.py` has it,
            `(1 or batch_size, num_patches)`; 1 or True = masked. All rows must keep equally many units.
        unit_grid: rows and columns of units.
        patches_per_side: patches along the side of a unit.

    Returns:
        Visible units, `(1 or batch_size, num_visible)`; equal rows are joined into one shared mask.

    Raises:
        `ValueError`: for other shapes or values, masks that cut through a unit, rows that keep different numbers of
        units, or masks that leave nothing visible.
    """
    masked = _masked_units(bool_masked_pos.cpu(), unit_grid, patches_per_side, batch_size)
    counts = (~masked).sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(
            f"`bool_masked_pos` keeps between {counts.min()} and {counts.max()} visible units per row;"
            " every row must keep equally many."
        )
    if counts[0] == 0:
        raise ValueError("`bool_masked_pos` masks every unit; at least one must stay visible.")
    if (masked == masked[:1]).all():
        masked = masked[:1]
    return (~masked).nonzero()[:, 1].view(masked.shape[0], -1)


def _fits(num_masks: int, batch_size: int) -> bool:
    return num_masks > 0 and num_masks in (1, batch_size)


def _masked_units(mask: torch.Tensor, unit_grid: tuple[int, int], patches_per_side: int, batch_size: int):
    rows, columns = unit_grid
    num_units, num_patches = rows * columns, rows * columns * patches_per_side**2
    if mask.ndim != 2 or not _fits(mask.shape[0], batch_size) or mask.shape[1] not in (num_units, num_patches):
        raise ValueError(
            f"`bool_masked_pos` has shape {tuple(mask.shape)}, but this input needs (1 or {batch_size}, {num_units})"
            f" (one value per mask unit) or (1 or {batch_size}, {num_patches}) (one per patch), and at least one row."
        )
    if mask.dtype != torch.bool:
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("`bool_masked_pos` has values other than 0 (visible) and 1 (masked).")
        mask = mask.bool()
    if mask.shape[1] == num_units:
        return mask
    units = mask.view(-1, rows, patches_per_side, columns, patches_per_side).transpose(2, 3).flatten(3).flatten(1, 2)
    if (units != units[..., :1]).any():
        raise ValueError(
            "`bool_masked_pos` cuts through a mask unit: patches of a unit must be all masked or all visible"
            f" (a unit is {patches_per_side}x{patches_per_side} patches)."
        )
    return units[..., 0]


def unit_mask(visible_units: torch.Tensor, num_units: int) -> torch.Tensor:
    """Float mask `(masks, num_units)` with 1 for masked units."""
    mask = torch.ones(visible_units.shape[0], num_units, device=visible_units.device)
    return mask.scatter_(1, visible_units, 0.0)
