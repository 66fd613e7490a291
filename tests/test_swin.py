"""The encoder on visible tokens: equal to the dense oracle and to Transformers' Swin, whatever the plan."""

import copy

import numpy as np
import pytest
import torch
from transformers import SwinConfig, SwinModel

from modeling_greenmim import GreenMIMForPreTraining, GreenMIMModel, attention, layout, packing, plan_mask, planning
from modeling_greenmim.attention import GreenMIMWindowAttention
from modeling_greenmim.blocks import GreenMIMDropPath, GreenMIMMLP
from tests.oracle import (
    DenseEncoder,
    assert_all_close,
    assert_close,
    check_against_oracle,
    check_kind_of_mask,
    gradients,
    random_images,
    random_masks,
    randomize,
    tiny_config,
    weighted_sum,
    window_pairs,
)


SCENES = {
    # name: (configuration, height, width)
    "default": ({}, 96, 96),
    "one stage": ({"depths": [3], "num_heads": [2], "image_size": 40, "window_size": 3}, 40, 40),
    "two stages": ({"depths": [2, 3], "num_heads": [2, 2], "image_size": 64, "window_size": 4}, 64, 64),
    "four stages": ({"depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 2], "image_size": 128}, 128, 128),
    "portrait": ({"image_size": (96, 64)}, 96, 64),
    "landscape": ({"image_size": (64, 112), "window_size": 3}, 64, 112),
    "even window": ({"window_size": 4}, 96, 96),
    "window of 1": ({"window_size": 1, "image_size": 64}, 64, 64),
    "window larger than every grid": ({"window_size": 30, "image_size": 64}, 64, 64),
    "patch 2": ({"patch_size": 2, "image_size": 56, "window_size": 7}, 56, 56),
    "patch 8": ({"patch_size": 8, "image_size": (96, 128), "window_size": 3}, 96, 128),
    "larger input than configured": ({"image_size": 48, "window_size": 5}, 96, 80),
    "smaller input than configured": ({"image_size": 96, "window_size": 5}, 64, 48),
    "no bias of queries, keys and values": ({"qkv_bias": False, "layer_norm_eps": 1e-3, "mlp_ratio": 2}, 64, 64),
}


@pytest.mark.parametrize("kind", ["shared", "per sample", "none"])
@pytest.mark.parametrize("scene", SCENES)
def test_equals_the_dense_oracle(scene, kind):
    changes, height, width = SCENES[scene]
    check_kind_of_mask(tiny_config(**changes), kind, height, width)


@pytest.mark.parametrize("num_visible", [1, 2, 18, 35])
def test_equals_the_dense_oracle_at_every_ratio(num_visible):
    check_against_oracle(tiny_config(), random_masks(3, 36, num_visible, seed=1), 96, 96, batch=3)


# Transformers' Swin


def copy_to_swin(ours: GreenMIMModel, theirs: SwinModel) -> None:
    """Copies the weights, and the one epsilon, which Transformers hard-codes in embedding and merging."""
    state = {}
    for name, value in ours.state_dict().items():
        if name == "embeddings.patch_embeddings.projection.weight":
            value = value.view(theirs.embeddings.patch_embeddings.projection.weight.shape)
        name = name.replace("attention.proj", "attention.o_proj")
        name = name.replace(
            "attention.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"
        )
        if "attention.qkv" in name:
            for part, piece in zip("qkv", value.chunk(3)):
                state[name.replace("qkv", f"{part}_proj")] = piece
        else:
            state[name] = value
    theirs.load_state_dict(state, strict=True)
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = ours.config.layer_norm_eps


def gradients_by_our_names(ours: GreenMIMModel, theirs: SwinModel) -> dict[str, torch.Tensor]:
    """Gradients of Transformers' Swin, with queries, keys and values joined."""
    their_grads, joined = {name: p.grad for name, p in theirs.named_parameters()}, {}
    for name, parameter in ours.named_parameters():
        their_name = name.replace("attention.proj", "attention.o_proj")
        their_name = their_name.replace("attention.rel", "attention.relative_position_bias.rel")
        if "attention.qkv" in name:
            joined[name] = torch.cat([their_grads[name.replace("qkv", f"{part}_proj")] for part in "qkv"])
        else:
            joined[name] = their_grads[their_name].view(parameter.shape)
    return joined


SWIN_SCENES = {
    # name: (configuration, height, width); grids of all stages that are larger than the window are divided by it
    "Swin at 224 px, window 7": ({"depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}, 224, 224),
    "larger input than configured": ({"image_size": 112, "num_heads": [1, 2, 2]}, 224, 112),
}


@pytest.mark.parametrize("scene", SWIN_SCENES)
def test_equals_swin_of_transformers(scene):
    changes, height, width = SWIN_SCENES[scene]
    config = tiny_config(**{"image_size": 224, "window_size": 7, **changes})
    ours = randomize(GreenMIMModel(config))
    names = ("image_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "layer_norm_eps")
    theirs = SwinModel._from_config(
        SwinConfig(**{name: getattr(config, name) for name in names}, drop_path_rate=0.0), attn_implementation="sdpa"
    ).double()
    copy_to_swin(ours, theirs)

    pixel_values = [random_images(1, height, width).requires_grad_() for _ in range(2)]
    actual = ours(pixel_values[0], output_hidden_states=True)
    expected = theirs(pixel_values[1], output_hidden_states=True)
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    assert_close(actual.pooler_output, expected.pooler_output)
    for name in ("hidden_states", "reshaped_hidden_states"):
        assert len(actual[name]) == len(expected[name]) == len(config.depths) + 1
        for number, (one, other) in enumerate(zip(actual[name], expected[name])):
            assert_close(one, other, name=f"{name}[{number}]")
    weighted_sum([actual.last_hidden_state]).backward()
    weighted_sum([expected.last_hidden_state]).backward()
    assert_close(pixel_values[0].grad, pixel_values[1].grad)
    assert_all_close({name: p.grad for name, p in ours.named_parameters()}, gradients_by_our_names(ours, theirs))


# The plan is a matter of speed alone


def run(model, mask, pixel_values=None):
    """Latents and gradients."""
    pixel_values = (random_images(2, 96, 96) if pixel_values is None else pixel_values).requires_grad_()
    latents = model(pixel_values, bool_masked_pos=mask).last_hidden_state
    return {"latents": latents.detach(), **gradients(weighted_sum([latents]), model, pixel_values)}


def groups_of(size):
    """A `choose_groups` that always takes groups of at least that size; None takes one group of all tokens."""

    def choose(counts, num_tokens):
        if size is None:
            return None
        group_size = max(size, int(counts.max()))
        packed = [packing.pack_windows(np.bincount(row).tolist(), group_size) for row in counts]
        return group_size, max(groups for _, groups in packed), [slots for slots, _ in packed]

    return choose


def test_equals_the_dense_oracle_where_every_stage_moves_tokens(monkeypatch):
    monkeypatch.setattr(planning, "choose_groups", groups_of(1))
    mask = random_masks(1, 36, 9)
    visible = (~mask).nonzero()[:, 1].view(1, -1).numpy()
    plans = planning.plan_stages(visible, (24, 24), (3, 3, 3))
    assert all(group.token_of_slot is not None for plan in plans for group in plan.groups)
    check_against_oracle(tiny_config(window_size=3), mask, 96, 96)
    check_against_oracle(tiny_config(window_size=3), random_masks(2, 36, 9), 96, 96)


@pytest.mark.parametrize("kind", ["shared", "per sample"])
def test_the_plan_changes_no_result(kind, monkeypatch):
    model = randomize(GreenMIMModel(tiny_config()))
    mask = random_masks(1 if kind == "shared" else 2, 36, 12)
    expected = run(model, mask)
    sizes = set()
    for size in (None, 1, 29, 50, 200):
        with monkeypatch.context() as patch:
            patch.setattr(planning, "choose_groups", groups_of(size))
            visible = (~mask).nonzero()[:, 1].view(len(mask), -1).numpy()
            plans = planning.plan_stages(visible, (24, 24), (5, 5, 5))
            sizes.add(plans[0].groups[1].group_size)
            assert_all_close(run(model, mask), expected, 1e-10)
    assert len(sizes) == 5
    for cost in (0, 1, 1000):
        with monkeypatch.context() as patch:
            patch.setattr(packing, "SLOT_COST", cost)
            assert_all_close(run(model, mask), expected, 1e-10)


@pytest.mark.parametrize("kind", ["shared", "per sample", "none"])
@pytest.mark.parametrize("grad", ["of all", "of images", "none"])
def test_eager_equals_sdpa(kind, grad, monkeypatch):
    """On a CPU `sdpa` runs the fused kernel where there are gradients, but none of the bias."""
    mask = {"shared": random_masks(1, 36, 12), "per sample": random_masks(2, 36, 12), "none": None}[kind]
    models = [
        randomize(GreenMIMModel._from_config(tiny_config(), attn_implementation=name)) for name in ("eager", "sdpa")
    ]
    assert [model.config._attn_implementation for model in models] == ["eager", "sdpa"]
    if grad == "of all":
        assert_all_close(run(models[1], mask), run(models[0], mask))
        return
    pixel_values = random_images(2, 96, 96).requires_grad_(grad == "of images")
    written_out, outputs = [], []
    eager = attention.eager_attention_forward
    monkeypatch.setattr(attention, "eager_attention_forward", lambda *a, **k: written_out.append(1) or eager(*a, **k))
    with torch.set_grad_enabled(grad == "of images"):
        for model in models:
            written_out.clear()
            latents = model.requires_grad_(False)(pixel_values, bool_masked_pos=mask).last_hidden_state
            outputs.append({"latents": latents.detach()})
            if grad == "of images":
                outputs[-1]["pixel_values"] = torch.autograd.grad(weighted_sum([latents]), pixel_values)[0]
    assert bool(written_out) == (grad == "none")
    assert_all_close(outputs[1], outputs[0])


def test_a_mask_shared_by_the_batch_equals_the_same_mask_per_sample():
    """A third row differs, so that the equal rows are not joined."""
    model = randomize(GreenMIMModel(tiny_config()))
    mask = random_masks(2, 36, 9)[[0, 0, 1]]
    pixel_values = random_images(3, 96, 96)
    per_sample = model(pixel_values, bool_masked_pos=mask)
    assert per_sample.visible_units.shape == (3, 9)
    shared = model(pixel_values[:2], bool_masked_pos=mask[:1])
    assert_close(per_sample.last_hidden_state[:2], shared.last_hidden_state)


def test_masked_pixels_change_nothing():
    model = randomize(GreenMIMModel(tiny_config()))
    pixel_values, mask = random_images(2, 96, 96), random_masks(2, 36, 9)
    hidden = mask.view(2, 1, 6, 6).repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = torch.where(hidden, random_images(2, 96, 96, seed=1), pixel_values)
    assert not torch.equal(pixel_values, other)
    expected = model(pixel_values, bool_masked_pos=mask).last_hidden_state
    assert torch.equal(model(other, bool_masked_pos=mask).last_hidden_state, expected)


def test_an_mlp_in_parts_equals_the_whole(monkeypatch):
    mlp = randomize(GreenMIMMLP(tiny_config(), 8, 32))
    tokens = torch.randn(5, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = []
    mlp.fc1.register_forward_hook(lambda module, inputs, output: parts.append(len(inputs[0])))
    expected = mlp(tokens)
    monkeypatch.setattr(layout, "CPU_TOKENS", 13)
    with torch.no_grad():
        assert_close(mlp(tokens), expected)
    assert parts == [5, 2, 2, 1]


@pytest.mark.parametrize("kind", ["shared", "per sample", "none"])
def test_attention_in_parts_equals_the_whole(kind, monkeypatch):
    """Masks that differ are planned together, and their samples stay together."""
    mask = {"shared": random_masks(1, 36, 12), "per sample": random_masks(3, 36, 12), "none": None}[kind]
    model, pixel_values = randomize(GreenMIMModel(tiny_config())), random_images(3, 96, 96)
    expected = model(pixel_values, bool_masked_pos=mask).last_hidden_state
    parts = []
    projection = model.encoder.layers[0].blocks[0].attention.proj
    projection.register_forward_hook(lambda module, inputs, output: parts.append(len(output)))
    monkeypatch.setattr(layout, "CPU_TOKENS", 1)
    with torch.no_grad():
        assert_close(model(pixel_values, bool_masked_pos=mask).last_hidden_state, expected)
    assert parts == ([3] if kind == "per sample" else [1, 1, 1])


def test_large_groups_keep_the_fused_kernel(monkeypatch):
    """Written out, scores of large windows take more time and memory than they save."""
    written_out = []
    eager = attention.eager_attention_forward
    monkeypatch.setattr(attention, "eager_attention_forward", lambda *a, **k: written_out.append(1) or eager(*a, **k))
    for window_size, is_written_out in ((6, True), (12, False)):
        written_out.clear()
        model = randomize(GreenMIMModel(tiny_config(window_size=window_size, depths=(1,), num_heads=(1,))))
        with torch.no_grad():
            model(random_images(1, 96, 96))
        assert bool(written_out) == is_written_out


def test_what_is_traced_holds_for_other_batches(monkeypatch):
    monkeypatch.setattr(layout, "CPU_TOKENS", 1)
    model = randomize(GreenMIMModel(tiny_config(window_size=24))).requires_grad_(False)
    pixel_values = random_images(5, 96, 96)
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state  # plans, too, which are no part of what is traced
        traced = torch.jit.trace(lambda images: model(images).last_hidden_state, pixel_values[:1])
        assert_close(traced(pixel_values), expected, 1e-6)


# Attention weights


@pytest.mark.parametrize("kind", ["shared", "per sample", "none"])
@pytest.mark.parametrize(("slot_cost", "width"), [(0, 96), (32, 128)])
def test_attentions_are_in_raster_order(kind, slot_cost, width, monkeypatch):
    """Plans of all units are kept: another width for another cost."""
    monkeypatch.setattr(packing, "SLOT_COST", slot_cost)
    height = 64
    config = tiny_config(image_size=(height, width), window_size=3)
    model = randomize(GreenMIMModel._from_config(config, attn_implementation="eager"))
    units = 4 * width // 16
    mask = {"shared": random_masks(1, units, 9), "per sample": random_masks(2, units, 9), "none": None}[kind]
    pixel_values = random_images(2, height, width)
    with torch.no_grad():
        attentions = model(pixel_values, bool_masked_pos=mask, output_attentions=True).attentions
        dense = DenseEncoder(model, pixel_values, None if mask is None else ~mask.view(-1, 4, width // 16))
    assert len(attentions) == 3
    for stage, (weights, visible) in enumerate(zip(attentions, dense.visible)):
        num_tokens = int(visible[0].sum())
        assert weights.shape == (2, config.num_heads[stage], num_tokens, num_tokens)
        assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:3], dtype=torch.float64))
        grid = tuple(visible.shape[1:])
        same, _ = window_pairs(grid, 3, 1 if min(grid) > 3 else 0)
        for sample in range(2):
            tokens = visible[sample % len(visible)].flatten().nonzero()[:, 0]
            assert (weights[sample][:, ~same[tokens][:, tokens]] == 0).all()
            assert_close(weights[sample], dense.attentions[stage][sample][:, tokens][:, :, tokens])


# Training


def test_gradient_checkpointing_gives_the_same_loss_and_gradients():
    model = randomize(GreenMIMForPreTraining(tiny_config())).train()
    pixel_values, mask = random_images(2, 96, 96).requires_grad_(), random_masks(2, 36, 9)
    loss = model(pixel_values, bool_masked_pos=mask).loss
    expected = gradients(loss, model, pixel_values)
    model.activation_checkpointing_enable()
    blocks = [
        *(block for layer in model.greenmim.encoder.layers for block in layer.blocks),
        *model.decoder.decoder_layers,
    ]
    assert all(block.gradient_checkpointing for block in blocks)
    runs = []
    for block in blocks:
        block.mlp.fc1.register_forward_hook(lambda *_: runs.append(1))
    checkpointed = model(pixel_values, bool_masked_pos=mask).loss
    assert len(runs) == len(blocks)
    assert torch.equal(checkpointed, loss)
    assert_all_close(gradients(checkpointed, model, pixel_values), expected, 1e-12)
    assert len(runs) == 2 * len(blocks)  # the backward pass ran them again


@pytest.mark.parametrize("name", ["drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_dropouts_are_random_in_training_only(name, attn_implementation):
    torch.manual_seed(0)
    config = tiny_config(**{name: 0.4})
    model = GreenMIMModel._from_config(config, attn_implementation=attn_implementation)
    plain = GreenMIMModel(tiny_config())
    plain.load_state_dict(model.state_dict())
    pixel_values, mask = random_images(4, 96, 96, dtype=torch.float32), random_masks(1, 36, 9)
    model.train()
    first, second = (model(pixel_values, bool_masked_pos=mask).last_hidden_state for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    weighted_sum([first]).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    evaluated = model(pixel_values, bool_masked_pos=mask).last_hidden_state
    assert torch.equal(evaluated, model(pixel_values, bool_masked_pos=mask).last_hidden_state)
    assert_close(evaluated, plain.eval()(pixel_values, bool_masked_pos=mask).last_hidden_state, 1e-5)


def test_drop_path_rates_rise_linearly():
    model = GreenMIMModel(tiny_config(drop_path_rate=0.5, depths=[1, 3, 2]))
    rates = [block.drop_path.rate for layer in model.encoder.layers for block in layer.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop_path = GreenMIMDropPath(0.3).train()
    branch = torch.rand(20000, 2, 3) + 1
    ratio = drop_path(branch) / branch
    kept = ratio[:, 0, 0] != 0
    assert (ratio[~kept] == 0).all()
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.7))
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.015)  # 4.6 standard deviations
    assert torch.equal(drop_path.eval()(branch), branch)
    assert GreenMIMDropPath(0.0).train()(branch) is branch


def test_drop_path_of_everything_leaves_the_residual_stream():
    """Blocks that always drop hand their input on: attention and MLP are both on the dropped branch."""
    model = randomize(GreenMIMModel(tiny_config(depths=[2], num_heads=[2], image_size=24)))
    block = copy.deepcopy(model.encoder.layers[0].blocks[0]).train()
    block.drop_path.rate = 1 - 1e-12
    plan = planning.plan_stages(np.arange(36)[None], (6, 6), (5,))[0].groups[0]
    tokens = torch.randn(2, 36, 8, dtype=torch.float64)
    assert torch.equal(block(tokens, plan)[0], tokens)


@pytest.mark.parametrize("num_visible", [32, 256])  # of 256: groups that are alike share their index then
def test_gradients_of_shared_biases_are_summed_exactly_in_bf16(num_visible):
    """The bias of a token with itself serves every token; bf16 cannot count beyond 256."""
    config = tiny_config(image_size=256)
    attention = GreenMIMWindowAttention(config, 16, 1, config.stage_windows[0])
    plan = plan_mask(config, torch.arange(num_visible)[None]).stages[0].groups[0]
    bias = attention.bias(plan, torch.bfloat16)
    bias[bias.isfinite()].sum().backward()
    assert (plan.pattern_of_group is None) == (num_visible < 256)
    index = plan.bias_index if num_visible < 256 else plan.bias_index[:, plan.pattern_of_group]
    index = index[(index > 0) & (index <= attention.table_size)] - 1
    expected = torch.bincount(index, minlength=attention.table_size).float()
    assert expected.max() > 256 and torch.equal(attention.relative_position_bias_table.grad[:, 0], expected)
