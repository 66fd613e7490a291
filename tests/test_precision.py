# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Norms in mixed precision. No GPU is needed: where a test says so, the CPU's autocast is taken for one's."""

import copy

import pytest
import torch
from torch import nn

from modeling_greenmim import GreenMIMForPreTraining, precision
from modeling_greenmim.blocks import GreenMIMBlock
from modeling_greenmim.decoder import GreenMIMDecoderBlock
from modeling_greenmim.precision import GreenMIMLayerNorm
from tests.oracle import random_images, random_masks, tiny_config


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Norms take the CPU's autocast for one that widens them."""
    monkeypatch.setattr(precision, "_autocast_widens_norms", torch.is_autocast_enabled)


def a_norm_and_pytorchs() -> tuple[GreenMIMLayerNorm, nn.LayerNorm]:
    torch.manual_seed(0)
    ours, theirs = GreenMIMLayerNorm(64, eps=1e-6), nn.LayerNorm(64, eps=1e-6)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_autocast", [False, True])
def test_a_norm_on_a_cpu_is_pytorchs(dtype, with_autocast):
    ours, theirs = a_norm_and_pytorchs()
    inputs = torch.randn(4, 64).to(dtype)
    if not with_autocast:
        ours, theirs = ours.to(dtype), theirs.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=with_autocast):
        assert torch.equal(ours(inputs), theirs(inputs))


def test_a_norm_as_on_a_gpu(as_on_a_gpu):
    """bfloat16 goes in and out, with means and deviations in single precision."""
    ours, theirs = a_norm_and_pytorchs()
    inputs = (5 + torch.randn(4, 64)).bfloat16()  # a mean that would take the deviation's digits
    expected = theirs(inputs.float())
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(inputs)
        assert torch.equal(ours(inputs.float()), expected)
        assert ours(inputs.half()).dtype == theirs(inputs.half()).dtype
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=2**-7, atol=2**-7)
    for result in (output, expected):
        result.float().square().sum().backward()
    for weight, reference in zip(ours.parameters(), theirs.parameters()):
        assert weight.grad.dtype == torch.float32
        assert (weight.grad - reference.grad).norm() < 0.01 * reference.grad.norm()


@pytest.mark.parametrize("changes", [{}, {"backbone_type": "twins"}])
def test_a_model_as_on_a_gpu(as_on_a_gpu, changes):
    """Residuals stay in bfloat16, and loss and gradients near those of single precision."""
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(tiny_config(**changes)).train()
    exact, types, results = copy.deepcopy(model), [], []
    for module in model.modules():
        if isinstance(module, (GreenMIMBlock, GreenMIMDecoderBlock)):
            module.register_forward_pre_hook(lambda block, args: types.append(args[0].dtype))
    for network in (exact, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=network is model):
            pixel_values, mask = random_images(2, 96, 96, 0, torch.float32), random_masks(2, 36, 9)
            loss = network(pixel_values, bool_masked_pos=mask).loss
        loss.backward()
        results.append((loss, torch.cat([weight.grad.flatten() for weight in network.parameters()])))
    assert len(types) == 7 and set(types) == {torch.bfloat16}
    (expected, expected_grad), (loss, grad) = results
    assert grad.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert (grad - expected_grad).norm() < 0.02 * expected_grad.norm()


def test_types_of_devices_without_autocast():
    model = GreenMIMForPreTraining(tiny_config()).bfloat16().to("meta")
    images = torch.empty(2, 3, 96, 96, device="meta", dtype=torch.bfloat16)
    assert model.greenmim.embeddings(images, None).dtype == torch.bfloat16
