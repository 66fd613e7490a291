"""Our numbers equal those of independent implementations."""

import pytest
import torch

from modeling_greenmim import GreenMIMForPreTraining, GreenMIMModel
from modeling_greenmim.decoder import sincos_positions
from modeling_greenmim.losses import reconstruction_loss
from tests.golden import load_golden, normalized


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5):
    """Relative to the largest expected value, since single entries cancel to anything."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", ["swin_window7_column", "swin_window14_column"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_pretraining_golden(name, attn_implementation):
    config, weights, golden = load_golden(name)
    model = GreenMIMForPreTraining._from_config(config, attn_implementation=attn_implementation)
    model.load_state_dict(weights, strict=True)
    pixel_values = normalized(golden["images_uint8"])
    mask = torch.ones(1, 49, dtype=torch.bool)
    mask[0, golden["visible_units"]] = False

    latent = model.greenmim(pixel_values, bool_masked_pos=mask).last_hidden_state
    assert_close(latent, golden["latent"])
    outputs = model(pixel_values, bool_masked_pos=mask)
    assert_close(outputs.logits, golden["pred"])
    assert outputs.loss.item() == pytest.approx(golden["loss_norm_pix"].item(), rel=1e-5)
    loss_pix = reconstruction_loss(outputs.logits, model.patchify(pixel_values), outputs.mask)
    assert loss_pix.item() == pytest.approx(golden["loss_pix"].item(), rel=1e-5)

    outputs.loss.backward()
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert norms.keys() == golden["grad_norms"].keys()
    assert norms == pytest.approx(golden["grad_norms"], rel=1e-5)


def test_decoder_positions_golden():
    golden = load_golden("swin_window7_column")[2]
    positions = sincos_positions((7, 7), 32, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(positions, golden["decoder_positions"][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_dense_golden(attn_implementation):
    config, weights, golden = load_golden("dense_swin_window14")
    model = GreenMIMModel._from_config(config, attn_implementation=attn_implementation)
    model.load_state_dict({key.removeprefix("greenmim."): value for key, value in weights.items()}, strict=True)
    with torch.no_grad():
        features = model(normalized(golden["images_uint8"])).last_hidden_state
    assert_close(features, golden["features"])
