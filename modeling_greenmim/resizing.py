# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Loading at other windows: position bias tables are interpolated (Swin Transformer, section 3.2).

[Swin Transformer: Hierarchical Vision Transformer using Shifted Windows](https://huggingface.co/papers/2103.14030).
"""

import math
import re

import torch
from torch import nn
from transformers.utils import logging

from .compat import LoadConversion


logger = logging.get_logger(__name__)

BIAS_TABLE = "relative_position_bias_table"


def resize_bias_table(table: torch.Tensor, window: int) -> torch.Tensor:
    """Interpolates a position bias table to another window: bicubic, each head by itself, pixel centres aligned.

    Args:
        table: `((2 * old_window - 1) ** 2, num_heads)`.
        window: side of the new windows in tokens.

    Returns:
        `((2 * window - 1) ** 2, num_heads)` of the table's dtype, computed in at least float32.

    Raises:
        `ValueError`: when no window has a table of that shape.
    """
    if window_of_table(table) is None:
        raise ValueError(
            f"`table` has shape {tuple(table.shape)}; a window w has a table of shape ((2 * w - 1) ** 2, num_heads)."
        )
    old_side, new_side = math.isqrt(table.shape[0]), 2 * window - 1
    maps = table.t().unflatten(1, (old_side, old_side)).to(torch.promote_types(table.dtype, torch.float32))
    maps = nn.functional.interpolate(maps[None], size=(new_side, new_side), mode="bicubic", align_corners=False)[0]
    return maps.flatten(1).t().to(table.dtype).contiguous()


def window_of_table(table: torch.Tensor) -> int | None:
    """The window `w` whose table has the shape `((2 * w - 1) ** 2, num_heads)`; None if there is none."""
    side = math.isqrt(table.shape[0]) if table.ndim == 2 else 0
    return (side + 1) // 2 if side % 2 == 1 and side**2 == table.shape[0] else None


class BiasTableResizing(LoadConversion):
    """Resizes tables of other windows while a checkpoint is loaded. One object serves one load.

    The old window is inferred from the table: the checkpoint's configuration is not needed. A table that fits stays as
    it is, and so does one that cannot be resized: Transformers then reports its shape as it does for other weights.

    Attributes:
        windows: old and new window of each stage (0-based) whose tables were resized.
        malformed: shapes of the tables, by name, that belong to no window.
    """

    weight_name = BIAS_TABLE

    def __init__(self):
        self.windows: dict[int, tuple[int, int]] = {}
        self.malformed: dict[str, tuple[int, ...]] = {}

    @torch.no_grad()
    def convert(self, input_dict, full_layer_name: str, config, **kwargs) -> dict[str, torch.Tensor]:
        """One table of the checkpoint, `{BIAS_TABLE: [table]}` -> the same with the window of the model's stage."""
        (table,) = input_dict[BIAS_TABLE]
        # From the configuration and not from the parameter, which is empty where DeepSpeed has partitioned it.
        stage = int(re.search(r"encoder\.layers\.(\d+)\.", full_layer_name)[1])
        old, new = window_of_table(table), config.stage_windows[stage]
        if old is None:
            self.malformed[full_layer_name] = tuple(table.shape)
        elif old != new and table.shape[1] == config.num_heads[stage]:
            self.windows[stage] = (old, new)
            table = resize_bias_table(table, new)
        return {BIAS_TABLE: table}

    def report(self, source: str, config, ignore_mismatched_sizes: bool) -> None:
        """Logs one line if tables were resized.

        Raises:
            `ValueError`: for tables of no window, unless `ignore_mismatched_sizes` asks for new ones.
        """
        if self.malformed and not ignore_mismatched_sizes:
            shapes = ", ".join(f"`{name}` of shape {shape}" for name, shape in self.malformed.items())
            raise ValueError(
                f"The checkpoint has {shapes}; a window w has a table of shape ((2 * w - 1) ** 2, num_heads), such as"
                " 169 rows for window 7. Repair it, or pass `ignore_mismatched_sizes=True` for a new table."
            )
        if self.windows:
            changes = ", ".join(
                f"{config.stage_names[stage + 1]} {old} -> {new}" for stage, (old, new) in sorted(self.windows.items())
            )
            logger.warning(
                f"{source}: position bias tables were interpolated (bicubic) to the windows of this model: {changes}."
            )
