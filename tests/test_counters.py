# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Kernels and memory traffic of a training step: that they are counted right, and that they do not grow unseen."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def counters(monkeypatch):
    """The benchmark that counts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import counters

    yield counters
    for name in ("counters", "roofline", "training_step"):
        sys.modules.pop(name, None)


def test_a_call_takes_its_longest_bound(counters):
    """Of the roofline: bytes by bandwidth, operations by peak, or the start of a kernel."""
    from roofline import Device, expected_seconds

    device = Device(bandwidth=100.0, peak=1000.0, launch=1.0)
    seconds, shares = expected_seconds([(200, 10), (50, 5000), (99, 999), (0, 0)], device)
    assert seconds == 2 + 5 + 1 + 1
    assert shares == {"launches": 2 / 9, "bytes": 2 / 9, "products": 5 / 9}


def test_a_step_of_the_roofline_ends_with_the_optimizer(counters):
    import roofline

    args = argparse.Namespace(
        task="pretraining", size="tiny", batch_size=2, device="cpu", compile=False, inference=False
    )
    build = counters.chosen_builders(argparse.Namespace(**vars(args), reference=None, peers=[]))["greenmim"]
    *calls, (traffic, flops) = roofline.calls_of_step(build, args, "bf16")
    assert calls == counters.count(build, args, "bf16").calls
    assert (traffic, flops) == (28 * sum(weight.numel() for weight in build(args)[0].parameters()), 0)


def test_a_layer_by_hand(counters):
    """Forward reads input, weight and bias and writes the output; views are free, and what changes in place counts
    as read and as written."""
    layer, inputs = nn.Linear(8, 16), torch.randn(4, 8)
    with counters.Counter() as counter:
        outputs = layer(inputs).view(64)
        outputs.add_(1)
    assert counter.kernels == {"addmm": 1, "add_": 1}
    assert counter.traffic == {"addmm": 4 * (4 * 8 + 8 * 16 + 16 + 4 * 16), "add_": 2 * 4 * 64}
    assert counter.flops == {"addmm": 2 * 4 * 8 * 16}
    assert counter.calls == [(counter.traffic["addmm"], counter.flops["addmm"]), (counter.traffic["add_"], 0)]


def of_greenmim(counters, batch: int, computed: bool = False, **changes):
    """Counts of a step of ours in bf16."""
    args = argparse.Namespace(
        task="pretraining", batch_size=batch, device="cpu", compile=False, inference=False, reference=None, peers=[]
    )
    vars(args).update(changes)
    return counters.count(counters.chosen_builders(args)["greenmim"], args, "bf16", computed)


def test_values_change_nothing(counters):
    """What is counted without values is what runs with them, but for statistics of norms, which are fp32 there."""
    counted, ran = (of_greenmim(counters, 2, computed, size="tiny") for computed in (False, True))
    assert counted.kernels == ran.kernels
    assert counted.flops == ran.flops
    for name, traffic in ran.traffic.items():
        assert counted.traffic[name] == pytest.approx(traffic, rel=0.01), name


@pytest.mark.parametrize(
    ("task", "size", "batch", "kernels", "megabytes"),
    [("pretraining", "base", 64, 1796, 290.5), ("classification", "tiny", 16, 916, 518)],
)
def test_a_step_does_not_grow(counters, task, size, batch, kernels, megabytes):
    """2 % around what docs/performance.md says: change both where a step becomes leaner."""
    counter = of_greenmim(counters, batch, task=task, size=size)
    assert sum(counter.kernels.values()) == pytest.approx(kernels, rel=0.02)
    assert sum(counter.traffic.values()) / batch / 1e6 == pytest.approx(megabytes, rel=0.02)


class SquaredLayer(nn.Module):
    """The sum of squares of what a linear layer gives."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 16)

    def forward(self, inputs):
        return self.layer(inputs).square().sum()


def test_a_compiled_layer_by_hand(counters):
    """Squares are summed as they are made; their gradient is written once, for the products and the bias."""
    inputs = torch.randn(4, 8)

    def build(args):
        model = SquaredLayer()
        return model, lambda images: model(inputs)

    product, squares = 4 * 8 + 8 * 16 + 16 + 4 * 16, 4 * 16 + 1
    gradient, of_weight, of_bias = 4 * 16 + 1 + 4 * 16, 4 * 16 + 4 * 8 + 8 * 16, 4 * 16 + 16
    counted = counters.traffic_of_compiled(build, argparse.Namespace(batch_size=1, device="cpu"), "fp32")
    assert counted == 4 * (product + squares + gradient + of_weight + of_bias)
