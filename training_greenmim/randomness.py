# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Randomness that is derived from where a run stands, never carried along.

Random state that is carried depends on how a run was started, interrupted and resumed, and on its number of workers.
Derived from (seed, epoch, sample) or (seed, step, micro-batch, process), every draw of a resumed run is exact.
"""

import numpy as np
import torch


# What draws are for: keeps streams of equal numbers apart.
SHUFFLE, AUGMENTATION, MASK, MODEL, REPLACEMENT, VIEW, STATISTICS = range(7)


def derived_generator(*key: int) -> np.random.Generator:
    """NumPy generator for a key of non-negative integers, such as (seed, purpose, epoch, sample)."""
    return np.random.default_rng(key)


def derived_seed(*key: int) -> int:
    """Seed in [0, 2**63) for a key of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def derived_torch_generator(*key: int) -> torch.Generator:
    """Torch generator on the CPU for a key of non-negative integers."""
    return torch.Generator().manual_seed(derived_seed(*key))
