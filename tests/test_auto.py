# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`--recipe auto` of both scripts: what it looks at, what it chooses, what it says."""

import json
import logging
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run_image_classification
import run_mim
from modeling_greenmim import GreenMIMForPreTraining
from tests.training_helpers import (
    noise_image,
    results_of,
    state_of,
    weights,
    write_class_folders,
    write_images,
    write_pretrained,
)
from training_greenmim.classification import recipes as classification
from training_greenmim.pretraining import recipes as pretraining
from training_greenmim.runs.arguments import ClassificationTrainingArguments, parse_arguments
from training_greenmim.runs.auto import Facts, Recipe, look_at
from training_greenmim.runs.models import build_config


PRETRAINING = run_mim.ARGUMENTS
CLASSIFICATION = (
    run_image_classification.ModelArguments,
    run_image_classification.DataArguments,
    ClassificationTrainingArguments,
)


def facts(count: int, **changes) -> Facts:
    return Facts(
        **{
            "count": count,
            "decoded": 0.1,
            "side": 300,
            "channels": 3,
            "gpu_memory": None,
            "has_bf16": False,
            **changes,
        }
    )


def read(types: tuple, recipe: Recipe | None, *argv) -> tuple:
    return parse_arguments(types, [str(value) for value in argv], recipe or (lambda chosen: {}))


def recipe_of_pretraining() -> Recipe:
    return Recipe(pretraining.recipe_defaults, pretraining.auto, labelled=False)


def recipe_of_classification() -> Recipe:
    return Recipe(classification.recipe_defaults, classification.auto, labelled=True)


def chosen(**values) -> dict:
    names = ("teacher", "config_name", "config_overrides", "model_name_or_path", "learning_rate", "probe_dir")
    return {
        **dict.fromkeys(names),
        "do_eval": False,
        "max_steps": -1,
        "mode": "finetune",
        "output_dir": "out",
        "recipe": None,
        **values,
    }


# What it looks at


def look(folder, **values) -> Facts:
    given = {"train_dir": str(folder), "image_column_name": None, "use_cpu": True, "max_train_samples": None}
    given |= {"do_eval": False, "do_predict": False, "train_val_split": 0.25}
    return look_at({**given, **values}, labelled=False)


def test_images_are_counted_and_measured(tmp_path):
    write_images(tmp_path, 3)  # 48 x 40
    noise_image(0, 90, 70).save(tmp_path / "larger.png")
    noise_image(0, 100, 120).save(tmp_path / "largest.png")
    found = look(tmp_path)
    assert (found.count, found.side, found.channels, found.gpu_memory) == (5, 40, 3, None)
    assert found.decoded == pytest.approx((3 * 48 * 40 + 90 * 70 + 100 * 120) * 3 / 1e9)
    assert look(tmp_path, max_train_samples=2).count == 2
    assert look(tmp_path, do_eval=True).count == 3  # two are held out
    assert look(tmp_path, do_eval=True, validation_dir=str(tmp_path)).count == 5


@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_grey_images_are_noticed(tmp_path, mode):
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (20, 30))
        image = Image.fromarray(pixels.astype("uint16" if mode == "I;16" else "uint8"))
        (image if mode == "I;16" else image.convert(mode)).save(tmp_path / f"{index}.png")
    assert look(tmp_path).channels == 1
    noise_image(9).save(tmp_path / "coloured.png")
    assert look(tmp_path).channels == 3
    np.save(tmp_path / "bands.npy", np.zeros((40, 40, 5), np.uint16))
    assert look(tmp_path).channels == 5


def test_broken_images_are_passed_over_unless_all_are(tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"`train_dir` has 1 image\(s\), none of which could be opened"):
        look(tmp_path)
    write_images(tmp_path, 2)
    assert (look(tmp_path).count, look(tmp_path).side) == (3, 40)


def test_streams_are_refused():
    flags = ("--recipe", "auto", "--dataset_name", "nowhere", "--streaming", "--output_dir", "out")
    with pytest.raises(ValueError, match=r"`recipe` is 'auto', .* `streaming` is set"):
        read(PRETRAINING, recipe_of_pretraining(), *flags)


# What it chooses


@pytest.mark.parametrize(("count", "epochs"), [(12, 2000), (200, 500), (500, 250), (1968, 100), (1_000_000, 100)])
def test_few_images_are_seen_more_often(count, epochs):
    assert pretraining.auto(facts(count), chosen())["num_train_epochs"].value == epochs
    assert "num_train_epochs" not in pretraining.auto(facts(count), chosen(max_steps=7))


def test_what_a_teacher_knows_is_learned_sooner():
    epochs = {
        count: pretraining.auto(facts(count), chosen(teacher="x"))["num_train_epochs"].value for count in (200, 3068)
    }
    assert epochs == {200: 500, 3068: 60}


@pytest.mark.parametrize(("count", "epochs"), [(1, 120), (10, 120), (100, 40), (197, 20), (500, 8), (49_999, 8)])
def test_few_labelled_images_are_seen_more_often(count, epochs):
    assert classification.auto(facts(count), chosen(config_name="tiny"))["num_train_epochs"].value == epochs


@pytest.mark.parametrize("side", [8, 33, 64, 95, 96, 127, 128, 3000])
@pytest.mark.parametrize("teacher", [None, "teacher"])
@pytest.mark.parametrize("channels", [1, 3, 13])
def test_models_for_a_cpu_fit_the_images(side, teacher, channels):
    choices = pretraining.auto(facts(500, side=side, channels=channels), chosen(teacher=teacher))
    config = build_config(choices["config_name"].value, choices["config_overrides"].value)
    # No larger than the images, unless these are tiny; at least 16 units to mask.
    assert config.image_size <= max(32, min(side, 128)) and config.unit_grid[0] * config.unit_grid[1] >= 16
    assert config.num_channels == channels
    output = GreenMIMForPreTraining(config)(torch.randn(2, config.num_channels, *config.image_height_and_width))
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize(
    ("memory", "count", "name", "batch"), [(8, 500, "tiny", 32), (24, 50_000, "small", 128), (80, 10**6, "base", 256)]
)
def test_models_for_a_gpu(memory, count, name, batch):
    choices = pretraining.auto(facts(count, gpu_memory=memory, has_bf16=True), chosen())
    assert choices["config_name"].value == name
    assert choices["per_device_train_batch_size"].value == batch
    # Rates of models with a name are the published ones; a GPU's precision is chosen elsewhere.
    assert not {"base_learning_rate", "bf16", "config_overrides"} & set(choices)


def test_a_model_that_is_given_stays(tmp_path):
    rules = {"config_name", "config_overrides", "base_learning_rate", "layer_decay", "warmup_steps"}
    assert not rules & set(pretraining.auto(facts(500), chosen(config_name="base")))
    start = str(write_pretrained(tmp_path))
    assert not {"config_name", "config_overrides"} & set(
        pretraining.auto(facts(500), chosen(model_name_or_path=start))
    )


# Going on


def other_model(folder: Path, **values) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize("teacher", [None, "teacher"])
def test_going_on_is_gentler_than_from_scratch(tmp_path, teacher):
    starts = {
        "small": str(write_pretrained(tmp_path / "small")),
        "swin": other_model(tmp_path / "swin", model_type="swin", embed_dim=8),
        "base": other_model(tmp_path / "base", model_type="greenmim"),
    }
    # From scratch: what `auto` takes for a CPU, and the published rate.
    small = pretraining.auto(facts(500), chosen(teacher=teacher))["base_learning_rate"].value
    rates = {"small": small, "swin": 1.5e-4, "base": 1.5e-4}
    for name, start in starts.items():
        given = chosen(model_name_or_path=start, teacher=teacher)
        values = pretraining.recipe_defaults({**given, "recipe": "continue"})
        assert values["base_learning_rate"] == pytest.approx(rates[name] / 2)
        assert 0 < values["layer_decay"] < 1 and values["warmup_steps"] < 0.05
        by_auto = pretraining.auto(facts(500), given)
        assert {key: by_auto[key].value for key in values} == values
    # A model that is small once its last stage is dropped.
    assert pretraining.recipe_defaults(
        chosen(model_name_or_path=starts["base"], config_overrides="depths=[2],num_heads=[4]", recipe="continue")
    )["base_learning_rate"] == pytest.approx(4e-3)


def test_going_on_needs_a_model():
    with pytest.raises(ValueError, match="`recipe` is 'continue', but there is nothing to go on from: give"):
        read(PRETRAINING, recipe_of_pretraining(), "--recipe", "continue", "--output_dir", "out", "--use_cpu")
    flags = ("--recipe", "continue", "--output_dir", "out", "--use_cpu", "--model_name_or_path", "nowhere")
    with pytest.raises(ValueError, match="`model_name_or_path` is 'nowhere': there is no such folder"):
        read(PRETRAINING, recipe_of_pretraining(), *flags)


def test_what_is_given_wins_over_going_on(tmp_path):
    flags = ["--recipe", "continue", "--output_dir", "out", "--use_cpu"]
    flags += ["--model_name_or_path", write_pretrained(tmp_path / "start"), "--per_device_train_batch_size", 64]
    recipe = recipe_of_pretraining()
    args = read(PRETRAINING, recipe, *flags)[3]
    assert (args.learning_rate, args.layer_decay, args.warmup_steps) == (1e-3, 0.9, 0.01)
    args = read(PRETRAINING, recipe, *flags, "--learning_rate", 0.3, "--layer_decay", 1, "--warmup_steps", 7)[3]
    assert (args.learning_rate, args.layer_decay, args.warmup_steps) == (0.3, 1, 7)
    (tmp_path / "more.yaml").write_text("learning_rate: 0.2\nlayer_decay: 0.8\n")
    args = read(PRETRAINING, recipe, tmp_path / "more.yaml", *flags)[3]
    assert (args.learning_rate, args.layer_decay, args.warmup_steps) == (0.2, 0.8, 0.01)


def test_a_run_goes_on_by_its_recipe(tmp_path):
    write_images(tmp_path / "data", 8)
    start = write_pretrained(tmp_path / "start")
    argv = ["--train_dir", str(tmp_path / "data"), "--model_name_or_path", str(start), "--recipe", "continue"]
    argv += [
        "--do_train",
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "4",
        "--use_cpu",
        "--logging_steps",
        "1",
    ]
    argv += ["--dataloader_num_workers", "0", "--report_to", "none", "--disable_tqdm", "true", "--warmup_steps", "0"]
    run_mim.main([*argv, "--output_dir", str(tmp_path / "out"), "--weight_decay", "0"])
    rates = [entry["learning_rate"] for entry in state_of(tmp_path / "out")["log_history"] if "learning_rate" in entry]
    assert rates[0] == pytest.approx(4e-3 * 4 / 256)
    before, after = weights(start), weights(tmp_path / "out")
    moved = {name: (after[name] - before[name]).abs().max() / sum(rates) for name in before}
    # A weight moves by about its rate in each step of Adam; layers 0 and 5 of 0 to 5.
    first = moved["greenmim.embeddings.norm.bias"]
    last = moved["decoder.decoder_pred.bias"]
    assert 0.9**5 * 0.8 < first < 0.9**5 * 1.2 and 0.8 < last < 1.2


def test_many_labelled_images_take_the_published_recipe():
    choices = classification.auto(facts(50_000), chosen(config_name="base"))
    assert {name: choice.value for name, choice in choices.items()} == classification.RECIPES["swin-base"]
    assert classification.auto(facts(500), chosen(mode="knn", config_name="base")) == {}
    assert classification.auto(facts(500), chosen()) == {}


def test_batches_are_no_larger_than_the_images(tmp_path):
    batches = [
        classification.auto(facts(count), chosen(config_name="tiny"))["per_device_train_batch_size"].value
        for count in (1, 2, 10, 31, 32, 500)
    ]
    assert batches == [1, 2, 8, 16, 32, 32]


@pytest.mark.parametrize("module", [pretraining, classification])
def test_large_images_are_not_kept_decoded(module):
    assert module.auto(facts(500, decoded=9.9), chosen(config_name="tiny"))["decode_once"].value is True
    assert module.auto(facts(500, decoded=10.1), chosen(config_name="tiny"))["decode_once"].value is False


def test_changes_to_a_model_that_is_not_given_are_refused():
    with pytest.raises(ValueError, match=r"`config_overrides` is 'mask_ratio=0.6', by which `recipe` 'auto' says"):
        pretraining.auto(facts(500), chosen(config_overrides="mask_ratio=0.6"))
    choices = pretraining.auto(facts(500), chosen(config_overrides="mask_ratio=0.6", config_name="tiny"))
    assert "config_overrides" not in choices


@pytest.mark.parametrize(
    ("output", "cache"), [("out", "out-teacher"), ("out/", "out-teacher"), (None, "trainer_output-teacher")]
)
def test_features_of_a_teacher_are_kept_beside_the_output(output, cache):
    assert pretraining.auto(facts(500), chosen(teacher="x", output_dir=output))["cache_teacher"].value == cache
    many = pretraining.auto(facts(20_001), chosen(teacher="x"))
    assert not {"cache_teacher", "teacher_crops"} & set(many) and many["target"].value == "teacher"


def test_rates_of_fine_tuning_depend_on_where_it_starts(tmp_path):
    ours, other, taught = write_pretrained(tmp_path / "ours"), tmp_path / "other", tmp_path / "taught"
    write_pretrained(taught, reconstruction_target="features", target_width=4)
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "resnet"}')
    found = {
        "scratch": classification.auto(facts(197), chosen(config_name="tiny")),
        "ours": classification.auto(facts(197), chosen(model_name_or_path=str(ours))),
        "taught": classification.auto(facts(197), chosen(model_name_or_path=str(taught))),
        "other": classification.auto(facts(197), chosen(model_name_or_path=str(other))),
        "linear": classification.auto(facts(197), chosen(model_name_or_path=str(ours), mode="linear")),
    }
    # For 32 images; base rates of classification are for 512.
    rates = {name: choices["base_learning_rate"].value / 16 for name, choices in found.items()}
    assert rates == pytest.approx({"scratch": 1e-3, "ours": 3e-3, "taught": 1e-3, "other": 5e-4, "linear": 1e-2})
    decays = {name: choices["layer_decay"].value for name, choices in found.items() if "layer_decay" in choices}
    assert decays == {"ours": 0.65, "taught": 0.5}


# What it says


@pytest.mark.parametrize("script", ["run_mim", "run_image_classification"])
def test_the_flags_that_are_logged_make_the_same_run(tmp_path, caplog, script):
    write_class_folders(tmp_path / "train", {"a": 5, "b": 4})
    if script == "run_mim":
        types, recipe, flags = PRETRAINING, recipe_of_pretraining(), ["--mask_ratio", "0.6"]
    else:
        types, recipe = CLASSIFICATION, recipe_of_classification()
        flags = ["--model_name_or_path", write_pretrained(tmp_path / "start"), "--drop_path_rate", "0.2"]
    flags += ["--train_dir", tmp_path / "train", "--output_dir", tmp_path / "out", "--do_train", "--use_cpu"]
    by_auto = read(types, recipe, "--recipe", "auto", *flags)
    with caplog.at_level(logging.INFO):
        recipe.explain(*by_auto)
    lines = [record.message.strip() for record in caplog.records]
    assert lines[0].startswith("--recipe auto: 9 images, shorter side about 40 px")
    told = [line for line in lines[1:] if line.startswith("--")]
    assert len(told) > 3 and all(line.endswith(")") and " (" in line for line in told)
    repeated = [value for line in told for value in shlex.split(line[: line.rindex("  (")])]
    named = Recipe(lambda chosen: {}, pretraining.auto, labelled=False)
    for auto, again in zip(by_auto, read(types, named, *repeated, *flags), strict=True):
        values, expected = vars(again), vars(auto)
        assert {name for name in expected if expected[name] != values[name]} <= {"recipe", "distributed_state"}


def test_what_is_given_wins_and_is_told(tmp_path, caplog):
    write_images(tmp_path / "train", 4)
    recipe = recipe_of_pretraining()
    flags = ("--train_dir", tmp_path / "train", "--output_dir", tmp_path / "out", "--use_cpu")
    flags += ("--num_train_epochs", 3, "--learning_rate", 0.5, "--decode_once", "false")
    arguments = read(PRETRAINING, recipe, "--recipe", "auto", *flags)
    assert (arguments[3].num_train_epochs, arguments[3].learning_rate, arguments[3].decode_once) == (3, 0.5, False)
    with caplog.at_level(logging.INFO):
        recipe.explain(*arguments)
    assert "(not --num_train_epochs 2000: 3.0 is given)" in caplog.text
    assert "(not --decode_once true: false is given)" in caplog.text
    assert "base_learning_rate" not in caplog.text


def test_with_labelled_images_the_best_checkpoint_is_kept(tmp_path):
    train = write_class_folders(tmp_path / "train", {"a": 40, "b": 40})
    argv = ["--train_dir", str(train), "--probe_dir", str(train), "--recipe", "auto", "--use_cpu", "--do_train"]
    argv += ["--do_eval", "--max_steps", "10", "--report_to", "none", "--output_dir", str(tmp_path / "model")]
    run_mim.main([*argv, "--dataloader_num_workers", "0", "--disable_tqdm", "true"])
    state = state_of(tmp_path / "model")
    found = {entry["step"]: entry["eval_probe_accuracy"] for entry in state["log_history"] if "eval_loss" in entry}
    assert list(found)[:10] == list(range(1, 11))
    assert state["best_metric"] == max(found.values())
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{max(found, key=found.get)}"


def test_both_scripts_run_by_it(tmp_path):
    train = write_class_folders(tmp_path / "train", {"a": 40, "b": 40})
    common = ["--train_dir", str(train), "--recipe", "auto", "--use_cpu", "--report_to", "none", "--disable_tqdm"]
    common += ["true", "--dataloader_num_workers", "0", "--do_train", "--max_steps", "2"]
    run_mim.main([*common, "--output_dir", str(tmp_path / "model")])
    assert results_of(tmp_path / "model")["train_loss"] > 0
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "classifier")]
    run_image_classification.main([*common, *flags, "--do_eval"])
    assert results_of(tmp_path / "classifier")["eval_loss"] > 0
