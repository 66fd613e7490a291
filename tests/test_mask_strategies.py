"""Mask strategies: exact numbers, determinism, and that each mask is of its kind; in the collator and in runs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from modeling_greenmim import GreenMIMConfig, GreenMIMForPreTraining
from tests.oracle import tiny_config
from tests.training_helpers import results_of, run, write_images
from training_greenmim.pretraining.collator import MaskedCollator, draw_plan
from training_greenmim.pretraining.masks import MASK_STRATEGIES
from training_greenmim.randomness import MASK, derived_torch_generator
from training_greenmim.runs.arguments import MIMTrainingArguments


properties = settings(derandomize=True, deadline=None, max_examples=200)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks_of(strategy: str, grid: tuple[int, int], num_visible: int, count: int) -> np.ndarray:
    """Masks as pictures, `(count, rows, columns)`, True where hidden."""
    hidden = np.ones((count, grid[0] * grid[1]), dtype=bool)
    for seed in range(count):
        hidden[seed, MASK_STRATEGIES[strategy](grid, num_visible, seeded(seed))[0].numpy()] = False
    return hidden.reshape(count, *grid)


@st.composite
def cases(draw):
    """Grids of units, some of them narrow, and any number of visible units."""
    grid = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    return grid, draw(st.integers(1, grid[0] * grid[1])), draw(st.integers(0, 2**32))


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
@properties
@given(cases())
def test_exactly_so_many_units_stay_visible(strategy, case):
    grid, num_visible, seed = case
    visible = MASK_STRATEGIES[strategy](grid, num_visible, seeded(seed))
    assert visible.shape == (1, num_visible) and visible.dtype == torch.int64
    assert visible.min() >= 0 and visible.max() < grid[0] * grid[1]
    assert (visible.diff(dim=1) > 0).all()
    torch.rand(3)  # what else draws from the global generator plays no part
    assert torch.equal(MASK_STRATEGIES[strategy](grid, num_visible, seeded(seed)), visible)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
@pytest.mark.parametrize("num_visible", [1, 1599])
def test_extreme_ratios_of_many_units_end(strategy, num_visible):
    assert MASK_STRATEGIES[strategy]((40, 40), num_visible, seeded(0)).shape == (1, num_visible)


@properties
@given(cases())
def test_random_masks_are_those_of_the_lowest_noise(case):
    """Bit for bit what was drawn before there were strategies."""
    grid, num_visible, seed = case
    noise = torch.rand(1, grid[0] * grid[1], generator=seeded(seed))[0].tolist()
    expected = sorted(sorted(range(len(noise)), key=noise.__getitem__)[:num_visible])
    assert MASK_STRATEGIES["random"](grid, num_visible, seeded(seed))[0].tolist() == expected


def samples(*keys) -> list[dict]:
    return [{"sample_key": key, "pixel_values": torch.zeros(3, 8, 8), "unreadable": []} for key in keys]


def test_random_masks_of_runs_are_those_of_earlier_versions():
    plan = MaskedCollator(GreenMIMConfig(), 42, per_sample=True)(samples((0, 0), (3, 17)))["plan"]
    assert plan.visible_units.tolist() == [
        [0, 5, 9, 13, 16, 29, 30, 33, 34, 41, 44, 47],
        [9, 13, 15, 20, 27, 29, 30, 33, 34, 39, 42, 48],
    ]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_the_collator_draws_a_mask_from_each_key(strategy, static):
    config = GreenMIMConfig()
    keys = [(epoch, position) for epoch in range(2) for position in range(8)]

    def visible(seed: int = 0, per_sample: bool = True):
        collator = MaskedCollator(config, seed, per_sample, static, strategy)
        return collator(samples(*keys))["plan"].visible_units

    rows = visible()
    assert rows.shape == (16, 12)
    for key, row in zip(keys, rows):
        expected = MASK_STRATEGIES[strategy]((7, 7), 12, derived_torch_generator(0, MASK, *key))
        assert torch.equal(row, expected[0])
    # Patterns of a grid are few: by chance some come twice.
    assert len({tuple(row) for row in rows.tolist()}) >= (8 if strategy == "grid" else 15)
    assert torch.equal(visible(per_sample=False), rows[:1])
    assert not torch.equal(visible(seed=1), rows)


def test_ratios_that_leave_nothing_are_refused():
    config = tiny_config(image_size=16, depths=(1, 1, 1), num_heads=(1, 1, 1))
    with pytest.raises(ValueError, match=r"`mask_ratio` is 0\.75, but of 1 units it leaves 0 visible"):
        draw_plan(config, [seeded(0)], "grid")


# Blocks


def mean_components(masks: np.ndarray) -> float:
    return np.mean([ndimage.label(mask)[1] for mask in masks])


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.4), ((14, 14), 0.6), ((7, 7), 0.4), ((10, 20), 0.5)])
def test_blocks_hide_few_connected_regions(grid, ratio):
    num_visible = round(grid[0] * grid[1] * (1 - ratio))
    block, random = (mean_components(masks_of(strategy, grid, num_visible, 100)) for strategy in ("block", "random"))
    assert block < 3 and block < random / 2


def test_a_first_block_is_a_rectangle_of_the_published_size_and_shape():
    """Where 16 of 14x14 are hidden, the first block is of 16 units; all of the mask where rounding leaves it 16."""
    heights = []
    for mask in masks_of("block", (14, 14), 180, 400):
        (rows, columns) = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        if mask.sum() == height * width:
            heights.append(height)
    # Of 2x8, 4x4 and 8x2 only 4x4 is within the ratios. It comes of ratios from (7 / 8)**2 to (8 / 7)**2, which are
    # 4 * ln(8 / 7) of the 2 * ln(1 / 0.3) of all logarithms.
    expected = 2 * math.log(8 / 7) / math.log(1 / 0.3)
    assert set(heights) == {4}
    assert abs(len(heights) / 400 - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_blocks_lie_everywhere():
    visible = 1 - masks_of("block", (7, 7), 25, 1000).mean(axis=0)
    assert visible.min() > 0.2 and visible.max() < 0.9
    # The middle is in more of the places where a block fits.
    assert visible[3, 3] < visible[[0, 0, 6, 6], [0, 6, 0, 6]].min()


# Grids


@properties
@given(cases())
def test_visible_units_lie_at_equal_distances(case):
    """Rows are as far apart as rounding lets them, hold as many units as others, and those are as far apart again."""
    grid, num_visible, seed = case
    visible = MASK_STRATEGIES["grid"](grid, num_visible, seeded(seed))[0].numpy()
    rows, counts = np.unique(visible // grid[1], return_counts=True)
    assert counts.max() - counts.min() <= 1
    distances = [(rows, grid[0] / len(rows))]
    distances += [(visible[visible // grid[1] == row] % grid[1], grid[1] / count) for row, count in zip(rows, counts)]
    for places, distance in distances:
        assert set(np.diff(places)) <= {math.floor(distance), math.ceil(distance)}
        assert places[0] < math.ceil(distance) and places[-1] >= math.floor((len(places) - 1) * distance)


@pytest.mark.parametrize(("side", "num_visible", "factor"), [(14, 49, 1.5), (14, 30, 1.25), (7, 12, 1.1)])
def test_visible_units_of_a_grid_are_far_from_one_another(side, num_visible, factor):
    nearest = {
        strategy: np.mean([nearest_distance(~mask) for mask in masks_of(strategy, (side, side), num_visible, 50)])
        for strategy in ("grid", "random")
    }
    assert nearest["grid"] > factor * nearest["random"]


def test_a_quarter_on_a_grid_is_every_other_unit_of_every_other_row():
    lattices = {(row, column) for row in range(2) for column in range(2)}
    for mask in masks_of("grid", (14, 14), 49, 100):
        row, column = np.argwhere(~mask)[0]
        assert not mask[row::2, column::2].any()
        lattices.discard((row, column))
    assert not lattices


def nearest_distance(visible: np.ndarray) -> float:
    """Mean distance of visible units to the nearest other one."""
    places = np.argwhere(visible).astype(float)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return distances.min(axis=1).mean()


@pytest.mark.parametrize(("grid", "num_visible"), [((7, 7), 12), ((14, 14), 61), ((3, 10), 7)])
def test_a_grid_shows_each_unit_equally_often(grid, num_visible):
    share = num_visible / (grid[0] * grid[1])
    shown = 1 - masks_of("grid", grid, num_visible, 2000).mean(axis=0)
    assert abs(shown - share).max() < 5 * (share * (1 - share) / 2000) ** 0.5


# Runs


def test_unknown_strategies_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`mask_strategy` is 'blocks'; it must be one of random, block, grid"):
        MIMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, mask_strategy="blocks")


@pytest.mark.parametrize("strategy", ["block", "grid"])
def test_a_run_trains_and_evaluates_on_masks_of_its_strategy(tmp_path, strategy, monkeypatch):
    write_images(tmp_path / "data", 8)
    seen = {True: [], False: []}
    forward = GreenMIMForPreTraining.forward

    def noting(self, *args, plan=None, **kwargs):
        seen[self.training].append(plan.visible_units.clone())
        return forward(self, *args, plan=plan, **kwargs)

    monkeypatch.setattr(GreenMIMForPreTraining, "forward", noting)
    output = run(
        tmp_path / "out",
        *("--train_dir", tmp_path / "data", "--do_train", "--do_eval", "--max_steps", 2, "--seed", 5),
        *("--mask_strategy", strategy, "--mask_per_sample"),
    )
    assert results_of(output)["eval_loss"] > 0
    assert f"| masks | {strategy}, ratio 0.75, one per image |" in (output / "README.md").read_text()
    # Batches of four, in the order of the first epoch.
    keys = [(0, position) for position in range(7)]
    expected = [MASK_STRATEGIES[strategy]((4, 4), 4, derived_torch_generator(5, MASK, *key)) for key in keys]
    assert torch.equal(torch.cat(seen[True])[:7], torch.cat(expected))
    evaluation = MASK_STRATEGIES[strategy]((4, 4), 4, derived_torch_generator(5, MASK))
    assert seen[False] and all(torch.equal(units, evaluation) for units in seen[False])
