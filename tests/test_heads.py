"""Heads of Transformers on a pre-trained encoder: what they are built of, saved as, and loaded from."""

import json
import logging
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    SwinConfig,
    SwinModel,
)

from modeling_greenmim import (
    GreenMIMBackbone,
    GreenMIMConfig,
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMImageProcessorPil,
    GreenMIMModel,
    planning,
)
from modeling_greenmim.conversion import (
    CheckpointError,
    build_head,
    head_image_processor,
    import_checkpoint,
    read_labels,
)
from modeling_greenmim.conversion.__main__ import main
from modeling_greenmim.heads_greenmim import backbone_of
from modeling_greenmim.image_processing_greenmim import build_image_processor
from modeling_greenmim.planning import PlanCache
from modeling_greenmim.resizing import resize_bias_table
from tests.test_remote_code import run_elsewhere
from training_greenmim.optimization import parameter_groups


NAMES = {0: "wall", 1: "floor", 2: "door"}
AUTO = {
    "upernet": AutoModelForSemanticSegmentation,
    "mask2former": AutoModelForUniversalSegmentation,
    "rt_detr_v2": AutoModelForObjectDetection,
}
SMALL = {
    "upernet": {"hidden_size": 16, "auxiliary_channels": 16},
    "mask2former": {
        **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32},
        **{"dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2},
        **{"num_queries": 7, "train_num_points": 64},
    },
    "rt_detr_v2": {
        **{"encoder_hidden_dim": 32, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
        **{"decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 9},
        **{"num_denoising": 6},
    },
}
HEADS = list(AUTO)


def encoder_config(**values) -> GreenMIMConfig:
    sizes = {"image_size": 128, "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
    return GreenMIMConfig(**{**sizes, **values})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    """Folder of a model of pre-training whose biases are no longer zero."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(encoder_config())
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    build_image_processor(model.config).save_pretrained(folder)
    return str(folder)


def build(folder: str, head: str, config_overrides: dict | None = None, **head_overrides):
    torch.manual_seed(1)
    return build_head(folder, head, NAMES, config_overrides, {**SMALL[head], **head_overrides})


def images(height: int = 97, width: int = 130) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


def scores(outputs) -> torch.Tensor:
    return outputs["logits"] if "logits" in outputs else outputs["class_queries_logits"]


def loss_of(model, head: str, pixels: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)  # points and noise are drawn
    shape = (len(pixels), *pixels.shape[2:])
    if head == "upernet":
        return model(pixels, labels=torch.arange(shape[1] * shape[2]).view(1, *shape[1:]).expand(shape) % 3).loss
    labels = [torch.tensor([1, 2])] * len(pixels)
    if head == "mask2former":
        masks = torch.zeros(2, *shape[1:])
        masks[0, :40], masks[1, 40:] = 1, 1
        return model(pixels, mask_labels=[masks] * len(pixels), class_labels=labels).loss
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.2, 0.3, 0.1, 0.1]])
    return model(pixels, labels=[{"class_labels": label, "boxes": boxes} for label in labels]).loss


# What a model is built of


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", [GreenMIMForPreTraining, GreenMIMModel, GreenMIMForImageClassification])
def test_every_folder_of_ours_gives_its_encoder(head, kind, tmp_path):
    source = kind(encoder_config(num_labels=5))
    source.save_pretrained(tmp_path)
    model = build(str(tmp_path), head)
    assert model.config.id2label == NAMES and model.config.num_labels == 3
    assert "wall" not in str(model.config.backbone_config.to_dict())
    expected = getattr(source, "greenmim", source).state_dict()
    found = backbone_of(model).greenmim.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_backbone_gives_the_norms_of_its_maps_too(tmp_path):
    source = GreenMIMBackbone(encoder_config(out_features=["stage1", "stage2", "stage3", "stage4"]))
    torch.nn.init.normal_(source.hidden_states_norms["stage2"].weight)
    source.save_pretrained(tmp_path)
    own = backbone_of(build(str(tmp_path), "upernet"))
    assert all(torch.equal(a, b) for a, b in zip(own(images()).feature_maps, source(images()).feature_maps))


@pytest.mark.parametrize("source", ["folder", "file"])
def test_what_import_reads_is_converted(source, tmp_path):
    sizes = {"image_size": 128, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    SwinModel(SwinConfig(**sizes)).save_pretrained(tmp_path / "swin")
    imported = import_checkpoint(str(tmp_path / "swin"), str(tmp_path / "ours"))
    given = str(tmp_path / "swin")
    if source == "file":
        main(
            ["export", "--model", str(tmp_path / "ours"), "--to", "timm", "--output", str(tmp_path / "a.safetensors")]
        )
        given = str(tmp_path / "a.safetensors")
    found = backbone_of(build(given, "upernet")).greenmim.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in imported.state_dict().items())


@pytest.mark.parametrize("depths", [[1, 1], [1, 1, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("head", ["upernet", "rt_detr_v2"])
def test_any_number_of_stages(head, depths, tmp_path):
    config = encoder_config(depths=depths, num_heads=[1] * len(depths))
    GreenMIMModel(config).save_pretrained(tmp_path)
    model = build(str(tmp_path), head).train()
    loss_of(model, head, images()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_values_of_the_encoder_can_be_changed(pretrained, caplog):
    with caplog.at_level(logging.WARNING):
        model = build(pretrained, "upernet", {"window_size": 8, "drop_path_rate": 0.2})
    lines = [line for line in caplog.messages if "bias tables" in line]
    assert len(lines) == 1 and "stage1 4 -> 8, stage2 4 -> 8, stage3 4 -> 8" in lines[0]
    before, after = GreenMIMModel.from_pretrained(pretrained).encoder, backbone_of(model).greenmim.encoder
    assert after.layers[-1].blocks[-1].drop_path.rate == pytest.approx(0.2)
    old, new = (encoder.layers[1].blocks[0].attention.relative_position_bias_table for encoder in (before, after))
    assert torch.equal(resize_bias_table(old, 8), new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "fcn"}, "`head` is 'fcn'; it must be one of upernet, mask2former, rt_detr_v2"),
        ({"id2label": {1: "a"}}, "`id2label` is {1: 'a'}; it needs a name for each of the numbers 0, 1, ..."),
        ({"id2label": {}}, "`id2label` is {}"),
        ({"config_overrides": {"windows": 3}}, "`config_overrides` names ['windows']"),
        ({"config_overrides": {"drop_path_rate": 2}}, "`drop_path_rate` is 2"),
        ({"head_overrides": {"pools": 3}}, "`head_overrides` names ['pools'], which GreenMIMUperNetConfig"),
        ({"head_overrides": {"hidden_size": "x"}}, "`head_overrides` {'hidden_size': 'x'}"),
        ({"config_overrides": {"embed_dim": 16}}, "changes what the weights of the checkpoint fix"),
        ({"folder": "/nowhere"}, "`folder` '/nowhere'"),
    ],
)
def test_bad_input_is_refused(change, message, pretrained):
    given = {"folder": pretrained, "head": "upernet", "id2label": NAMES, **change}
    with pytest.raises(CheckpointError) as error:
        build_head(**given)
    assert message in str(error.value)


def test_heads_that_need_more_stages_say_so(tmp_path):
    GreenMIMModel(encoder_config(depths=[1, 1], num_heads=[1, 1])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has 2 stages; mask2former needs at least 3"):
        build(str(tmp_path), "mask2former")


def test_an_encoder_without_weights_is_refused(pretrained, tmp_path):
    weights = load_file(Path(pretrained, "model.safetensors"))
    del weights["greenmim.encoder.layers.0.blocks.0.mlp.fc1.weight"]
    (tmp_path / "config.json").write_text(Path(pretrained, "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights of the encoder: greenmim\.encoder\.layers\.0\.blocks"):
        build(str(tmp_path), "upernet")


# What it computes


@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_everything_and_checkpointing_changes_none(head, pretrained):
    model = build(pretrained, head).train()
    gradients, calls = [], []
    backbone_of(model).greenmim.encoder.layers[0].blocks[0].attention.register_forward_hook(lambda *_: calls.append(1))
    for checkpoints in (False, True):
        if checkpoints:
            model.activation_checkpointing_enable()
        model.zero_grad()
        loss_of(model, head, images()).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(calls) == 3  # once, then once more for the backward pass
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_agrees(head, pretrained):
    model = build(pretrained, head, **({"num_denoising": 0} if head == "rt_detr_v2" else {})).train()
    exact = loss_of(model, head, images())
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, head, images())
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_all_of_a_detector_has_gradients_without_an_object(pretrained):
    """Processes of DDP wait for each of them."""
    model = build(pretrained, "rt_detr_v2").train()
    boxes = [{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 2
    model(torch.randn(2, 3, 128, 128), labels=boxes).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_boxes_of_odd_sizes_are_those_of_the_resized_image(pretrained):
    model = build(pretrained, "rt_detr_v2")
    resized = torch.nn.functional.interpolate(images(97, 130), (128, 160), mode="bilinear")
    assert torch.equal(model(images(97, 130)).pred_boxes, model(resized).pred_boxes)


# Frozen stages


def test_frozen_stages_stay_in_evaluation(pretrained):
    model = build(pretrained, "upernet", {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.5})
    backbone = backbone_of(model)
    backbone.freeze_stages(2)
    model.train()
    frozen = [backbone.greenmim.embeddings, *backbone.greenmim.encoder.layers[:2]]
    assert not any(module.training for part in frozen for module in part.modules())
    assert backbone.greenmim.encoder.layers[2].blocks[0].training and model.decode_head.training
    still = {id(parameter) for part in frozen for parameter in part.parameters()}
    assert all(parameter.requires_grad != (id(parameter) in still) for parameter in model.parameters())
    first_maps = [backbone(images()).feature_maps[1] for _ in range(2)]
    assert torch.equal(*first_maps)
    loss_of(model, "upernet", images()).backward()
    assert all((parameter.grad is None) == (id(parameter) in still) for parameter in model.parameters())


@pytest.mark.parametrize("count", [-1, 5])
def test_stages_that_there_are_not_cannot_be_frozen(count, pretrained):
    with pytest.raises(ValueError, match=rf"`count` is {count}; it must be between 0 and the 4 stages"):
        backbone_of(build(pretrained, "upernet")).freeze_stages(count)


def test_no_frozen_stage_is_all_that_learn(pretrained):
    backbone = backbone_of(build(pretrained, "upernet"))
    backbone.freeze_stages(0)
    assert backbone.train().greenmim.embeddings.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())


# Learning rates by layer


# Of an encoder of 1, 2, 1 and 1 blocks; all else, the norms of the maps and the head, is layer 6.
LAYERS = {
    "embeddings.": 0,
    "encoder.layers.0.blocks.0.": 1,
    "encoder.layers.0.downsample.": 1,
    "encoder.layers.1.blocks.0.": 2,
    "encoder.layers.1.blocks.1.": 3,
    "encoder.layers.1.downsample.": 3,
    "encoder.layers.2.blocks.0.": 4,
    "encoder.layers.2.downsample.": 4,
    "encoder.layers.3.blocks.0.": 5,
}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("head", HEADS)
def test_rates_fall_from_the_head_down(head, layer_decay, pretrained):
    model = build(pretrained, head)
    encoder = {id(parameter): name for name, parameter in backbone_of(model).greenmim.named_parameters()}
    groups = parameter_groups(model, learning_rate=0.3, weight_decay=0.05, layer_decay=layer_decay)
    assert len(groups) == (14 if layer_decay < 1 else 2) and groups[0]["lr"] == 0.3
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        part = encoder.get(id(parameter), "")
        layer = next((layer for start, layer in LAYERS.items() if part.startswith(start)), 6)
        assert group_of[id(parameter)]["lr"] == pytest.approx(0.3 * layer_decay ** (6 - layer), rel=1e-14), name
        spared = parameter.ndim <= 1 or name.endswith("relative_position_bias_table")
        assert group_of[id(parameter)]["weight_decay"] == (0.0 if spared else 0.05), name


def test_frozen_stages_are_in_no_group(pretrained):
    model = build(pretrained, "upernet")
    backbone_of(model).freeze_stages(2)
    groups = parameter_groups(model, learning_rate=0.3, weight_decay=0.05, layer_decay=0.5)
    assert min(group["lr"] for group in groups) == 0.3 * 0.5**2


# Folders


ELSEWHERE = """
from safetensors.torch import load_file
auto = {"upernet": AutoModelForSemanticSegmentation, "mask2former": AutoModelForUniversalSegmentation,
        "rt_detr_v2": AutoModelForObjectDetection}["HEAD"]
pixels = load_file(folder + "/../pixels.safetensors")["pixels"]
for place in (folder, folder + "-again"):
    model = auto.from_pretrained(place, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs = model(pixels)
    scores = outputs["logits"] if "logits" in outputs else outputs["class_queries_logits"]
    print(type(model).__name__, type(AutoImageProcessor.from_pretrained(place, trust_remote_code=True)).__name__)
    print(scores.flatten().tolist())
    model.save_pretrained(folder + "-again")
    AutoImageProcessor.from_pretrained(place, trust_remote_code=True).save_pretrained(folder + "-again")
"""


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_loads_where_the_project_is_not_importable(head, pretrained, tmp_path):
    model = build(pretrained, head)
    model.save_pretrained(tmp_path / "model")
    head_image_processor(model).save_pretrained(tmp_path / "model")
    save_file({"pixels": images()}, tmp_path / "pixels.safetensors")
    # In a process as that one is, with one thread.
    lines = run_elsewhere(ELSEWHERE.replace("HEAD", head), tmp_path / "model", tmp_path).splitlines()
    processor = {"upernet": "Segformer", "mask2former": "Mask2Former", "rt_detr_v2": "RTDetr"}[head]
    assert lines[0] == lines[2] == f"{type(model).__name__} {processor}ImageProcessorPil"
    with torch.no_grad():
        expected = scores(model(images())).flatten()
    for line in (lines[1], lines[3]):
        torch.testing.assert_close(torch.tensor(json.loads(line)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_our_image_processor_is_found_elsewhere(pretrained, tmp_path):
    build(pretrained, "upernet").save_pretrained(tmp_path / "model")
    processor = build_image_processor(encoder_config())
    processor.image_range = [[0, 4095]] * 3
    processor.save_pretrained(tmp_path / "model")
    code = "print(type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)).__name__)"
    assert run_elsewhere(code, tmp_path / "model", tmp_path).strip() == "GreenMIMImageProcessorPil"


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["None", "True"])
def test_installed_and_imported_it_is_our_class(trust, pretrained, tmp_path):
    build(pretrained, "upernet").save_pretrained(tmp_path / "model")
    code = f"""
import modeling_greenmim
from transformers import AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code={trust})
print(type(model).__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "modeling_greenmim.heads_greenmim"


@pytest.mark.parametrize("head", HEADS)
def test_saved_and_loaded_it_computes_the_same(head, pretrained, tmp_path):
    model = build(pretrained, head)
    model.save_pretrained(tmp_path)
    loaded = AUTO[head].from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config.to_dict().keys() == model.config.to_dict().keys()
    # Weights of a file are mapped where they lie in it, and products may round by alignment: both are copied first.
    with torch.no_grad():
        assert torch.equal(scores(deepcopy(loaded)(images())), scores(deepcopy(model)(images())))
    assert {"heads_greenmim.py", "modeling_greenmim.py", "swin.py"} < {path.name for path in tmp_path.glob("*.py")}


def test_the_command_writes_a_folder_to_train(pretrained, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("wall\nfloor\ndoor\n")
    given = ["--model", pretrained, "--head", "rt_detr_v2", "--labels", str(tmp_path / "labels.txt")]
    main(["head", *given, "--output", str(tmp_path / "out"), "--image_size", "160", "--drop_path_rate", "0.1"])
    assert "M parameters, 3 classes" in capsys.readouterr().out
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert model.config.id2label == NAMES and model.config.backbone_config.drop_path_rate == 0.1
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size == {"height": 160, "width": 160}
    assert processor.do_normalize and list(processor.image_mean) == [0.485, 0.456, 0.406]


def test_the_command_says_what_is_wrong(pretrained, tmp_path, capsys):
    given = ["--model", pretrained, "--head", "upernet", "--labels", str(tmp_path / "none.txt")]
    with pytest.raises(SystemExit) as error:
        main(["head", *given, "--output", str(tmp_path / "out")])
    assert error.value.code == 2 and "none.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("channels", "values"), [(1, {}), (3, {"image_range": [[0, 4095]] * 3})])
def test_images_that_only_ours_reads_keep_our_image_processor(channels, values, tmp_path):
    GreenMIMModel(encoder_config(num_channels=channels)).save_pretrained(tmp_path)
    own = build_image_processor(encoder_config(num_channels=channels))
    for name, value in values.items():
        setattr(own, name, value)
    processor = head_image_processor(build(str(tmp_path), "upernet", {"image_size": 64}), own)
    assert type(processor) is GreenMIMImageProcessorPil and processor.size == {"height": 64, "width": 64}
    assert processor.image_range == own.image_range


@pytest.mark.parametrize(
    "text",
    [
        "wall\nfloor\ndoor\n\n",
        '["wall", "floor", "door"]',
        '{"0": "wall", "2": "door", "1": "floor"}',
        "wall\r\nfloor\r\ndoor",
    ],
)
def test_names_of_classes_are_read(text, tmp_path):
    (tmp_path / "labels").write_bytes(text.encode())
    assert read_labels(str(tmp_path / "labels")) == NAMES


@pytest.mark.parametrize(
    "content", [b"", b"wall\n\ndoor", b"wall\nwall", b'{"1": "a"}', b'{"a": "b"}', b'{"0": 3}', b"{", b"\xff\xfe\x00"]
)
def test_other_files_of_names_are_refused(content, tmp_path):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(CheckpointError, match="`labels`"):
        read_labels(str(tmp_path / "labels"))


# Plans of changing sizes


def planned(sizes, monkeypatch) -> tuple[list, PlanCache]:
    """What a Swin-B plans of such sizes, one after another, and where it keeps them."""
    made, make, config = [], planning._make_dense_plan, GreenMIMConfig()
    monkeypatch.setattr(planning, "_make_dense_plan", lambda *key: made.append(key[1]) or make(*key))
    monkeypatch.setattr(planning, "DENSE_PLANS", PlanCache(planning.DENSE_PLANS.budget))
    for size in sizes:
        planning.plan_dense(config, size, torch.device("cpu"))
    return made, planning.DENSE_PLANS


def random_sizes(shortest: int, longest: int, divisor: int) -> torch.Tensor:
    """Heights and widths of 200 batches, padded to multiples of the divisor."""
    sides = torch.randint(shortest, longest + 1, (200, 2), generator=torch.Generator().manual_seed(0))
    return (sides + divisor - 1) // divisor * divisor


@pytest.mark.parametrize(("longest", "divisor"), [(576, 64), (800, 32)])
def test_sizes_that_recur_are_planned_once_each(longest, divisor, monkeypatch):
    sizes = random_sizes(33, longest, divisor)
    if longest == 800:  # images that keep their aspect: one side is the longest
        sizes[:100, 0] = sizes[100:, 1] = longest
    sizes = [tuple(size) for size in sizes.tolist()]
    made, kept = planned(sizes, monkeypatch)
    assert len(made) == len(set(sizes)) < 100 and kept.num_bytes <= kept.budget


def test_plans_of_sizes_without_end_stay_within_the_budget(monkeypatch):
    sizes = [tuple(size) for size in random_sizes(900, 1400, 1).tolist()]
    made, kept = planned(sizes[:60], monkeypatch)
    assert len(made) == 60 and kept.budget / 2 < kept.num_bytes <= kept.budget
