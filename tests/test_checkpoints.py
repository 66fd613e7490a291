"""Checkpoints that were damaged, broken off or changed, resumed as another run, or written by two runs at once."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_parts

import run_image_classification
import run_mim
from tests.test_trainer import make_trainer
from tests.training_helpers import (
    OVERRIDES,
    assert_same_weights,
    flags,
    messages,
    results_of,
    run,
    subprocess_environment,
    tiny_config,
    write_images,
)
from training_greenmim.dense import arguments, detection_arguments
from training_greenmim.runs import checkpoints
from training_greenmim.runs.arguments import ClassificationTrainingArguments, MIMTrainingArguments
from training_greenmim.runs.checkpoints import DiskFullError, damage, last_checkpoint, rotate, saved_weights
from training_greenmim.runs.lock import LOCK_FILE, locked_output
from training_greenmim.runs.record import FREE, MACHINE, RECORD
from training_greenmim.runs.trainer import logging_interval


COMMON = ("--do_train", "--max_steps", 6, "--warmup_steps", 0)
SAVING = ("--save_strategy", "steps", "--save_steps", 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of six steps with three checkpoints, beside its data."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "data", 10)
    run(folder / "out", "--train_dir", folder / "data", *COMMON, *SAVING)
    return folder / "out"


@pytest.fixture
def stopped(finished, tmp_path) -> Path:
    """The same run as if it had been killed after step 4."""
    for step in (2, 4):
        shutil.copytree(finished / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    return tmp_path / "out"


def resume(output: Path, finished: Path, *more) -> Path:
    return run(output, "--train_dir", finished.parent / "data", *COMMON, "--resume_from_checkpoint", "true", *more)


# Damage


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


SAID = {delete: "is missing", truncate: "bytes, but", flip_a_bit: "its checksum differs"}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "trainer_state.json")


@pytest.mark.parametrize("harm", SAID)
@pytest.mark.parametrize("name", [*FILES, RECORD])
def test_any_damage_is_named_and_the_checkpoint_before_it_is_found(stopped, name, harm, caplog):
    harm(stopped / "checkpoint-4" / name)
    assert last_checkpoint(str(stopped)) == str(stopped / "checkpoint-2")
    assert f"Overlooked {stopped / 'checkpoint-4'}: {name}" in messages(caplog) and SAID[harm] in messages(caplog)


def test_a_damaged_manifest_is_damage(stopped):
    truncate(stopped / "checkpoint-4" / "manifest.json")
    assert damage(stopped / "checkpoint-4") == "manifest.json cannot be read"
    assert last_checkpoint(str(stopped)) == str(stopped / "checkpoint-2")


@pytest.mark.parametrize(("name", "harm"), [("optimizer.pt", truncate), ("model.safetensors", flip_a_bit)])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_exactly(finished, stopped, name, harm):
    harm(stopped / "checkpoint-4" / name)
    resume(stopped, finished, *SAVING)
    assert_same_weights(finished, stopped)
    assert damage(stopped / "checkpoint-4") is None, "written anew"
    assert not list(stopped.glob("_*"))


def test_a_damaged_checkpoint_that_is_named_is_refused(finished, stopped):
    truncate(stopped / "checkpoint-4" / "scheduler.pt")
    with pytest.raises(ValueError, match=r"checkpoint-4', which is no whole checkpoint of a run: scheduler\.pt has"):
        resume(stopped, finished, "--resume_from_checkpoint", stopped / "checkpoint-4")


@pytest.mark.parametrize(
    ("name", "harm"), [("optimizer.pt", delete), ("scheduler.pt", delete), *((name, truncate) for name in FILES)]
)
def test_what_can_be_told_without_a_manifest_is(stopped, name, harm):
    for step in (2, 4):
        (stopped / f"checkpoint-{step}" / "manifest.json").unlink()
    harm(stopped / "checkpoint-4" / name)
    assert last_checkpoint(str(stopped)) == str(stopped / "checkpoint-2")


def test_a_checkpoint_without_a_manifest_is_resumed_with_a_warning(finished, stopped, caplog):
    for name in ("manifest.json", RECORD):
        (stopped / "checkpoint-4" / name).unlink()
    resume(stopped, finished)
    assert "checkpoint-4 has no manifest.json" in messages(caplog) and f"has no {RECORD}" in messages(caplog)
    assert_same_weights(finished, stopped)


def test_weights_in_parts_that_are_not_finite_are_not_good(tmp_path):
    for step, value in ((2, 1.0), (4, torch.nan)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        weights = {"first": torch.ones(3), "second": torch.full((2, 2), value, dtype=torch.bfloat16)}
        writer = FileSystemWriter(folder / "pytorch_model_fsdp_0")
        save_parts({"model": weights}, storage_writer=writer, no_dist=True)
    assert damage(tmp_path / "checkpoint-4") == "its weights are not finite numbers (second)"
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    found = dict(saved_weights(tmp_path / "checkpoint-2"))
    assert found.keys() == {"first", "second"} and torch.equal(found["first"], torch.ones(3))


def test_whole_weights_that_are_not_finite_are_not_good(stopped):
    path = stopped / "checkpoint-4" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).fill_(torch.inf)
    save_file(weights, path, {"format": "pt"})
    (stopped / "checkpoint-4" / "manifest.json").unlink()
    assert last_checkpoint(str(stopped)) == str(stopped / "checkpoint-2")


# Saving


class Killed(BaseException):
    """Nothing that programs catch."""


def break_off(monkeypatch, error: BaseException, after: str = "optimizer") -> None:
    """Makes torch fail where a checkpoint's second file of its own is saved, the second time."""
    save, calls = torch.save, []

    def failing(content, path, *args, **kwargs):
        if after in str(path):
            calls.append(path)
            if len(calls) == 2:
                Path(path).write_bytes(b"half")
                raise error
        return save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", failing)


def test_a_kill_while_saving_leaves_no_checkpoint_and_the_run_goes_on(finished, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        break_off(patch, Killed())
        with pytest.raises(Killed):
            run(output, "--train_dir", finished.parent / "data", *COMMON, *SAVING, "--save_total_limit", 1)
    assert (output / "_saving-checkpoint-4" / "model.safetensors").is_file()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    resume(output, finished, *SAVING)
    assert_same_weights(finished, output)
    assert not list(output.glob("_*"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_told_in_one_message_and_leaves_the_checkpoint_before(finished, tmp_path, monkeypatch, error):
    output = tmp_path / "out"
    break_off(monkeypatch, error)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    expected = f"while saving checkpoint-4. Last whole checkpoint: {output / 'checkpoint-2'}"
    with pytest.raises(DiskFullError, match=expected):
        run(output, "--train_dir", finished.parent / "data", *COMMON, *SAVING, "--save_total_limit", 1)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-2"]
    assert damage(output / "checkpoint-2") is None


def test_other_errors_while_saving_stay_what_they_are(finished, tmp_path, monkeypatch):
    break_off(monkeypatch, RuntimeError("PytorchStreamWriter failed"))
    with pytest.raises(RuntimeError, match="PytorchStreamWriter failed"):
        run(tmp_path / "out", "--train_dir", finished.parent / "data", *COMMON, *SAVING)


def test_a_checkpoint_holds_what_trainers_own_does_and_three_files_more(tmp_path):
    trainer = make_trainer(tmp_path / "ours", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.write_checkpoint(str(tmp_path / "written"))
    names, written = (
        {path.name for path in folder.iterdir()}
        for folder in (tmp_path / "ours" / "checkpoint-1", tmp_path / "written")
    )
    assert names - written == {"manifest.json", RECORD}


def test_the_best_checkpoint_and_the_newest_are_kept(tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, **changes, **best, save_total_limit=2, learning_rate=0.0, num_pictures=0)
    trainer.train()  # nothing is learned: the first evaluation stays the best
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-4"]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert trainer.state.best_model_checkpoint == state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    ("limit", "newest", "best", "kept"),
    [
        (None, 30, None, {10, 20, 30, 40}),
        (2, 40, None, {30, 40}),
        (2, 30, None, {20, 30}),
        (1, 30, 10, {10, 30}),
        (1, 20, None, {20}),
    ],
)
def test_rotation_deletes_an_abandoned_future_first_then_the_oldest(tmp_path, limit, newest, best, kept):
    for step in (10, 20, 30, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    rotate(str(tmp_path), limit, newest, best and str(tmp_path / f"checkpoint-{best}"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-mine", *(f"checkpoint-{step}" for step in kept)}


# The same run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--seed", 1), "seed 42 (now 1)"),
        (("--mask_per_sample",), "mask_per_sample False (now True)"),
        (("--mask_strategy", "block"), "mask_strategy 'random' (now 'block')"),
        (("--base_learning_rate", 0.2), "learning_rate 0.0015625 (now 0.003125)"),
        (("--per_device_train_batch_size", 2), "total_batch_size 4 (now 2)"),
        (("--min_crop_scale", 0.5), "min_crop_scale 0.2 (now 0.5)"),
        (("--weight_decay", 0.1), "weight_decay 0.05 (now 0.1)"),
        (("--layer_decay", 0.7), "layer_decay 1.0 (now 0.7)"),
        (("--max_train_samples", 9), "training images 10 (now 9)"),
        (("--max_steps", 5), "max_steps 6 (now 5)"),
    ],
)
def test_resuming_another_run_is_refused(finished, stopped, more, said):
    with pytest.raises(ValueError) as caught:
        resume(stopped, finished, *more)
    assert said in str(caught.value)
    assert ("--allow_changes" in str(caught.value)) == (more[0] != "--layer_decay")


def test_the_groups_of_an_optimizer_cannot_be_changed(finished, stopped):
    with pytest.raises(ValueError, match=r"layer_decay 1\.0 \(now 0\.7\), by which .*--model_name_or_path"):
        resume(stopped, finished, "--layer_decay", 0.7, "--allow_changes")


def test_another_mask_ratio_and_other_images_are_refused(finished, stopped, tmp_path):
    with pytest.raises(ValueError, match=r"mask_ratio of the model 0\.75 \(now 0\.5\)"):
        resume(stopped, finished, "--config_overrides", OVERRIDES + ",mask_ratio=0.5")
    data = shutil.copytree(finished.parent / "data", tmp_path / "other")
    (data / "000.png").rename(data / "new.png")
    with pytest.raises(ValueError, match="checksum of training images"):
        resume(stopped, finished, "--train_dir", data)


def test_what_may_change_does_not_matter_and_images_may_be_moved(finished, stopped, tmp_path):
    data = shutil.copytree(finished.parent / "data", tmp_path / "moved")
    resume(stopped, finished, "--train_dir", data, "--logging_steps", 3, "--dataloader_num_workers", 1)
    assert_same_weights(finished, stopped)


def test_a_run_may_be_made_longer_and_split_otherwise_with_a_word(finished, stopped, caplog):
    batch = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    resume(stopped, finished, "--max_steps", 8, *batch)
    assert "made longer, max_steps 6 (now 8)" in messages(caplog)
    assert "per_device_train_batch_size 4 (now 2)" in messages(caplog)


def test_changes_are_allowed_on_request_and_named(finished, stopped, caplog):
    resume(stopped, finished, "--seed", 1, "--base_learning_rate", 0.2, "--allow_changes")
    said = messages(caplog)
    assert "Resumed with changes: " in said and "seed 42 (now 1)" in said
    assert "learning_rate: the optimizer's state in the checkpoint keeps what it had." in said


def test_arguments_that_are_free_exist():
    known = {field.name for kind in (MIMTrainingArguments, ClassificationTrainingArguments) for field in fields(kind)}
    for script in (run_mim, run_image_classification):
        known |= {field.name for part in (script.ModelArguments, script.DataArguments) for field in fields(part)}
    for module in (arguments, detection_arguments):
        kinds = [kind for name, kind in vars(module).items() if name.endswith("Arguments")]
        known |= {field.name for kind in kinds for field in fields(kind)}
    assert FREE | MACHINE <= known | {"processes"}


# Evaluation of a checkpoint


def test_evaluating_alone_evaluates_the_checkpoint(finished, stopped, tmp_path):
    held_out = tmp_path / "held-out"
    write_images(held_out, 4, first_seed=50)
    folders = ("--train_dir", finished.parent / "data", "--validation_dir", held_out, "--do_eval")
    untrained = results_of(run(tmp_path / "untrained", *folders))["eval_loss"]
    run(stopped, *folders, "--resume_from_checkpoint", "true")
    argv = flags(tmp_path / "expected", *folders, "--model_name_or_path", stopped / "checkpoint-4")
    del argv[argv.index("--config_overrides") : argv.index("--config_overrides") + 2]
    run_mim.main(argv)
    assert results_of(stopped)["eval_loss"] == results_of(tmp_path / "expected")["eval_loss"] != untrained
    assert (stopped / "reconstructions" / "step-000004.png").is_file()


def test_a_checkpoint_of_another_model_is_not_loaded(stopped, tmp_path):
    trainer = make_trainer(tmp_path / "other", config=tiny_config(embed_dim=16))
    with pytest.raises(ValueError, match=r"had embed_dim of the model 8 \(now 16\)"):
        trainer.load_checkpoint(str(stopped / "checkpoint-4"))


# Locks

HOLD = """
import sys, time
from types import SimpleNamespace
from training_greenmim.runs.lock import locked_output
with locked_output(SimpleNamespace(output_dir=sys.argv[1], should_save=True)):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_folder_in_which_a_run_is_at_work_is_refused_until_it_ends_or_dies(finished, tmp_path):
    output = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], env=subprocess_environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        expected = f"`output_dir` is '{output}', in which another run is at work: process {holder.pid} on .*, started"
        with pytest.raises(ValueError, match=expected):
            run(output, "--train_dir", finished.parent / "data", *COMMON)
        assert [path.name for path in output.iterdir()] == [LOCK_FILE], "nothing was written"
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    run(output, "--train_dir", finished.parent / "data", *COMMON)
    assert (output / "model.safetensors").is_file() and not (output / LOCK_FILE).exists()


def test_a_lock_leaves_nothing_behind_and_is_the_first_processs(tmp_path):
    with locked_output(SimpleNamespace(output_dir=str(tmp_path / "out"), should_save=True)):
        assert json.loads((tmp_path / "out" / LOCK_FILE).read_text())["process"] == os.getpid()
    with locked_output(SimpleNamespace(output_dir=str(tmp_path / "out"), should_save=False)):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("place", "why"), [("file", "File exists"), ("file/below", "Not a directory")])
def test_an_output_that_cannot_be_a_folder_is_refused_by_name(finished, tmp_path, place, why):
    (tmp_path / "file").write_text("something else")
    expected = f"`output_dir` is '{tmp_path / place}', which cannot be made a folder: {why}"
    with pytest.raises(ValueError, match=expected):
        run(tmp_path / place, "--train_dir", finished.parent / "data", *COMMON)
    assert (tmp_path / "file").read_text() == "something else"


# Lengths and logs


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--max_steps", 0), "`max_steps` is 0"),
        (("--max_steps", -1, "--num_train_epochs", 0), "`num_train_epochs` is 0"),
        (("--per_device_train_batch_size", 16, "--dataloader_drop_last"), "there are 10 training images, and only"),
    ],
)
def test_training_without_a_step_is_refused(finished, tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "out", "--train_dir", finished.parent / "data", *COMMON, *more)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("max_steps", "seconds", "expected"),
    [(6, None, 1), (19, 0.1, 1), (40, None, 2), (100, 0.01, 5), (10_000, 0.1, 100), (10_000, 3, 3), (10_000, 60, 1)],
)
def test_steps_between_logs(max_steps, seconds, expected):
    assert logging_interval(max_steps, seconds) == expected


def test_a_short_run_shows_its_loss(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=45, logging_steps=None)
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) >= 20 and steps[-1] == 45


def test_logs_come_as_often_as_told(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=9, logging_steps=4)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [4, 8]
