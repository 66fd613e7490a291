# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Masks and their plans, made in the data loader's workers."""

from collections.abc import Sequence

import torch

from modeling_greenmim import GreenMIMConfig, MaskPlan, plan_mask
from modeling_greenmim.masking import checked_num_visible

from ..data.image_dataset import collate
from ..randomness import MASK, derived_torch_generator
from .masks import ATTENTIVE, MASK_STRATEGIES, gumbel_noise, saliency, salient_units


def draw_plan(
    config: GreenMIMConfig,
    generators: Sequence[torch.Generator | None],
    strategy: str = "random",
    static: bool = False,
) -> MaskPlan | None:
    """Draws masks at the configuration's ratio and plans them; None where the ratio is 0.

    Args:
        config: of the model.
        generators: one for each mask; None is torch's own.
        strategy: a name of `MASK_STRATEGIES`.
        static: see `plan_mask`.
    """
    if config.mask_ratio == 0:
        return None
    num_visible = checked_num_visible(config.unit_grid[0] * config.unit_grid[1], config.mask_ratio)
    draw = MASK_STRATEGIES[strategy]
    visible = torch.cat([draw(config.unit_grid, num_visible, generator) for generator in generators])
    return plan_mask(config, visible, static=static)


def plan_by_saliency(config: GreenMIMConfig, features: torch.Tensor, noise: torch.Tensor, static: bool) -> MaskPlan:
    """Plans masks that keep what a teacher finds salient; waits for the features where they are on a device.

    Args:
        config: of the model.
        features: of a teacher, `(batch, rows, columns, width)`.
        noise: Gumbel noise, `(1 or batch, num_units)`; one row is for a mask that the batch shares.
        static: see `plan_mask`.
    """
    num_visible = checked_num_visible(noise.shape[1], config.mask_ratio)
    scores = saliency(features, config.unit_grid).cpu()
    if len(noise) == 1:
        scores = scores.mean(dim=0, keepdim=True)
    return plan_mask(config, salient_units(scores, num_visible, noise), static=static)


class MaskedCollator:
    """Joins training samples to a batch, draws its mask or masks and plans them; it runs in the loader's workers.

    Masks are derived from the seed and the `sample_key` of a sample (where it stands in the run), of the first one
    where a batch shares its mask: so they differ between steps and processes, whatever the number of workers.

    Args:
        config: of the model.
        seed: what masks are derived from.
        per_sample: whether each image has a mask of its own.
        static: whether the shapes of plans are the same for every mask; see `plan_mask`.
        strategy: how masks are drawn, a name of `MASK_STRATEGIES`, or `ATTENTIVE`.
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
        """What `collate` returns, and `plan`, a `MaskPlan`, None where nothing is masked.

        Attentive masks need a teacher's features: where the samples bring none, there is `mask_noise` instead.
        """
        batch, drawing = collate(samples), samples if self.per_sample else samples[:1]
        generators = [self.generator(sample["sample_key"]) for sample in drawing]
        if self.strategy != ATTENTIVE or self.config.mask_ratio == 0:
            return {**batch, "plan": draw_plan(self.config, generators, self.strategy, self.static)}
        num_units = self.config.unit_grid[0] * self.config.unit_grid[1]
        noise = torch.cat([gumbel_noise(num_units, generator) for generator in generators])
        if "features" not in batch:
            return {**batch, "mask_noise": noise}
        return {**batch, "plan": plan_by_saliency(self.config, batch["features"], noise, self.static)}

    def generator(self, sample_key: tuple[int, ...]) -> torch.Generator:
        """Generator of the mask that is derived from a sample's key."""
        return derived_torch_generator(self.seed, MASK, *sample_key)
