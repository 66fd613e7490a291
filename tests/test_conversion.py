"""Checkpoints in and out: every format by way of files that the tests write themselves, and live against Swin."""

import argparse
import errno
import os
import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTImageProcessorPil,
)

from modeling_greenmim import GreenMIMConfig, GreenMIMForImageClassification, GreenMIMForPreTraining, GreenMIMModel
from modeling_greenmim.conversion import (
    CheckpointError,
    convert,
    export_model,
    import_checkpoint,
    read_checkpoint,
    released,
)
from modeling_greenmim.conversion.__main__ import main
from modeling_greenmim.conversion.checkpoint import Source
from modeling_greenmim.conversion.formats import FORMATS, WRITABLE
from modeling_greenmim.image_processing_greenmim import GreenMIMImageProcessorPil, build_image_processor
from tests.golden import FIXTURES, load_golden, normalized
from tests.oracle import random_images, randomize, tiny_config


COLUMN, ROW = "green_mim_swin_base_patch4_dec512b1", "green_mim_swin_base_patch4_dec5121b1"
TINY = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window": 4, "grid": 8, "decoder": 16}
HEADS = {"decoder_num_attention_heads": 2}


def encoder_shapes(embed_dim, depths, num_heads, window, grid, patch=4, channels=3, **_) -> dict[str, tuple]:
    """Names and shapes of Microsoft's Swin, buffers included."""
    shapes = {"patch_embed.proj.weight": (embed_dim, channels, patch, patch)}
    shapes |= {f"patch_embed.{name}": (embed_dim,) for name in ("proj.bias", "norm.weight", "norm.bias")}
    for stage, depth in enumerate(depths):
        width, side = embed_dim * 2**stage, min(window, grid // 2**stage)
        for block in range(depth):
            own = block_shapes(width)
            own["attn.relative_position_bias_table"] = ((2 * side - 1) ** 2, num_heads[stage])
            own["attn.relative_position_index"] = (side**2, side**2)
            shapes |= {f"layers.{stage}.blocks.{block}.{name}": shape for name, shape in own.items()}
        if stage + 1 < len(depths):
            for name, shape in (("norm.weight", ()), ("norm.bias", ()), ("reduction.weight", (2 * width,))):
                shapes[f"layers.{stage}.downsample.{name}"] = (*shape, 4 * width)
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def block_shapes(width: int) -> dict[str, tuple]:
    layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    shapes = {f"{name}.{kind}": (width,) for name in ("norm1", "norm2") for kind in ("weight", "bias")}
    for name, (rows, columns) in layers.items():
        shapes |= {f"{name}.weight": (rows * width, columns * width), f"{name}.bias": (rows * width,)}
    return shapes


def official_shapes(decoder, **encoder) -> dict[str, tuple]:
    """Names and shapes of an official pre-training file."""
    stages, channels, patch = len(encoder["depths"]), encoder.get("channels", 3), encoder.get("patch", 4)
    unit, width = patch * 2 ** (stages - 1), encoder["embed_dim"] * 2 ** (stages - 1)
    units = (encoder["grid"] * patch // unit) ** 2
    shapes = {f"encoder.{name}": shape for name, shape in encoder_shapes(**encoder).items()}
    shapes |= {"mask_token": (1, 1, decoder), "decoder_pos_embed": (1, units, decoder)}
    shapes |= {"decoder_embed.weight": (decoder, width), "decoder_embed.bias": (decoder,)}
    shapes |= {f"decoder_blocks.0.{name}": shape for name, shape in block_shapes(decoder).items()}
    shapes |= {"decoder_norm.weight": (decoder,), "decoder_norm.bias": (decoder,)}
    return shapes | {"decoder_pred.weight": (unit**2 * channels, decoder), "decoder_pred.bias": (unit**2 * channels,)}


def random_weights(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.zeros(shape, dtype=torch.long)
        if name.endswith("position_index")
        else 0.3 * torch.randn(shape, generator=generator) + float("norm" in name and "weight" in name)
        for name, shape in shapes.items()
    }


def write_official(path, weights, model: str = COLUMN, **changes):
    content = {"model": weights, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}}
    content |= {"epoch": 199, "scaler": {"scale": 65536.0}, "args": argparse.Namespace(model=model, mask_ratio=0.75)}
    torch.save({**content, **changes}, path)
    return path


@pytest.fixture
def official(tmp_path):
    return write_official(tmp_path / "official.pth", random_weights(official_shapes(**TINY)))


# In


@pytest.mark.parametrize(
    ("changes", "millions", "encoder_millions"),
    [
        ({}, 92.02, 86.74),
        ({"window": 14}, 92.20, 86.92),
        ({"window": 14, "embed_dim": 192, "num_heads": [6, 12, 24, 48]}, 200.80, 195.26),
    ],
)
def test_released_models_have_their_published_sizes(changes, millions, encoder_millions):
    base = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window": 7, "grid": 56}
    shapes = official_shapes(**{**base, **changes}, decoder=512)
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    model = convert(FORMATS["original"].read(Source(Path("official.pth"), weights, {"model": COLUMN})))
    # The published number counts the fixed positions of the decoder.
    assert round((sum(p.numel() for p in model.parameters()) + 49 * 512) / 1e6, 2) == millions
    assert round(sum(p.numel() for p in model.greenmim.parameters()) / 1e6, 2) == encoder_millions
    config, window = model.config, changes.get("window", 7)
    assert config.window_size == window and config.depths == [2, 2, 18, 2] and config.image_size == 224
    assert config.num_heads == changes.get("num_heads", [4, 8, 16, 32]) and config.layer_norm_eps == 1e-6
    assert (config.decoder_hidden_size, config.decoder_num_attention_heads) == (512, 16)


@pytest.mark.parametrize("name", ["swin_window7_column", "swin_window14_column"])
def test_official_file_computes_what_the_published_code_does(name, tmp_path):
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.startswith("state_dict.")]
        weights = {key.removeprefix("state_dict."): file.get_tensor(key) for key in names}
    config, _, golden = load_golden(name)
    path = write_official(tmp_path / "official.pth", weights)
    heads = config.decoder_num_attention_heads
    import_checkpoint(path, tmp_path / "model", decoder_num_attention_heads=heads)
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "model")
    assert isinstance(model, GreenMIMForPreTraining)
    mask = torch.ones(1, 49, dtype=torch.bool)
    mask[0, golden["visible_units"]] = False
    outputs = model(normalized(golden["images_uint8"]), bool_masked_pos=mask)
    assert outputs.loss.item() == pytest.approx(golden["loss_norm_pix"].item(), rel=1e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert list(processor.image_mean) == [0.485, 0.456, 0.406] and dict(processor.size) == {
        "height": 224,
        "width": 224,
    }


def test_dense_golden_is_imported(tmp_path):
    with safe_open(FIXTURES / "dense_swin_window14.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.startswith("state_dict.")]
        torch.save({"model": {key.removeprefix("state_dict."): file.get_tensor(key) for key in names}}, tmp_path / "f")
    config, _, golden = load_golden("dense_swin_window14")
    model = convert(read_checkpoint(tmp_path / "f"), layer_norm_eps=config.layer_norm_eps)
    assert isinstance(model, GreenMIMModel) and model.config.window_size == 14
    with torch.no_grad():
        features = model(normalized(golden["images_uint8"])).last_hidden_state
    assert (features - golden["features"]).abs().max() < 1e-5 * golden["features"].abs().max()


def merged(tokens: torch.Tensor, weights: dict, order: list[tuple[int, int]]) -> torch.Tensor:
    """Merging of `(height, width, channels)` tokens, in words: joins (row, column) in an order, norm, reduction."""
    joined = torch.cat([tokens[row::2, column::2] for row, column in order], dim=-1)
    scale, shift = weights["downsample.norm.weight"], weights["downsample.norm.bias"]
    return nn.functional.layer_norm(joined, scale.shape, scale, shift, 1e-6) @ weights["downsample.reduction.weight"].T


@pytest.mark.parametrize(
    ("model_name", "order"), [(ROW, [(0, 0), (0, 1), (1, 0), (1, 1)]), (COLUMN, [(0, 0), (1, 0), (0, 1), (1, 1)])]
)
def test_merging_computes_what_it_was_trained_to(model_name, order, tmp_path):
    weights = random_weights(official_shapes(**TINY))
    path = write_official(tmp_path / "official.pth", weights, model=model_name)
    model = convert(read_checkpoint(path), **HEADS).greenmim
    assert model.config.image_size == 32, "the positions of the decoder tell"
    tokens = torch.randn(8, 8, 8)
    merging = {name[len("encoder.layers.0.") :]: t for name, t in weights.items() if ".downsample." in name}
    expected = merged(tokens, merging, order)
    # Ours joins runs of four tokens, (row, column) = (0,0), (1,0), (0,1), (1,1).
    nested = tokens.view(4, 2, 4, 2, 8).permute(0, 2, 3, 1, 4).reshape(1, 64, 8)
    found = model.encoder.layers[0].downsample(nested).view(4, 4, 16)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_merging_order_must_be_known(tmp_path):
    weights = random_weights(official_shapes(**TINY))
    for changes in ({"args": None}, {"args": argparse.Namespace(model="green_mim_swin_large")}):
        path = write_official(tmp_path / "official.pth", weights, **changes)
        with pytest.raises(CheckpointError, match="--patch_merging_order"):
            convert(read_checkpoint(path), **HEADS)
        by_row = convert(read_checkpoint(path), "row", **HEADS)
        by_column = convert(read_checkpoint(path), "column", **HEADS)
        assert not torch.equal(*(m.greenmim.encoder.layers[0].downsample.norm.bias for m in (by_row, by_column)))


def test_simmim_microsoft_and_parallel_files_are_one(tmp_path):
    weights = random_weights(encoder_shapes(**TINY))
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)  # 4 windows of 16 tokens: 8x8 tokens, 32 px
    simmim = {f"encoder.{name}": tensor for name, tensor in weights.items()}
    simmim |= {"encoder.mask_token": torch.zeros(1, 1, 8), "decoder.0.weight": torch.zeros(192, 16, 1, 1)}
    simmim["decoder.0.bias"] = torch.zeros(192)
    files = {"microsoft": weights, "simmim": simmim, "parallel": {f"module.{k}": v for k, v in weights.items()}}
    images, features = random_images(1, 32, 32).float(), []
    for name, content in files.items():
        torch.save({"model": content}, tmp_path / name)
        model = convert(read_checkpoint(tmp_path / name))
        assert isinstance(model, GreenMIMModel) and model.config.image_size == 32
        assert model.config.layer_norm_eps == 1e-5
        features.append(model(images).last_hidden_state)
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])


def test_a_classifier_keeps_its_head(tmp_path):
    weights = random_weights({**encoder_shapes(**TINY), "head.weight": (5, 16), "head.bias": (5,)})
    torch.save(weights, tmp_path / "swin.pth")
    import_checkpoint(tmp_path / "swin.pth", tmp_path / "model", image_size=32)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert isinstance(model, GreenMIMForImageClassification) and model.config.num_labels == 5
    assert torch.equal(model.classifier.weight, weights["head.weight"])


@pytest.fixture
def yacs_node():
    """yacs' class of configurations, as it pickles: a dictionary with attributes of its own."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, values: dict):
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in values.items()})
            self.__dict__ |= {"__immutable__": False, "__deprecated_keys__": set(), "__renamed_keys__": {}}
            self.__dict__["__new_allowed__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    sys.modules |= {"yacs": types.ModuleType("yacs"), "yacs.config": module}
    yield CfgNode
    sys.modules.pop("yacs", None)
    sys.modules.pop("yacs.config", None)


def write_with_yacs(path, weights, node, swin=None, **more):
    """A file as `save_checkpoint` of Microsoft's Swin and of SimMIM writes it; yacs is gone when it is read."""
    config = {"BASE": [""], "DATA": {"IMG_SIZE": 32}, "TRAIN": {"OPTIMIZER": {"BETAS": (0.9, 0.999)}}}
    config["MODEL"] = {"TYPE": "swin", "DROP_PATH_RATE": 0.3, "DROP_RATE": 0.0, "SWIN": swin or {"QK_SCALE": None}}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0])
    content = {"model": weights, "optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict()}
    scaler = torch.amp.GradScaler("cpu").state_dict()
    torch.save(content | {"max_accuracy": 83.1, "scaler": scaler, "epoch": 99, "config": node(config)} | more, path)
    for name in ("yacs.config", "yacs"):
        del sys.modules[name]


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_files_of_microsofts_and_simmims_trainers_are_read(prefix, yacs_node, tmp_path):
    weights = random_weights(encoder_shapes(**TINY))
    write_with_yacs(tmp_path / "a.pth", {f"{prefix}{k}": v for k, v in weights.items()}, yacs_node)
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.format == ("simmim" if prefix else "microsoft-swin")
    model = convert(checkpoint)
    assert (model.config.image_size, model.config.drop_path_rate, model.config.window_size) == (32, 0.3, 4)
    torch.save({"model": weights}, tmp_path / "bare.pth")
    images = random_images(1, 32, 32).float()
    expected = convert(read_checkpoint(tmp_path / "bare.pth"), image_size=32)(images).last_hidden_state
    assert torch.equal(model(images).last_hidden_state, expected)


def test_beside_a_yacs_configuration_other_classes_are_refused(yacs_node, tmp_path):
    weights = random_weights(encoder_shapes(**TINY))
    write_with_yacs(tmp_path / "a.pth", weights, yacs_node, scaler=Trap(tmp_path / "trapped"))
    with pytest.raises(CheckpointError, match=r"wants (posix|nt)\.system.*nothing of it was executed"):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "trapped").exists()


def test_strange_configurations_have_clear_errors(yacs_node, tmp_path):
    node = yacs_node({"DATA": "not a node"})
    node.__dict__["get"] = "what dictionaries have is not taken from the file"
    write_with_yacs(tmp_path / "a.pth", random_weights(encoder_shapes(**TINY)), yacs_node, config=node)
    with pytest.raises(CheckpointError, match=r"a\.pth' cannot be read"):
        read_checkpoint(tmp_path / "a.pth")


def test_attention_of_another_scale_is_refused(yacs_node, tmp_path):
    write_with_yacs(tmp_path / "a.pth", random_weights(encoder_shapes(**TINY)), yacs_node, swin={"QK_SCALE": 0.5})
    with pytest.raises(CheckpointError, match=r"QK_SCALE 0\.5"):
        read_checkpoint(tmp_path / "a.pth")


# What no weight tells


def test_assumed_values_are_said(tmp_path, caplog):
    shapes = official_shapes(**{**TINY, "decoder": 64})
    path = write_official(tmp_path / "official.pth", random_weights(shapes))
    convert(read_checkpoint(path))
    (record,) = caplog.records
    assert record.getMessage() == (
        "The checkpoint does not tell these values, so they were assumed: --decoder_num_attention_heads 2"
    )
    caplog.clear()
    assert convert(read_checkpoint(path), decoder_num_attention_heads=4).config.decoder_num_attention_heads == 4
    assert not caplog.records, "nothing is assumed"
    save_model(GreenMIMModel, tmp_path / "twins", backbone_type="twins")
    export_model(str(tmp_path / "twins"), "twins", str(tmp_path / "twins.pth"))
    convert(read_checkpoint(tmp_path / "twins.pth"))
    assert caplog.text.count("assumed: --num_heads 1 1 --window_size 7 --image_size 224") == 1


def test_official_files_tell_their_target(tmp_path):
    args = argparse.Namespace(model=COLUMN, mask_ratio=0.6, norm_pix_loss=False, input_size=32)
    path = write_official(tmp_path / "official.pth", random_weights(official_shapes(**TINY)), args=args)
    config = convert(read_checkpoint(path), **HEADS).config
    assert (config.mask_ratio, config.norm_pix_loss, config.image_size) == (0.6, False, 32)


# Twins, against a dense forward by its own names


def dense_twins(weights, images, num_heads, window, residual, outer_epsilon, channels_last) -> torch.Tensor:
    """Last tokens `(1, height * width, channels)` of a Twins without mask.

    `outer_epsilon` is that of patch embedding, merging and keys; blocks and the last norm have 1e-6.
    """

    def norm(x, name, epsilon=1e-6):
        return nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)

    def linear(x, name):
        return nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def strided(x, name, last=channels_last):
        kernel = weights[f"{name}.weight"].permute(0, 3, 1, 2) if last else weights[f"{name}.weight"]
        x = nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel, weights[f"{name}.bias"], stride=kernel.shape[-1])
        return x.permute(0, 2, 3, 1)

    def attend(query, key, value, heads):  # (..., tokens, channels)
        parts = [x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (query, key, value)]
        return nn.functional.scaled_dot_product_attention(*parts).transpose(-3, -2).flatten(-2)

    x = images.permute(0, 2, 3, 1)
    for stage, heads in enumerate(num_heads):
        x = strided(x, f"patch_embeds.{stage}.proj", channels_last and stage > 0)
        x = norm(x, f"patch_embeds.{stage}.norm", outer_epsilon)
        rows, columns = x.shape[1] // window, x.shape[2] // window
        for block in range(2):
            name = f"blocks.{stage}.{block}"
            y = norm(x, f"{name}.norm1")
            if block == 0:
                y = y.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3).flatten(3, 4)
                y = attend(*linear(y, f"{name}.attn.qkv").chunk(3, dim=-1), heads)
                y = y.unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
            else:
                keys = y
                if f"{name}.attn.sr.weight" in weights:
                    keys = norm(strided(y, f"{name}.attn.sr"), f"{name}.attn.norm", outer_epsilon)
                keys = linear(keys.flatten(1, 2), f"{name}.attn.kv").chunk(2, dim=-1)
                y = attend(linear(y.flatten(1, 2), f"{name}.attn.q"), *keys, heads)
            x = x + linear(y, f"{name}.attn.proj").view_as(x)
            y = nn.functional.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + linear(y, f"{name}.mlp.fc2")
            if block == 0:
                name = f"pos_block.{stage}.proj.0"
                kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
                encoded = nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel, bias, padding=1, groups=x.shape[3])
                x = encoded.permute(0, 2, 3, 1) + (x if residual else 0)
    return norm(x, "norm").flatten(1, 2)


TWINS = {"backbone_type": "twins", "num_heads": [1, 2], "window_size": 4, "layer_norm_eps": 1e-6}
OFFICIAL_TWINS = {"num_heads": [1, 2], "window": 4, "residual": False, "outer_epsilon": 1e-6, "channels_last": True}


def assert_features(found: torch.Tensor, expected: torch.Tensor):
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def read_exported(path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@torch.no_grad()
def test_official_twins_computes_without_residual(tmp_path):
    ours = save_model(GreenMIMForPreTraining, tmp_path / "model", **TWINS)
    images = random_images(1, 32, 32).float()
    assert export_model(str(tmp_path / "model"), "original", str(tmp_path / "a.pth")) == 0
    content = read_exported(tmp_path / "a.pth")
    encoder = {k.removeprefix("encoder."): v for k, v in content["model"].items()}
    expected = ours.greenmim(images).last_hidden_state
    assert_features(dense_twins(encoder, images, **OFFICIAL_TWINS), expected)
    # In again; a file as official GreenMIM writes it, whose arguments tell nothing of this; and its bare encoder.
    told = {name: TWINS[name] for name in ("num_heads", "window_size")} | {"image_size": 32}
    official = content | {"args": argparse.Namespace(model="green_mim_twins_large_patch4_dec512b1")}
    bare = {name: tensor for name, tensor in encoder.items() if name != "mask_token" and "decoder_" not in name}
    for changed in (content, official, {"model": bare}):
        torch.save(changed, tmp_path / "b.pth")
        checkpoint = read_checkpoint(tmp_path / "b.pth")
        assert checkpoint.format == "original"
        back = convert(checkpoint, decoder_num_attention_heads=ours.config.decoder_num_attention_heads, **told)
        assert_features(getattr(back, "greenmim", back)(images).last_hidden_state, expected)


def test_half_precision_keeps_the_position_encoding(tmp_path):
    """Beside a 1 a small weight has fewer digits."""
    ours = save_model(GreenMIMForPreTraining, tmp_path / "model", **TWINS).bfloat16()
    ours.save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), "original", str(tmp_path / "a.pth"))
    back = convert(read_checkpoint(tmp_path / "a.pth")).state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(back[name], tensor.float(), atol=3e-7, rtol=0)


def test_exports_of_the_first_release_are_read_as_they_were_written(tmp_path):
    """They had the residual of the position encoding, and did not say so."""
    ours = save_model(GreenMIMForPreTraining, tmp_path / "model", **TWINS)
    export_model(str(tmp_path / "model"), "original", str(tmp_path / "a.pth"))
    content = read_exported(tmp_path / "a.pth")
    del content["args"].position_encoding_residual
    for stage, layer in enumerate(ours.greenmim.encoder.layers):
        content["model"][f"encoder.pos_block.{stage}.proj.0.weight"] = layer.position_encoding.conv.weight.detach()
    torch.save(content, tmp_path / "a.pth")
    back = convert(read_checkpoint(tmp_path / "a.pth")).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("target", ["timm", "twins"])
def test_difference_of_a_twins_is_that_of_timms_own_epsilons(target, tmp_path):
    """timm makes the norms of patch embedding, merging and keys with 1e-5, the others with 1e-6."""
    model = save_model(GreenMIMModel, tmp_path / "model", **TWINS)
    model.embeddings.patch_embeddings.projection.weight *= 1e-3  # so that an epsilon counts
    model.embeddings.patch_embeddings.projection.bias *= 1e-3
    model.save_pretrained(tmp_path / "model")
    found = export_model(str(tmp_path / "model"), target, str(tmp_path / "t.safetensors"))
    weights = load_file(tmp_path / "t.safetensors")
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {**OFFICIAL_TWINS, "residual": True, "outer_epsilon": 1e-5, "channels_last": False}
    expected = model(images).last_hidden_state
    difference = (dense_twins(weights, images, **options) - expected).abs().max() / expected.abs().max()
    assert found == pytest.approx(difference.item(), rel=1e-2) and found > 1e-4
    options["outer_epsilon"] = 1e-6
    assert_features(dense_twins(weights, images, **options), expected)


# Against Transformers' Swin


def swin_of(kind, **changes):
    values = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "image_size": 32, "window_size": 4}
    torch.manual_seed(0)
    model = kind(SwinConfig(**{**values, **changes})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", [SwinModel, SwinForImageClassification, SwinForMaskedImageModeling])
def test_folders_of_transformers_are_imported(kind, tmp_path):
    theirs = swin_of(kind, id2label={0: "cat", 1: "dog"}, encoder_stride=8)
    theirs.save_pretrained(tmp_path / "swin")
    import_checkpoint(tmp_path / "swin", tmp_path / "model")
    ours = AutoModel.from_pretrained(tmp_path / "model").eval()
    images = random_images(2, 32, 32).float()
    with torch.no_grad():
        expected = getattr(theirs, "swin", theirs)(images).last_hidden_state
        torch.testing.assert_close(ours(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        if kind is SwinForImageClassification:
            ours = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
            assert ours.config.id2label == {0: "cat", 1: "dog"}
            torch.testing.assert_close(ours(images).logits, theirs(images).logits, atol=1e-5, rtol=1e-5)


def save_model(kind, folder, **changes):
    values = {"image_size": 32, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "layer_norm_eps": 1e-5}
    model = randomize(kind(tiny_config(**{**values, **changes}))).float().eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", [GreenMIMModel, GreenMIMForImageClassification, GreenMIMForPreTraining])
def test_export_to_transformers_swin(kind, tmp_path):
    ours = save_model(kind, tmp_path / "model", id2label={0: "good", 1: "bad"})
    assert export_model(str(tmp_path / "model"), "transformers-swin", str(tmp_path / "swin")) < 1e-5
    theirs = AutoModel.from_pretrained(tmp_path / "swin").eval()
    images = random_images(2, 32, 32).float()
    with torch.no_grad():
        found = theirs(images).last_hidden_state
        torch.testing.assert_close(
            found, getattr(ours, "greenmim", ours)(images).last_hidden_state, atol=1e-5, rtol=1e-5
        )
        if kind is GreenMIMForImageClassification:
            theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "swin").eval()
            assert isinstance(theirs, SwinForImageClassification) and theirs.config.id2label == {0: "good", 1: "bad"}
            torch.testing.assert_close(theirs(images).logits, ours(images).logits, atol=1e-5, rtol=1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "swin").resample == 3
    assert not list((tmp_path / "swin").glob("*.py")), "needs no code of ours"


def test_export_keeps_the_image_processor(tmp_path):
    model = save_model(GreenMIMForImageClassification, tmp_path / "model")
    processor = build_image_processor(model.config)
    processor.image_mean, processor.do_center_crop = [0.1, 0.2, 0.3], True
    processor.size, processor.crop_size = {"shortest_edge": 36}, {"height": 32, "width": 32}
    processor.save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), "transformers-swin", str(tmp_path / "swin"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "swin")
    assert type(theirs) is ViTImageProcessorPil
    assert np.array_equal(theirs(image)["pixel_values"], processor(image)["pixel_values"])


def test_difference_by_epsilon_is_measured(tmp_path):
    save_model(GreenMIMModel, tmp_path / "model", layer_norm_eps=1e-2)
    found = export_model(str(tmp_path / "model"), "transformers-swin", str(tmp_path / "swin"))
    ours = AutoModel.from_pretrained(tmp_path / "model").eval()
    theirs = AutoModel.from_pretrained(tmp_path / "swin").eval()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(images).last_hidden_state
        error = (expected - theirs(images).last_hidden_state).abs().max() / expected.abs().max()
    assert found == pytest.approx(error.item(), rel=1e-3) and found > 1e-4


def test_what_transformers_swin_cannot_express_is_refused(tmp_path):
    save_model(GreenMIMModel, tmp_path / "model", window_size=8)
    with pytest.raises(CheckpointError, match=r"window_size` 8 .* windows \[8, 4\].*microsoft-swin or timm"):
        export_model(str(tmp_path / "model"), "transformers-swin", str(tmp_path / "swin"))
    assert not (tmp_path / "swin").exists()


# Out and in again


@pytest.mark.parametrize(
    ("target", "file", "kind"),
    [
        ("original", "a.pth", GreenMIMForPreTraining),
        ("microsoft-swin", "a.pth", GreenMIMForImageClassification),
        ("timm", "a.safetensors", GreenMIMForImageClassification),
        ("timm", "a.pth", GreenMIMModel),
        ("transformers-swin", "folder", GreenMIMForImageClassification),
    ],
)
def test_round_trips(target, file, kind, tmp_path):
    ours = save_model(kind, tmp_path / "model", decoder_num_attention_heads=1, decoder_hidden_size=32)
    export_model(str(tmp_path / "model"), target, str(tmp_path / file))
    back = convert(read_checkpoint(tmp_path / file), image_size=32, layer_norm_eps=1e-5)
    assert type(back) is kind
    expected, found = ours.state_dict(), back.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_exported_names_are_those_of_the_formats(tmp_path):
    save_model(GreenMIMForPreTraining, tmp_path / "pretrained", window_size=4)
    save_model(GreenMIMForImageClassification, tmp_path / "classifier")
    config = AutoModel.from_pretrained(tmp_path / "pretrained").config
    sizes = {"embed_dim": config.embed_dim, "depths": config.depths, "num_heads": config.num_heads, "window": 4}
    official = official_shapes(**sizes, grid=8, decoder=config.decoder_hidden_size)
    if config.decoder_num_hidden_layers == 1:
        export_model(str(tmp_path / "pretrained"), "original", str(tmp_path / "o.pth"))
        content = torch.load(tmp_path / "o.pth", weights_only=False)
        ratio = {name: shape for name, shape in shapes_of(content["model"]).items() if ".mlp." not in name}
        assert ratio == {name: shape for name, shape in official.items() if ".mlp." not in name}
        assert content["args"].model.endswith("dec512b1")
    export_model(str(tmp_path / "classifier"), "microsoft-swin", str(tmp_path / "m.pth"))
    microsoft = torch.load(tmp_path / "m.pth")["model"]
    heads = {"head.weight": (2, config.hidden_size), "head.bias": (2,)}
    assert set(microsoft) == set(encoder_shapes(**sizes, grid=8)) | set(heads)
    index = SwinModel(SwinConfig(window_size=4, image_size=32, depths=[1, 1], num_heads=[1, 1], embed_dim=8))
    expected = index.encoder.layers[0].blocks[0].attention.relative_position_bias.relative_position_index
    assert torch.equal(microsoft["layers.0.blocks.0.attn.relative_position_index"].flatten(), expected.flatten())
    export_model(str(tmp_path / "classifier"), "timm", str(tmp_path / "t.safetensors"))
    timm = load_file(tmp_path / "t.safetensors")
    assert "layers.1.downsample.reduction.weight" in timm and "head.fc.weight" in timm
    assert not any(name.startswith("layers.0.downsample.") for name in timm)


def shapes_of(weights) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


# Bad input


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_other_classes_are_refused_and_not_executed(tmp_path):
    weights = random_weights(official_shapes(**TINY))
    path = write_official(tmp_path / "official.pth", weights, scaler=Trap(tmp_path / "trapped"))
    with pytest.raises(CheckpointError, match=r"wants (posix|nt)\.system.*nothing of it was executed"):
        read_checkpoint(path)
    assert not (tmp_path / "trapped").exists()


def test_damaged_files_are_refused(official, tmp_path):
    content = official.read_bytes()
    files = {"half.pth": content[: len(content) // 2], "empty.pth": b"", "text.pth": b"no weights"}
    files |= {"zip.pth": content[:4] + bytes(300), "a.safetensors": content[:100]}
    for name, damaged in files.items():
        path, writer = tmp_path / name, "safetensors" if name.endswith(".safetensors") else r"torch\.save"
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"^`checkpoint` '{path}' is .*damaged or no file of {writer}.$"):
            read_checkpoint(path)
    with pytest.raises(CheckpointError, match="there is no file"):
        read_checkpoint(tmp_path / "nowhere.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(tmp_path / "other.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"is no Swin.*conv1\.weight"):
        read_checkpoint(tmp_path / "resnet.pth")
    torch.save({"encoder.patch_embeds.0.proj.weight": torch.zeros(3)}, tmp_path / "twins.pth")
    with pytest.raises(CheckpointError, match=r"is no Swin or Twins.*four dimensions"):
        read_checkpoint(tmp_path / "twins.pth")


def test_a_file_that_may_not_be_opened_says_so(official, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(official))

    monkeypatch.setattr(torch, "load", refuse)  # permissions do not keep the administrator out
    with pytest.raises(CheckpointError, match=r"^`checkpoint` '.*' cannot be opened: Permission denied\.$"):
        read_checkpoint(official)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    weights = random_weights(official_shapes(**TINY))
    del weights["encoder.layers.1.blocks.0.mlp.fc2.bias"]
    weights["encoder.absolute_pos_embed"] = torch.zeros(3)
    weights["decoder_norm.weight"] = torch.zeros(17)
    path = write_official(tmp_path / "official.pth", weights)
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(path, tmp_path / "model", **HEADS)
    text = str(error.value)
    assert "greenmim.encoder.layers.1.blocks.0.mlp.fc2.bias is missing" in text
    assert "absolute_pos_embed is unknown" in text
    assert "decoder.decoder_norm.weight has shape (17,) instead of (16,)" in text
    assert not (tmp_path / "model").exists()


def test_windows_that_do_not_fit_the_image_size(tmp_path):
    weights = random_weights(encoder_shapes(**{**TINY, "window": 8}))
    torch.save(weights, tmp_path / "swin.pth")  # windows 8 and 4: an image of 32 px
    with pytest.raises(CheckpointError, match=r"windows .* \[8, 4\].* 224 have \[8, 8\].*--image_size 32\."):
        convert(read_checkpoint(tmp_path / "swin.pth"))
    assert convert(read_checkpoint(tmp_path / "swin.pth"), image_size=32).config.window_size == 8


def test_windows_of_their_own_in_each_stage_cannot_be_expressed(tmp_path):
    """As timm's swin_s3_tiny: windows 7, 7, 14 and 7."""
    weights = random_weights(encoder_shapes(**TINY))
    weights["layers.1.blocks.0.attn.relative_position_bias_table"] = torch.zeros(15**2, 2)
    torch.save(weights, tmp_path / "swin.pth")
    for image_size in (32, 64):
        with pytest.raises(CheckpointError, match=r"windows .* \[4, 8\].*one window for all stages") as error:
            convert(read_checkpoint(tmp_path / "swin.pth"), image_size=image_size)
        assert "--image_size" not in str(error.value)


def test_foreign_folders_are_refused(tmp_path):
    save_model(GreenMIMModel, tmp_path / "model")
    with pytest.raises(CheckpointError, match="model type 'greenmim'"):
        read_checkpoint(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        read_checkpoint(tmp_path / "empty")
    swin_of(SwinModel).save_pretrained(tmp_path / "swin")
    with pytest.raises(CheckpointError, match="model type 'swin'; a GreenMIM is needed"):
        export_model(str(tmp_path / "swin"), "timm", str(tmp_path / "out.pth"))
    swin_of(SwinModel, use_absolute_embeddings=True).save_pretrained(tmp_path / "absolute")
    with pytest.raises(CheckpointError, match="absolute position embeddings"):
        read_checkpoint(tmp_path / "absolute")
    save_model(GreenMIMForImageClassification, tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="without decoder"):
        export_model(str(tmp_path / "classifier"), "original", str(tmp_path / "out.pth"))


def test_an_encoder_alone_has_the_order_that_its_name_tells(tmp_path):
    weights = random_weights(official_shapes(**TINY))
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    path = write_official(tmp_path / "encoder.pth", encoder, model=ROW)
    found = convert(read_checkpoint(path), image_size=32)
    by_row = convert(read_checkpoint(path), "row", image_size=32)
    assert isinstance(found, GreenMIMModel) and found.config.layer_norm_eps == 1e-6
    assert torch.equal(*(model.encoder.layers[0].downsample.norm.bias for model in (found, by_row)))


def test_original_layout_tells_what_no_weight_does(tmp_path):
    changes = {"image_size": [32, 64], "decoder_hidden_size": 64, "decoder_num_attention_heads": 8}
    ours = save_model(GreenMIMForPreTraining, tmp_path / "model", layer_norm_eps=1e-2, **changes)
    assert export_model(str(tmp_path / "model"), "original", str(tmp_path / "a.pth")) > 1e-4
    back = convert(read_checkpoint(tmp_path / "a.pth"))
    names = ("image_size", "decoder_num_attention_heads", "layer_norm_eps")
    assert [getattr(back.config, name) for name in names] == [getattr(ours.config, name) for name in names]


def test_import_keeps_processor_and_problem_type(tmp_path):
    swin_of(SwinForImageClassification, problem_type="multi_label_classification").save_pretrained(tmp_path / "swin")
    given = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    given.save_pretrained(tmp_path / "swin")
    import_checkpoint(tmp_path / "swin", tmp_path / "model")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.problem_type == "multi_label_classification"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert type(processor) is GreenMIMImageProcessorPil and list(processor.image_mean) == [0.5] * 3


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_do_not_fit_their_folder_are_refused(tmp_path):
    save_model(GreenMIMModel, tmp_path / "model")
    change_weights(tmp_path / "model", lambda weights: weights.pop("encoder.layers.0.blocks.0.mlp.fc1.weight"))
    with pytest.raises(CheckpointError, match=r"missing_keys encoder\.layers\.0\.blocks\.0\.mlp\.fc1\.weight"):
        export_model(str(tmp_path / "model"), "timm", str(tmp_path / "t.pth"))
    swin_of(SwinModel).save_pretrained(tmp_path / "swin")
    change_weights(tmp_path / "swin", lambda weights: weights.update({"encoder.more": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected_keys .*more"):
        read_checkpoint(tmp_path / "swin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("mask_token"), r"part of a decoder: \['mask_token'\]"),
        (lambda w: w.pop("decoder_pred.weight"), r"part of a decoder: \['decoder_pred\.weight'\]"),
        (lambda w: w.update({"decoder_pos_embed": torch.zeros(3)}), "`decoder_pos_embed` has shape"),
        (lambda w: w.update({"encoder.patch_embed.proj.weight": torch.zeros(())}), "is no Swin"),
        (lambda w: w.update({"encoder.layers.0.downsample.norm.weight": torch.zeros(7)}), r"shape \(7,\) instead"),
        (lambda w: w.update({"encoder.norm.weight": torch.zeros(16, dtype=torch.long)}), "no floating-point numbers"),
        (lambda w: w.update({1: torch.zeros(3)}), "holds no weights"),
    ],
)
def test_broken_official_files_have_clear_errors(change, message, tmp_path):
    weights = random_weights(official_shapes(**TINY))
    change(weights)
    path = write_official(tmp_path / "official.pth", weights, model=ROW)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(path, tmp_path / "model", **HEADS)


def test_impossible_values_and_outputs_have_clear_errors(official, tmp_path):
    for name, value in (("image_size", 33), ("decoder_num_attention_heads", 3)):
        with pytest.raises(CheckpointError, match=rf"impossible: `{name}` is {value}, but .*\.$"):
            import_checkpoint(official, tmp_path / "model", **{name: value})
    with pytest.raises(CheckpointError, match="a file; a folder is needed"):
        import_checkpoint(official, official, **HEADS)
    save_model(GreenMIMModel, tmp_path / "model")
    with pytest.raises(CheckpointError, match="timm needs a file"):
        export_model(str(tmp_path / "model"), "timm", str(tmp_path))
    with pytest.raises(CheckpointError, match="transformers-swin needs a folder"):
        export_model(str(tmp_path / "model"), "transformers-swin", str(official))
    with pytest.raises(CheckpointError, match="`model` '/nowhere'"):
        export_model("/nowhere", "timm", str(tmp_path / "t.pth"))
    (tmp_path / "swin").mkdir()
    (tmp_path / "swin" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="swin"):
        read_checkpoint(tmp_path / "swin")


@pytest.mark.parametrize("other", ["training_args.bin", "notes.txt", "config.json"])
def test_a_folder_of_something_else_is_not_imported_into(official, tmp_path, other):
    (tmp_path / "model" / ".git").mkdir(parents=True)
    for _ in range(2):  # an import may be repeated
        import_checkpoint(official, tmp_path / "model", **HEADS)
    before = {path: path.read_bytes() for path in (tmp_path / "model").glob("*.*") if path.is_file()}
    before[tmp_path / "model" / other] = b'{"model_type": "swin"}'
    (tmp_path / "model" / other).write_bytes(before[tmp_path / "model" / other])
    with pytest.raises(CheckpointError, match=rf"`output` is .*something else than an earlier import: .*{other}"):
        import_checkpoint(official, tmp_path / "model", **HEADS)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_command_line(official, tmp_path, capsys):
    folder = str(tmp_path / "model")
    main(["import", "--checkpoint", str(official), "--output", folder, "--decoder_num_attention_heads", "2"])
    assert "GreenMIMForPreTraining of" in capsys.readouterr().out
    main(["export", "--model", folder, "--to", "timm", "--output", str(tmp_path / "timm.safetensors")])
    assert "relative difference" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["import", "--checkpoint", str(tmp_path / "nowhere.pth"), "--output", folder])
    printed = capsys.readouterr()
    assert end.value.code == 2 and not printed.out
    assert re.fullmatch(r"error: .*nowhere.*\n", printed.err)


def test_commands_of_the_page_run(tmp_path, monkeypatch):
    """In a folder with what the page names, and an official file that was fetched before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.txt").write_text("wall\nfloor\n")
    GreenMIMModel(GreenMIMConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4)).save_pretrained("outputs/photos")
    monkeypatch.setattr(released, "HF_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "greenmim").mkdir(parents=True)
    write_official(tmp_path / "home" / "greenmim" / "swin-base.pth", random_weights(official_shapes(**TINY)))
    torch.save(random_weights(encoder_shapes(**TINY)), "swin.pth")
    write_official(tmp_path / "greenmim.pth", random_weights(official_shapes(**TINY)), args=None)
    page = (FIXTURES.parents[1] / "docs" / "conversion.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[:3] == ["python", "-m", "modeling_greenmim.conversion"]
            main(words[3:])
    assert {"swin-greenmim", "swin.safetensors", "greenmim-swin"} <= set(os.listdir())
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, {})
    formats = page.partition("## Heads for dense tasks")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|.* \| ([^|]+) \|$", formats, flags=re.MULTILINE)
    assert {name: not export.startswith("no") for name, export in rows} == {name: name in WRITABLE for name in FORMATS}


def test_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "modeling_greenmim.conversion.__main__")
    monkeypatch.setattr(sys, "argv", ["conversion", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("modeling_greenmim.conversion", run_name="__main__")
    printed = capsys.readouterr()
    assert "import" in printed.out and "export" in printed.out and not printed.err
