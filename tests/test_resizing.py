"""Loading at other sizes and windows. The oracle interpolates in NumPy, straight from the cubic kernel."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from configuration_greenmim import GreenMIMConfig
from modeling_greenmim import (
    GreenMIMBackbone,
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMModel,
)
from modeling_greenmim.resizing import resize_bias_table
from tests.oracle import assert_close, random_images, randomize, tiny_config


MODELS = [GreenMIMModel, GreenMIMForPreTraining, GreenMIMForImageClassification, GreenMIMBackbone]
TABLE = "relative_position_bias_table"


# The oracle


def kernel(distance: float) -> float:
    """Keys' cubic convolution kernel with a = -0.75."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def weights(old: int, new: int) -> np.ndarray:
    """Share of each of `old` points in each of `new` ones: pixels' centres aligned, the border repeated."""
    matrix = np.zeros((new, old))
    for target in range(new):
        source = (target + 0.5) * old / new - 0.5
        for point in range(math.floor(source) - 1, math.floor(source) + 3):
            matrix[target, min(max(point, 0), old - 1)] += kernel(source - point)
    return matrix


def resized(table: torch.Tensor, new: int) -> torch.Tensor:
    """A table for windows of `new` tokens a side, in double precision."""
    old_side, new_side = round(math.sqrt(len(table))), 2 * new - 1
    matrix = weights(old_side, new_side)
    maps = table.double().numpy().reshape(old_side, old_side, -1)
    return torch.from_numpy(np.einsum("ra,cb,abh->rch", matrix, matrix, maps).reshape(new_side**2, -1))


# Checkpoints and what is expected of a loaded model


def pretrained(**changes) -> GreenMIMForPreTraining:
    """Stages of 24x24, 12x12 and 6x6 tokens with windows 5, 5 and 5."""
    return randomize(GreenMIMForPreTraining(tiny_config(**changes))).float().eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a pre-training checkpoint, and its state."""
    folder = tmp_path_factory.mktemp("pretrained")
    model = pretrained()
    model.save_pretrained(folder)
    return folder, model.state_dict()


def encoder_state(state: dict) -> dict:
    """The encoder's weights, named as in GreenMIMModel."""
    if any(name.startswith("greenmim.") for name in state):
        state = {name: value for name, value in state.items() if name.startswith("greenmim.")}
    return {name.removeprefix("greenmim."): value for name, value in state.items()}


def assert_encoder(model: torch.nn.Module, source: dict, windows: tuple[int, ...], dtype=torch.float32) -> None:
    """The encoder has the source's weights to the bit, but tables of other windows as the oracle resizes them."""
    state, source = encoder_state(model.state_dict()), encoder_state(source)
    assert state.keys() == source.keys()
    for name, value in state.items():
        assert value.dtype == dtype and value.is_contiguous(), name
        if not name.endswith(TABLE):
            assert torch.equal(value, source[name].to(dtype)), name
            continue
        window = windows[int(name.split(".")[2])]
        assert len(value) == (2 * window - 1) ** 2, name
        if value.shape == source[name].shape:
            assert torch.equal(value, source[name].to(dtype)), name
        else:
            steps = 1 if dtype.itemsize == 2 else 20  # half precision is computed in single and rounded once
            assert_close(value.double(), resized(source[name].to(dtype), window), steps * torch.finfo(dtype).eps)


def lines(caplog) -> list[str]:
    """What was logged about resizing."""
    return [record.getMessage() for record in caplog.records if record.name == "modeling_greenmim.resizing"]


def outputs_of(model: torch.nn.Module, side: int) -> list[torch.Tensor]:
    """Tensors that the model gives for an image of its size."""
    inputs = {"noise": torch.linspace(0, 1, (side // 16) ** 2)[None]} if type(model) in MODELS[:2] else {}
    with torch.no_grad():
        outputs = model(random_images(1, side, side, dtype=model.dtype), **inputs)
    return list(outputs.feature_maps if "feature_maps" in outputs else outputs.to_tuple())


# Interpolation


@pytest.mark.parametrize(("old", "new"), [(7, 12), (7, 14), (14, 7), (6, 7), (3, 2), (2, 1), (1, 4), (5, 5)])
def test_a_resized_table_is_the_bicubic_one(old, new):
    table = torch.randn((2 * old - 1) ** 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = resize_bias_table(table, new)
    assert actual.shape == ((2 * new - 1) ** 2, 3) and actual.is_contiguous()
    torch.testing.assert_close(actual, resized(table, new), atol=1e-12, rtol=0)
    middle, old_middle = (len(actual) - 1) // 2, (len(table) - 1) // 2
    torch.testing.assert_close(actual[middle], table[old_middle], atol=1e-12, rtol=0)  # a token's bias to itself


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    table = torch.randn(169, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    actual = resize_bias_table(table, 12)
    assert actual.dtype == dtype
    assert torch.equal(actual, resize_bias_table(table.float(), 12).to(dtype))


@pytest.mark.parametrize("shape", [(168, 2), (64, 2), (0, 2), (169,), (13, 13, 2)])
def test_a_table_of_no_window_is_refused(shape):
    with pytest.raises(ValueError, match="`table` has shape") as error:
        resize_bias_table(torch.zeros(shape), 7)
    assert str(shape) in str(error.value)


# Loading at another size


@pytest.mark.parametrize("by", ["arguments", "config"])
@pytest.mark.parametrize("model_class", MODELS)
def test_each_class_loads_with_another_size_and_window(model_class, by, checkpoint, caplog):
    folder, state = checkpoint
    changes = {"image_size": 128, "window_size": 12}  # stages of 32, 16 and 8 tokens a side
    arguments = changes if by == "arguments" else {"config": GreenMIMConfig.from_pretrained(folder, **changes)}
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **arguments)
    assert lines(caplog) == [
        f"{folder}: position bias tables were interpolated (bicubic) to the windows of this model:"
        " stage1 5 -> 12, stage2 5 -> 12, stage3 5 -> 8."
    ]
    assert not info["mismatched_keys"] and not any("encoder" in name for name in info["missing_keys"])
    assert_encoder(model, state, (12, 12, 8))
    assert model.config.window_size == 12 and model.config.image_size == 128 and not model.training
    assert all(output.isfinite().all() for output in outputs_of(model, 128))


@pytest.mark.parametrize(
    ("image_size", "windows", "changes"),
    [
        (64, (5, 5, 4), "stage3 5 -> 4."),  # the last stage has 4x4 tokens
        ([96, 32], (5, 4, 2), "stage2 5 -> 4, stage3 5 -> 2."),
    ],
)
def test_the_image_size_alone_can_change_windows(image_size, windows, changes, checkpoint, caplog):
    folder, state = checkpoint
    model = GreenMIMForImageClassification.from_pretrained(folder, image_size=image_size)
    assert_encoder(model, state, windows)
    (line,) = lines(caplog)
    assert line.endswith(f"to the windows of this model: {changes}")


@pytest.mark.parametrize("changes", [{}, {"image_size": 192}, {"image_size": 80}])
def test_nothing_is_resized_where_windows_agree(changes, checkpoint, caplog):
    folder, state = checkpoint
    model = GreenMIMModel.from_pretrained(folder, **changes)
    assert_encoder(model, state, (5, 5, 5))
    assert not lines(caplog)


@pytest.mark.parametrize("source_class", MODELS)
@pytest.mark.parametrize("model_class", MODELS)
def test_names_with_and_without_the_prefix(source_class, model_class, tmp_path, caplog):
    source = randomize(source_class(tiny_config())).float()
    source.save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, window_size=3, output_loading_info=True)
    assert_encoder(model, source.state_dict(), (3, 3, 3))
    assert not info["mismatched_keys"] and len(lines(caplog)) == 1


@pytest.mark.parametrize("source", ["shards", "pickle", "subfolder", "variant", "state_dict", "renamed"])
def test_every_source_of_weights(source, tmp_path, caplog):
    model = pretrained()
    arguments = {"window_size": 4}
    folder = tmp_path
    if source == "shards":
        model.save_pretrained(tmp_path, max_shard_size="8KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    elif source == "pickle":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    elif source == "subfolder":
        model.save_pretrained(tmp_path / "deeper")
        arguments["subfolder"] = "deeper"
    elif source == "variant":
        model.save_pretrained(tmp_path, variant="ema")
        arguments["variant"] = "ema"
    elif source == "state_dict":
        folder, arguments = None, {"config": tiny_config(window_size=4), "state_dict": model.state_dict()}
    else:
        model.config.save_pretrained(tmp_path)
        renamed = {name.replace("greenmim.", "backbone."): value for name, value in model.state_dict().items()}
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        arguments["key_mapping"] = {r"^backbone\.": "greenmim."}
    loaded = GreenMIMForPreTraining.from_pretrained(folder, **arguments)
    assert_encoder(loaded, model.state_dict(), (4, 4, 4))
    assert torch.equal(loaded.decoder.mask_token, model.decoder.mask_token)
    (line,) = lines(caplog)
    assert line.startswith("state_dict: " if source == "state_dict" else f"{tmp_path}: ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision(dtype, checkpoint, caplog):
    folder, state = checkpoint
    model = GreenMIMModel.from_pretrained(folder, window_size=12, dtype=dtype)
    assert_encoder(model, state, (12, 12, 6), dtype)
    assert len(lines(caplog)) == 1


def test_offloading_to_disk(checkpoint, tmp_path):
    folder, _ = checkpoint
    expected = GreenMIMModel.from_pretrained(folder, window_size=12)
    devices = dict.fromkeys(("embeddings", "encoder.layers.0", "encoder.layers.2", "layernorm"), "cpu")
    devices["encoder.layers.1"] = "disk"
    model = GreenMIMModel.from_pretrained(folder, window_size=12, device_map=devices, offload_folder=tmp_path)
    assert getattr(model.encoder.layers[1].blocks[0].attention, TABLE).is_meta
    for actual, wanted in zip(outputs_of(model, 96), outputs_of(expected, 96)):
        assert torch.equal(actual, wanted)


def test_the_window_comes_from_the_table_and_not_from_the_configuration(checkpoint, tmp_path, caplog):
    folder, state = checkpoint
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "window_size": 6}))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_encoder(GreenMIMModel.from_pretrained(tmp_path), state, (6, 6, 6))
    assert lines(caplog)[0].endswith("stage1 5 -> 6, stage2 5 -> 6, stage3 5 -> 6.")


@pytest.mark.parametrize("model_class", MODELS)
def test_saving_and_loading_again_gives_the_same_model(model_class, checkpoint, tmp_path, caplog):
    folder, _ = checkpoint
    model = model_class.from_pretrained(folder, image_size=64, window_size=3)
    model.save_pretrained(tmp_path)
    caplog.clear()
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not lines(caplog)
    assert not any(info.values())
    assert again.config.window_size == 3 and again.config.image_size == 64
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert all(torch.equal(one, other) for one, other in zip(outputs_of(again, 64), outputs_of(model, 64)))


def test_loads_do_not_influence_one_another(checkpoint, caplog):
    folder, state = checkpoint
    for window in (3, 5, 4, 3):
        assert_encoder(GreenMIMModel.from_pretrained(folder, window_size=window), state, (window,) * 3)
    assert [line.split("model: ")[1].split(",")[0] for line in lines(caplog)] == [
        "stage1 5 -> 3", "stage1 5 -> 4", "stage1 5 -> 3",
    ]  # fmt: skip
    assert all(get_checkpoint_conversion_mapping(name) is None for name in ("greenmim", "GreenMIMModel"))


# The head


@pytest.fixture
def classifier(tmp_path):
    """A folder with a classifier of three named classes, and its state."""
    names = {0: "crack", 1: "hot spot", 2: "sound"}
    config = tiny_config(id2label=names, label2id={name: number for number, name in names.items()})
    model = randomize(GreenMIMForImageClassification(config)).float()
    model.save_pretrained(tmp_path)
    return tmp_path, model.state_dict()


@pytest.mark.parametrize("load", [GreenMIMForImageClassification, AutoModelForImageClassification])
def test_another_head_and_another_window(load, classifier, caplog):
    folder, state = classifier
    with pytest.raises(RuntimeError, match="`ignore_mismatched_sizes`"):
        load.from_pretrained(folder, num_labels=5, window_size=3)
    caplog.clear()
    model, info = load.from_pretrained(
        folder, num_labels=5, window_size=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(lines(caplog)) == 1
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert_encoder(model, state, (3, 3, 3))
    assert outputs_of(model, 96)[0].shape == (1, 5)
    # a new head as `_init_weights` draws it, and not the old one of a random state near 1
    assert 0 < model.classifier.weight.abs().max() < 0.1 and not model.classifier.bias.any()


def test_label_names_survive_where_the_number_of_labels_does(classifier):
    folder, state = classifier
    load = AutoModelForImageClassification.from_pretrained
    for arguments in ({}, {"num_labels": 3}, {"window_size": 3}, {"num_labels": 3, "ignore_mismatched_sizes": True}):
        model = load(folder, **arguments)
        assert model.config.id2label == {0: "crack", 1: "hot spot", 2: "sound"}
        assert model.config.label2id == {"crack": 0, "hot spot": 1, "sound": 2}
        assert torch.equal(model.classifier.weight, state["classifier.weight"])


def test_other_labels_get_their_names(classifier, tmp_path):
    folder, _ = classifier
    load = AutoModelForImageClassification.from_pretrained
    unnamed = load(folder, num_labels=2, ignore_mismatched_sizes=True)
    assert unnamed.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    named = load(
        folder, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, ignore_mismatched_sizes=True, window_size=4
    )
    assert named.num_labels == 2 and named.classifier.weight.shape == (2, 32)
    named.save_pretrained(tmp_path / "named")
    again = load(tmp_path / "named")
    assert again.config.id2label == {0: "no", 1: "yes"} and again.config.label2id == {"no": 0, "yes": 1}
    assert torch.equal(again.classifier.weight, named.classifier.weight)


@pytest.mark.parametrize(
    ("auto_class", "model_class"), [(AutoModel, GreenMIMModel), (AutoModelForPreTraining, GreenMIMForPreTraining)]
)
def test_auto_classes(auto_class, model_class, checkpoint, caplog):
    folder, state = checkpoint
    model = auto_class.from_pretrained(folder, image_size=64, window_size=8)
    assert type(model) is model_class
    assert_encoder(model, state, (8, 8, 4))
    assert len(lines(caplog)) == 1


# What is refused


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A checkpoint in which the last stage's tables have 80 rows."""
    folder, _ = checkpoint
    GreenMIMConfig.from_pretrained(folder).save_pretrained(tmp_path)
    state = load_file(folder / "model.safetensors")
    names = [f"greenmim.encoder.layers.2.blocks.{block}.attention.{TABLE}" for block in range(2)]
    state.update({name: state[name][:80].clone() for name in names})
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path, names, state


@pytest.mark.parametrize("changes", [{}, {"window_size": 3}])
def test_tables_of_no_window_are_refused_by_name(changes, broken):
    folder, names, _ = broken
    with pytest.raises(ValueError, match="a window w has a table of shape") as error:
        GreenMIMForImageClassification.from_pretrained(folder, **changes)
    assert all(f"`{name}` of shape (80, 4)" in str(error.value) for name in names)
    assert "layers.1" not in str(error.value)


def test_tables_of_no_window_are_new_where_mismatches_are_ignored(broken, caplog):
    folder, names, _ = broken
    model, info = GreenMIMForPreTraining.from_pretrained(
        folder, ignore_mismatched_sizes=True, window_size=3, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == set(names)
    for name in names:
        assert model.get_parameter(name).shape == (25, 4)
        assert 0 < model.get_parameter(name).abs().max() < 0.1  # drawn anew
    assert lines(caplog)[0].endswith("stage1 5 -> 3, stage2 5 -> 3.")


def test_other_numbers_of_heads_are_mismatches_as_ever(checkpoint, caplog):
    folder, _ = checkpoint
    with pytest.raises(RuntimeError, match="`ignore_mismatched_sizes`"):
        GreenMIMModel.from_pretrained(folder, num_heads=[2, 2, 4], window_size=3)
    caplog.clear()
    _, info = GreenMIMModel.from_pretrained(
        folder, num_heads=[2, 2, 4], window_size=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    tables = {f"encoder.layers.0.blocks.{block}.attention.{TABLE}" for block in range(2)}
    assert info["mismatched_keys"] == {(name, torch.Size([81, 1]), torch.Size([25, 2])) for name in tables}
    assert lines(caplog)[0].endswith("stage2 5 -> 3, stage3 5 -> 3.")
