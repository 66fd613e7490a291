"""Layers of parameters, groups of an optimizer, the schedule and LARS."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from modeling_greenmim import GreenMIMForImageClassification, GreenMIMForPreTraining, GreenMIMModel
from tests.training_helpers import tiny_config
from training_greenmim.optimization import (
    cosine_schedule,
    lars,
    layer_of_parameter,
    no_decay_parameters,
    parameter_groups,
)


SWIN_BASE = [2, 2, 18, 2]
# The first blocks of the stages are 0, 2, 4 and 22 of 24; merges end stages 0, 1 and 2.
SWIN_BASE_LAYERS = {
    "greenmim.embeddings.patch_embeddings.projection.weight": 0,
    "greenmim.embeddings.patch_embeddings.projection.bias": 0,
    "greenmim.embeddings.norm.weight": 0,
    "greenmim.encoder.layers.0.blocks.0.attention.qkv.weight": 1,
    "greenmim.encoder.layers.0.blocks.1.layernorm_before.bias": 2,
    "greenmim.encoder.layers.0.downsample.reduction.weight": 2,
    "greenmim.encoder.layers.0.downsample.norm.weight": 2,
    "greenmim.encoder.layers.1.blocks.0.mlp.fc1.weight": 3,
    "greenmim.encoder.layers.1.blocks.1.attention.relative_position_bias_table": 4,
    "greenmim.encoder.layers.1.downsample.norm.bias": 4,
    "greenmim.encoder.layers.2.blocks.0.layernorm_after.weight": 5,
    "greenmim.encoder.layers.2.blocks.9.mlp.fc2.bias": 14,
    "greenmim.encoder.layers.2.blocks.17.attention.proj.weight": 22,
    "greenmim.encoder.layers.2.downsample.reduction.weight": 22,
    "greenmim.encoder.layers.3.blocks.0.attention.qkv.bias": 23,
    "greenmim.encoder.layers.3.blocks.1.mlp.fc2.weight": 24,
    "greenmim.layernorm.weight": 25,
    "greenmim.layernorm.bias": 25,
    "classifier.weight": 25,
    "classifier.bias": 25,
}
# Depths 1, 3, 2: by prefix, all of them.
THREE_STAGES = {
    "greenmim.embeddings.": 0,
    "greenmim.encoder.layers.0.blocks.0.": 1,
    "greenmim.encoder.layers.0.downsample.": 1,
    "greenmim.encoder.layers.1.blocks.0.": 2,
    "greenmim.encoder.layers.1.blocks.1.": 3,
    "greenmim.encoder.layers.1.blocks.2.": 4,
    "greenmim.encoder.layers.1.downsample.": 4,
    "greenmim.encoder.layers.2.blocks.0.": 5,
    "greenmim.encoder.layers.2.blocks.1.": 6,
    "greenmim.layernorm.": 7,
    "classifier.": 7,
    "decoder.": 7,
}
ALIGNED = {"decoder_type": "linear", "reconstruction_target": "features", "target_width": 4}


def three_stage_model(model_class=GreenMIMForImageClassification, **changes):
    return model_class(tiny_config(depths=[1, 3, 2], num_heads=[1, 2, 4], window_size=2, **changes))


def names_to_groups(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    """Group of each trainable parameter, each of which must be in exactly one."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(names)
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


# Layers


@pytest.mark.parametrize("name", SWIN_BASE_LAYERS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_layers_of_swin_base_are_those_of_the_table(name, prefix):
    assert layer_of_parameter(prefix + name, SWIN_BASE) == SWIN_BASE_LAYERS[name]


def test_the_table_has_real_names_of_swin_base():
    with torch.device("meta"):
        model = GreenMIMForImageClassification(tiny_config(depths=SWIN_BASE, num_heads=[1, 1, 1, 1], window_size=1))
    names = dict(model.named_parameters())
    assert [name for name in SWIN_BASE_LAYERS if name not in names] == []
    assert {layer_of_parameter(name, SWIN_BASE) for name in names} == set(range(26))


def test_layers_of_a_model_of_three_stages_are_those_of_the_table():
    used = set()
    names = [name for name, _ in three_stage_model().named_parameters()]
    for name in (*names, *(name for name, _ in three_stage_model(GreenMIMForPreTraining).named_parameters())):
        (prefix,) = [prefix for prefix in THREE_STAGES if name.startswith(prefix)]
        used.add(prefix)
        assert layer_of_parameter(name, [1, 3, 2]) == THREE_STAGES[prefix], name
    assert used == set(THREE_STAGES)


@pytest.mark.parametrize("name", ["head.weight", "dinov2.encoder.layer.0.mlp.fc1.weight", "norm.bias"])
def test_a_parameter_that_such_models_do_not_have_has_no_layer(name):
    with pytest.raises(ValueError, match=f"`name` is '{name}'"):
        layer_of_parameter(name, SWIN_BASE)


# Groups


def check_closed_form(model: nn.Module, groups: list[dict], prefix: str = "") -> None:
    """Learning rates and decays of depths 1, 3, 2 with decay 0.7."""
    spared = no_decay_parameters(model)
    found = names_to_groups(model, groups)
    for name, group in found.items():
        (layer,) = [layer for start, layer in THREE_STAGES.items() if name.startswith(prefix + start)]
        assert group["lr"] == pytest.approx(0.3 * 0.7 ** (7 - layer), rel=1e-14), name
        assert group["weight_decay"] == (0.0 if name in spared else 0.05), name


def test_groups_have_the_learning_rates_of_the_closed_form():
    model = three_stage_model()
    groups = parameter_groups(model, learning_rate=0.3, weight_decay=0.05, layer_decay=0.7)
    check_closed_form(model, groups)
    # Layers 0 to 7, each with decayed and with spared parameters.
    assert len(groups) == 16
    assert groups[0]["lr"] == 0.3 and min(group["lr"] for group in groups) == groups[-1]["lr"]
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("changes", [{}, {"decoder_type": "prompting"}, ALIGNED])
def test_decoders_and_heads_of_alignment_learn_at_the_full_rate(changes):
    model = three_stage_model(GreenMIMForPreTraining, **changes)
    groups = parameter_groups(model, learning_rate=0.3, weight_decay=0.05, layer_decay=0.7)
    check_closed_form(model, groups)
    decoder = {id(parameter) for parameter in model.decoder.parameters()}
    full = {id(parameter) for group in groups for parameter in group["params"] if group["lr"] == 0.3}
    assert decoder and decoder < full


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_vectors_and_bias_tables_are_not_decayed(layer_decay):
    model = three_stage_model()
    groups = names_to_groups(model, parameter_groups(model, 0.3, 0.05, layer_decay))
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith("relative_position_bias_table")
        assert groups[name]["weight_decay"] == (0.0 if spared else 0.05), name


def test_tokens_are_not_decayed():
    model = GreenMIMForPreTraining(tiny_config())
    groups = names_to_groups(model, parameter_groups(model, 0.3, 0.05))
    assert groups["decoder.mask_token"]["weight_decay"] == 0.0 and model.decoder.mask_token.ndim > 1


@pytest.mark.parametrize("model_class", [GreenMIMForImageClassification, GreenMIMForPreTraining])
def test_a_wrapped_model_has_the_same_groups(tmp_path, model_class):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(three_stage_model(model_class))
        check_closed_form(model, parameter_groups(model, 0.3, 0.05, 0.7), prefix="module.")
    finally:
        torch.distributed.destroy_process_group()
    model = torch.compile(three_stage_model(model_class))
    check_closed_form(model, parameter_groups(model, 0.3, 0.05, 0.7), prefix="_orig_mod.")


def test_a_linear_probe_trains_its_head_alone():
    model = three_stage_model()
    model.requires_grad_(False)
    model.classifier = nn.Sequential(nn.BatchNorm1d(32, affine=False), nn.Linear(32, 2))
    groups = parameter_groups(model, 0.3, 0.05, 0.7)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.3, 0.05), (0.3, 0.0)]
    assert set(names_to_groups(model, groups)) == {"classifier.1.weight", "classifier.1.bias"}


def other_model() -> ViTForImageClassification:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))


@pytest.mark.parametrize("make", [other_model, three_stage_model, lambda: nn.Linear(2, 3)])
def test_without_layer_decay_any_model_has_the_usual_two_groups(make):
    model = make()
    groups = parameter_groups(model, learning_rate=0.3, weight_decay=0.05, layer_decay=1.0)
    names_to_groups(model, groups)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.3, 0.05), (0.3, 0.0)]


def test_layers_of_vit_and_swin():
    rates = {}
    swin = SwinForImageClassification(
        SwinConfig(image_size=32, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2)
    )
    for model in (other_model(), swin):
        for name, group in names_to_groups(model, parameter_groups(model, 1.0, 0.05, layer_decay=0.5)).items():
            rates[name] = math.log2(1 / group["lr"]), group["weight_decay"]
    expected = {"vit.embeddings.cls_token": (3, 0.0), "vit.embeddings.position_embeddings": (3, 0.0)}
    expected |= {"vit.embeddings.patch_embeddings.projection.weight": (3, 0.05), "vit.layernorm.weight": (0, 0.0)}
    expected |= {"vit.layers.0.attention.q_proj.weight": (2, 0.05), "vit.layers.1.mlp.fc1.weight": (1, 0.05)}
    expected |= {"classifier.weight": (0, 0.05), "swin.embeddings.norm.weight": (4, 0.0)}
    expected |= {"swin.encoder.layers.0.downsample.reduction.weight": (3, 0.05)}
    expected |= {"swin.encoder.layers.1.blocks.1.mlp.fc1.weight": (1, 0.05), "swin.layernorm.bias": (0, 0.0)}
    assert {name: rates[name] for name in expected} == expected


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 3), lambda: GreenMIMModel(tiny_config())])
def test_layer_decay_needs_a_known_model(make):
    model = make()
    with pytest.raises(ValueError, match=rf"`layer_decay` is 0\.7, but the model is a {type(model).__name__}"):
        parameter_groups(model, 0.3, 0.05, layer_decay=0.7)


# Schedule


def scheduled_rates(warmup_steps: int, total_steps: int, lr: float, lowest: float, first: float) -> np.ndarray:
    """Learning rates of a group with all of `lr` and one with a quarter of it, `(total_steps, 2)`."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": lr}, {"params": parameters[1:], "lr": lr / 4}])
    schedule = cosine_schedule(optimizer, warmup_steps, total_steps, lr, lowest, first)
    rates = []
    for _ in range(total_steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return np.array(rates)


def test_schedule_of_a_table():
    rates = scheduled_rates(warmup_steps=4, total_steps=9, lr=1.0, lowest=0.2, first=0.1)
    # Steps of the warm-up are 0.225 apart; the cosine is at angles 0, 45, 90, 135 and 180 degrees.
    half = math.sqrt(0.5)
    cosine = [1.0, 0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half), 0.2]
    np.testing.assert_allclose(rates[:, 0], [0.1, 0.325, 0.55, 0.775, *cosine], rtol=1e-12)
    np.testing.assert_allclose(rates[:, 1], rates[:, 0] / 4, rtol=1e-12)


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 19])
def test_schedule_meets_all_three_rates_whatever_the_warm_up(warmup_steps):
    rates = scheduled_rates(warmup_steps, total_steps=21, lr=1.25e-3, lowest=2.5e-7, first=5e-7)[:, 0]
    if warmup_steps:
        assert rates[0] == pytest.approx(5e-7, rel=1e-12)
    assert rates[warmup_steps] == pytest.approx(1.25e-3, rel=1e-12)
    assert rates[-1] == pytest.approx(2.5e-7, rel=1e-12)
    assert (np.diff(rates[: warmup_steps + 1]) > 0).all() and (np.diff(rates[warmup_steps:]) < 0).all()


@pytest.mark.parametrize(
    ("warmup_steps", "expected"), [(3, [0, 1 / 3, 2 / 3]), (2, [0, 0.5, 1.0]), (6, [0, 1 / 6, 1 / 3])]
)
def test_schedule_of_a_run_that_ends_with_its_warm_up(warmup_steps, expected):
    rates = scheduled_rates(warmup_steps, total_steps=3, lr=1.0, lowest=0.0, first=0.0)
    np.testing.assert_allclose(rates[:, 0], expected, rtol=1e-12)


def test_schedule_stays_at_the_minimum_after_the_end_and_resumes():
    def make():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, cosine_schedule(optimizer, 2, 6, 1.0, 0.1)

    optimizer, schedule = make()
    rates = []
    for step in range(8):
        if step == 3:
            states = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = make()
            optimizer.load_state_dict(states[0])
            schedule.load_state_dict(states[1])
        rates.append(schedule.get_last_lr()[0])
        assert optimizer.param_groups[0]["lr"] == rates[-1]
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.775, 0.325, 0.1, 0.1, 0.1], rtol=1e-12)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"learning_rate": 0.0}, r"`learning_rate` is 0\.0; it must be above 0"),
        ({"min_learning_rate": 0.2}, r"`min_learning_rate` is 0\.2; it must be between 0 and `learning_rate`, 0\.1"),
        ({"min_learning_rate": -0.2}, r"`min_learning_rate` is -0\.2"),
        ({"warmup_learning_rate": 0.2}, r"`warmup_learning_rate` is 0\.2"),
    ],
)
def test_rates_in_the_wrong_order_are_refused(rates, message):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        cosine_schedule(optimizer, 2, 6, **{"learning_rate": 0.1, **rates})


# LARS


def lars_by_hand(weights: list[np.ndarray], gradients: list[list[np.ndarray]], lr: float) -> list[np.ndarray]:
    """You et al., 2017, algorithm 1 without weight decay, in float64; vectors as in plain momentum SGD."""
    velocities = [np.zeros_like(weight) for weight in weights]
    for step in gradients:
        for index, gradient in enumerate(step):
            local = 1.0
            norms = np.sqrt((weights[index] ** 2).sum()), np.sqrt((gradient**2).sum())
            if gradient.ndim > 1 and min(norms) > 0:
                local = 0.001 * norms[0] / norms[1]
            velocities[index] = 0.9 * velocities[index] + local * gradient
            weights[index] = weights[index] - lr * velocities[index]
    return weights


@pytest.fixture
def lars_case():
    draw = np.random.default_rng(0).normal
    weights = [draw(size=(3, 4)), draw(size=4), np.zeros((2, 3)), draw(size=(2, 3, 2, 2))]
    gradients = [[draw(size=weight.shape) * 10.0**step for weight in weights] for step in range(5)]
    gradients[1][0] = np.zeros((3, 4))
    return weights, gradients


def lars_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step):
            parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)
        optimizer.step()


def test_lars_agrees_with_the_paper(lars_case):
    weights, gradients = lars_case
    parameters = [nn.Parameter(torch.tensor(weight)) for weight in weights]
    lars_steps(lars(parameters, learning_rate=0.5), parameters, gradients)
    for parameter, expected in zip(parameters, lars_by_hand(list(weights), gradients, lr=0.5)):
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_lars_goes_on_exactly_from_its_state(lars_case, tmp_path):
    weights, gradients = lars_case
    whole = [nn.Parameter(torch.tensor(weight, dtype=torch.float32)) for weight in weights]
    lars_steps(lars(whole, learning_rate=0.5), whole, gradients)

    first = [nn.Parameter(torch.tensor(weight, dtype=torch.float32)) for weight in weights]
    optimizer = lars(first, learning_rate=0.5)
    lars_steps(optimizer, first, gradients[:2])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = lars(second, learning_rate=0.1)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    lars_steps(resumed, second, gradients[2:])
    assert all(torch.equal(left, right) for left, right in zip(whole, second))


def test_lars_takes_groups_and_a_schedule(lars_case):
    weights, gradients = lars_case
    parameters = [nn.Parameter(torch.tensor(weight)) for weight in weights[:2]]
    groups = [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "lr": 0.0}]
    optimizer = lars(groups, learning_rate=0.3)
    cosine_schedule(optimizer, 2, 10, learning_rate=0.5, warmup_learning_rate=0.25)
    lars_steps(optimizer, parameters, [step[:2] for step in gradients[:1]])
    expected = lars_by_hand(list(weights[:1]), [step[:1] for step in gradients[:1]], lr=0.25)
    np.testing.assert_allclose(parameters[0].detach().numpy(), expected[0], rtol=1e-12)
    assert np.array_equal(parameters[1].detach().numpy(), weights[1])
