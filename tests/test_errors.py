"""Errors that users can mend: one message each, before work starts; checkpoints that are evaluated; missing extras."""

import errno
import re
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, ViTConfig, ViTForImageClassification
from transformers.utils.import_utils import BACKENDS_MAPPING, requires_backends

import run_mim
from modeling_greenmim import GreenMIMForPreTraining, GreenMIMModel
from tests.training_helpers import (
    OVERRIDES,
    ROOT,
    assert_same_weights,
    classification_flags,
    classify,
    flags,
    messages,
    predictions_of,
    results_of,
    run,
    state_of,
    subprocess_environment,
    tiny_config,
    write_class_folders,
    write_images,
    write_pretrained,
)
from training_greenmim.runs.extras import MissingPackageError, is_installed, require
from training_greenmim.runs.models import build_config
from training_greenmim.runs.script import run_script
from training_greenmim.runs.trainer import NonFiniteLossError


def shown(capsys, main) -> str:
    """What the command line shows of a failing script; it must end with exit code 2."""
    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and len(re.findall(r"(?:^|[\r\n])error: ", captured.err)) == 1
    return captured.err


def raising(error: Exception):
    def main():
        raise error

    return main


# One message


@pytest.mark.parametrize(
    "error",
    [
        ValueError("`mode` is 'x'"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "photos"),
        PermissionError(errno.EACCES, "Permission denied", "photos"),
        NonFiniteLossError("The loss is not a finite number at step 3."),
        SafetensorError("header too large"),
        MissingPackageError("This run needs kornia"),
        ImportError("TimmWrapperModel requires the timm library but it was not found in your environment."),
        PackageNotFoundError("bitsandbytes"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_expected_errors_are_one_message(error, capsys, monkeypatch):
    assert str(error).strip(".") in shown(capsys, raising(error))
    monkeypatch.setattr(sys, "argv", ["run_mim.py", "--debug"])
    with pytest.raises(type(error)):
        run_script(raising(error))


def failing_import(code: str) -> ImportError:
    with pytest.raises(ImportError) as raised:
        exec(code)
    return raised.value


def test_missing_back_ends_of_transformers_are_one_message(capsys, monkeypatch):
    monkeypatch.setitem(BACKENDS_MAPPING, "timm", (lambda: False, "{0} requires the timm library."))
    message = shown(capsys, lambda: requires_backends(GreenMIMModel, ["timm"]))
    assert "error: GreenMIMModel requires the timm library." in message


@pytest.mark.parametrize("code", ["import defect", "from json import defect"])
def test_imports_that_fail_are_defects(code):
    error = failing_import(code)
    with pytest.raises(type(error), match="defect"):
        run_script(raising(error))


@pytest.mark.parametrize("error", [TypeError("defect"), KeyError("defect"), RuntimeError("defect")])
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error), match="defect"):
        run_script(raising(error))


def test_only_the_first_process_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        run_script(raising(ValueError("wrong")))
    assert end.value.code == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("script", ["run_mim.py", "run_image_classification.py"])
def test_scripts_show_one_message(script, capsys, monkeypatch, tmp_path):
    argv = ["--output_dir", str(tmp_path / "out"), "--do_train", "--config_name", "huge", "--use_cpu", "true"]
    monkeypatch.setattr(
        sys, "argv", [script, *argv, "--train_dir", str(write_class_folders(tmp_path / "data", {"red": 2, "blue": 2}))]
    )
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in error
    assert "error: `config_name` is 'huge'; it must be one of tiny, small, base" in error


def test_debug_is_an_argument_of_the_scripts(tmp_path, monkeypatch):
    argv = ["--output_dir", str(tmp_path / "out"), "--debug", "--do_train", "--config_name", "huge", "--use_cpu"]
    monkeypatch.setattr(sys, "argv", ["run_mim.py", *argv])
    with pytest.raises(ValueError, match="`config_name` is 'huge'"):
        runpy.run_path(str(ROOT / "run_mim.py"), run_name="__main__")


# Full disks


def write_to_full_disk():
    with open("/dev/full", "w") as file:
        file.write("x")


@pytest.mark.parametrize(
    "main",
    [
        write_to_full_disk,
        lambda: torch.save({"step": torch.zeros(1000)}, "/dev/full"),
        raising(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        raising(OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
    ids=["a file", "torch", "safetensors", "quota"],
)
def test_a_full_disk_is_told(main, capsys):
    assert "No space left on device" in shown(capsys, main)


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "data", 6)
    out = tmp_path / "out"
    options = ("--train_dir", tmp_path / "data", "--do_train", "--max_steps", 3, "--save_strategy", "steps")
    save = torch.save

    def full(content, *args, **kwargs):
        if (out / "checkpoint-1" / "trainer_state.json").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    message = shown(capsys, lambda: run(out, *options, "--save_steps", 1))
    assert "No space left on" in message and "--resume_from_checkpoint true" in message
    monkeypatch.setattr(torch, "save", save)
    run(out, *options, "--save_steps", 1, "--resume_from_checkpoint", "true")
    assert_same_weights(out, run(tmp_path / "whole", *options[:-2], "--save_strategy", "no"))


# Models that there are not


@pytest.fixture
def no_hub(monkeypatch):
    """Fails where a configuration is looked for on the Hub."""
    read = PreTrainedConfig.get_config_dict.__func__

    def local(cls, name, **kwargs):
        assert Path(name).is_dir(), f"asked the Hub for {name}"
        return read(cls, name, **kwargs)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", classmethod(local))


def test_an_unknown_size_is_not_looked_for_on_the_hub(no_hub):
    with pytest.raises(ValueError, match="`config_name` is 'huge'; it must be one of tiny, small, base, base-win14"):
        build_config("huge")


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32)).save_pretrained(folder)
    return folder


def test_models_that_there_are_not_are_refused_by_name(tmp_path, no_hub, vit):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.pth").write_bytes(b"weights")
    argv = ["--output_dir", str(tmp_path / "out"), "--do_train", "--use_cpu", "true", "--train_dir", "x"]
    file, of_vit = tmp_path / "file.pth", "a checkpoint of model type 'vit'"
    for argument, name, error in (
        ("config_name", tmp_path / "empty", "a folder without a config.json"),
        ("config_name", file, "a file; a folder with a config.json is needed.*conversion import"),
        ("config_name", vit, f"{of_vit}; one of GreenMIM is needed.*conversion import"),
        ("model_name_or_path", tmp_path / "empty", "a folder without a config.json"),
        ("model_name_or_path", file, "which cannot be converted: .* damaged .*conversion import"),
        ("model_name_or_path", vit, f"{of_vit}. It can be a folder or a Hub repository of GreenMIM, of Transformers'"),
    ):
        with pytest.raises(ValueError, match=f"`{argument}` is '{name}', {error}"):
            run_mim.main([*argv, f"--{argument}", str(name)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["outputs/nowhere", "nowhere"])
def test_a_model_that_is_nowhere_is_refused_in_one_line(tmp_path, name):
    data = write_class_folders(tmp_path / "data", {"red": 3, "blue": 3})
    options = ("--model_name_or_path", name, "--train_dir", data, "--do_train")
    error = f"`model_name_or_path` is '{name}': there is no such folder, and the Hub does not give it"
    with pytest.raises(ValueError, match=error) as raised:
        run_mim.main([str(value) for value in ("--output_dir", tmp_path / "out", *options)])
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=error):
        classify(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["image_size=100", "embed_dim=wide", "depths=[2,2]"])
def test_wrong_configurations_are_one_message(text, capsys, tmp_path):
    message = shown(capsys, lambda: run(tmp_path / "out", "--do_train", overrides=text))
    assert f"error: `config_overrides` is '{text}': " in message and len(message.splitlines()) == 1
    assert "Validation error" not in message and "validator" not in message


@pytest.mark.parametrize("changes", [{"mask_ratio": "most"}, {"image_size": 100}])
def test_strict_dataclasses_tell_what_is_wrong_without_a_headline(changes, capsys):
    message = shown(capsys, lambda: tiny_config(**changes))
    assert next(iter(changes)) in message and len(message.splitlines()) == 1
    assert "Validation error" not in message and "validator" not in message


def test_a_new_decoder_is_told_in_one_line(tmp_path, caplog):
    write_images(tmp_path / "data", 4)
    write_pretrained(tmp_path / "whole")
    GreenMIMModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "encoder")
    (tmp_path / "whole" / "preprocessor_config.json").rename(tmp_path / "encoder" / "preprocessor_config.json")
    argv = ["--output_dir", tmp_path / "out", "--model_name_or_path", tmp_path / "encoder", "--do_train"]
    argv += ["--train_dir", tmp_path / "data", "--max_steps", 1, "--use_cpu", "--dataloader_num_workers", 0]
    run_mim.main([str(value) for value in (*argv, "--save_strategy", "no")])
    told = [line for line in messages(caplog).splitlines() if "new weights" in line]
    assert len(told) == 1 and "decoder" in told[0] and "LOAD REPORT" not in messages(caplog)


# Data that there are not


def test_one_image_cannot_be_trained_and_evaluated_on(tmp_path):
    write_images(tmp_path / "data", 1)
    with pytest.raises(ValueError, match=r"`train_val_split` is 0\.05, but `train_dir` has 1 image.*`validation_dir`"):
        run(tmp_path / "out", "--train_dir", tmp_path / "data", "--do_train", "--do_eval", "--max_steps", 1)
    data = write_class_folders(tmp_path / "classes", {"red": 1, "blue": 1})
    with pytest.raises(ValueError, match="`train_val_split` is"):
        classify(tmp_path / "out", "--config_name", "tiny", "--train_dir", data, "--do_train", "--do_eval")
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(ValueError, match="`dataset_name` is 'nowhere/data' and `dataset_config_name` is 'x'"):
        run(tmp_path / "out", "--dataset_name", "nowhere/data", "--dataset_config_name", "x", "--do_train")


# A checkpoint that is evaluated


def test_a_checkpoint_is_evaluated_without_training(tmp_path):
    write_images(tmp_path / "data", 8)
    write_images(tmp_path / "held-out", 4, first_seed=30)
    folders = ("--train_dir", tmp_path / "data", "--validation_dir", tmp_path / "held-out")
    saving = ("--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2)
    out = run(tmp_path / "out", *folders, "--do_train", "--do_eval", "--max_steps", 6, *saving)
    losses = {entry["step"]: entry["eval_loss"] for entry in state_of(out)["log_history"] if "eval_loss" in entry}
    before = (out / "model.safetensors").read_bytes()
    for checkpoint, step in (("true", 6), (out / "checkpoint-2", 2)):
        run(out, *folders, "--do_eval", "--resume_from_checkpoint", checkpoint)
        assert results_of(out)["eval_loss"] == pytest.approx(losses[step], rel=1e-6)
    assert losses[2] != pytest.approx(losses[6], rel=1e-3)
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("mode", ["finetune", "linear"])
def test_a_checkpoint_is_classified_with_without_training(tmp_path, mode):
    data = write_class_folders(tmp_path / "data", {"red": 6, "green": 6, "blue": 6})
    held_out = write_class_folders(tmp_path / "held-out", {"red": 2, "green": 2, "blue": 2}, first_seed=50)
    options = ("--mode", mode, "--model_name_or_path", write_pretrained(tmp_path / "pretrained"))
    options += ("--train_dir", data, "--validation_dir", held_out, "--crop_pct", 1)
    stages = ("--feature_stage", 1) if mode == "linear" else ()
    saving = ("--save_strategy", "steps", "--save_steps", 4, "--max_steps", 4, "--base_learning_rate", 0.5)
    out = classify(tmp_path / "out", *options, *stages, *saving, "--do_train", "--do_eval", "--do_predict")
    expected, probabilities = results_of(out), predictions_of(out)
    again = ("--do_eval", "--do_predict", "--resume_from_checkpoint", out / "checkpoint-4")
    other = classify(tmp_path / "other", *options, *stages, *again)
    assert results_of(other)["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for row, wanted in zip(predictions_of(other), probabilities):
        assert row["prediction"] == wanted["prediction"]
        assert float(row["red"]) == pytest.approx(float(wanted["red"]), abs=1e-5)


def test_a_checkpoint_without_a_probe_is_no_probe(tmp_path):
    data = write_class_folders(tmp_path / "data", {"red": 6, "blue": 6})
    options = ("--model_name_or_path", write_pretrained(tmp_path / "pretrained"), "--train_dir", data)
    saving = ("--save_strategy", "steps", "--save_steps", 1, "--max_steps", 1)
    out = classify(tmp_path / "out", *options, *saving, "--do_train")
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` is .*checkpoint-1', which holds no linear probe"):
        classify(out, *options, "--mode", "linear", "--do_eval", "--resume_from_checkpoint", "true")


# Missing extras


def test_a_missing_package_names_the_extra(without):
    without("kornia", "matplotlib")
    with pytest.raises(MissingPackageError, match=r"needs kornia.*pip install 'greenmim-.*\[augmentation\]'"):
        require("kornia", "augmentation")
    with pytest.raises(MissingPackageError, match=r"needs matplotlib, .*\[pictures\]"):
        require("matplotlib.figure", "pictures")
    assert not is_installed("matplotlib") and is_installed("torch")
    assert require("json", "any").loads("1") == 1


@pytest.mark.parametrize(
    ("package", "argv", "error"),
    [
        ("tensorboard", ["--report_to", "tensorboard"], r"tensorboard.*\[pictures\]"),
        ("codecarbon", ["--track_energy", "--country_iso_code", "DEU"], r"codecarbon.*\[energy\]"),
        ("elpv_dataset", [], r"elpv_dataset.*\[elpv\]"),
    ],
)
def test_runs_that_need_an_extra_say_so_before_work(tmp_path, without, package, argv, error):
    without(package)
    with pytest.raises(MissingPackageError, match=error):
        run(tmp_path / "out", "--do_train", "--max_steps", 1, *argv)
    assert not (tmp_path / "out").exists()


def test_augmentation_names_its_extra_before_training(tmp_path, without):
    data = write_class_folders(tmp_path / "data", {"red": 4, "blue": 4})
    options = ("--config_name", "tiny", "--config_overrides", OVERRIDES, "--train_dir", data, "--do_train")
    without("kornia")
    with pytest.raises(MissingPackageError, match=r"kornia.*\[augmentation\]"):
        classify(tmp_path / "out", *options, "--max_steps", 1, "--mixup", 0.8)


WITHOUT_EXTRAS = """
import sys
for package in ("kornia", "matplotlib", "tensorboard", "codecarbon", "elpv_dataset", "pytest"):
    sys.modules[package] = None
import run_image_classification, run_mim
split = sys.argv.index("--")
run_mim.main(sys.argv[1:split])
run_image_classification.main(sys.argv[split + 1 :])
"""


@pytest.mark.slow
def test_scripts_work_without_any_extra(tmp_path):
    data = write_class_folders(tmp_path / "data", {"red": 6, "blue": 6})
    short = ("--train_dir", data, "--validation_dir", data, "--do_train", "--do_eval", "--max_steps", 1)
    pretraining = flags(tmp_path / "out", *short)
    classification = classification_flags(tmp_path / "classes", *short, "--model_name_or_path", tmp_path / "out")
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *pretraining, "--", *classification]
    ended = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for folder in ("out", "classes"):
        assert "loss_curve" not in (tmp_path / folder / "README.md").read_text()
    assert GreenMIMForPreTraining.from_pretrained(tmp_path / "out").config.embed_dim == 8
