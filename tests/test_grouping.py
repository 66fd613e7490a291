"""Plans: properties that every plan must have, checked against the formula for each pair of tokens."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_greenmim import GreenMIMConfig, packing, plan_mask, planning
from modeling_greenmim.layout import token_raster_index
from modeling_greenmim.masking import sample_noise, visible_units_from_noise
from modeling_greenmim.packing import choose_groups, pack_statically, pack_windows, static_groups
from modeling_greenmim.planning import PlanCache, _windows_and_keys, plan_dense, plan_groups, plan_stages
from modeling_greenmim.plans import bias_index, num_bytes
from tests.oracle import bias_row, nested_coordinates, shift_of, tiny_config, window_of
from training_greenmim.pretraining.masks import MASK_STRATEGIES


properties = settings(derandomize=True, deadline=None, max_examples=80)


def slots_of(plan, row: int, num_tokens: int) -> np.ndarray:
    """Slot of each token, counted inside its own plan."""
    if plan.slot_of_token is None:
        return np.arange(num_tokens)
    return plan.slot_of_token[row].numpy() - row * plan.num_slots


def index_of_groups(plan, row: int) -> np.ndarray:
    """`(num_groups, group_size, group_size)`, shared or not."""
    index = plan.bias_index[row]
    return (index if plan.pattern_of_group is None else index[plan.pattern_of_group]).numpy()


def rows_of_pairs(plan, row: int, num_tokens: int, outside: int) -> np.ndarray:
    """What a plan says of each pair of tokens: a row of the bias table, or `outside` where they do not meet."""
    slots = slots_of(plan, row, num_tokens)
    group, place = slots // plan.group_size, slots % plan.group_size
    index = index_of_groups(plan, row)[group[:, None], place[:, None], place[None, :]] - 1
    meet = (group[:, None] == group[None, :]) & (0 <= index) & (index < outside)
    return np.where(meet, index, outside)


def expected_rows(coordinates, grid, window: int, shift: int) -> np.ndarray:
    """The same from the formula, pair by pair; -1 for pairs of two padding tokens, which may or may not meet."""
    outside = (2 * window - 1) ** 2
    windows = [window_of(*place, window, shift) for place in coordinates]
    padding = [place[0] >= grid[0] or place[1] >= grid[1] for place in coordinates]
    rows = np.full((len(coordinates), len(coordinates)), outside)
    for q, k in itertools.product(range(len(coordinates)), repeat=2):
        if padding[q] and padding[k] and q != k:
            rows[q, k] = -1
        elif padding[q] == padding[k] and windows[q] == windows[k]:
            rows[q, k] = bias_row(coordinates[q], coordinates[k], window)
    return rows


def check_plan(plan, row: int, coordinates, grid, window: int, shift: int) -> None:
    """Everything that a plan promises for one mask."""
    num_tokens, outside = len(coordinates), (2 * window - 1) ** 2
    index, num_groups = index_of_groups(plan, row), plan.num_slots // plan.group_size
    assert index.shape == (num_groups, plan.group_size, plan.group_size)
    assert plan.bias_index.dtype == torch.int32
    assert plan.bias_index.min() >= 0 and plan.bias_index.max() <= outside + 1
    slots = slots_of(plan, row, num_tokens)
    # Every token has one slot, and that slot holds it; other slots hold some token that exists.
    assert len(set(slots.tolist())) == num_tokens
    assert slots.min() >= 0 and slots.max() < num_groups * plan.group_size
    if plan.token_of_slot is not None:
        tokens = plan.token_of_slot[row].flatten().numpy()
        assert (tokens[slots] == np.arange(num_tokens) + row * num_tokens).all()
        assert tokens.min() >= 0 and tokens.max() < plan.token_of_slot.shape[0] * num_tokens
    # No window is split over groups.
    group_of_window = {}
    for place, slot in zip(coordinates, slots):
        is_padding = place[0] >= grid[0] or place[1] >= grid[1]
        if not is_padding:
            name = window_of(*place, window, shift)
            assert group_of_window.setdefault(name, slot // plan.group_size) == slot // plan.group_size
    # Exactly the pairs of one window meet, with the right row of the table.
    actual, expected = rows_of_pairs(plan, row, num_tokens, outside), expected_rows(coordinates, grid, window, shift)
    assert (actual == expected)[expected >= 0].all()
    # Padding slots never meet tokens, and no row of any slot is empty.
    filled = np.zeros(num_groups * plan.group_size, dtype=bool)
    filled[slots] = True
    filled = filled.reshape(num_groups, plan.group_size)
    meets = (index >= 1) & (index <= outside)
    assert not meets[filled[:, :, None] != filled[:, None, :]].any()
    assert meets.any(axis=2).all()


@st.composite
def scenes(draw):
    """Rows of places on a padded grid, equally many each, often all that there are, with a window and a shift."""
    grid = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    padded_grid = (grid[0] + draw(st.integers(0, 3)), grid[1] + draw(st.integers(0, 3)))
    window = draw(st.integers(1, 6))
    shift = draw(st.sampled_from([0, window // 2]))
    num_places, num_plans = padded_grid[0] * padded_grid[1], draw(st.integers(1, 3))
    num_tokens = draw(st.one_of(st.integers(1, num_places), st.just(num_places)))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    places = np.stack([generator.permutation(num_places)[:num_tokens] for _ in range(num_plans)])
    return places, grid, padded_grid, window, shift


@properties
@given(scenes(), st.sampled_from([0, 4, 32]), st.booleans())
def test_plans_let_exactly_the_pairs_of_a_window_meet(scene, slot_cost, static):
    """Cheap slots make groups even of few tokens, which the real cost puts into one."""
    places, grid, padded_grid, window, shift = scene
    real_cost = packing.SLOT_COST
    try:
        packing.SLOT_COST = slot_cost
        plan = plan_groups(places, grid, window, shift, padded_grid, static)
    finally:
        packing.SLOT_COST = real_cost
    assert plan.bias_index.shape[0] == len(places)
    assert (plan.token_of_slot is None) == (plan.slot_of_token is None)
    for row, numbers in enumerate(places):
        coordinates = [divmod(int(number), padded_grid[1]) for number in numbers]
        check_plan(plan, row, coordinates, grid, window, shift)


@properties
@given(scenes())
def test_plans_of_several_masks_equal_the_plans_of_each(scene):
    places, grid, padded_grid, window, shift = scene
    together = plan_groups(places, grid, window, shift, padded_grid)
    outside, num_tokens = (2 * window - 1) ** 2, places.shape[1]
    for row in range(len(places)):
        alone = plan_groups(places[row : row + 1], grid, window, shift, padded_grid)
        actual = rows_of_pairs(together, row, num_tokens, outside)
        assert (actual == rows_of_pairs(alone, 0, num_tokens, outside)).all()


@st.composite
def masks(draw):
    """Visible units, ascending, and windows of the stages; a single mask may be of a grid that overhangs its units."""
    num_stages, num_masks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    side = 2 ** (num_stages - 1)
    patch_grid = draw(st.tuples(st.integers(1, 4 * side), st.integers(1, 4 * side)))
    if num_masks > 1:
        patch_grid = tuple(-(-length // side) * side for length in patch_grid)
    num_units = -(-patch_grid[0] // side) * -(-patch_grid[1] // side)
    num_visible = draw(st.integers(1, num_units))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    visible = np.stack([np.sort(generator.permutation(num_units)[:num_visible]) for _ in range(num_masks)])
    windows = tuple(draw(st.lists(st.integers(1, 5), min_size=num_stages, max_size=num_stages)))
    return visible, patch_grid, windows


@properties
@given(masks())
def test_plans_of_stages(scene):
    """Coordinates, shifts, padding and raster order of each stage, against nested order walked by hand."""
    visible, patch_grid, windows = scene
    num_stages = len(windows)
    unit_columns = -(-patch_grid[1] // 2 ** (num_stages - 1))
    stages = plan_stages(visible, patch_grid, windows, raster=True)
    assert len(stages) == num_stages
    for stage, (plan, window) in enumerate(zip(stages, windows)):
        side = 2 ** (num_stages - 1 - stage)
        grid = (-(-patch_grid[0] // 2**stage), -(-patch_grid[1] // 2**stage))
        assert plan.grid == grid
        for row, units in enumerate(visible.tolist()):
            coordinates = [
                (unit // unit_columns * side + down, unit % unit_columns * side + right)
                for unit in units
                for down, right in nested_coordinates(side)
            ]
            for block in (0, 1):
                check_plan(plan.groups[block], row, coordinates, grid, window, shift_of(block, grid, window))
            inside = [place[0] < grid[0] and place[1] < grid[1] for place in coordinates]
            assert all(inside) if plan.inside is None else plan.inside[:, 0].tolist() == inside
            raster = sorted((i for i in range(len(coordinates)) if inside[i]), key=coordinates.__getitem__)
            assert (plan.raster_order[row] - row * len(coordinates)).tolist() == raster


def test_unshifted_stages_share_one_plan():
    shifted, shrunk = plan_stages(np.arange(16)[None], (8, 8), (3, 4))
    assert shifted.groups[0] is not shifted.groups[1]
    assert shrunk.groups[0] is shrunk.groups[1]
    moved = shrunk.map(torch.Tensor.clone)
    assert moved.groups[0] is moved.groups[1]
    assert shifted.raster_order is None


def test_bias_indices_are_those_of_the_picture():
    """The example of `bias_index`: a left of b in one window of side 2, c in the next, and a slot of padding."""
    keys = _windows_and_keys((2, 4), 2, 0, (2, 4))[1][[0, 1, 2]]
    index = bias_index(np.array([*keys, -1], dtype=np.int32), 2)
    assert index.tolist() == [[5, 4, 0, 10], [6, 5, 0, 10], [10, 10, 5, 10], [0, 0, 0, 5]]


def test_packing_is_that_of_the_picture():
    assert pack_windows([0, 1, 1, 2, 1], 5) == ([[], [4], [8], [5, 10], [0]], 3)


def test_plans_of_everything_are_kept_and_equal_plans_of_a_full_mask():
    arguments = (tiny_config(image_size=(48, 80)), (48, 80), torch.device("cpu"))
    kept, windows = plan_dense(*arguments), arguments[0].stage_windows
    assert plan_dense(*arguments) is kept
    for plan, expected in zip(kept, plan_stages(np.arange(15)[None], (12, 20), windows, raster=True)):
        assert torch.equal(plan.raster_order, expected.raster_order)
        for actual, fresh in zip(plan.groups, expected.groups):
            assert torch.equal(actual.bias_index, fresh.bias_index)


def test_kept_plans_are_bounded_by_memory():
    first, second, third = (plan_stages(np.arange(side)[None], (1, side), (3,)) for side in (20, 21, 22))
    cache = PlanCache(budget=num_bytes(first) + num_bytes(third))
    for name, plans in (("first", first), ("second", second), ("second", second)):  # as two threads may
        cache.put((name,), plans)
    assert cache.num_bytes == num_bytes(first) + num_bytes(second)
    assert cache.get(("first",)) is first
    cache.put(("third",), third)  # the second was used least recently
    assert cache.get(("second",)) is None and cache.get(("first",)) is first and cache.get(("third",)) is third
    assert cache.num_bytes == cache.budget
    small = PlanCache(budget=1)
    small.put(("first",), first)
    small.put(("second",), second)  # larger than the budget, yet of use to the next forward
    assert small.get(("first",)) is None and small.get(("second",)) is second


def test_models_of_many_sizes_keep_no_more_than_the_budget(monkeypatch):
    monkeypatch.setattr(planning, "DENSE_PLANS", PlanCache(budget=2**22))
    for side in range(16, 512, 16):
        plan_dense(tiny_config(), (side, 160), torch.device("cpu"))
    assert 2**21 < planning.DENSE_PLANS.num_bytes <= 2**22


histograms = st.lists(st.integers(0, 6), min_size=2, max_size=14).filter(lambda counts: any(counts[1:]))


@properties
@given(histograms, st.integers(0, 12))
def test_packing_places_each_window_once_inside_one_group(num_windows_of_size, slack):
    largest = max(size for size, windows in enumerate(num_windows_of_size) if windows)
    given_counts, group_size = list(num_windows_of_size), max(largest + slack, 1)
    first_slots, num_groups = pack_windows(num_windows_of_size, group_size)
    assert num_windows_of_size == given_counts
    taken = []
    for size, starts in enumerate(first_slots):
        assert len(starts) == (num_windows_of_size[size] if size else 0)
        for start in starts:
            assert start // group_size == (start + size - 1) // group_size
            taken += range(start, start + size)
    assert len(set(taken)) == len(taken)
    num_tokens = sum(size * windows for size, windows in enumerate(num_windows_of_size))
    assert len(taken) == num_tokens
    filled = np.bincount(np.array(taken) // group_size, minlength=num_groups)
    assert len(filled) == num_groups and (filled > 0).all()
    # Any two groups together overflow one: fewer would not do for either pair.
    for first, second in itertools.combinations(filled.tolist(), 2):
        assert first + second > group_size


@properties
@given(st.lists(st.lists(st.integers(0, 20), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(1, 30))
def test_a_group_size_near_the_cheapest_is_chosen(rows, first_count):
    """Against the cost of every group size; several plans share the most groups that one of them needs."""
    num_tokens = max(sum(row) for row in rows) + first_count
    counts = np.array([[*row, num_tokens - sum(row)] for row in rows])
    largest = counts.max()
    histograms = [np.bincount(row, minlength=largest + 1).tolist() for row in counts]
    costs = {}
    for group_size in range(largest, min(2 * largest, num_tokens) + 1):
        num_groups = max(pack_windows(histogram, group_size)[1] for histogram in histograms)
        costs[group_size] = num_groups * group_size * (group_size + packing.SLOT_COST)
    chosen = choose_groups(counts, num_tokens)
    if chosen is None:
        assert packing.WORTHWHILE * num_tokens**2 <= min(costs.values())
        return
    group_size, num_groups, first_slots = chosen
    assert packing.WORTHWHILE * costs[group_size] <= min(costs.values())
    assert costs[group_size] < num_tokens**2
    assert costs[group_size] == num_groups * group_size * (group_size + packing.SLOT_COST)
    assert first_slots == [pack_windows(histogram, group_size)[0] for histogram in histograms]


def test_groups_pay_at_the_size_of_swin_base():
    """A plan that always chose one group, or never, would pass the tests above at tiny sizes only."""
    visible = np.sort(np.random.default_rng(0).permutation(49)[:12])[None]
    stages = plan_stages(visible, (56, 56), (7, 7, 7, 7))
    first, last = stages[0].groups[1], stages[3].groups[0]
    assert first.token_of_slot is not None
    assert first.num_slots * first.group_size < 768**2 / 4
    assert last.token_of_slot is None and last.group_size == 12


@pytest.mark.parametrize("shift", [0, 3])
def test_groups_that_are_alike_share_their_index(shift):
    """Windows of 7 meet units of 8 tokens in 64 ways, and edges add some; with a mask no two need be alike."""
    everything = token_raster_index(np.arange(42 * 25)[None], (25, 42), 8)
    plan = plan_groups(everything, (200, 336), 7, shift)
    assert plan.num_slots // plan.group_size > 1300 and plan.bias_index.shape[1] < 64
    shared = plan.bias_index[0].flatten(1)
    assert len(shared.unique(dim=0)) == len(shared)
    assert plan_groups(everything[:, :-64], (200, 336), 7, shift).pattern_of_group is None


# Static plans


@properties
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 40))
def test_static_groups_hold_windows_of_any_sizes(sizes, slack):
    """The bound is proved in `static_groups`; windows of any sizes must keep to it, for every group size."""
    num_tokens, largest = sum(sizes), 20
    group_size = largest + slack
    fitting = group_size // largest
    bound = -(-(num_tokens - 1) * (fitting + 1) // (fitting * group_size))
    num_groups = pack_windows(np.bincount(sizes, minlength=largest + 1).tolist(), group_size)[1]
    assert num_groups <= max(1, bound)


def test_windows_that_pack_badly_get_the_groups_that_always_suffice():
    """Windows of just over half a group waste the most; few masks have many of them."""
    group_size, usual, sufficient = static_groups(800, 49)
    assert group_size == 50 and usual < 30 <= sufficient
    counts = np.array([[25] * 32, [26] * 30 + [20, 0]])
    assert [pack_statically(counts[rows], 800, 49)[1] for rows in ([0], [1], [0, 1])] == [
        usual,
        sufficient,
        sufficient,
    ]


def shapes_of(plan) -> tuple[torch.Size, ...]:
    """Shapes of all index tensors."""
    shapes = []
    plan.map(lambda tensor: shapes.append(tensor.shape) or tensor)
    return tuple(shapes)


@pytest.mark.parametrize("backbone_type", ["swin", "twins"])
@pytest.mark.parametrize(
    ("image_size", "window", "ratio"), [(224, 7, 0.75), (224, 7, 0.5), (224, 14, 0.6), (320, 7, 0.9)]
)
def test_static_plans_have_the_same_shapes_for_every_mask(image_size, window, ratio, backbone_type):
    config = GreenMIMConfig(image_size=image_size, window_size=window, mask_ratio=ratio, backbone_type=backbone_type)
    num_units = config.unit_grid[0] * config.unit_grid[1]
    shapes, tight = set(), set()
    for seed in range(100):
        noise = sample_noise(num_units, generator=torch.Generator().manual_seed(seed))
        visible = visible_units_from_noise(noise, num_units, 1, ratio)
        shapes.add(shapes_of(plan_mask(config, visible, static=True)))
        tight.add(shapes_of(plan_mask(config, visible)))
    assert len(shapes) == 1 and len(tight) > 1


@properties
@given(
    st.sampled_from(sorted(MASK_STRATEGIES)),
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.floats(0, 1),
    st.integers(2, 5),
    st.integers(0, 2**16),
)
def test_static_plans_serve_the_masks_of_every_strategy(strategy, unit_grid, share, window, seed):
    """Blocks leave whole windows, a grid leaves parts of all: both are far from what random masks leave."""
    num_units = unit_grid[0] * unit_grid[1]
    num_visible = 1 + round(share * (num_units - 2))
    visible = MASK_STRATEGIES[strategy](unit_grid, num_visible, torch.Generator().manual_seed(seed)).numpy()
    grid = (2 * unit_grid[0], 2 * unit_grid[1])
    coordinates = [
        (unit // unit_grid[1] * 2 + down, unit % unit_grid[1] * 2 + right)
        for unit in visible[0].tolist()
        for down, right in nested_coordinates(2)
    ]
    (plan, _) = plan_stages(visible, grid, (window, 1), static=True)
    for block in (0, 1):
        check_plan(plan.groups[block], 0, coordinates, grid, window, shift_of(block, grid, window))


@pytest.mark.parametrize(("strategy", "rare"), [("grid", 0), ("block", 0.1)])
def test_static_plans_seldom_need_other_shapes_for_other_strategies(strategy, rare):
    config = GreenMIMConfig()
    draws = [MASK_STRATEGIES[strategy]((7, 7), 12, torch.Generator().manual_seed(seed)) for seed in range(100)]
    shapes = Counter(shapes_of(plan_mask(config, visible, static=True)) for visible in draws)
    assert len(draws) - max(shapes.values()) <= rare * len(draws)
