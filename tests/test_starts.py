# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Going on from weights: ours with changes, and those of other projects, by name or path."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTConfig,
    ViTModel,
)

import run_image_classification
import run_mim
from modeling_greenmim import GreenMIMBackbone, GreenMIMForImageClassification, GreenMIMForPreTraining, GreenMIMModel
from modeling_greenmim.conversion import CheckpointError, export_model, import_checkpoint
from modeling_greenmim.conversion.releasing import complete_card
from tests.hub_server import serve
from tests.test_conversion import TINY, encoder_shapes, official_shapes, random_weights, write_official
from tests.test_resizing import resized
from tests.test_teacher import write_teacher
from tests.training_helpers import (
    OVERRIDES,
    classify,
    results_of,
    run,
    subprocess_environment,
    tiny_config,
    write_class_folders,
    write_images,
    write_pretrained,
)
from tests.training_helpers import weights as weights_of
from training_greenmim.pretraining.teacher import load_teacher
from training_greenmim.runs.arguments import parse_arguments
from training_greenmim.runs.starts import start_of


ROOT = Path(__file__).parent.parent
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made; nothing may stay there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def write_swin(folder, model_class=SwinModel, **changes):
    torch.manual_seed(1)
    model_class(SwinConfig(**{**SWIN, **changes})).save_pretrained(folder)
    return folder


def write_exported(folder, to: str):
    """A classifier of ours in another format."""
    torch.manual_seed(2)
    GreenMIMForImageClassification(tiny_config(num_labels=3)).save_pretrained(folder / "ours")
    output = folder / {"timm": "swin.safetensors", "microsoft-swin": "swin.pth"}.get(to, to)
    export_model(str(folder / "ours"), to, str(output))
    return output


def write_timm(folder, **pretrained_cfg):
    """As timm's repositories are: weights, and a config.json of timm's own."""
    (folder / "timm").mkdir()
    write_exported(folder, "timm").rename(folder / "timm" / "model.safetensors")
    values = {"architecture": "swin_tiny_patch4_window7_224", "num_classes": 3, "pretrained_cfg": pretrained_cfg}
    (folder / "timm" / "config.json").write_text(json.dumps(values))
    return folder / "timm"


def write_simmim(folder) -> Path:
    """As SimMIM's own pre-training writes it."""
    weights = random_weights(encoder_shapes(**TINY))
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)  # of 4 windows: tells the size of images
    weights = {f"encoder.{name}": tensor for name, tensor in weights.items()}
    weights |= {"encoder.mask_token": torch.zeros(1, 1, 8), "decoder.0.weight": torch.zeros(192, 16, 1, 1)}
    torch.save({"model": weights | {"decoder.0.bias": torch.zeros(192)}}, folder / "simmim.pth")
    return folder / "simmim.pth"


def write_twins(folder, model_class, to: str, file: str) -> Path:
    torch.manual_seed(3)
    # Heads and windows are those that files of Twins are taken to have: 32 wide, and of 7 tokens a side.
    config = tiny_config(backbone_type="twins", embed_dim=32, window_size=7, num_labels=3)
    model_class(config).save_pretrained(folder / "twins")
    export_model(str(folder / "twins"), to, str(folder / file))
    return folder / file


def write_timm_twins(folder) -> Path:
    (folder / "timm").mkdir()
    write_twins(folder, GreenMIMForImageClassification, "timm", "model.safetensors").rename(
        folder / "timm" / "model.safetensors"
    )
    values = {"architecture": "twins_svt_small", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (folder / "timm" / "config.json").write_text(json.dumps(values))
    return folder / "timm"


SOURCES = {
    "swin": write_swin,
    "swin classifier": lambda folder: write_swin(folder, SwinForImageClassification, num_labels=3),
    "swin of SimMIM": lambda folder: write_swin(folder, SwinForMaskedImageModeling, encoder_stride=8),
    "swin backbone": lambda folder: write_swin(folder, SwinBackbone),
    "timm file": lambda folder: write_exported(folder, "timm"),
    "timm folder": lambda folder: write_timm(folder),
    "microsoft": lambda folder: write_exported(folder, "microsoft-swin"),
    "simmim file": write_simmim,
    "official": lambda folder: write_official(folder / "official.pth", random_weights(official_shapes(**TINY))),
    "official twins": lambda folder: write_twins(folder, GreenMIMForPreTraining, "original", "twins.pth"),
    "timm twins folder": write_timm_twins,
}
OURS = {"encoder": GreenMIMModel, "backbone": GreenMIMBackbone, "classifier": GreenMIMForImageClassification}


def built(name, *flags) -> tuple:
    """What run_mim.py builds: model, image processor, teacher, origin."""
    argv = ["--model_name_or_path", name, "--output_dir", "out", "--use_cpu", "true", *flags]
    model_args, target, _, args = parse_arguments(run_mim.ARGUMENTS, [str(value) for value in argv])
    torch.manual_seed(0)
    return run_mim.build_model(model_args, target, args)


def image(channels: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(5))


# From what


def converted(path: Path, output: Path):
    """The model that the conversion itself makes of a source."""
    if path.name != "timm":
        return import_checkpoint(str(path), str(output))
    size = json.loads((path / "config.json").read_text())["pretrained_cfg"].get("input_size")
    told = {"image_size": size[-1]} if size else {}
    return import_checkpoint(str(path / "model.safetensors"), str(output), **told)


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_starts_from_any_swin_as_from_its_conversion(tmp_path, source):
    (tmp_path / "source").mkdir()
    path = SOURCES[source](tmp_path / "source")
    model, processor, _, origin = built(path)
    expected = converted(path, tmp_path / "converted")
    encoder = getattr(expected, "greenmim", expected)
    assert isinstance(model, GreenMIMForPreTraining)
    torch.testing.assert_close(model.greenmim(image()).pooler_output, encoder(image()).pooler_output)
    again = built(tmp_path / "converted")[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    side = expected.config.image_size
    assert dict(processor.size) == {"height": side, "width": side} and origin.startswith(f"`{path}` (")
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(6))
    losses = [one.eval()(image(), noise=noise).loss for one in (model, again)]
    assert torch.equal(*losses) and losses[0].isfinite()
    if isinstance(expected, GreenMIMForPreTraining):  # the decoder came with it
        torch.testing.assert_close(losses[0], expected.eval()(image(), noise=noise).loss)


@torch.no_grad()
@pytest.mark.parametrize("kind", OURS)
def test_a_run_starts_from_our_own_models_by_what_they_hold(tmp_path, kind):
    """The encoder is what was saved; a backbone has the encoder's last norm as that of its last stage."""
    start = write_pretrained(tmp_path / "start")
    own = OURS[kind].from_pretrained(start, ignore_mismatched_sizes=True)
    own.save_pretrained(tmp_path / kind)
    expected = GreenMIMModel.from_pretrained(start)(image()).last_hidden_state
    found = built(tmp_path / kind)[0].eval().greenmim(image()).last_hidden_state
    torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("source", ["timm file", "timm folder", "microsoft", "timm twins folder"])
def test_classifiers_of_others_keep_their_logits(tmp_path, source):
    (tmp_path / "source").mkdir()
    path = SOURCES[source](tmp_path / "source")
    arguments = run_image_classification.ModelArguments(model_name_or_path=str(path))
    model, _, _ = run_image_classification.build_model(arguments, None)
    expected = converted(path, tmp_path / "converted")
    assert isinstance(expected, GreenMIMForImageClassification)
    found = model.eval()(image()).logits
    torch.testing.assert_close(found, expected.eval()(image()).logits, atol=1e-5, rtol=1e-4)
    assert found.shape == (1, 3) and found.std() > 1e-3


@pytest.mark.parametrize("model_class", [SwinModel, SwinForImageClassification, SwinForMaskedImageModeling])
def test_an_old_configuration_that_names_no_class_is_decided_by_weights(tmp_path, model_class):
    path = write_swin(
        tmp_path / "swin", model_class, **({"encoder_stride": 8} if "Masked" in str(model_class) else {})
    )
    expected = built(path)[0].greenmim(image()).pooler_output
    values = json.loads((path / "config.json").read_text())
    del values["architectures"]
    (path / "config.json").write_text(json.dumps(values))
    torch.testing.assert_close(built(path)[0].greenmim(image()).pooler_output, expected)


def test_nothing_is_trained_from_random_weights_unnoticed(tmp_path):
    path = write_swin(tmp_path / "swin")
    weights = load_file(path / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "layers.1" not in name}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"`model_name_or_path` is '.*swin', which cannot be converted: .*missing"):
        built(path)


def test_what_is_no_start_is_refused_by_what_it_is(tmp_path):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"'.*vit', a checkpoint of model type 'vit'. It can be"):
        built(tmp_path / "vit")
    folder = write_timm(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'.*timm', a model of timm without model.safetensors"):
        built(folder)
    (folder / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(ValueError, match=r"'.*timm', timm's resnet50. It can be"):
        built(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'.*timm', a config.json without a model type"):
        built(folder)


def test_timm_and_swin_of_the_hub_by_name(tmp_path):
    """Against a Hub on loopback, in another process."""
    repositories = {"timm/swin_tiny": write_timm(tmp_path, input_size=[3, 32, 32]), "ms/swin": tmp_path / "swin"}
    write_swin(tmp_path / "swin")
    hub, server = serve()
    try:
        for repository, folder in repositories.items():
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            hub.create(repository)
            card = {"README.md": b"---\nlicense: mit\n---\n"}
            hub.commit(repository, {**files, **card}, {"model.safetensors": True})
        environment = {**subprocess_environment(), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        code = (
            "import sys\nfrom tests.test_starts import built\n"
            "for name in sys.argv[1:]:\n    model, _, _, origin = built(name)\n    print(origin)\n"
            "    model.save_pretrained(name)\n"
        )
        command = [sys.executable, "-c", code, *repositories]
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "`timm/swin_tiny` (timm's swin_tiny_patch4_window7_224, converted, licence: mit)" in done.stdout
    assert "`ms/swin` (Transformers' Swin, converted, licence: mit)" in done.stdout
    for repository, folder in repositories.items():
        expected = built(folder)[0]
        torch.testing.assert_close(weights_of(tmp_path / repository), expected.state_dict())


def test_pixels_have_the_scale_and_size_that_timm_says(tmp_path):
    folder = write_timm(tmp_path, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3], input_size=[3, 32, 32])
    model, processor, _, _ = built(folder)
    assert model.config.image_size == 32
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])


# With changes


def test_image_and_window_change(tmp_path):
    """The features are those of the converted model at that window, which interpolates its tables as it loads."""
    path = write_swin(tmp_path / "swin")
    model, processor, _, _ = built(path, "--config_overrides", "image_size=[48,64],window_size=3,mask_ratio=0.5")
    assert (model.config.image_size, model.config.mask_ratio) == ([48, 64], 0.5)
    assert dict(processor.size) == {"height": 48, "width": 64}
    import_checkpoint(str(path), str(tmp_path / "converted"))
    expected = GreenMIMModel.from_pretrained(tmp_path / "converted", image_size=[48, 64], window_size=3)
    images = image(height=48, width=64)
    torch.testing.assert_close(model.greenmim(images).pooler_output, expected(images).pooler_output)


@torch.no_grad()
def test_a_swin_of_224_px_goes_on_at_256x320_px_and_window_8(tmp_path):
    """Against Transformers' Swin at that size, whose tables the tests interpolate themselves."""
    theirs = SwinModel(SwinConfig(**{**SWIN, "image_size": 224, "window_size": 7})).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs.save_pretrained(tmp_path / "swin")
    model, processor, _, _ = built(
        tmp_path / "swin", "--config_overrides", "image_size=[256,320],window_size=8,layer_norm_eps=1e-5"
    )
    expected = SwinModel(SwinConfig(**{**SWIN, "image_size": [256, 320], "window_size": 8})).eval()
    weights = theirs.state_dict()
    for name, tensor in weights.items():
        if name.endswith("bias_table"):
            weights[name] = resized(tensor, 8).float()
    fresh = {name: tensor for name, tensor in expected.state_dict().items() if name.endswith("index")}
    expected.load_state_dict(weights | fresh)
    images = image(height=256, width=320)
    assert dict(processor.size) == {"height": 256, "width": 320}
    found = model.eval().greenmim(images).last_hidden_state
    torch.testing.assert_close(found, expected(images).last_hidden_state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "embed_dim=16,num_heads=[2,4]",
            r"`embed_dim` from 8 to 16, which the weights of `model_name_or_path` .* fix",
        ),
        ("depths=[2,4]", r"`depths` from \[2, 2\] to \[2, 4\].* only be dropped from the end"),
        ("num_heads=[2,4]", r"`num_heads` from \[1, 2\] to \[2, 4\]"),
        ("patch_size=2", "`patch_size` from 4 to 2"),
        ("backbone_type=twins", "`backbone_type` from swin to twins"),
        ("nonsense=1", r"names \['nonsense'\]"),
    ],
)
def test_what_weights_fix_cannot_be_changed(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        built(write_pretrained(tmp_path / "start"), "--config_overrides", overrides)


def test_last_stages_are_dropped(tmp_path, caplog):
    start = write_pretrained(tmp_path / "start")
    model = built(start, "--config_overrides", "depths=[2],num_heads=[1],image_size=16")[0]
    old = load_file(start / "model.safetensors")
    kept = [name for name in model.state_dict() if "layers.0.blocks" in name]
    assert len(kept) > 10 and all(torch.equal(model.state_dict()[name], old[name]) for name in kept)
    assert not any("layers.1" in name for name in model.state_dict())
    assert f"Of {start}: new weights are " in caplog.text


def test_another_decoder_or_target_keeps_the_encoder(tmp_path):
    start = write_pretrained(tmp_path / "start")
    expected = GreenMIMModel.from_pretrained(start)(image()).pooler_output
    for flags in (["--config_overrides", "decoder_hidden_size=32,decoder_num_attention_heads=4"], ["--target", "hog"]):
        torch.testing.assert_close(built(start, *flags)[0].greenmim(image()).pooler_output, expected)


def test_what_was_aligned_with_a_teacher_goes_on_to_any_target(tmp_path):
    values = {"decoder_type": "linear", "pooled_loss_weight": 1.0, "mask_ratio": 0.5, "target_loss": "cosine"}
    start = write_pretrained(tmp_path / "start", reconstruction_target="features", target_width=4, **values)
    write_teacher(tmp_path / "teacher")
    teacher = ("--target", "teacher", "--teacher", tmp_path / "teacher")
    expected = {
        "pixels": (("--target", "pixels"), ("pixels", "mse", "transformer", 0.0, 0.75)),
        "hog": (("--target", "hog", "--mask_ratio", 0.6), ("hog", "mse", "transformer", 0.0, 0.6)),
        "predict": ((*teacher, "--teacher_mode", "predict"), ("features", "cosine", "transformer", 0.0, 0.75)),
        "align": (teacher, ("features", "cosine", "linear", 1.0, 0.5)),
    }
    for flags, values in expected.values():
        config = built(start, *flags)[0].config
        names = ("reconstruction_target", "target_loss", "decoder_type", "pooled_loss_weight", "mask_ratio")
        assert tuple(getattr(config, name) for name in names) == values


def test_a_folder_of_ours_without_its_encoder_is_refused(tmp_path):
    """As one whose names kept a prefix: nothing of it would be used."""
    start = write_pretrained(tmp_path / "start")
    weights = load_file(start / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, start / "model.safetensors")
    with pytest.raises(ValueError, match=r"`model_name_or_path` is '.*start', which lacks weights of the encoder"):
        built(start)
    with pytest.raises(ValueError, match=r"`teacher` is '.*start', .* it lacks weights, .* would be random"):
        load_teacher(str(start), 3, (32, 32))


def test_classification_keeps_what_weights_fix(tmp_path):
    start = write_pretrained(tmp_path / "start")
    for overrides in ("hidden_act=relu", "num_heads=[2,4]"):
        args = run_image_classification.ModelArguments(model_name_or_path=str(start), config_overrides=overrides)
        with pytest.raises(ValueError, match=rf"`config_overrides` changes `{overrides.split('=')[0]}` from"):
            run_image_classification.build_model(args, ["a", "b"])


def test_messages_name_what_was_given(tmp_path):
    path = write_swin(tmp_path / "swin")
    with pytest.raises(ValueError, match=rf"^`model_name_or_path` is '{path}': `mask_ratio` is 1.5"):
        built(path, "--mask_ratio", 1.5)


def test_grey_channels_take_the_mean_of_colours(tmp_path):
    """A grey image has the effect that it has as three equal channels."""
    start = write_pretrained(tmp_path / "start")
    model, processor, _, _ = built(start, "--config_overrides", "num_channels=1")
    expected = GreenMIMModel.from_pretrained(start)
    grey = image(1)
    found = model.greenmim(grey).pooler_output
    torch.testing.assert_close(found, expected(grey.expand(-1, 3, -1, -1)).pooler_output, atol=1e-5, rtol=0)
    assert len(processor.image_mean) == 1
    back = built(write_pretrained(tmp_path / "grey", num_channels=1), "--config_overrides", "num_channels=3")[0]
    expected = GreenMIMModel.from_pretrained(tmp_path / "grey")(grey).pooler_output
    found = back.greenmim(grey.expand(-1, 3, -1, -1)).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_first_channels_are_kept_or_all_start_anew(tmp_path):
    start = write_pretrained(tmp_path / "start")
    old = GreenMIMModel.from_pretrained(start).embeddings.patch_embeddings.projection.weight.unflatten(1, (3, 16))

    def kernels(rule: str) -> torch.Tensor:
        flags = ("--config_overrides", "num_channels=1", "--channel_weights", rule)
        return built(start, *flags)[0].greenmim.embeddings.patch_embeddings.projection.weight.unflatten(1, (1, 16))

    assert torch.equal(kernels("first")[:, 0], old[:, 0])
    new = kernels("new")
    assert not any(torch.allclose(new[:, 0], other, atol=0.01) for other in (old[:, 0], old.mean(dim=1)))
    with pytest.raises(ValueError, match="`channel_weights` is 'all'; it must be one of mean, first, new"):
        kernels("all")


# Whole runs


def test_a_run_from_other_weights_tells_of_it_and_resumes(tmp_path):
    """The first loss is that of the converted folder; the card says where weights come from, under which licence."""
    write_images(tmp_path / "images", 12)
    path = write_swin(tmp_path / "swin")
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    import_checkpoint(str(path), str(tmp_path / "converted"))
    losses = []
    for number, start in enumerate((path, tmp_path / "converted")):
        flags = ("--train_dir", tmp_path / "images", "--model_name_or_path", start, "--do_train", "--max_steps", 2)
        output = run(tmp_path / f"run-{number}", *flags, "--save_strategy", "steps", "--save_steps", 1, overrides="")
        losses.append(results_of(output)["train_loss"])
    assert losses[0] == losses[1]
    card = (tmp_path / "run-0" / "README.md").read_text()
    assert f"`{path}` (Transformers' Swin, converted, licence: mit)" in card
    assert "comes from the images below and from the weights it started from" in " ".join(card.split())
    assert "within that of the images and that of the weights that it started from, mit." in card
    with start_of(str(tmp_path / "run-0"), "model_name_or_path") as again:
        assert again.origin.endswith("run-0` (licence: mit)"), "a licence is not lost on the way"
    with pytest.raises(CheckpointError, match=r"no license .* its images allow, and what .* which is under mit"):
        complete_card(tmp_path / "run-0", "you/mine")
    before = load_file(tmp_path / "run-0" / "model.safetensors")
    (tmp_path / "run-0" / "checkpoint-2").rename(tmp_path / "gone")
    flags = ("--train_dir", tmp_path / "images", "--model_name_or_path", path, "--do_train", "--max_steps", 2)
    resumed = run(tmp_path / "run-0", *flags, "--resume_from_checkpoint", "true", overrides="")
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(resumed / "model.safetensors").items())


@pytest.mark.parametrize("source", ["timm folder", "timm file", "official"])
def test_classification_starts_from_other_weights(tmp_path, source):
    (tmp_path / "source").mkdir()
    path = SOURCES[source](tmp_path / "source")
    images = write_class_folders(tmp_path / "images", {"red": 6, "green": 6, "blue": 6})
    output = classify(
        tmp_path / "out",
        *("--model_name_or_path", path, "--train_dir", images, "--do_train", "--do_eval", "--max_steps", 1),
        *("--ignore_mismatched_sizes", "true", "--learning_rate", 1e-12),
    )
    found = GreenMIMForImageClassification.from_pretrained(output)
    weights = path / "model.safetensors" if source == "timm folder" else path
    expected = import_checkpoint(str(weights), str(tmp_path / "converted"))
    encoder = getattr(expected, "greenmim", expected)
    torch.testing.assert_close(found.greenmim(image()).pooler_output, encoder(image()).pooler_output)
    assert f"`{path}`" in (output / "README.md").read_text()


def test_classification_carries_channels(tmp_path):
    start = write_pretrained(tmp_path / "start")
    args = run_image_classification.ModelArguments(
        model_name_or_path=str(start), config_overrides="num_channels=1", drop_path_rate=0.0
    )
    model, processor, _ = run_image_classification.build_model(args, ["a", "b"])
    grey = image(1)
    expected = GreenMIMModel.from_pretrained(start)(grey.expand(-1, 3, -1, -1)).pooler_output
    torch.testing.assert_close(model.eval().greenmim(grey).pooler_output, expected, atol=1e-5, rtol=0)
    assert isinstance(model.classifier, nn.Linear) and len(processor.image_mean) == 1


def test_config_name_and_model_exclude_one_another():
    with pytest.raises(ValueError, match="`model_name_or_path` is 'x' and `config_name` is 'tiny'; give one of them"):
        built("x", "--config_name", "tiny", "--config_overrides", OVERRIDES)
