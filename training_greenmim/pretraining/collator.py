# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Masks and their plans, made in the data loader's workers."""

import torch

from modeling_greenmim import GreenMIMConfig, MaskPlan, plan_mask
from modeling_greenmim.masking import sample_noise, visible_units_from_noise

from ..data.image_dataset import collate
from ..randomness import MASK, derived_torch_generator


def plan_from_noise(config: GreenMIMConfig, noise: torch.Tensor, static: bool = False) -> MaskPlan:
    """Plan of the masks at the configuration's ratio that noise `(masks, num_units)` stands for; see `plan_mask`."""
    visible = visible_units_from_noise(noise, noise.shape[1], noise.shape[0], config.mask_ratio)
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
    """

    def __init__(self, config: GreenMIMConfig, seed: int, per_sample: bool = False, static: bool = False):
        self.config, self.seed, self.per_sample, self.static = config, seed, per_sample, static

    def __call__(self, samples: list[dict]) -> dict:
        """What `collate` returns, and `plan`, a `MaskPlan`; None where nothing is to be masked."""
        if self.config.mask_ratio == 0:
            return {**collate(samples), "plan": None}
        rows, columns = self.config.unit_grid
        keys = [sample["sample_key"] for sample in (samples if self.per_sample else samples[:1])]
        noise = torch.cat([sample_noise(rows * columns, generator=self.generator(key)) for key in keys])
        return {**collate(samples), "plan": plan_from_noise(self.config, noise, self.static)}

    def generator(self, sample_key: tuple[int, ...]) -> torch.Generator:
        """Generator of the mask that is derived from a sample's key."""
        return derived_torch_generator(self.seed, MASK, *sample_key)
