"""The script run_mim.py: data, flags, outputs, exact resumption and several processes."""

import json
import logging
import os
import shlex
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

import run_mim
from modeling_greenmim import GreenMIMForPreTraining, GreenMIMModel
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.training_helpers import (
    OVERRIDES,
    ROOT,
    assert_same_weights,
    encoded,
    flags,
    kill_after_checkpoint,
    messages,
    noise_image,
    results_of,
    run,
    run_in_processes,
    start,
    state_of,
    tiny_config,
    weights,
    write_broken,
    write_images,
    write_webdataset,
)
from training_greenmim.pretraining.targets import TargetArguments
from training_greenmim.runs.arguments import MIMTrainingArguments, parse_arguments
from training_greenmim.runs.models import MODEL_SIZES, build_config, parse_overrides


def card_of(output: Path) -> str:
    return (output / "README.md").read_text()


def parse_run_mim(argv: list[str]) -> tuple:
    return parse_arguments((run_mim.ModelArguments, run_mim.DataArguments, MIMTrainingArguments), argv)


def write_parquet(folder: Path, count: int, split: str = "train", first_seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"photo": ImageFeature(), "label": datasets.Value("int64")})
    photos = [
        {"path": f"{index}.png", "bytes": encoded(noise_image(first_seed + index, 32, 32))} for index in range(count)
    ]
    data = datasets.Dataset.from_dict({"photo": photos, "label": [0] * count}, features)
    data.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


# Data


def test_default_data_are_the_elpv_photographs(tmp_path):
    output = run(
        tmp_path / "out",
        *("--do_train", "--do_eval", "--max_steps", 2, "--max_train_samples", 8, "--max_eval_samples", 5),
    )
    assert state_of(output)["global_step"] == 2
    card = card_of(output)
    assert "ELPV" in card and "8 for training and 5 for evaluation" in card and "The split is fixed" in card
    assert ModelCard.load(output / "README.md").data.license == "cc-by-nc-sa-4.0"


def test_nested_folder_with_a_share_held_out(tmp_path):
    write_images(tmp_path / "data" / "a" / "b", 6)
    write_images(tmp_path / "data" / "c", 4)
    output = run(
        tmp_path / "out",
        "--train_dir",
        tmp_path / "data",
        "--do_train",
        "--do_eval",
        "--max_steps",
        1,
        *("--train_val_split", 0.3),
    )
    assert "`data`: 7 for training and 3 for evaluation." in card_of(output)
    assert ModelCard.load(output / "README.md").data.license is None


def test_held_out_share_is_disjoint_and_fixed_by_the_seed(tmp_path):
    write_images(tmp_path / "data", 20)

    def split(seed):
        argv = flags(tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--do_eval", "--seed", seed)
        _, data, args = parse_run_mim([*argv, "--train_val_split", "0.25"])
        config = tiny_config()
        train, evaluation = run_mim.build_datasets(
            data, TargetArguments(), args, config, build_image_processor(config), teacher=None
        )
        return tuple({record["path"] for record in part.records["image"]} for part in (train, evaluation))

    (train, evaluation), again, other = split(1), split(1), split(2)
    assert (len(train), len(evaluation)) == (15, 5) and not train & evaluation
    assert again == (train, evaluation) and other != (train, evaluation)


def test_validation_folder(tmp_path):
    write_images(tmp_path / "data", 4)
    write_images(tmp_path / "held-out", 3, first_seed=10)
    output = run(
        tmp_path / "out",
        *("--train_dir", tmp_path / "data", "--validation_dir", tmp_path / "held-out"),
        *("--do_train", "--do_eval", "--max_steps", 1),
    )
    assert "4 for training and 3 for evaluation" in card_of(output)


def test_all_images_train_when_nothing_is_evaluated(tmp_path):
    write_images(tmp_path / "data", 10)
    output = run(tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--max_steps", 1)
    assert "`data`: 10 for training." in card_of(output)
    assert not (output / "reconstruction.png").exists() and "reconstruction.png" not in card_of(output)


def test_more_samples_than_there_are_is_all_of_them(tmp_path):
    write_images(tmp_path / "data", 5)
    output = run(
        tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--max_steps", 1, "--max_train_samples", 99
    )
    assert "5 for training" in card_of(output)


def test_local_parquet_data_set(tmp_path):
    data = write_parquet(tmp_path / "data", 6)
    write_parquet(data, 3, split="test", first_seed=20)
    output = run(tmp_path / "out", "--dataset_name", data, "--do_train", "--do_eval", "--num_train_epochs", 2)
    assert state_of(output)["global_step"] == 4
    assert "6 for training and 3 for evaluation" in card_of(output)


def test_image_column_can_be_named_and_a_wrong_name_is_refused(tmp_path):
    data = write_parquet(tmp_path / "data", 4)
    options = ("--dataset_name", data, "--do_train", "--max_steps", 1)
    run(tmp_path / "out", *options, "--image_column_name", "photo")
    with pytest.raises(ValueError, match=r"`image_column_name` is 'picture'.*\['photo', 'label'\]"):
        run(tmp_path / "other", *options, "--image_column_name", "picture")


def test_streaming_goes_through_the_data_again_and_again(tmp_path):
    images = [encoded(noise_image(seed)) for seed in range(11)]
    data = write_webdataset(tmp_path / "data", images[:8])
    write_webdataset(data, images[8:], split="validation")
    output = run(tmp_path / "out", "--dataset_name", data, "--streaming", "--do_train", "--do_eval", "--max_steps", 5)
    assert state_of(output)["global_step"] == 5
    assert results_of(output)["eval_loss"] > 0 and (output / "reconstruction.png").exists()
    assert "as a stream" in card_of(output)


def test_grey_model(tmp_path):
    write_images(tmp_path / "data", 6)
    output = run(
        tmp_path / "out",
        "--train_dir",
        tmp_path / "data",
        "--do_train",
        "--do_eval",
        "--max_steps",
        1,
        overrides=OVERRIDES + ",num_channels=1",
    )
    assert Image.open(output / "reconstruction.png").mode == "L"
    assert len(AutoImageProcessor.from_pretrained(output).image_mean) == 1


def test_non_square_model(tmp_path):
    write_images(tmp_path / "data", 6)
    output = run(
        tmp_path / "out",
        "--train_dir",
        tmp_path / "data",
        "--do_train",
        "--do_eval",
        "--max_steps",
        1,
        overrides=OVERRIDES.replace("image_size=32", "image_size=[32,48]"),
    )
    processor = AutoImageProcessor.from_pretrained(output)
    assert (processor.size["height"], processor.size["width"]) == (32, 48)


# Arguments


@pytest.mark.parametrize("kind", ["yaml", "yml", "json"])
def test_file_of_arguments_and_flags_that_win(tmp_path, kind):
    values = {
        "output_dir": str(tmp_path / "out"),
        "train_dir": "photos",
        "do_train": True,
        "max_steps": 7,
        "config_name": "tiny",
        "base_learning_rate": 0.001,
        "mask_per_sample": True,
        "per_device_train_batch_size": 16,
        "use_cpu": True,
    }
    path = tmp_path / f"run.{kind}"
    path.write_text(json.dumps(values) if kind == "json" else yaml.safe_dump(values))
    model, data, args = parse_run_mim([str(path)])
    assert (model.config_name, data.train_dir, args.max_steps) == ("tiny", "photos", 7)
    assert args.do_train and args.mask_per_sample and args.learning_rate == pytest.approx(0.001 * 16 / 256)
    more = ["--max_steps", "3", "--config_name", "small", "--mask_per_sample", "false", "--do_eval"]
    model, data, args = parse_run_mim([str(path), *more])
    assert (model.config_name, data.train_dir, args.max_steps) == ("small", "photos", 3)
    assert args.do_train and args.do_eval and not args.mask_per_sample


def test_numbers_with_exponents_in_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\nlearning_rate: 1e-3\nadam_epsilon: 1.0e-7\n")
    args = parse_run_mim([str(path)])[2]
    assert (args.learning_rate, args.adam_epsilon) == (1e-3, 1e-7)


def test_example_is_a_valid_file():
    argv = [str(ROOT / "examples" / "pretrain_elpv.yaml"), "--use_cpu", "true"]
    model, data, args = parse_run_mim(argv)
    assert args.do_train and args.do_eval and data.train_dir is None and data.dataset_name is None
    assert build_config(model.config_name, model.config_overrides).image_size == 128


SIZES = {"tiny": 27.5, "small": 48.8, "base": 86.7, "base-win14": 86.9, "large-win14": 195.2, "twins-large": 98.2}


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_are_those_of_swin_and_twins(name):
    config = build_config(name)
    assert config.window_size == (14 if name.endswith("win14") else 7) and config.image_size == 224
    with torch.device("meta"):
        model = GreenMIMModel(config)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(SIZES[name], abs=0.5)
    assert set(MODEL_SIZES) == set(SIZES)


def test_config_overrides():
    assert parse_overrides(None) == {} and parse_overrides("") == {}
    config = build_config("tiny", OVERRIDES + ",mask_ratio=0.5,norm_pix_loss=false,hidden_act=relu")
    expected = tiny_config(mask_ratio=0.5, norm_pix_loss=False, hidden_act="relu")
    assert config.to_dict() == expected.to_dict()
    assert build_config("base", "image_size=[64,96]").image_height_and_width == (64, 96)


def test_config_overrides_with_exponents():
    config = build_config("tiny", "layer_norm_eps=1e-5,initializer_range=1.0e-2")
    assert (config.layer_norm_eps, config.initializer_range) == (1e-5, 0.01)


def test_config_name_can_be_a_folder(tmp_path):
    tiny_config(mask_ratio=0.5).save_pretrained(tmp_path)
    config = build_config(str(tmp_path), "image_size=64,depths=[1,1,1],num_heads=[1,2,2]")
    assert (config.mask_ratio, config.image_size, config.depths, config.embed_dim) == (0.5, 64, [1, 1, 1], 8)
    assert config.encoder_stride == 16
    with pytest.raises((ValueError, StrictDataclassError), match="`num_heads` is"):
        build_config(str(tmp_path), "depths=[1,1,1]")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("depths=[2,2", r"`config_overrides` is 'depths=\[2,2'"),
        ("imagesize=32", r"`config_overrides` names \['imagesize'\]"),
        ("depths=2,2", r"`config_overrides` names \[2\]"),
        ("image_size", "image_size"),
        ("image_size=100", "`image_size` is 100"),
        ("depths=[2,2]", "`num_heads` is"),
        ("mask_ratio=1.0", r"`mask_ratio` is 1\.0"),
        ("embed_dim=wide", "embed_dim"),
    ],
)
def test_wrong_config_overrides_are_refused(text, error, tmp_path):
    with pytest.raises((ValueError, StrictDataclassError), match=error):
        run(tmp_path / "out", "--do_train", "--max_steps", 1, overrides=text)
    assert not (tmp_path / "out").exists()


CONTRADICTIONS = [
    (["--model_name_or_path", "m", "--config_name", "tiny"], r"`model_name_or_path` is 'm'.*`config_name`"),
    (["--model_name_or_path", "m", "--config_overrides", "depths=[2]"], r"`model_name_or_path` is 'm'"),
    (["--dataset_name", "d", "--train_dir", "t"], "`dataset_name` is 'd' and `train_dir` is 't'"),
    (["--validation_dir", "v"], "`validation_dir` is 'v', but there is no `train_dir`"),
    (["--validation_dir", "v", "--dataset_name", "d"], "`validation_dir` is 'v', but there is no `train_dir`"),
    (["--streaming"], "`streaming` is for a `dataset_name`"),
    (["--streaming", "--train_dir", "t"], "`streaming` is for a `dataset_name`"),
    (["--train_val_split", "0"], r"`train_val_split` is 0\.0"),
    (["--train_val_split", "1.5"], r"`train_val_split` is 1\.5"),
    (["--min_crop_scale", "0"], r"`min_crop_scale` is 0\.0"),
    (["--min_crop_scale", "1.1"], r"`min_crop_scale` is 1\.1"),
    (["--learning_rate", "1e-3", "--base_learning_rate", "1e-3"], "`learning_rate` is.*`base_learning_rate` is"),
]


@pytest.mark.parametrize(("more", "error"), CONTRADICTIONS, ids=[" ".join(case[0]) for case in CONTRADICTIONS])
def test_contradicting_arguments_are_refused(more, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        run_mim.main(["--output_dir", str(tmp_path / "out"), "--do_train", "--use_cpu", "true", *more])
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="do_train"):
        run(tmp_path / "out")


def test_stream_needs_max_steps(tmp_path):
    data = write_webdataset(tmp_path / "data", [encoded(noise_image(0))])
    with pytest.raises(ValueError, match=r"`streaming` is set.*`max_steps`"):
        run(tmp_path / "out", "--dataset_name", data, "--streaming", "--do_train")


def test_stream_cannot_be_decoded_once(tmp_path):
    data = write_webdataset(tmp_path / "data", [encoded(noise_image(0))])
    with pytest.raises(ValueError, match=r"`decode_once` is set.*`streaming`"):
        run(tmp_path / "out", "--dataset_name", data, "--streaming", "--decode_once", "--do_train", "--max_steps", 1)


def test_decoding_once_changes_no_loss(tmp_path):
    write_images(tmp_path / "data", 6)
    options = ("--train_dir", tmp_path / "data", "--do_train", "--max_steps", 3)
    losses = [
        results_of(run(tmp_path / name, *options, *flag))["train_loss"]
        for name, flag in (("each-time", ()), ("once", ("--decode_once",)))
    ]
    assert losses[0] == losses[1]


def test_stream_without_a_validation_split_cannot_be_evaluated(tmp_path):
    data = write_parquet(tmp_path / "data", 4)
    with pytest.raises(ValueError, match=r"`do_eval` is set.*validation"):
        run(tmp_path / "out", "--dataset_name", data, "--streaming", "--do_train", "--do_eval", "--max_steps", 1)


def test_data_set_without_a_training_split_is_refused(tmp_path):
    data = write_parquet(tmp_path / "data", 4, split="test")
    with pytest.raises(ValueError, match=r"no split train but \['test'\]"):
        run(tmp_path / "out", "--dataset_name", data, "--do_train", "--max_steps", 1)


# Outputs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two epochs over a folder with two corrupt images."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "data", 12)
    write_broken(folder / "data" / "half.png")
    (folder / "data" / "nothing.jpg").write_bytes(b"")
    write_images(folder / "held-out", 5, first_seed=30)
    return run(
        folder / "out",
        *("--train_dir", folder / "data", "--validation_dir", folder / "held-out", "--do_train", "--do_eval"),
        *("--num_train_epochs", 2, "--eval_strategy", "epoch"),
    )


def test_outputs_at_the_end(finished):
    expected = {
        *("README.md", "all_results.json", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("trainer_state.json", "loss_curve.png", "reconstruction.png", "reconstructions"),
    }
    assert expected <= set(os.listdir(finished))
    results, state = results_of(finished), state_of(finished)
    assert np.isfinite([results["train_loss"], results["eval_loss"]]).all()
    assert state["global_step"] == 8 and state["epoch"] == 2.0
    assert {"loss", "learning_rate"} <= set(state["log_history"][0])
    assert any("images_per_second" in entry for entry in state["log_history"])
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [4, 8, 8]
    for name, size in (("loss_curve.png", None), ("reconstruction.png", (3 * 32 + 8, 4 * 32 + 12))):
        image = Image.open(finished / name)
        image.load()
        assert size is None or image.size == size


def test_saved_model_and_image_processor_load(finished):
    model, loading = AutoModelForPreTraining.from_pretrained(finished, output_loading_info=True)
    assert isinstance(model, GreenMIMForPreTraining)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    saved = weights(finished)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if name in saved)
    encoder = AutoModel.from_pretrained(finished)
    assert isinstance(encoder, GreenMIMModel)
    assert torch.equal(encoder.layernorm.weight, saved["greenmim.layernorm.weight"])
    processor = AutoImageProcessor.from_pretrained(finished)
    assert (processor.size["height"], processor.size["width"]) == (32, 32)
    assert processor.resample == Image.Resampling.BICUBIC
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(processor.image_std) == [0.229, 0.224, 0.225]
    outputs = encoder(**processor(noise_image(0), return_tensors="pt"))
    assert outputs.last_hidden_state.shape == (1, 16, 16)


def test_model_card_tells_data_recipe_results_and_command(finished):
    card = card_of(finished)
    assert "`data`: 14 for training and 5 for evaluation. 2 of them could not be read." in card
    assert "| steps | 8 |" in card and "| batch | 4 |" in card and "AdamW, betas 0.9/0.95" in card
    assert (
        "| epochs | 2" in card
        and "| masks | random, ratio 0.75, one per step and process |" in card
        and "8x8 px" in card
    )
    assert f"| eval_loss | {results_of(finished)['eval_loss']:.5g} |" in card
    assert "predicts the hidden ones (pixels normalised per unit)" in card
    assert "(loss_curve.png)" in card and "(reconstruction.png)" in card
    (command,) = [line for line in card.splitlines() if line.startswith("python run_mim.py ")]
    argv = shlex.split(command)[2:]
    model, data, args = parse_run_mim(argv)
    assert data.train_dir == str(finished.parent / "data") and args.output_dir == str(finished)
    assert model.config_overrides == OVERRIDES
    loaded = ModelCard.load(finished / "README.md")
    assert "greenmim" in loaded.data.tags and loaded.data.library_name == "transformers"
    measured = {result.metric_type: result for result in loaded.data.eval_results}
    assert set(measured) == {"loss", "feature_std"}, "the images are too few for RankMe, and have no labels"
    result = measured["loss"]
    assert result.dataset_name == "data"
    assert result.metric_value == pytest.approx(results_of(finished)["eval_loss"], rel=1e-4)


def test_end_tells_where_the_picture_is(tmp_path, caplog):
    write_images(tmp_path / "data", 6)
    caplog.set_level(logging.INFO)
    run(tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--do_eval", "--max_steps", 1)
    last = messages(caplog, logging.INFO).splitlines()[-1]
    assert last.endswith(str(tmp_path / "out" / "reconstructions" / "step-000001.png"))
    assert Path(last.split(": ")[-1]).is_file()


def test_model_can_be_evaluated_alone(finished, tmp_path):
    write_images(tmp_path / "data", 3, first_seed=60)
    argv = ["--output_dir", tmp_path / "out", "--model_name_or_path", finished, "--train_dir", tmp_path / "data"]
    argv += ["--validation_dir", finished.parent / "held-out", "--do_eval", "--use_cpu", "true"]
    argv += ["--report_to", "none", "--dataloader_num_workers", "0", "--per_device_eval_batch_size", "4"]
    run_mim.main([str(value) for value in argv])
    assert results_of(tmp_path / "out")["eval_loss"] == pytest.approx(results_of(finished)["eval_loss"], rel=1e-5)


def test_model_name_or_path_goes_on_from_a_checkpoint(finished, tmp_path):
    argv = ["--output_dir", tmp_path / "out", "--model_name_or_path", finished, "--do_train", "--max_steps", 1]
    argv += ["--train_dir", finished.parent / "held-out", "--learning_rate", 0.0, "--use_cpu", "true"]
    argv += ["--report_to", "none", "--dataloader_num_workers", "0", "--save_strategy", "no"]
    run_mim.main([str(value) for value in argv])
    assert_same_weights(finished, tmp_path / "out")
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 32


# Bad input


def test_corrupt_images_are_skipped_counted_and_named(tmp_path, caplog):
    write_images(tmp_path / "data", 6)
    write_broken(tmp_path / "data" / "half.png")
    write_broken(tmp_path / "data" / "000-first.png")
    output = run(tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--num_train_epochs", 2)
    log = messages(caplog)
    assert log.count("half.png") == 1 and "000-first.png" in log
    assert state_of(output)["log_history"][-1]["unreadable_images"] == 2
    assert "2 of them could not be read" in card_of(output)


def test_corrupt_images_of_a_data_set_are_counted_once(tmp_path):
    features = datasets.Features({"image": ImageFeature()})
    contents = [encoded(noise_image(0)), b"broken", encoded(noise_image(1)), encoded(noise_image(2))]
    photos = [{"path": f"{index}.png", "bytes": content} for index, content in enumerate(contents)]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"image": photos}, features).to_parquet(str(tmp_path / "data" / "train.parquet"))
    output = run(tmp_path / "out", "--dataset_name", tmp_path / "data", "--do_train", "--num_train_epochs", 3)
    assert state_of(output)["log_history"][-1]["unreadable_images"] == 1


@pytest.mark.parametrize("argument", ["train_dir", "validation_dir"])
def test_folder_without_a_readable_image_is_an_error_before_anything_is_written(tmp_path, argument):
    write_images(tmp_path / "good", 6)
    for name in "ab":
        write_broken(tmp_path / "bad" / f"{name}.png")
    folders = {"train_dir": tmp_path / "good", "validation_dir": tmp_path / "good", argument: tmp_path / "bad"}
    options = [part for name, folder in folders.items() for part in (f"--{name}", folder)]
    with pytest.raises(ValueError, match=rf"`{argument}`.*no readable image.*a\.png"):
        run(tmp_path / "out", *options, "--do_train", "--do_eval", "--max_steps", 1)
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_folders_are_errors_before_anything_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, error in (("nowhere", "not a folder"), ("empty", "no image file")):
        with pytest.raises(ValueError, match=f"`train_dir`.*{folder}.*{error}"):
            run(tmp_path / "out", "--train_dir", tmp_path / folder, "--do_train", "--max_steps", 1)
    assert not (tmp_path / "out").exists()


def test_output_folder_that_holds_a_run_is_refused(tmp_path):
    write_images(tmp_path / "data", 4)
    options = ("--train_dir", tmp_path / "data", "--do_train", "--max_steps", 1)
    run(tmp_path / "out", *options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(
        ValueError, match=r"`output_dir` is '.*out', which already holds a run.*resume_from_checkpoint"
    ):
        run(tmp_path / "out", *options)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    # A run that was killed leaves a checkpoint only; one that is not whole is of no use and in nobody's way.
    (tmp_path / "killed" / "checkpoint-5").mkdir(parents=True)
    run(tmp_path / "killed", *options)
    (tmp_path / "whole" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "whole" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"already holds a run \(checkpoint-5\)"):
        run(tmp_path / "whole", *options)


def test_output_folder_with_other_files_is_no_run(tmp_path):
    write_images(tmp_path / "data", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("kept")
    run(tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--max_steps", 1)
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"


def test_resuming_without_a_whole_checkpoint_is_an_error(tmp_path):
    write_images(tmp_path / "data", 4)
    options = ("--train_dir", tmp_path / "data", "--do_train", "--max_steps", 1, "--resume_from_checkpoint")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        run(tmp_path / "out", *options, "true")
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    for value in ("true", tmp_path / "out" / "checkpoint-3"):
        with pytest.raises(ValueError, match="no whole checkpoint"):
            run(tmp_path / "out", *options, value)


@pytest.mark.parametrize(("length", "value"), [("--max_steps", 2), ("--num_train_epochs", 1)])
def test_resuming_a_finished_run_is_an_error_that_names_what_to_raise(tmp_path, length, value):
    write_images(tmp_path / "data", 8)
    options = ("--train_dir", tmp_path / "data", "--do_train", "--save_strategy", "epoch")
    run(tmp_path / "out", *options, length, value)
    before = weights(tmp_path / "out")
    with pytest.raises(ValueError, match=f"end of its run.*raise {length[2:]}"):
        run(tmp_path / "out", *options, length, value, "--resume_from_checkpoint", "true")
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "out").items())


# Exact resumption


@pytest.mark.slow
def test_killed_and_resumed_run_equals_one_that_was_not(tmp_path):
    """With workers, micro-batches, dropout, a mask for each image and an image that cannot be read."""
    overrides = OVERRIDES + ",drop_path_rate=0.4,hidden_dropout_prob=0.1"
    write_images(tmp_path / "data", 27)  # 7 steps an epoch, the last one smaller
    write_broken(tmp_path / "data" / "broken.png")
    common = ["--train_dir", tmp_path / "data", "--do_train", "--max_steps", 30, "--mask_per_sample"]
    common += ["--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2]
    whole = run(tmp_path / "whole", *common, overrides=overrides)

    saving = [*common, "--save_strategy", "steps", "--save_steps", 3, "--dataloader_num_workers", 2]
    killed = tmp_path / "killed"
    kill_after_checkpoint(start(flags(killed, *saving, overrides=overrides)), killed / "checkpoint-6")
    assert not (killed / "model.safetensors").exists()
    newest = max(int(path.parent.name.split("-")[1]) for path in killed.glob("checkpoint-*/trainer_state.json"))
    assert 6 <= newest < 30
    assert newest % 7, "killed in mid-epoch"
    (killed / "checkpoint-29").mkdir()  # what a kill while saving leaves
    (killed / "checkpoint-29" / "model.safetensors").write_bytes(b"half")

    resuming = [*saving, "--save_strategy", "no", "--resume_from_checkpoint", "true"]
    run(killed, *resuming, overrides=overrides)
    assert_same_weights(whole, killed)
    state, expected = state_of(killed), state_of(whole)
    assert state["global_step"] == 30 and state["epoch"] == expected["epoch"]
    losses, wanted = ([entry["loss"] for entry in s["log_history"] if "loss" in entry] for s in (state, expected))
    assert losses[newest:] == wanted[newest:]
    assert_different_weights(whole, killed / "checkpoint-6")


def assert_different_weights(first: Path, second: Path) -> None:
    first, second = weights(first), weights(second)
    assert not any(torch.equal(first[name], second[name]) for name in first if first[name].ndim > 1)


def test_resumption_at_any_place_of_an_epoch_is_exact(tmp_path):
    write_images(tmp_path / "data", 14)  # 4 steps an epoch
    common = ["--train_dir", tmp_path / "data", "--do_train", "--max_steps", 10]
    whole = run(tmp_path / "whole", *common, "--save_strategy", "steps", "--save_steps", 1)
    for steps in (2, 4, 9):  # within the first epoch, at its end, in the third
        checkpoint = tmp_path / "whole" / f"checkpoint-{steps}"
        resumed = run(tmp_path / f"resumed-{steps}", *common, "--resume_from_checkpoint", checkpoint)
        assert_same_weights(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resumption_of_a_stream_is_exact(tmp_path, workers):
    # About 4 steps a pass: the first checkpoint is in the first pass, the other in the second.
    data = write_webdataset(tmp_path / "data", [encoded(noise_image(seed)) for seed in range(14)])
    common = ["--dataset_name", data, "--streaming", "--do_train", "--max_steps", 8]
    common += ["--dataloader_num_workers", workers]
    whole = run(tmp_path / "whole", *common, "--save_strategy", "steps", "--save_steps", 3)
    for steps in (3, 6):
        checkpoint = tmp_path / "whole" / f"checkpoint-{steps}"
        resumed = run(tmp_path / f"resumed-{steps}", *common, "--resume_from_checkpoint", checkpoint)
        assert_same_weights(whole, resumed)


def test_evaluating_and_saving_do_not_change_the_run(tmp_path):
    write_images(tmp_path / "data", 12)
    write_images(tmp_path / "held-out", 3, first_seed=30)
    folders = ("--train_dir", tmp_path / "data", "--validation_dir", tmp_path / "held-out")
    common = (*folders, "--do_train", "--max_steps", 6)
    overrides = OVERRIDES + ",drop_path_rate=0.4"
    plain = run(tmp_path / "plain", *common, overrides=overrides)
    busy = run(
        tmp_path / "busy",
        *(*common, "--do_eval", "--eval_strategy", "steps", "--eval_steps", 1),
        *("--save_strategy", "steps", "--save_steps", 2, "--dataloader_num_workers", 2),
        overrides=overrides,
    )
    assert_same_weights(plain, busy)


# Several processes

RANK_SCRIPT = """
import json, sys
from pathlib import Path
import run_mim
from training_greenmim.pretraining.trainer import MIMTrainer
from training_greenmim.runs.processes import leave_processes

class Recording(MIMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            folder = Path(sys.argv[1])
            folder.mkdir(exist_ok=True)
            with open(folder / f"{self.args.process_index}.jsonl", "a") as file:
                sums = inputs["pixel_values"].flatten(1).sum(1, dtype=int).tolist()
                file.write(json.dumps({"mask": result[1].mask[0].tolist(), "images": sums}) + "\\n")
        return result if return_outputs else result[0]

run_mim.MIMTrainer = Recording
run_mim.main(sys.argv[2:])
leave_processes()
"""


def flat_image(value: int) -> bytes:
    """An image of one level of grey, which tells it apart after cropping."""
    return encoded(Image.new("RGB", (48, 40), (value, value, value)))


def launch(tmp_path: Path, argv: list[str]) -> list[list[dict]]:
    """Runs the script in two processes; returns what each step of each of them saw."""
    script = tmp_path / "recorded.py"
    script.write_text(RANK_SCRIPT)
    run_in_processes(script, [str(tmp_path / "seen"), *argv, "--ddp_backend", "gloo"])
    files = [tmp_path / "seen" / f"{rank}.jsonl" for rank in range(2)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.slow
def test_two_processes_share_the_images_and_draw_their_own_masks(tmp_path):
    write_images(tmp_path / "data", 10)
    for index in range(6):
        write_broken(tmp_path / "data" / f"{index:03}-broken.png")
    write_images(tmp_path / "held-out", 3, first_seed=30)
    options = ("--train_dir", tmp_path / "data", "--validation_dir", tmp_path / "held-out", "--do_train", "--do_eval")
    options = (*options, "--decode_once", "--num_train_epochs", 1, "--per_device_train_batch_size", 2)
    ranks = launch(tmp_path, flags(tmp_path / "out", *options))
    assert [len(steps) for steps in ranks] == [4, 4]
    masks = [tuple(step["mask"]) for steps in ranks for step in steps]
    assert len(set(masks)) >= 7
    images = Counter(value for steps in ranks for step in steps for value in step["images"])
    assert sorted(images.values()) == [1] * 16, "each of the 16 files once in an epoch, or another image, cropped anew"
    output = tmp_path / "out"
    assert "| batch | 4 |" in card_of(output) and (output / "model.safetensors").exists()
    rates = [entry["learning_rate"] for entry in state_of(output)["log_history"] if "learning_rate" in entry]
    assert max(rates) == pytest.approx(0.1 * 4 / 256)
    assert np.isfinite(results_of(output)["eval_loss"])
    assert "6 of them could not be read" in card_of(output), "those that any process met"


@pytest.mark.slow
def test_two_processes_share_a_stream(tmp_path):
    """Each reads shards of its own, though their number is odd; and they meet an unreadable image in evaluation."""
    data = write_webdataset(tmp_path / "data", [flat_image(seed) for seed in range(18)], shards=3)
    held_out = [encoded(noise_image(seed)) for seed in range(5)]
    held_out[1] = held_out[1][:100]
    write_webdataset(tmp_path / "data", held_out, split="validation")
    options = ("--dataset_name", data, "--streaming", "--do_train", "--do_eval", "--max_steps", 3)
    ranks = launch(tmp_path, flags(tmp_path / "out", *options, "--per_device_train_batch_size", 2))
    assert [len(steps) for steps in ranks] == [3, 3]
    numbers = [[round(value / (3 * 32 * 32)) for step in steps for value in step["images"]] for steps in ranks]
    shards = [{number % 3 for number in part} for part in numbers]
    assert not shards[0] & shards[1] and sum(map(len, shards)) == 3
    assert len(set(numbers[0])) == len(set(numbers[1])) == 6, "no image twice in a pass"
    assert np.isfinite(results_of(tmp_path / "out")["eval_loss"])
    assert len({tuple(step["mask"]) for steps in ranks for step in steps}) >= 5


# Compiled


@pytest.mark.slow
def test_a_compiled_run_is_the_run_as_it_is(tmp_path):
    """One graph, though evaluations lie between its steps and its images do not fill whole batches."""
    write_images(tmp_path / "data", 10)
    write_images(tmp_path / "held-out", 4, first_seed=30)
    folders = ("--train_dir", tmp_path / "data", "--validation_dir", tmp_path / "held-out")
    evaluating = ("--do_eval", "--eval_strategy", "steps", "--eval_steps", 2, "--num_pictures", 0)
    common = (*folders, "--do_train", *evaluating, "--max_steps", 6, "--layer_decay", 0.7)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(tmp_path / "compiled", *common, "--torch_compile_backend", "aot_eager")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    # Two batches of four an epoch.
    assert state_of(compiled)["epoch"] == 3.0
    plain = run(tmp_path / "plain", *common, "--dataloader_drop_last")
    expected = load_file(plain / "model.safetensors")
    for name, value in load_file(compiled / "model.safetensors").items():
        assert torch.allclose(value, expected[name], atol=1e-4), name
    assert results_of(compiled)["eval_loss"] == pytest.approx(results_of(plain)["eval_loss"], rel=1e-4)


def test_a_compiled_step_needs_a_whole_batch(tmp_path):
    write_images(tmp_path / "data", 3)
    with pytest.raises(ValueError, match=r"`per_device_train_batch_size` is 4.*there are 3 training images"):
        run(tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--max_steps", 1, "--torch_compile")
