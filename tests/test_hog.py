"""Histograms of oriented gradients as target: equal to scikit-image's, in the model and in a run."""

import math

import numpy as np
import pytest
import torch
from skimage.feature import hog
from transformers import AutoModelForPreTraining

from modeling_greenmim import GreenMIMForPreTraining, plan_mask
from modeling_greenmim.hog import HogTarget
from tests.oracle import random_images, random_masks, tiny_config
from tests.training_helpers import OVERRIDES, noise_image, results_of, run, smooth_image, write_images


def hog_config(unit: int = 16, **changes):
    """A unit of 8 px is made of two stages, one of 16 px of three."""
    stages = {8: 2, 16: 3, 32: 4}[unit]
    return tiny_config(
        **{"depths": [1] * stages, "num_heads": [1] * stages, "reconstruction_target": "hog", **changes}
    )


def of_library(images: torch.Tensor, unit: int) -> torch.Tensor:
    """Histograms by scikit-image, put into units by loops."""
    batch, channels, height, width = images.shape
    settings = {"orientations": 9, "pixels_per_cell": (8, 8), "cells_per_block": (1, 1), "block_norm": "L2"}
    planes = [
        [hog(plane.numpy(), **settings, feature_vector=False)[:, :, 0, 0] for plane in image] for image in images
    ]
    units = [
        [
            planes[sample][channel][row * unit // 8 + cell_row, column * unit // 8 + cell_column]
            for cell_row in range(unit // 8)
            for cell_column in range(unit // 8)
            for channel in range(channels)
        ]
        for sample in range(batch)
        for row in range(height // unit)
        for column in range(width // unit)
    ]
    return torch.from_numpy(np.array(units)).reshape(batch, height // unit * (width // unit), -1)


def assert_equals_library(images: torch.Tensor, unit: int) -> torch.Tensor:
    target = HogTarget(hog_config(unit, num_channels=images.shape[1]))
    actual, expected = target.targets(images), of_library(images, unit)
    assert actual.shape == expected.shape and actual.shape[2] == target.width
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=1e-5)
    return actual


@pytest.mark.parametrize(
    ("unit", "channels", "height", "width"), [(8, 1, 8, 8), (8, 2, 24, 40), (16, 3, 64, 48), (32, 3, 32, 96)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_random_images_give_the_librarys_histograms(unit, channels, height, width, scale):
    """At every border of the image and of its units, at scales where epsilon counts and where it does not."""
    generator = torch.Generator().manual_seed(unit)
    images = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
    assert_equals_library(scale * images, unit)


@pytest.mark.parametrize("kind", ["noise", "smooth", "binary"])
def test_normalised_8_bit_images_give_the_librarys_histograms(kind):
    """Single precision, with many equal neighbours: gradients of 0, and of exactly 0, 90 and 180 degrees."""
    image = smooth_image(48, 64) if kind == "smooth" else noise_image(1, 48, 64)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    pixels = pixels.round() if kind == "binary" else pixels
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    targets = assert_equals_library((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), 16)
    assert (targets.unflatten(2, (-1, 9)).norm(dim=3) > 0.99).any()


# Not 60, 120, ...: there two bins meet, and rounding decides; 0 and 180 are exact.
@pytest.mark.parametrize("degrees", [degrees for degrees in range(0, 360, 15) if degrees % 60 or degrees % 180 == 0])
def test_ramps_of_every_direction_fall_into_the_librarys_bin(degrees):
    rows, columns = torch.meshgrid(*[torch.arange(24, dtype=torch.float64)] * 2, indexing="ij")
    direction = math.radians(degrees)
    across = {0: (0, 1), 90: (1, 0), 180: (0, -1), 270: (-1, 0)}  # where sine and cosine are not exact
    down, right = across.get(degrees, (math.sin(direction), math.cos(direction)))
    targets = assert_equals_library((down * rows + right * columns)[None, None], 8)
    inner = targets[0, 4]  # the cell that no border touches has one direction
    assert inner.argmax() == degrees % 180 // 20 and inner.max() > 0.999


def test_angles_that_single_precision_rounds_to_180_degrees_are_in_the_last_bin():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 3], image[0, 0, 4, 5], image[0, 0, 5, 4] = 1, -1, 1e-8
    targets = assert_equals_library(image, 8)
    assert targets[0, 0, 8] > 0.3


def test_flat_images_are_0():
    assert (HogTarget(hog_config()).targets(torch.full((1, 3, 32, 32), 7.0)) == 0).all()


def test_the_scale_and_mean_of_a_channel_do_not_matter():
    target, images = HogTarget(hog_config()), random_images(2, 32, 48)
    changed = images * torch.tensor([0.229, 3.0, 50.0]).view(3, 1, 1) + torch.tensor([5.0, -1.0, 0.0]).view(3, 1, 1)
    torch.testing.assert_close(target.targets(changed), target.targets(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    target, images = HogTarget(hog_config()), random_images(2, 32, 48).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual = target.targets(images)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, target.targets(images.float()))


@pytest.mark.parametrize("changes", [{"patch_size": 2, "depths": [1, 1], "num_heads": [1, 1]}, {"patch_size": 3}])
def test_units_that_cells_do_not_fill_are_refused(changes):
    config = hog_config(image_size=48, **changes)
    with pytest.raises(ValueError, match=r"`reconstruction_target` is 'hog', but a mask unit of (4x4|12x12) px"):
        GreenMIMForPreTraining(config)


def test_the_loss_is_the_squared_error_of_masked_units():
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(hog_config())
    pixel_values, mask = random_images(2, 96, 96, dtype=torch.float32), random_masks(2, 36, 9)
    outputs = model(pixel_values, bool_masked_pos=mask)
    assert outputs.logits.shape == (2, 36, 3 * 9 * 2 * 2) and model.target.to_pixels is None
    expected = (outputs.logits - of_library(pixel_values, 16)).square().mean(dim=2)[mask].mean()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_and_equals_the_eager_one():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = GreenMIMForPreTraining(hog_config(8, image_size=32))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    pixel_values, losses, grads = random_images(2, 32, 32, dtype=torch.float32), [], []
    visible = (~random_masks(1, 16, 4)).nonzero()[:, 1].view(1, -1)
    for network in (model, compiled):
        model.zero_grad()
        loss = network(pixel_values, plan=plan_mask(model.config, visible, static=True)).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(model.decoder.decoder_pred.weight.grad.clone())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)


def test_a_run_learns_histograms_without_pictures(tmp_path):
    write_images(tmp_path / "data", 8)
    output = run(
        tmp_path / "out",
        *("--train_dir", tmp_path / "data", "--do_train", "--do_eval", "--max_steps", 2, "--eval_strategy", "epoch"),
        overrides=OVERRIDES + ",reconstruction_target=hog",
    )
    # Histograms have lengths of at most 1, and a new decoder predicts about 0.
    assert 0 < results_of(output)["eval_loss"] < 1
    assert not (output / "reconstructions").exists() and not (output / "reconstruction.png").exists()
    card = (output / "README.md").read_text()
    assert "predicts the hidden ones (histograms of oriented gradients" in card and "reconstruction.png" not in card
    assert "pixels" not in card
    model = AutoModelForPreTraining.from_pretrained(output)
    assert isinstance(model.target, HogTarget) and model.decoder.decoder_pred.out_features == 27
