"""Masks: sampling, the callers' own at both granularities, and what is refused."""

import re

import pytest
import torch

from modeling_greenmim import GreenMIMForPreTraining, GreenMIMModel
from modeling_greenmim.masking import sample_noise, unit_mask, visible_units_from_mask, visible_units_from_noise
from tests.oracle import random_images, random_masks, tiny_config


GRID = (3, 5)  # units
SIDE = 4  # patches along a unit


def at_patch_granularity(mask: torch.Tensor, grid=GRID, side=SIDE) -> torch.Tensor:
    """Repeats each unit's value for its patches, in raster order of the patches."""
    patches = [
        mask[:, (row // side) * grid[1] + column // side]
        for row in range(grid[0] * side)
        for column in range(grid[1] * side)
    ]
    return torch.stack(patches, dim=1)


def read(mask: torch.Tensor, batch_size: int = 3) -> torch.Tensor:
    return visible_units_from_mask(mask, GRID, SIDE, batch_size)


def test_noise_keeps_the_lowest():
    noise = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.2, 0.7, 0.6, 0.5]])
    assert visible_units_from_noise(noise, 8, 4, 0.6).tolist() == [[1, 3, 4]]
    rows = torch.stack([noise[0], noise[0].flip(0)])
    assert visible_units_from_noise(rows, 8, 2, 0.5).tolist() == [[1, 3, 4, 7], [0, 3, 4, 6]]


def test_ties_of_noise_go_to_the_first_units():
    assert visible_units_from_noise(torch.zeros(1, 40), 40, 1, 0.9).tolist() == [[0, 1, 2, 3]]


def test_sampling_is_uniform_shared_by_default_and_follows_the_generator():
    assert sample_noise(49).shape == (1, 49)
    assert sample_noise(49).device.type == "cpu"
    noise = [sample_noise(49, 2000, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
    visible = visible_units_from_noise(noise[0], 49, 2000, 0.75)
    assert visible.shape == (2000, 12)
    assert (visible.diff(dim=1) > 0).all()
    shares = torch.bincount(visible.flatten(), minlength=49) / 2000
    # Each unit is visible with probability 12 / 49; 5 standard deviations of the mean of 2000 draws.
    assert (shares - 12 / 49).abs().max() < 5 * (12 / 49 * 37 / 49 / 2000) ** 0.5


def test_sampling_follows_the_global_seed():
    torch.manual_seed(3)
    first = sample_noise(20)
    torch.manual_seed(3)
    assert torch.equal(first, sample_noise(20))


@pytest.mark.parametrize("shape", [(15,), (2, 15), (3, 14), (1, 16), (3, 15, 1)])
def test_noise_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"`noise` has shape .* needs \(1 or 3, 15\)") as error:
        visible_units_from_noise(torch.rand(shape), 15, 3, 0.5)
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("ratio", ["a", None, [0.5], 1.5, float("nan")])
def test_ratio_that_is_no_share_is_refused_by_name(ratio):
    with pytest.raises(ValueError, match=re.escape(f"`mask_ratio` is {ratio!r}, but it must be between 0 and 1")):
        visible_units_from_noise(torch.rand(1, 15), 15, 3, ratio)


@pytest.mark.parametrize(("ratio", "visible"), [(1.0, 0), (0.95, 0), (0.0, 15)])
def test_ratio_that_leaves_nothing_visible_or_nothing_masked_is_refused(ratio, visible):
    with pytest.raises(ValueError, match=f"`mask_ratio` is {ratio}, but of 15 units it leaves {visible} visible"):
        visible_units_from_noise(torch.rand(1, 15), 15, 3, ratio)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_masks_at_both_granularities_say_the_same(dtype):
    mask = random_masks(3, 15, 4)
    expected = torch.stack([torch.tensor([i for i in range(15) if not row[i]]) for row in mask])
    assert torch.equal(read(mask.to(dtype)), expected)
    assert torch.equal(read(at_patch_granularity(mask).to(dtype)), expected)


def test_equal_rows_are_joined():
    mask = random_masks(1, 15, 4)
    assert read(mask).shape == (1, 4)
    assert torch.equal(read(mask.repeat(3, 1)), read(mask))
    assert torch.equal(read(at_patch_granularity(mask).repeat(3, 1)), read(mask))
    assert read(random_masks(3, 15, 4)).shape == (3, 4)


@pytest.mark.parametrize("shape", [(15,), (2, 15), (4, 15), (3, 14), (3, 60), (3, 239), (3, 15, 1), (3, 12, 20)])
def test_mask_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"`bool_masked_pos` has shape") as error:
        read(torch.zeros(shape, dtype=torch.bool))
    message = str(error.value)
    assert str(tuple(shape)) in message
    assert "(1 or 3, 15)" in message and "(1 or 3, 240)" in message


def test_uneven_rows_are_refused():
    mask = random_masks(3, 15, 4)
    mask[1] = random_masks(1, 15, 6)[0]
    for granularity in (mask, at_patch_granularity(mask)):
        with pytest.raises(ValueError, match="keeps between 4 and 6 visible units per row"):
            read(granularity)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("patch", [0, 19, 77, 239])
def test_mask_that_cuts_through_a_unit_is_refused(value, patch):
    mask = torch.full((1, 240), 1 - value)
    mask[0, patch] = value
    with pytest.raises(ValueError, match=r"`bool_masked_pos` cuts through a mask unit.*4x4 patches"):
        read(mask)


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan")])
def test_other_values_than_0_and_1_are_refused(value):
    mask = random_masks(1, 15, 4).float()
    mask[0, 7] = value
    with pytest.raises(ValueError, match="`bool_masked_pos` has values other than 0"):
        read(mask)


def test_mask_of_everything_is_refused():
    with pytest.raises(ValueError, match="`bool_masked_pos` masks every unit"):
        read(torch.ones(1, 15))


def test_unit_mask():
    assert unit_mask(torch.tensor([[0, 3], [1, 2]]), 5).tolist() == [[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]]


@pytest.fixture(scope="module")
def model() -> GreenMIMForPreTraining:
    torch.manual_seed(0)
    return GreenMIMForPreTraining(tiny_config()).eval()


def test_model_gives_the_same_at_both_granularities(model):
    pixel_values, mask = random_images(2, 96, 96, dtype=torch.float32), random_masks(2, 36, 9)
    coarse = model(pixel_values, bool_masked_pos=mask)
    fine = model(pixel_values, bool_masked_pos=at_patch_granularity(mask, (6, 6), 4).long())
    assert torch.equal(coarse.logits, fine.logits)
    assert torch.equal(coarse.loss, fine.loss)
    assert torch.equal(coarse.mask, mask.float())
    assert torch.equal(fine.mask, mask.float())


def test_model_joins_equal_rows(model):
    pixel_values, mask = random_images(2, 96, 96, dtype=torch.float32), random_masks(1, 36, 9)
    shared = model.greenmim(pixel_values, bool_masked_pos=mask)
    repeated = model.greenmim(pixel_values, bool_masked_pos=mask.repeat(2, 1))
    assert repeated.visible_units.shape == (1, 9)
    assert torch.equal(shared.last_hidden_state, repeated.last_hidden_state)
    assert shared.mask.shape == (2, 36)


def test_model_draws_one_mask_for_the_batch_from_the_global_generator(model):
    pixel_values = random_images(2, 96, 96, dtype=torch.float32)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(model(pixel_values).mask)
    assert masks[0].sum(dim=1).tolist() == [27, 27]
    assert torch.equal(masks[0][0], masks[0][1])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_model_follows_noise_and_ratio(model):
    pixel_values = random_images(2, 96, 96, dtype=torch.float32)
    noise = torch.rand(2, 36, generator=torch.Generator().manual_seed(0))
    by_noise = model(pixel_values, noise=noise)
    mask = torch.ones(2, 36)
    for row, values in zip(mask, noise.tolist()):
        row[sorted(range(36), key=values.__getitem__)[:9]] = 0
    assert torch.equal(by_noise.mask, mask)
    assert torch.equal(by_noise.logits, model(pixel_values, bool_masked_pos=mask).logits)
    assert model.greenmim(pixel_values, noise=noise, mask_ratio=0.5).visible_units.shape == (2, 18)
    assert model.greenmim(pixel_values, mask_ratio=0.5).visible_units.shape == (1, 18)
    assert model.greenmim(pixel_values).visible_units is None


def test_model_treats_a_mask_of_nothing_as_no_mask():
    torch.manual_seed(0)
    model = GreenMIMModel(tiny_config()).eval()
    pixel_values = random_images(2, 96, 96, dtype=torch.float32)
    outputs = model(pixel_values, bool_masked_pos=torch.zeros(1, 36))
    assert outputs.mask is None and outputs.visible_units is None
    assert torch.equal(outputs.last_hidden_state, model(pixel_values).last_hidden_state)
