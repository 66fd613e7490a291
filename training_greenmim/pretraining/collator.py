# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Masks and their plans, made in the data loader's workers."""

from collections.abc import Sequence

import torch

from modeling_greenmim import GreenMIMConfig, MaskPlan, plan_mask
from modeling_greenmim.masking import checked_num_visible

from ..data.image_dataset import collate
from ..randomness import MASK, derived_torch_generator
from .masks import MASK_STRATEGIES


def draw_plan(
    config: GreenMIMConfig,
    generators: Sequence[torch.Generator | None],
    strategy: str = "random",
    static: bool = False,
) -> MaskPlan:
    """Draws masks at the configuration's ratio and plans them.

    Args:
        config: of the model.
        generators: one for each mask; None is torch's own.
        strategy: a name of `MASK_STRATEGIES`.
        static: see `plan_mask`.
    """
    num_visible = checked_num_visible(config.unit_grid[0] * config.unit_grid[1], config.mask_ratio)
    draw = MASK_STRATEGIES[strategy]
    visible = torch.cat([draw(config.unit_grid, num_visible, generator) for generator in generators])
    return plan_mask(config, visible, static=static)


class MaskedCollator:
    """Joins training samples to a batch, draws its mask or masks and plans them; it runs in the loader's workers.

    Masks are derived from the seed and the `sample_key` of a sample (where it stands in the run), of the first one
    where a batch shares its mask: so they differ between steps and processes, whatever the number of workers.

    Args:
        config: of the model.
        seed: what masks are derived from.
        per_sample: whether each image has a mask of its own.
        static: whether the shapes of plans are the same for every mask; see `plan_mask`.
        strategy: how masks are drawn, a name of `MASK_STRATEGIES`.
    """

    def __init__(
        self,
        config: GreenMIMConfig,
        seed: int,
        per_sample: bool = False,
        static: bool = False,
        strategy: str = "random",
    ):
        self.config, self.seed, self.per_sample, self.static = config, seed, per_sample, static
        self.strategy = strategy

    def __call__(self, samples: list[dict]) -> dict:
        """What `collate` returns, and `plan`, a `MaskPlan`."""
        drawing = samples if self.per_sample else samples[:1]
        generators = [self.generator(sample["sample_key"]) for sample in drawing]
        return {**collate(samples), "plan": draw_plan(self.config, generators, self.strategy, self.static)}

    def generator(self, sample_key: tuple[int, ...]) -> torch.Generator:
        """Generator of the mask that is derived from a sample's key."""
        return derived_torch_generator(self.seed, MASK, *sample_key)
