"""Geometry of dense tasks: an image of indices that is carried along says where each pixel comes from."""

import numpy as np
import pytest
from PIL import Image

from modeling_greenmim.array_image import ArrayImage, FullDepth
from training_greenmim.dense.geometry import (
    DenseGeometry,
    apply_to_boxes,
    apply_to_image,
    apply_to_map,
    draw_crop,
)


def drawn(seed: int, width: int, height: int, crop=(48, 40)) -> DenseGeometry:
    return draw_crop(width, height, crop, np.random.default_rng(seed))


def corner_colours(height: int, width: int) -> Image.Image:
    """Red grows with the row and green with the column, linearly: what interpolation leaves as it is."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([2 * rows, 2 * columns, 0 * rows], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [(90, 70), (30, 100), (20, 20)])
def test_images_and_maps_move_alike(seed, size):
    width, height = size
    geometry = drawn(seed, width, height)
    indices = np.arange(height * width).reshape(height, width)
    moved = apply_to_map(indices, geometry, fill=-1)
    image = apply_to_image(corner_colours(height, width), geometry, 3).numpy()
    assert moved.shape == image.shape[1:] == (48, 40)
    below, right = geometry.padding
    is_padding = np.ones_like(moved, dtype=bool)
    is_padding[: 48 - below, : 40 - right] = False
    assert ((moved == -1) == is_padding).all()
    assert (image[:, is_padding] == 0).all()
    rows, columns = np.divmod(moved, width)
    # Bicubic values at the edge of the image bend, those inside are where the nearest pixel is, half a pixel at most.
    inside = ~is_padding & (rows > 2) & (rows < height - 3) & (columns > 2) & (columns < width - 3)
    assert inside.any()
    assert np.abs(image[0].astype(int) - 2 * rows)[inside].max() <= 2
    assert np.abs(image[1].astype(int) - 2 * columns)[inside].max() <= 2


def test_maps_of_whole_numbers_of_pixels_are_slices():
    values = np.arange(60).reshape(6, 10)
    geometry = DenseGeometry((2, 1, 8, 5), (4, 6))
    assert (apply_to_map(values, geometry, 0) == values[1:5, 2:8]).all()
    doubled = apply_to_map(values, DenseGeometry((2, 1, 8, 5), (8, 12), flip=True, canvas=(9, 14)), 99)
    assert (doubled[:8, :12] == values[1:5, 2:8].repeat(2, 0).repeat(2, 1)[:, ::-1]).all()
    assert (doubled[8:] == 99).all() and (doubled[:, 12:] == 99).all()
    several = apply_to_map(np.stack([values, values + 100]), geometry, 0)
    assert (several[1] == values[1:5, 2:8] + 100).all()


@pytest.mark.parametrize("seed", range(20))
def test_boxes_are_those_of_their_masks(seed):
    # Squares of which a few pixels are known inside: boxes of moved masks agree with moved boxes to a pixel.
    width, height = 80, 60
    masks, boxes = np.zeros((3, height, width), np.uint8), []
    for index, (left, top, right, bottom) in enumerate([(5, 7, 30, 40), (40, 10, 75, 30), (0, 0, 80, 60)]):
        masks[index, top:bottom, left:right] = 1
        boxes.append((left, top, right, bottom))
    geometry = drawn(seed, width, height)
    moved, shares = apply_to_boxes(np.array(boxes), geometry)
    for mask, box, share in zip(apply_to_map(masks, geometry, 0), moved, shares):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            # The nearest pixels may miss less than half a pixel of it.
            assert min(box[2] - box[0], box[3] - box[1]) <= 1
            continue
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(found - box).max() <= 1
        assert 0 < share <= 1


def test_shares_of_boxes():
    geometry = DenseGeometry((10, 0, 20, 10), (10, 10))
    boxes, shares = apply_to_boxes(np.array([[0, 0, 20, 10], [0, 0, 5, 5], [12, 2, 12, 8], [11, 1, 13, 3]]), geometry)
    assert shares.tolist() == [0.5, 0, 0, 1]
    assert boxes[3].tolist() == [1, 1, 3, 3]


def test_crops_of_one_key_are_equal_and_reach_every_scale_and_both_sides():
    drawn_crops = [drawn(seed, 300, 200) for seed in range(200)]
    assert drawn_crops == [drawn(seed, 300, 200) for seed in range(200)]
    scales = [geometry.size[1] / (geometry.box[2] - geometry.box[0]) for geometry in drawn_crops]
    assert 0.49 < min(scales) < 0.6 and 1.9 < max(scales) < 2.1
    assert 60 < sum(geometry.flip for geometry in drawn_crops) < 140
    assert {geometry.padding for geometry in drawn_crops} == {(0, 0)}
    assert not any(draw_crop(300, 200, (48, 40), np.random.default_rng(s), flip=False).flip for s in range(20))


def test_values_of_full_depth_move_as_maps_do():
    values = np.random.default_rng(0).uniform(0, 4000, (40, 50, 4)).astype(np.float32)
    geometry = DenseGeometry((10, 5, 30, 25), (20, 20), flip=True, canvas=(24, 32))
    depth = FullDepth(((0, 4000),) * 4)
    moved = apply_to_image(ArrayImage(values), geometry, 4, depth).numpy()
    expected = apply_to_map(values.transpose(2, 0, 1) / 4000, geometry, 0)
    assert moved.shape == (4, 24, 32)
    np.testing.assert_allclose(moved, expected, atol=1e-6)
