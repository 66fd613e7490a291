"""Twins on visible tokens: equal to the dense oracle, to an independent dense Twins, and to the published size."""

import re

import pytest
import torch
from safetensors.torch import load_file

from modeling_greenmim import GreenMIMConfig, GreenMIMForImageClassification, GreenMIMForPreTraining, GreenMIMModel
from modeling_greenmim.conversion import CheckpointError, convert, export_model, read_checkpoint
from tests.golden import FIXTURES, normalized
from tests.oracle import (
    DenseEncoder,
    assert_all_close,
    assert_close,
    check_kind_of_mask,
    dense_pretraining,
    gradients,
    random_images,
    random_masks,
    randomize,
    tiny_config,
)
from training_greenmim.optimization import layer_of_parameter


def twins_config(**changes) -> GreenMIMConfig:
    return tiny_config(backbone_type="twins", **changes)


SCENES = {
    # name: (configuration, height, width)
    "default": ({}, 96, 96),
    "one stage": ({"depths": [3], "num_heads": [2], "image_size": 40, "window_size": 3}, 40, 40),
    "two stages, odd depths": ({"depths": [1, 3], "num_heads": [2, 2], "image_size": 64, "window_size": 4}, 64, 64),
    "four stages": ({"depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 2], "image_size": 128}, 128, 128),
    "landscape": ({"image_size": (64, 112), "window_size": 3}, 64, 112),
    "window of 1": ({"window_size": 1, "image_size": 64}, 64, 64),
    "window larger than every grid": ({"window_size": 30, "image_size": 64}, 64, 64),
    "patch 8": ({"patch_size": 8, "image_size": (96, 128), "window_size": 3}, 96, 128),
    "larger input than configured": ({"image_size": 48, "window_size": 5}, 96, 80),
    "no bias of queries, keys and values": ({"qkv_bias": False, "layer_norm_eps": 1e-3, "mlp_ratio": 2}, 64, 64),
}


@pytest.mark.parametrize("kind", ["shared", "per sample", "none"])
@pytest.mark.parametrize("scene", SCENES)
def test_equals_the_dense_oracle(scene, kind):
    changes, height, width = SCENES[scene]
    check_kind_of_mask(twins_config(**changes), kind, height, width)


@pytest.mark.parametrize("masks", [1, 2])
def test_pretraining_equals_the_dense_oracle(masks):
    model = randomize(GreenMIMForPreTraining(twins_config()))
    pixel_values, mask = random_images(2, 96, 96).requires_grad_(), random_masks(masks, 36, 9)
    outputs = model(pixel_values, bool_masked_pos=mask)
    loss, logits = dense_pretraining(model, pixel_values, mask)
    assert_close(outputs.logits, logits)
    assert_close(outputs.loss, loss)
    actual, expected = (gradients(value, model, pixel_values) for value in (outputs.loss, loss))
    assert_all_close(actual, expected)


@pytest.mark.parametrize("depths", [[2, 2, 2], [1, 1, 1]])
@pytest.mark.parametrize("kind", ["shared", "per sample", "none"])
def test_attentions_are_in_raster_order(kind, depths):
    config = twins_config(window_size=3, depths=depths)
    model = randomize(GreenMIMModel._from_config(config, attn_implementation="eager"))
    pixel_values, masks = random_images(2, 96, 96), {"shared": 1, "per sample": 2, "none": 0}[kind]
    mask = random_masks(masks, 36, 9) if masks else None
    outputs = model(pixel_values, bool_masked_pos=mask, output_attentions=True)
    dense = DenseEncoder(model, pixel_values, None if mask is None else ~mask.view(-1, 6, 6))
    for weights, expected, visible in zip(outputs.attentions, dense.attentions, dense.visible):
        for sample in range(2):
            tokens = visible[sample % len(visible)].flatten().nonzero()[:, 0]
            units = dense.visible[-1][sample % len(visible)].flatten().nonzero()[:, 0]
            keys = units if depths[0] == 2 else tokens
            assert_close(weights[sample], expected[sample][:, tokens][:, :, keys])


def test_gradient_checkpointing_gives_the_same_gradients():
    model = randomize(GreenMIMForPreTraining(twins_config())).train()
    pixel_values, mask = random_images(2, 96, 96).requires_grad_(), random_masks(2, 36, 9)
    expected = gradients(model(pixel_values, bool_masked_pos=mask).loss, model, pixel_values)
    model.activation_checkpointing_enable()
    actual = gradients(model(pixel_values, bool_masked_pos=mask).loss, model, pixel_values)
    assert_all_close(actual, expected, 1e-12)


def golden_file(folder, channels_last: bool, decoder: dict) -> tuple:
    """The golden weights in a file as Twins or, channels last and with a decoder, official GreenMIM has it."""
    tensors = load_file(FIXTURES / "dense_twins.safetensors")
    weights = {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items() if "state_dict." in name}
    if channels_last:
        strided = [
            name for name in weights if ".sr.weight" in name or re.match(r"patch_embeds.[1-3].proj.weight", name)
        ]
        weights |= {name: weights[name].permute(0, 2, 3, 1) for name in strided}
        for name in weights:
            if re.match(r"pos_block.\d.proj.0.weight", name):
                weights[name][:, :, 1, 1] += 1  # its convolution is all of the position encoding, without residual
        weights = {f"encoder.{name}": tensor for name, tensor in weights.items()} | decoder
    torch.save({"model": weights}, folder / "twins.pth")
    return folder / "twins.pth", tensors


def decoder_weights() -> dict[str, torch.Tensor]:
    """An official decoder of width 16 for 49 units of 32x32 px and latents of width 64."""
    shapes = {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 49, 16), "decoder_embed.weight": (16, 64)}
    shapes |= {"decoder_pred.weight": (3072, 16), "decoder_pred.bias": (3072,), "decoder_embed.bias": (16,)}
    shapes |= {
        f"decoder_{name}.{kind}": (16,)
        for name in ("norm", "blocks.0.norm1", "blocks.0.norm2")
        for kind in ("weight", "bias")
    }
    for name, (rows, columns) in {
        "attn.qkv": (48, 16),
        "attn.proj": (16, 16),
        "mlp.fc1": (64, 16),
        "mlp.fc2": (16, 64),
    }.items():
        shapes |= {f"decoder_blocks.0.{name}.weight": (rows, columns), f"decoder_blocks.0.{name}.bias": (rows,)}
    return {name: torch.full(shape, 0.1) for name, shape in shapes.items()}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_dense_golden(channels_last, attn_implementation, tmp_path):
    """An independent dense Twins, read in both layouts; the first key's kernel, 8x8x8x8, tells no layout."""
    path, golden = golden_file(tmp_path, channels_last, decoder_weights())
    model = convert(read_checkpoint(path), num_heads=[1, 2, 4, 8])
    assert isinstance(model, GreenMIMForPreTraining if channels_last else GreenMIMModel)
    assert model.config.window_size == 7 and model.config.layer_norm_eps == 1e-6
    model.set_attn_implementation(attn_implementation)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and "layernorm" not in name:
            module.eps = 1e-5  # as that implementation has it in embedding, merging and keys
    with torch.no_grad():
        features = getattr(model, "greenmim", model)(normalized(golden["images_uint8"])).last_hidden_state
    assert_close(features, golden["features"], 1e-5)


# Checkpoints


@pytest.mark.parametrize(("kind", "target"), [(GreenMIMForPreTraining, "original"), (GreenMIMModel, "timm")])
def test_exports_come_back(kind, target, tmp_path):
    config = twins_config(depths=[2, 2, 3], layer_norm_eps=1e-6)
    model = randomize(kind(config)).float()
    model.save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), target, str(tmp_path / "twins.pth"))
    told = {} if target == "original" else {"num_heads": [1, 2, 4], "window_size": 5, "image_size": 96}
    imported = convert(read_checkpoint(tmp_path / "twins.pth"), **told)
    names = ("backbone_type", "depths", "num_heads", "window_size", "image_size", "embed_dim")
    assert all(getattr(imported.config, name) == getattr(config, name) for name in names)
    assert imported.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        # Official GreenMIM has the residual of the position encoding within its weights: added and subtracted.
        rounding = 3e-7 if target == "original" and "position_encoding.conv.weight" in name else 0
        torch.testing.assert_close(imported.state_dict()[name], tensor, atol=rounding, rtol=0)


def test_exported_names_and_shapes_are_those_of_twins(tmp_path):
    golden = load_file(FIXTURES / "dense_twins.safetensors")
    expected = {name.removeprefix("state_dict."): golden[name].shape for name in golden if "state_dict." in name}
    config = GreenMIMConfig(
        backbone_type="twins", embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], layer_norm_eps=1e-6
    )
    GreenMIMModel(config).save_pretrained(tmp_path / "model")
    assert export_model(str(tmp_path / "model"), "timm", str(tmp_path / "twins.safetensors")) < 1e-4
    assert {name: tensor.shape for name, tensor in load_file(tmp_path / "twins.safetensors").items()} == expected


@pytest.mark.parametrize("target", ["microsoft-swin", "transformers-swin"])
def test_formats_of_swin_refuse_twins(target, tmp_path):
    GreenMIMModel(twins_config()).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"is a Twins, which {target} cannot express; export it to .*timm"):
        export_model(str(tmp_path / "model"), target, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_twins_large_has_its_published_size():
    """99.27 M parameters with 1,000 classes (Twins-SVT-L in timm and in the paper: 99.2 M)."""
    with torch.device("meta"):
        model = GreenMIMForImageClassification(GreenMIMConfig(backbone_type="twins", num_labels=1000))
    assert round(model.num_parameters() / 1e6, 2) == 99.27


def test_layers_of_the_recipe():
    """The position encoding learns with the first block of its stage."""
    layers = {"encoder.layers.1.position_encoding.conv.weight": 3, "encoder.layers.1.blocks.0.mlp.fc1.weight": 3}
    layers |= {"encoder.layers.0.downsample.reduction.weight": 2, "encoder.layers.1.blocks.1.attention.kv.bias": 4}
    for name, layer in layers.items():
        assert layer_of_parameter(f"greenmim.{name}", [2, 2, 2]) == layer
