# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Mixed precision: norms that hand on bfloat16, and weights cast together as autocast casts them one by one."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from modeling_greenmim import GreenMIMForPreTraining, blocks, decoder
from modeling_greenmim.precision import GreenMIMLayerNorm, weights_cast_together
from tests.oracle import random_images, random_masks, tiny_config


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


def loss_and_gradients(model, dtype):
    model.zero_grad()
    with autocast(dtype):
        loss = model(random_images(2, 96, 96, 0, torch.float32), bool_masked_pos=random_masks(2, 36, 9)).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"backbone_type": "twins"}, {"decoder_type": "prompting"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "not reentrant"])
def test_casting_together_equals_autocast_bit_for_bit(monkeypatch, changes, dtype, checkpointing):
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(tiny_config(**changes)).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    loss, grads = loss_and_gradients(model, dtype)
    for module in (blocks, decoder):
        monkeypatch.setattr(module, "weights_cast_together", lambda *args: nullcontext())
    expected_loss, expected_grads = loss_and_gradients(model, dtype)
    assert torch.equal(loss, expected_loss)
    for name, grad in expected_grads.items():
        assert grads[name].dtype == torch.float32
        assert torch.equal(grads[name], grad), name


def test_residuals_stay_in_bfloat16():
    model = GreenMIMForPreTraining(tiny_config()).train()
    types = []
    for module in model.modules():
        if isinstance(module, (blocks.GreenMIMBlock, decoder.GreenMIMDecoderBlock)):
            module.register_forward_pre_hook(lambda block, args: types.append(args[0].dtype))
    loss_and_gradients(model, torch.bfloat16)
    assert len(types) == 7 and set(types) == {torch.bfloat16}


class Block(nn.Module):
    """Layers of several kinds."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.unused = GreenMIMLayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.other = nn.LayerNorm(8)

    def forward(self, inputs):
        with weights_cast_together(self, "cpu"):
            self.types = {name: weight.dtype for name, weight in self.named_parameters()}
            return self.linear(self.norm(inputs))


def types_in(block: Block) -> set[str]:
    """Runs it, and names the weights that had been cast."""
    block(torch.randn(2, 8))
    return {name for name, dtype in block.types.items() if dtype != torch.float32}


CAST = {f"{layer}.{kind}" for layer in ("norm", "linear", "unused") for kind in ("weight", "bias")}


def test_what_is_cast_and_when():
    block = Block()
    with autocast():
        assert types_in(block) == CAST
        with torch.no_grad():
            assert types_in(block) == set()  # autocast keeps what it cast
        block.linear.weight.requires_grad_(False)
        assert types_in(block) == CAST - {"linear.weight"}
        block.linear = torch.nn.utils.parametrizations.weight_norm(block.linear)  # another class now
        assert types_in(block) == CAST - {"linear.weight", "linear.bias"}
        block.requires_grad_(False)
        assert types_in(block) == set()
    with autocast(torch.float16):
        assert types_in(Block()) == CAST - {"norm.weight", "norm.bias"}
    assert types_in(Block()) == set()


def test_weights_come_back():
    """After an error too, and what was not used has no gradient."""
    block = Block()
    before = dict(block.named_parameters())
    with autocast(), pytest.raises(RuntimeError, match="normalized_shape"):
        block(torch.randn(2, 7))
    with autocast():
        block(torch.randn(2, 8)).sum().backward()
    assert all(weight is before[name] for name, weight in block.named_parameters())
    has_gradient = {name for name, weight in before.items() if weight.grad is not None}
    assert has_gradient == {name for name in CAST if "unused" not in name}


def test_gradients_of_gradients():
    """Casting is linear, so that gradients of gradients pass through it."""
    block, inputs = Block(), torch.randn(2, 8)
    grads = []
    for context in (nullcontext(), autocast()):
        with context:
            output = block(inputs).tanh().sum()
        (grad,) = torch.autograd.grad(output.float(), block.linear.weight, create_graph=True)
        grads += torch.autograd.grad(grad.square().sum(), block.linear.weight)
    assert grads[1].dtype == torch.float32
    assert (grads[1] - grads[0]).norm() < 0.03 * grads[0].norm()


def test_norm():
    """Of single precision it is PyTorch's; bfloat16 goes in and out with means and deviations in single precision."""
    torch.manual_seed(0)
    ours, theirs = GreenMIMLayerNorm(64, eps=1e-6), nn.LayerNorm(64, eps=1e-6)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.normal_()
    theirs.load_state_dict(ours.state_dict())
    inputs = (5 + torch.randn(4, 64)).bfloat16()  # a mean that would take the deviation's digits
    expected = theirs(inputs.float())
    assert torch.equal(ours(inputs.float()), expected)
    output = ours(inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=2**-7, atol=2**-7)
    cast = GreenMIMLayerNorm(64, eps=1e-6).bfloat16()
    cast.load_state_dict(ours.state_dict())
    torch.testing.assert_close(cast(inputs.float()), expected, rtol=2**-7, atol=2**-7)  # as inside a block
    for result in (output, expected):
        result.float().square().sum().backward()
    for weight, reference in zip(ours.parameters(), theirs.parameters()):
        assert weight.grad.dtype == torch.float32
        assert (weight.grad - reference.grad).norm() < 0.01 * reference.grad.norm()
