"""Pixels and units, nested order, and the picking of tokens, against explicit loops."""

import numpy as np
import pytest
import torch

from modeling_greenmim.layout import move_tokens, nested_patches, patchify, take_tokens, token_raster_index, unpatchify
from tests.oracle import nested_coordinates, random_images, units_of


@pytest.mark.parametrize(("height", "width", "unit"), [(8, 8, 4), (12, 20, 4), (16, 8, 8), (7, 14, 7)])
def test_patchify_cuts_units_and_unpatchify_undoes_it(height, width, unit):
    pixel_values = random_images(2, height, width)
    patches = patchify(pixel_values, unit)
    assert torch.equal(patches, units_of(pixel_values, unit))
    assert torch.equal(unpatchify(patches, unit, height, width), pixel_values)


def looped_patches(pixel_values, unit, patch, visible) -> torch.Tensor:
    """Nested patches, one after the other; `visible` has a list of units per sample."""
    columns, samples = pixel_values.shape[3] // unit, []
    for image, units in zip(pixel_values, visible):
        patches = []
        for number in units:
            for row, column in nested_coordinates(unit // patch):
                top, left = number // columns * unit + row * patch, number % columns * unit + column * patch
                patches.append(image[:, top : top + patch, left : left + patch].flatten())
        samples.append(torch.stack(patches))
    return torch.stack(samples)


@pytest.mark.parametrize(
    ("height", "width", "unit", "patch"), [(16, 24, 8, 2), (32, 16, 16, 2), (12, 8, 4, 4), (32, 48, 16, 4)]
)
def test_nested_patches_of_everything_of_a_shared_mask_and_of_masks_per_sample(height, width, unit, patch):
    pixel_values, num_units = random_images(2, height, width), (height // unit) * (width // unit)
    everything = list(range(num_units))
    expected = looped_patches(pixel_values, unit, patch, [everything] * 2)
    assert torch.equal(nested_patches(pixel_values, unit, patch), expected)
    shared = everything[1::2]
    actual = nested_patches(pixel_values, unit, patch, torch.tensor([shared]))
    assert torch.equal(actual, looped_patches(pixel_values, unit, patch, [shared] * 2))
    own = [everything[: num_units // 2], everything[num_units - num_units // 2 :]]
    actual = nested_patches(pixel_values, unit, patch, torch.tensor(own))
    assert torch.equal(actual, looped_patches(pixel_values, unit, patch, own))


@pytest.mark.parametrize("side", [2, 4, 8])
def test_runs_of_four_are_blocks_in_the_order_of_swin_recursively(side):
    """At every level: a run of four is one 2x2 block, and the runs are nested order of the halved grid."""
    grid, num_units = (2, 3), 6
    places = token_raster_index(np.arange(num_units)[None], grid, side)[0]
    columns = grid[1] * side
    while side > 1:
        runs = np.stack([places // columns, places % columns], axis=-1).reshape(-1, 4, 2)
        blocks = runs[:, 0] // 2
        for position, corner in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            assert (runs[:, position] == 2 * blocks + corner).all()
        columns, side = columns // 2, side // 2
        places = blocks[:, 0] * columns + blocks[:, 1]
        assert (places == token_raster_index(np.arange(num_units)[None], grid, side)[0]).all()
    assert (places == np.arange(num_units)).all()


def test_token_raster_index_of_masks():
    grid, side = (3, 4), 4
    visible = np.array([[0, 5, 11], [2, 3, 7]])
    expected = [
        [
            (unit // 4 * side + row) * 4 * side + unit % 4 * side + column
            for unit in units
            for row, column in nested_coordinates(side)
        ]
        for units in visible
    ]
    assert token_raster_index(visible, grid, side).tolist() == expected


def test_take_tokens_shared_and_per_sample():
    tokens = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    shared = torch.tensor([[6, 0, 0, 3]])
    assert torch.equal(take_tokens(tokens, shared), torch.stack([row[[6, 0, 0, 3]] for row in tokens]))
    own = torch.tensor([[1, 2], [6, 0], [3, 3]])
    actual = take_tokens(tokens, own + 7 * torch.arange(3)[:, None])
    assert torch.equal(actual, torch.stack([row[index] for row, index in zip(tokens, own)]))


@pytest.mark.parametrize("num_plans", [1, 2])
def test_moving_tokens_has_the_gradient_of_taking_them(num_plans):
    """Where a place of the result repeats a token and is not in the inverse, it has no gradient."""
    tokens = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index = torch.tensor([[2, 0, 3, 0, 1]]) + 4 * torch.arange(num_plans)[:, None]
    inverse = torch.tensor([[1, 4, 0, 2]]) + 5 * torch.arange(num_plans)[:, None]
    weights = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights[:, 3] = 0
    moved, taken = move_tokens(tokens, index, inverse), take_tokens(tokens, index)
    assert torch.equal(moved, taken)
    (actual,) = torch.autograd.grad((moved * weights).sum(), tokens)
    (expected,) = torch.autograd.grad((taken * weights).sum(), tokens)
    assert torch.equal(actual, expected)
