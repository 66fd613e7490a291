"""Decoder and loss: each latent at its own unit, positions and loss from their formulas."""

import pytest
import torch

from modeling_greenmim import GreenMIMForPreTraining
from modeling_greenmim.decoder import GreenMIMDecoder, sincos_positions
from modeling_greenmim.layout import patchify
from modeling_greenmim.losses import reconstruction_loss
from modeling_greenmim.targets import PixelTarget, normalize_units, unit_statistics
from tests.oracle import (
    assert_all_close,
    assert_close,
    dense_pretraining,
    gradients,
    plain_loss,
    positions,
    random_images,
    random_masks,
    randomize,
    tiny_config,
)


@pytest.fixture
def decoder() -> GreenMIMDecoder:
    return randomize(GreenMIMDecoder(tiny_config(), 768))


def latents_of(batch: int, num_visible: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_visible, 32, generator=generator, dtype=torch.float64)


def without_mixing(decoder: GreenMIMDecoder, monkeypatch) -> None:
    """Silences attention and positions: what a unit's prediction says then depends on what lies at that unit alone."""
    torch.nn.init.zeros_(decoder.decoder_layers[0].attention.proj.weight)
    monkeypatch.setattr("modeling_greenmim.decoder.sincos_positions", lambda *_: 0.0)


@pytest.mark.parametrize("kind", ["shared", "per sample"])
def test_each_latent_lies_at_its_own_unit_and_mask_tokens_elsewhere(decoder, kind, monkeypatch):
    without_mixing(decoder, monkeypatch)
    visible = torch.tensor([[1, 4, 5, 11], [0, 2, 7, 8]])[: 1 if kind == "shared" else 2]
    latents = latents_of(2, 4)
    predictions = decoder(latents, visible, (3, 4))
    # What a latent gives wherever it lies: alone, on a grid of a single unit.
    alone = decoder(latents.view(8, 1, 32), torch.tensor([[0]]), (1, 1)).view(2, 4, -1)
    masked = predictions[0, 3]
    for sample in range(2):
        units = visible[sample % len(visible)].tolist()
        for unit in range(12):
            expected = alone[sample, units.index(unit)] if unit in units else masked
            assert_close(predictions[sample, unit], expected, 1e-12)
    assert (alone[0, 0] - masked).abs().max() > 0.1
    assert (alone[0, 0] - alone[0, 1]).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_permuting_units_and_latents_alike_changes_nothing(decoder, seed):
    """A decoder that puts latents back by any rank (as the published code does) fails."""
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    visible, latents = torch.tensor([[1, 4, 5, 10, 11]]), latents_of(2, 5)
    expected = decoder(latents, visible, (3, 4))
    assert_close(decoder(latents[:, order], visible[:, order], (3, 4)), expected, 1e-12)
    assert not torch.equal(order, torch.arange(5))
    scrambled = decoder(latents[:, order], visible, (3, 4))
    assert (scrambled - expected).abs().max() > 0.1


def test_the_prediction_follows_the_image_when_units_move():
    """Whole model, windows of one unit and no positions: what is seen at a unit is predicted there, wherever it is."""
    config = tiny_config(image_size=64, window_size=1)
    model = randomize(GreenMIMForPreTraining(config))
    pixel_values = random_images(1, 64, 64)
    units = patchify(pixel_values, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    moved = model.unpatchify(units[:, order], (64, 64))
    mask = random_masks(1, 16, 5)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("modeling_greenmim.decoder.sincos_positions", lambda *_: 0.0)
        before = model(pixel_values, bool_masked_pos=mask)
        after = model(moved, bool_masked_pos=mask[:, order])
    assert not torch.equal(mask, mask[:, order])
    assert_close(after.logits, before.logits[:, order], 1e-12)
    assert_close(after.loss, before.loss, 1e-12)
    assert (after.logits - before.logits).abs().max() > 0.1


def test_pixels_of_a_visible_unit_reach_its_own_prediction_most_directly(decoder, monkeypatch):
    """Without attention in the decoder, a latent has a gradient from its own unit's prediction and from no other."""
    without_mixing(decoder, monkeypatch)
    visible, latents = torch.tensor([[2, 3, 8]]), latents_of(1, 3).requires_grad_()
    predictions = decoder(latents, visible, (3, 4))
    for unit in range(12):
        grad = torch.autograd.grad(predictions[0, unit].sum(), latents, retain_graph=True)[0][0].abs().amax(dim=1)
        assert (grad > 0).tolist() == [unit == 2, unit == 3, unit == 8]


@pytest.mark.parametrize(("grid", "width"), [((7, 7), 32), ((3, 5), 4), ((6, 2), 20), ((1, 1), 8), ((14, 9), 512)])
def test_positions_follow_the_formula(grid, width):
    actual = sincos_positions(grid, width, torch.device("cpu"), torch.float32)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), positions(grid, width), atol=2e-6, rtol=0)


def test_positions_tell_columns_from_rows():
    actual = sincos_positions((3, 4), 8, torch.device("cpu"), torch.float64).view(3, 4, 8)
    assert (actual[:1, :, :4] == actual[:, :, :4]).all()
    assert (actual[:, :1, 4:] == actual[:, :, 4:]).all()
    assert len(torch.unique(actual.flatten(0, 1), dim=0)) == 12


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("kind", ["shared", "per sample"])
def test_loss_follows_the_formula(norm_pix_loss, kind):
    pixel_values = 3 * random_images(2, 48, 64) + 5
    logits = random_images(2, 48, 64, seed=1).view(2, 12, 768)
    mask = random_masks(1 if kind == "shared" else 2, 12, 5).expand(2, -1)
    target = PixelTarget(tiny_config(norm_pix_loss=norm_pix_loss))
    actual = reconstruction_loss(logits, target.targets(pixel_values), mask.double())
    assert_close(actual, plain_loss(logits, pixel_values, mask, 16, norm_pix_loss), 1e-12)


def test_loss_ignores_visible_units_and_weighs_masked_ones_alike():
    logits, patches = torch.zeros(1, 4, 6), torch.tensor([100.0, 1.0, 2.0, 100.0])[None, :, None].expand(1, 4, 6)
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    assert reconstruction_loss(logits, patches, mask).item() == pytest.approx((1 + 4) / 2)


def test_loss_of_flat_units_is_finite():
    patches = torch.full((1, 4, 6), 7.0, requires_grad=True)
    logits = torch.ones(1, 4, 6)
    loss = reconstruction_loss(logits, normalize_units(patches), torch.ones(1, 4))
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    assert patches.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_is_computed_in_single(dtype):
    logits, pixel_values = (
        random_images(2, 32, 32, seed=1).view(2, 4, 768).to(dtype),
        random_images(2, 32, 32).to(dtype),
    )
    mask = random_masks(2, 4, 2)
    actual = reconstruction_loss(logits, PixelTarget(tiny_config()).targets(pixel_values), mask.float())
    assert actual.dtype == torch.float32
    assert_close(actual.double(), plain_loss(logits.double(), pixel_values.double(), mask, 16, True), 1e-5)


def test_normalised_units_have_mean_0_and_unbiased_variance_1_and_can_be_undone():
    patches = 3 * latents_of(2, 4) + 5
    normalised, (mean, deviation) = normalize_units(patches), unit_statistics(patches)
    assert_close(normalised.mean(dim=-1), torch.zeros(2, 4, dtype=torch.float64), 1e-9)
    assert_close(normalised.var(dim=-1), torch.ones(2, 4, dtype=torch.float64), 1e-5)
    assert_close(normalised * deviation + mean, patches, 1e-12)


@pytest.mark.parametrize(
    ("changes", "height", "width"),
    [
        ({}, 96, 96),
        ({"norm_pix_loss": False, "decoder_num_hidden_layers": 2, "qkv_bias": False}, 96, 96),
        ({"image_size": 48}, 64, 96),
        ({"image_size": (96, 64)}, 48, 80),
    ],
    ids=["default", "plain pixels, two layers", "larger input", "smaller input"],
)
@pytest.mark.parametrize("kind", ["shared", "per sample"])
def test_pretraining_equals_the_dense_oracle(changes, height, width, kind):
    """Loss, predictions and all gradients. Positions are in single precision: hence the tolerance."""
    model = randomize(GreenMIMForPreTraining(tiny_config(**changes)))
    pixel_values = random_images(2, height, width).requires_grad_()
    num_units = height * width // 256
    mask = random_masks(1 if kind == "shared" else 2, num_units, num_units // 3)
    outputs = model(pixel_values, bool_masked_pos=mask)
    loss, logits = dense_pretraining(model, pixel_values, mask)
    assert outputs.logits.shape == (2, num_units, 768)
    assert_close(outputs.logits, logits, 1e-6)
    assert_close(outputs.loss, loss, 1e-7)
    assert_all_close(gradients(outputs.loss, model, pixel_values), gradients(loss, model, pixel_values), 2e-6)
