"""The models: gradients, saving and loading, Auto classes, precisions, compiling, exporting, and what is refused."""

import copy
import math

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    SwinBackbone,
    SwinConfig,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from configuration_greenmim import GreenMIMConfig
from modeling_greenmim import (
    GreenMIMBackbone,
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMModel,
    blocks,
    plan_mask,
)
from modeling_greenmim.plans import has_padding
from tests.oracle import (
    DenseEncoder,
    assert_all_close,
    assert_close,
    gradients,
    layer_norm,
    nested_coordinates,
    random_images,
    random_masks,
    randomize,
    tiny_config,
    weighted_sum,
)
from tests.test_swin import copy_to_swin


def images(batch=2, height=96, width=96, seed=0):
    return random_images(batch, height, width, seed, torch.float32)


# Gradients


SMALLEST = {"image_size": 32, "depths": (2, 1), "num_heads": (2, 2), "window_size": 3}


def check_directions(model, pixel_values, loss_of):
    """Compares gradients with differences along a random direction of the pixels and of each parameter."""
    expected, step = gradients(loss_of(), model, pixel_values), 1e-6
    generator = torch.Generator().manual_seed(5)
    for name, tensor in (*model.named_parameters(), ("pixel_values", pixel_values)):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        original, losses = tensor.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                tensor.copy_(original + sign * step * direction)
                losses.append(loss_of().item())
            tensor.copy_(original)
        slope = (expected[name] * direction).sum().item()
        scale = (expected[name].norm() * direction.norm()).item()
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, abs=1e-6 * scale + 1e-8), name


@pytest.mark.parametrize("masks", [1, 2])
def test_gradients_of_pretraining_equal_differences(masks):
    model = randomize(GreenMIMForPreTraining(tiny_config(**SMALLEST)))
    pixel_values, mask = random_images(2, 32, 32).requires_grad_(), random_masks(masks, 16, 5)
    check_directions(model, pixel_values, lambda: model(pixel_values, bool_masked_pos=mask).loss)


def test_gradients_of_classification_equal_differences():
    model = randomize(GreenMIMForImageClassification(tiny_config(**SMALLEST, num_labels=3)))
    pixel_values, labels = random_images(2, 32, 32).requires_grad_(), torch.tensor([2, 0])
    check_directions(model, pixel_values, lambda: model(pixel_values, labels=labels).loss)


# Saving, loading and Auto classes


MODELS = [GreenMIMModel, GreenMIMForPreTraining, GreenMIMForImageClassification, GreenMIMBackbone]


@pytest.mark.parametrize("model_class", MODELS)
def test_saving_and_loading_restores_every_bit(model_class, tmp_path):
    torch.manual_seed(0)
    model = randomize(model_class(tiny_config(out_features=["stem", "stage2", "stage3"]))).float().eval()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    inputs = {"noise": torch.rand(1, 36)} if model_class in MODELS[:2] else {}
    for actual, expected in zip(*(m(images(), return_dict=False, **inputs) for m in (loaded, model))):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("model_class", "changes", "new"),
    [
        (GreenMIMModel, {}, set()),
        (GreenMIMForImageClassification, {"num_labels": 7}, {"classifier.weight", "classifier.bias"}),
        (GreenMIMBackbone, {}, set()),
        (
            GreenMIMBackbone,
            {"out_features": ["stage1", "stage3"]},
            {"hidden_states_norms.stage1.weight", "hidden_states_norms.stage1.bias"},
        ),
    ],
)
def test_pretraining_checkpoint_loads_with_only_the_head_new(model_class, changes, new, tmp_path):
    pretrained = randomize(GreenMIMForPreTraining(tiny_config())).float()
    pretrained.save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True, **changes)
    assert set(info["missing_keys"]) == new
    assert not info["mismatched_keys"]
    if model_class is not GreenMIMModel:
        assert not info["unexpected_keys"]
    encoder = (model if model_class is GreenMIMModel else model.greenmim).state_dict()
    assert encoder.keys() == pretrained.greenmim.state_dict().keys()
    assert all(torch.equal(value, encoder[name]) for name, value in pretrained.greenmim.state_dict().items())
    if model_class is GreenMIMForImageClassification:
        assert model.classifier.weight.shape == (7, 32)
        assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert not model.classifier.bias.any()


def test_encoder_checkpoint_loads_into_pretraining(tmp_path):
    encoder = randomize(GreenMIMModel(tiny_config())).float()
    encoder.save_pretrained(tmp_path)
    model, info = GreenMIMForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith("decoder.") for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert all(torch.equal(v, model.greenmim.state_dict()[name]) for name, v in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, GreenMIMModel),
        (AutoModelForPreTraining, GreenMIMForPreTraining),
        (AutoModelForMaskedImageModeling, GreenMIMForPreTraining),
        (AutoModelForImageClassification, GreenMIMForImageClassification),
    ],
)
def test_auto_classes(auto_class, model_class, tmp_path):
    config = tiny_config()
    assert type(auto_class.from_config(config)) is model_class
    model_class(config).save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is model_class
    assert type(AutoConfig.from_pretrained(tmp_path)) is GreenMIMConfig


def test_auto_backbone():
    backbone = AutoBackbone.from_config(tiny_config(out_indices=[1, 2]))
    assert type(backbone) is GreenMIMBackbone
    assert backbone.out_features == ["stage1", "stage2"]
    assert backbone.channels == [8, 16]


def test_auto_image_processor(tmp_path):
    processor = ViTImageProcessorPil(size={"height": 96, "width": 96}, image_mean=[0.1, 0.2, 0.3], resample=3)
    processor.save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded).__name__.startswith("ViTImageProcessor")
    assert list(loaded.image_mean) == [0.1, 0.2, 0.3]
    photograph = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    pixel_values = loaded(photograph, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 96, 96)
    assert GreenMIMForPreTraining(tiny_config())(pixel_values).loss.isfinite()


# Outputs


@pytest.mark.parametrize("model_class", MODELS)
def test_return_dict_false_gives_the_same_as_a_tuple(model_class):
    model = model_class(tiny_config()).eval()
    inputs = {"noise": torch.rand(1, 36)} if model_class in MODELS[:2] else {}
    named = model(images(), output_hidden_states=True, **inputs)
    values = model(images(), output_hidden_states=True, return_dict=False, **inputs)
    assert isinstance(values, tuple)
    assert len(values) == len(named.to_tuple())
    for actual, expected in zip(values, named.to_tuple()):
        pairs = [(actual, expected)] if isinstance(expected, torch.Tensor) else zip(actual, expected)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_outputs_asked_for_in_the_configuration():
    model = GreenMIMModel._from_config(
        tiny_config(output_hidden_states=True, output_attentions=True), attn_implementation="eager"
    )
    outputs = model(images(), mask_ratio=0.5)
    assert len(outputs.hidden_states) == 4 and len(outputs.attentions) == 3
    assert outputs.reshaped_hidden_states is None
    assert len(model(images()).reshaped_hidden_states) == 4
    plain = model(images(), output_hidden_states=False, output_attentions=False)
    assert plain.hidden_states is None and plain.attentions is None


def test_patchify_and_unpatchify_are_those_of_vit_mae():
    ours = GreenMIMForPreTraining(tiny_config())
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=96, patch_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
            decoder_intermediate_size=8,
        )
    )  # fmt: skip
    patches = ours.patchify(images())
    assert torch.equal(patches, theirs.patchify(images()))
    assert torch.equal(ours.unpatchify(patches), theirs.unpatchify(patches))
    assert torch.equal(ours.unpatchify(patches), images())
    wide = images(height=48, width=128)
    assert torch.equal(ours.unpatchify(ours.patchify(wide), (48, 128)), wide)
    for shape, size in (
        ((2, 35, 768), None),
        ((2, 36, 767), None),
        ((2, 24, 768), (48, 127)),
        ((2, 23, 768), (48, 128)),
    ):
        with pytest.raises(ValueError, match="`patchified_pixel_values` has shape"):
            ours.unpatchify(torch.zeros(shape), size)


def test_classification_is_a_linear_layer_on_the_mean_and_its_losses_are_the_usual():
    model = GreenMIMForImageClassification(tiny_config(num_labels=3)).eval()
    labels = torch.tensor([2, 0])
    outputs = model(images(), labels=labels)
    tokens = model.greenmim(images()).last_hidden_state
    torch.testing.assert_close(outputs.logits, tokens.mean(dim=1) @ model.classifier.weight.T + model.classifier.bias)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))
    assert model(images()).loss is None
    regression = GreenMIMForImageClassification(tiny_config(num_labels=1)).eval()
    targets = torch.tensor([0.5, -1.0])
    outputs = regression(images(), labels=targets)
    torch.testing.assert_close(outputs.loss, (outputs.logits[:, 0] - targets).square().mean())
    headless = GreenMIMForImageClassification(tiny_config(num_labels=0)).eval()
    assert torch.equal(headless(images()).logits, headless.greenmim(images()).pooler_output)


# Initial weights and sizes


def test_initial_weights():
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(tiny_config(embed_dim=32, decoder_hidden_size=256))
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert "greenmim.embeddings.patch_embeddings.projection" in dict(linears)
    for name, linear in linears:
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.95 * bound < linear.weight.abs().max() <= bound, name
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
        assert linear.bias is None or not linear.bias.any(), name
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
            assert module.eps == model.config.layer_norm_eps
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert [table.shape for table in tables] == [(81, 1)] * 2 + [(81, 2)] * 2 + [(81, 4)] * 2
    values = torch.cat([table.flatten() for table in tables])
    assert values.std().item() == pytest.approx(0.02, rel=0.1)
    assert values.mean().abs() < 0.003


@pytest.mark.parametrize(
    ("changes", "millions", "encoder_millions"),
    [
        ({}, 92.02, 86.74),
        ({"window_size": 14}, 92.20, 86.92),
        ({"window_size": 14, "embed_dim": 192, "num_heads": (6, 12, 24, 48)}, 200.80, 195.26),
    ],
)
def test_parameter_counts_of_the_published_models(changes, millions, encoder_millions):
    """The published counts hold 49 x 512 fixed positions of the decoder, which are no parameter here."""
    with torch.device("meta"):
        model = GreenMIMForPreTraining(GreenMIMConfig(**changes))
    assert round((model.num_parameters() + 49 * 512) / 1e6, 2) == millions
    assert round(model.greenmim.num_parameters() / 1e6, 2) == encoder_millions


# Precisions, compiling and exporting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_each_precision(dtype, tmp_path):
    torch.manual_seed(0)
    expected = GreenMIMForPreTraining(tiny_config()).eval()
    expected.save_pretrained(tmp_path)
    model = GreenMIMForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    mask = random_masks(2, 36, 9)
    outputs = model(images(), bool_masked_pos=mask)
    assert outputs.logits.dtype == dtype
    assert outputs.loss.dtype == torch.float32
    reference = expected(images(), bool_masked_pos=mask)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert_close(outputs.logits.float(), reference.logits, tolerance)
    assert outputs.loss.item() == pytest.approx(reference.loss.item(), rel=tolerance)
    if dtype != torch.float16:
        outputs.loss.backward()
        reference.loss.backward()
        for (name, actual), parameter in zip(model.named_parameters(), expected.parameters()):
            assert actual.grad.dtype == dtype
            assert_close(actual.grad.float(), parameter.grad, 0.15 if dtype == torch.bfloat16 else 1e-5, name)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_autocast(attn_implementation):
    torch.manual_seed(0)
    model = GreenMIMForPreTraining._from_config(tiny_config(), attn_implementation=attn_implementation)
    mask = random_masks(2, 36, 9)
    expected = model(images(), bool_masked_pos=mask)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images(), bool_masked_pos=mask)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)
    # All gradients as one vector: those of some biases of norms nearly cancel, and bf16 keeps little of them.
    exact, rounded = (
        torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])
        for loss in (expected.loss, outputs.loss)
    )
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_training_after_inference_mode():
    """A plan that is kept must be of use to autograd, whatever mode it was made in."""
    model = GreenMIMForImageClassification(tiny_config(image_size=64, window_size=3, num_labels=2))
    pixel_values = images(height=80, width=112)  # a size that no other test has
    with torch.inference_mode():
        expected = model(pixel_values).logits.clone()
    outputs = model(pixel_values, labels=torch.tensor([0, 1]))
    outputs.loss.backward()
    assert_close(outputs.logits.detach(), expected, 1e-6)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
def test_compiled_training_steps_equal_eager_ones():
    """The masks need other group sizes and numbers of groups: compiled code must serve all of them."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = GreenMIMForPreTraining(
        tiny_config(image_size=64, depths=(1, 1), num_heads=(1, 1), window_size=4, decoder_num_attention_heads=1)
    )
    compiled = torch.compile(model, backend="aot_eager")  # the default back end is tested with static plans
    pixel_values = images(height=64, width=64)
    for seed in range(5):
        mask = random_masks(1, 64, 16, seed)
        losses, grads = [], []
        for network in (model, compiled):
            model.zero_grad()
            loss = network(pixel_values, bool_masked_pos=mask).loss
            loss.backward()
            losses.append(loss.item())
            grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert_all_close(grads[1], grads[0], 1e-4)


@pytest.mark.parametrize("backbone_type", ["swin", "twins"])
@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("static", [False, True])
def test_a_plan_made_ahead_gives_what_its_mask_gives(backbone_type, masks, static, monkeypatch):
    model = randomize(GreenMIMForPreTraining(tiny_config(backbone_type=backbone_type, window_size=3)))
    pixel_values, mask = random_images(2, 96, 96).requires_grad_(), random_masks(masks, 36, 18)
    expected = model(pixel_values, bool_masked_pos=mask)
    visible = (~mask).nonzero()[:, 1].view(masks, -1)
    plan = plan_mask(model.config, visible, static=static)
    assert not static or any(stage.groups[0].token_of_slot is not None for stage in plan.stages)
    monkeypatch.setattr(GreenMIMModel, "_plan", None)  # nothing is planned in forward
    outputs = model(pixel_values, plan=plan)
    assert_close(outputs.loss, expected.loss)
    assert_close(outputs.logits, expected.logits)
    assert torch.equal(outputs.mask, expected.mask)
    actual, wanted = (gradients(loss, model, pixel_values) for loss in (outputs.loss, expected.loss))
    assert_all_close(actual, wanted)


def test_plans_that_do_not_fit_are_refused(pretraining):
    plan = plan_mask(pretraining.config, torch.arange(9).view(1, 9))
    with pytest.raises(ValueError, match=r"`plan` says what is masked"):
        pretraining(images(), plan=plan, noise=torch.rand(1, 36))
    with pytest.raises(ValueError, match=r"`plan` says what is masked; .*`mask_ratio`"):
        pretraining.greenmim(images(), plan=plan, mask_ratio=0.5)
    for change in ({"window_size": 2}, {"backbone_type": "twins"}):
        other = plan_mask(tiny_config(**change), torch.arange(9).view(1, 9))
        with pytest.raises(ValueError, match=r"`plan` was made for the backbone and windows .*, but the model has"):
            pretraining(images(), plan=other)
    with pytest.raises(ValueError, match=r"`plan` was made for \(6, 6\) mask units, but the images have \(4, 6\)"):
        pretraining(images(height=64), plan=plan)
    with pytest.raises(ValueError, match=r"`plan` has 3 masks, but the batch has 2 images"):
        pretraining(images(), plan=plan_mask(pretraining.config, torch.arange(9).repeat(3, 1)))
    with pytest.raises(ValueError, match=r"without `raster=True`"):
        pretraining(images(), plan=plan, output_hidden_states=True)


@pytest.mark.slow
def test_a_step_is_compiled_once_for_all_masks():
    """1,000 steps with fresh masks of static plans: one graph, no break, and the losses of the model as it is."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = tiny_config(image_size=64, depths=(1, 2), num_heads=(1, 2), patch_size=4, window_size=4, mask_ratio=0.5)
    model = GreenMIMForPreTraining(config)
    compiled, pixel_values = torch.compile(model, fullgraph=True), images(height=64, width=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for step in range(1000):
        visible = random_masks(1, 64, 32, step).logical_not().nonzero()[:, 1].view(1, -1)
        plan = plan_mask(config, visible, static=True)
        loss = compiled(pixel_values, plan=plan).loss
        if step % 250 == 0:
            assert loss.item() == pytest.approx(model(pixel_values, plan=plan).loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("masks", [1, 2])
def test_a_compiled_step_has_the_gradients_of_the_model_as_it_is(masks):
    """Static groups are padded: what moves into them and back has gradients of its own."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = tiny_config(image_size=64, depths=(1, 2), num_heads=(1, 2), patch_size=4, window_size=4, mask_ratio=0.5)
    model, pixel_values = GreenMIMForPreTraining(config), images(height=64, width=64)
    units = config.unit_grid[0] * config.unit_grid[1]
    visible = random_masks(masks, units, units // 2).logical_not().nonzero()[:, 1].view(masks, -1)
    plan = plan_mask(config, visible, static=True)
    assert has_padding(plan.stages[0].groups[0])
    gradients = []
    for network in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        network(pixel_values, plan=plan).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone_type", ["swin", "twins"])
@pytest.mark.parametrize("masks", [1, 2])
def test_a_step_on_a_device_waits_for_nothing(backbone_type, masks):
    """Tensors of the device "meta" take the path of a GPU and have no values: whatever needs one raises."""
    config = tiny_config(backbone_type=backbone_type)
    plan = plan_mask(config, random_masks(masks, 36, 9).logical_not().nonzero()[:, 1].view(masks, -1))
    with torch.device("meta"):
        model = GreenMIMForPreTraining(config).train()
        optimizer = torch.optim.AdamW(model.parameters())
        loss = model(torch.empty(2, 3, 96, 96), plan=plan.to(torch.device("meta"))).loss
        loss.backward()
        optimizer.step()
    assert loss.device.type == "meta" and all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()  # what waiting would look like


@pytest.mark.parametrize(
    ("model_class", "backbone_type", "backend"),
    [
        (GreenMIMModel, "twins", "eager"),
        (GreenMIMForImageClassification, "swin", "aot_eager"),
        (GreenMIMBackbone, "swin", "eager"),
    ],
)
def test_dense_models_compile_without_a_break(model_class, backbone_type, backend):
    """A plan of everything is a constant of what is compiled; another size compiles anew."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    changes = {"depths": (2, 1), "num_heads": (1, 2), "image_size": 48, "window_size": 4}
    model = model_class(tiny_config(**changes, backbone_type=backbone_type)).eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for size in ((48, 64), (64, 80), (48, 64)):
        pixel_values = images(2, *size)
        expected, actual = model(pixel_values), compiled(pixel_values)
        for one, other in zip(actual.to_tuple(), expected.to_tuple()):
            pairs = [(one, other)] if isinstance(one, torch.Tensor) else zip(one, other)
            assert all(torch.allclose(*pair, atol=1e-5) for pair in pairs)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("model_class", [GreenMIMModel, GreenMIMForImageClassification, GreenMIMBackbone])
def test_compiled_dense_models_leave_attention_weights_out(model_class):
    torch.manual_seed(0)
    torch._dynamo.reset()
    changes = {"depths": (2, 1), "num_heads": (1, 2), "image_size": 48, "window_size": 4}
    model = model_class._from_config(tiny_config(**changes), attn_implementation="sdpa").eval()
    compiled, pixel_values = torch.compile(model, fullgraph=True, backend="eager"), images(2, 48, 64)
    blocks.logger.warning_once.cache_clear()
    actual, expected = compiled(pixel_values, output_attentions=True), model(pixel_values)
    assert actual.attentions == ()
    for one, other in zip(actual.to_tuple(), expected.to_tuple()):
        pairs = [(one, other)] if isinstance(one, torch.Tensor) else zip(one, other)
        assert all(torch.allclose(*pair, atol=1e-5) for pair in pairs)


def exported_models():
    """Sizes that no other test has: plans are not made yet when the export begins."""
    torch.manual_seed(0)
    changes = {"depths": (2, 1), "num_heads": (1, 2), "image_size": 48, "window_size": 4, "num_labels": 5}
    classifier = GreenMIMForImageClassification(tiny_config(**changes)).eval()
    backbone = GreenMIMBackbone(tiny_config(**changes, out_features=["stem", "stage1", "stage2"])).eval()
    return {"classifier": classifier, "backbone": backbone}


def tensors_of(outputs) -> list[torch.Tensor]:
    """Logits, or feature maps."""
    return [outputs["logits"]] if "logits" in outputs else list(outputs["feature_maps"])


EXPORTS = {"classifier": ((72, 104), (56, 136)), "backbone": ((45, 70), (51, 83))}


@pytest.mark.parametrize("name", EXPORTS)
def test_torch_export_equals_eager(name):
    model, pixel_values = exported_models()[name], images(2, *EXPORTS[name][0])
    batches = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (pixel_values,), dynamic_shapes=batches)
    for batch in (2, 5):
        pixel_values = images(batch, *EXPORTS[name][0], seed=batch)
        with torch.no_grad():
            expected = tensors_of(model(pixel_values))
            actual = tensors_of(program.module()(pixel_values))
        assert all(type(tensor) is torch.Tensor for tensor in expected)
        assert len(actual) == len(expected) == (1 if name == "classifier" else 3)
        for one, other in zip(actual, expected):
            assert_close(one, other, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_onnx_export_equals_eager(name, tmp_path):
    model, pixel_values = exported_models()[name], images(2, *EXPORTS[name][1])
    batches = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.onnx.export(model, (pixel_values,), dynamo=True, dynamic_shapes=batches, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (2, 3):
        pixel_values = images(batch, *EXPORTS[name][1], seed=batch)
        actual = session.run(None, {session.get_inputs()[0].name: pixel_values.numpy()})
        with torch.no_grad():
            expected = tensors_of(model(pixel_values))
        assert all(type(tensor) is torch.Tensor for tensor in expected)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            assert_close(torch.from_numpy(one), other, 1e-5)


# Backbone


ALL_MAPS = ["stem", "stage1", "stage2", "stage3"]


@pytest.mark.parametrize("backbone_type", ["swin", "twins"])
@pytest.mark.parametrize("size", [(96, 96), (37, 50), (33, 95), (16, 100), (5, 3), (96, 97)])
def test_backbone_equals_the_dense_oracle_at_any_size(size, backbone_type):
    """Padding is never attended to, merges see zeros: maps and gradients, also of the pixels at the edge."""
    model = randomize(GreenMIMBackbone(tiny_config(out_features=ALL_MAPS, window_size=3, backbone_type=backbone_type)))
    pixel_values = random_images(2, *size).requires_grad_()
    outputs = model(pixel_values, output_hidden_states=True)

    patch_grid = tuple(math.ceil(side / 4) for side in size)
    padding = (0, -size[1] % 16, 0, -size[0] % 16)
    dense = DenseEncoder(model.greenmim, torch.nn.functional.pad(pixel_values, padding), patch_grid=patch_grid)
    norms = [*(model.hidden_states_norms[name] for name in ("stem", "stage1", "stage2")), model.greenmim.layernorm]
    expected_maps, expected_states = [], []
    for stage, (states, norm) in enumerate(zip([dense.inputs[0], *dense.outputs], norms)):
        stride = 4 * 2 ** max(stage - 1, 0)
        states = states[:, : math.ceil(size[0] / stride), : math.ceil(size[1] / stride)]
        expected_states.append(states.permute(0, 3, 1, 2))
        expected_maps.append(layer_norm(states, norm, 1e-6).permute(0, 3, 1, 2))
    assert len(outputs.feature_maps) == len(outputs.hidden_states) == 4
    for actual, expected in zip((*outputs.feature_maps, *outputs.hidden_states), (*expected_maps, *expected_states)):
        assert_close(actual, expected)
    actual = gradients(weighted_sum(outputs.feature_maps), model, pixel_values)
    assert_all_close(actual, gradients(weighted_sum(expected_maps), model, pixel_values))


@pytest.mark.parametrize("backbone_type", ["swin", "twins"])
def test_content_of_padding_reaches_no_feature_map(backbone_type):
    model = randomize(GreenMIMBackbone(tiny_config(out_features=ALL_MAPS, window_size=3, backbone_type=backbone_type)))
    height, width = 37, 50  # patches 10 x 13, units 3 x 4
    pixel_values = random_images(2, height, width)
    expected = model(pixel_values).feature_maps
    places = [
        (unit // 4 * 4 + row, unit % 4 * 4 + column) for unit in range(12) for row, column in nested_coordinates(4)
    ]
    outside = torch.tensor([row >= 10 or column >= 13 for row, column in places])
    assert outside.sum() == 12 * 16 - 10 * 13

    def spoil(module, arguments, tokens):
        return torch.where(outside[:, None], 100 * torch.randn_like(tokens), tokens)

    model.greenmim.embeddings.register_forward_hook(spoil)
    for actual, wanted in zip(model(pixel_values).feature_maps, expected):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("size", [(224, 224), (222, 109)])
def test_backbone_equals_swin_backbone_of_transformers(size):
    """On grids that the window divides, and whose smaller side exceeds it."""
    features = ALL_MAPS
    config = tiny_config(image_size=224, window_size=7, out_features=features)
    ours = randomize(GreenMIMBackbone(config))
    names = ("image_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "layer_norm_eps")
    values = {name: getattr(config, name) for name in names}
    if size != (224, 224):  # three stages of 56 x 28, 28 x 14 and 14 x 7: the last is not larger than the window
        features = features[:3]
    theirs = SwinBackbone(SwinConfig(**values, drop_path_rate=0.0, out_features=features)).double()
    theirs.set_attn_implementation("sdpa")
    copy_to_swin(ours.greenmim, theirs.swin)
    for name, norm in theirs.hidden_states_norms.items():
        own = ours.greenmim.layernorm if name == "stage3" else ours.hidden_states_norms[name]
        norm.load_state_dict(own.state_dict())
        norm.eps = config.layer_norm_eps
    pixel_values = random_images(1, *size)
    with torch.no_grad():
        actual, expected = ours(pixel_values).feature_maps, theirs(pixel_values).feature_maps
    assert len(expected) == len(features)
    for one, other in zip(actual, expected):
        assert_close(one, other)


def test_backbone_returns_the_stages_that_it_is_asked_for():
    model = GreenMIMBackbone(tiny_config(out_features=["stem", "stage2"]))
    maps = model(images(1, 50, 70)).feature_maps
    assert [tuple(one.shape) for one in maps] == [(1, 8, 13, 18), (1, 16, 7, 9)]
    assert model.channels == [8, 16]
    assert set(model.hidden_states_norms) == {"stem", "stage2"}
    assert set(GreenMIMBackbone(tiny_config()).hidden_states_norms) == set()


# What is refused


@pytest.fixture(scope="module")
def pretraining() -> GreenMIMForPreTraining:
    return GreenMIMForPreTraining(tiny_config())


@pytest.mark.parametrize("shape", [(2, 1, 96, 96), (2, 4, 96, 96), (3, 96, 96), (2, 3, 96)])
@pytest.mark.parametrize("model_class", MODELS)
def test_images_of_a_wrong_shape_are_refused(model_class, shape):
    with pytest.raises(ValueError, match=r"`pixel_values` has shape .*\(batch, 3, height, width\)") as error:
        model_class(tiny_config())(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("size", [(96, 100), (90, 96), (0, 96), (8, 8)])
@pytest.mark.parametrize("model_class", MODELS[:3])
def test_images_of_partial_units_are_refused(model_class, size):
    with pytest.raises(ValueError, match=f"has images of {size[0]}x{size[1]} pixels; .* multiple of 16"):
        model_class(tiny_config())(torch.zeros(2, 3, *size))


@pytest.mark.parametrize("model_class", MODELS[:3])
def test_no_images_are_refused(model_class):
    with pytest.raises(ValueError, match="`pixel_values` is None"):
        model_class(tiny_config())()


def test_a_mask_together_with_noise_or_ratio_is_refused(pretraining):
    mask = random_masks(1, 36, 9)
    with pytest.raises(ValueError, match="`noise` and `mask_ratio` cannot be given too"):
        pretraining(images(), bool_masked_pos=mask, noise=torch.rand(1, 36))
    with pytest.raises(ValueError, match="`noise` and `mask_ratio` cannot be given too"):
        pretraining.greenmim(images(), bool_masked_pos=mask, mask_ratio=0.5)


def test_pretraining_without_anything_masked_is_refused(pretraining):
    with pytest.raises(ValueError, match="`bool_masked_pos` masks no unit"):
        pretraining(images(), bool_masked_pos=torch.zeros(1, 36))


def test_images_of_a_single_unit_cannot_be_masked(pretraining):
    with pytest.raises(ValueError, match="of 1 units it leaves 0 visible"):
        pretraining(images(2, 16, 16))


@pytest.mark.parametrize("model_class", MODELS)
def test_attention_weights_are_left_out_with_a_warning_where_nothing_keeps_them(model_class, caplog):
    """As Transformers' Swin and ViT do under sdpa."""
    model = model_class._from_config(tiny_config(), attn_implementation="sdpa")
    blocks.logger.warning_once.cache_clear()
    assert model(images(), output_attentions=True).attentions == ()
    assert [record.levelname for record in caplog.records if record.name == blocks.logger.name] == ["WARNING"]
    assert "`output_attentions` is True, but attn_implementation 'sdpa'" in caplog.text
    assert model(images()).attentions is None


@pytest.mark.parametrize("model_class", MODELS)
def test_unknown_arguments_are_refused_by_name(model_class):
    model = model_class(tiny_config())
    with pytest.raises(TypeError, match=rf"{model_class.__name__}.forward\(\) has no argument 'mask_rato', 'labl'"):
        model(images(), mask_rato=0.5, labl=None)
    # What Transformers hands to any model.
    model(images(), num_items_in_batch=2, interpolate_pos_encoding=True, return_dict=True)


def test_the_mask_ratio_of_pretraining_is_the_argument_or_the_configuration(pretraining):
    assert pretraining(images(), mask_ratio=0.5).mask.sum(dim=1).tolist() == [18, 18]
    assert pretraining(images()).mask.sum(dim=1).tolist() == [27, 27]
    noise = torch.linspace(0, 1, 36)[None]
    assert pretraining(images(), noise=noise, mask_ratio=0.5).mask[0].tolist() == [0] * 18 + [1] * 18
    for ratio in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"`mask_ratio` is {ratio}, but it must be between 0 and 1"):
            pretraining(images(), mask_ratio=ratio)
    with pytest.raises(ValueError, match="`noise` and `mask_ratio` cannot be given too"):
        pretraining(images(), bool_masked_pos=random_masks(1, 36, 9), mask_ratio=0.5)
    plan = plan_mask(pretraining.config, torch.arange(9).view(1, 9))
    with pytest.raises(ValueError, match=r"`plan` says what is masked; .*`mask_ratio`"):
        pretraining(images(), plan=plan, mask_ratio=0.5)


@pytest.mark.parametrize("model_class", MODELS)
def test_empty_batches_are_refused(model_class):
    with pytest.raises(ValueError, match=r"`pixel_values` has shape \(0, 3, 96, 96\); at least one image"):
        model_class(tiny_config())(torch.zeros(0, 3, 96, 96))


@pytest.mark.parametrize("name", ["bool_masked_pos", "noise"])
def test_masks_without_a_row_are_refused(pretraining, name):
    with pytest.raises(ValueError, match=rf"`{name}` has shape \(0, 36\).* at least one"):
        pretraining(images(), **{name: torch.zeros(0, 36)})


def test_targets_that_are_made_ahead_are_predicted(pretraining):
    plan = plan_mask(pretraining.config, torch.arange(9).view(1, 9))
    expected = pretraining(images(), plan=plan)
    targets = pretraining.target.targets(images())
    assert torch.equal(pretraining(images(), plan=plan, targets=targets).loss, expected.loss)
    assert pretraining(images(), plan=plan, targets=expected.logits.detach()).loss == 0
    with pytest.raises(ValueError, match=r"`targets` has shape \(2, 36, 5\), but \(2, 36, 768\) is needed"):
        pretraining(images(), plan=plan, targets=torch.zeros(2, 36, 5))


# Quantisation


class Int8Linear(torch.nn.Module):
    """As bitsandbytes' 8-bit layer: its weight is of int8, its input stays floating."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = scale.detach(), linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        assert hidden_states.is_floating_point()
        return torch.nn.functional.linear(hidden_states, self.weight * self.scale, self.bias)


def with_int8_linears(model: torch.nn.Module) -> torch.nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            model.set_submodule(name, Int8Linear(module))
    return model


def quantize_dynamically(model: torch.nn.Module) -> torch.nn.Module:
    torch.backends.quantized.engine = next(
        name for name in ("fbgemm", "x86", "qnnpack") if name in torch.backends.quantized.supported_engines
    )
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("quantize", [quantize_dynamically, with_int8_linears])
@pytest.mark.parametrize("backbone_type", ["swin", "twins"])
@pytest.mark.parametrize("model_class", MODELS)
def test_quantised_linears_compute_nearly_the_same(model_class, backbone_type, quantize):
    torch.manual_seed(0)
    model = model_class(tiny_config(backbone_type=backbone_type)).eval()
    inputs = {"noise": torch.linspace(0, 1, 36)[None]} if model_class in MODELS[:2] else {}

    def output(model):
        with torch.no_grad():
            outputs = model(images(), **inputs)
        return tensors_of(outputs)[0] if "last_hidden_state" not in outputs else outputs.last_hidden_state

    expected, actual = output(model), output(quantize(copy.deepcopy(model)))
    assert 0 < (actual - expected).norm() < 0.1 * expected.norm()


def test_patchify_refuses_partial_units(pretraining):
    with pytest.raises(ValueError, match="90x96 pixels"):
        pretraining.patchify(images(2, 90, 96))
