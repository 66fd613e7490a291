# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of runs: how one is made whole, what is damaged, which one to resume from.

A checkpoint is written into a folder aside. When every file is there, a manifest with sizes and checksums is written
last, and the folder gets its name, `checkpoint-<step>`: what has that name was saved to its end.
"""

import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_parts
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .processes import on_main_process


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
# Uploads to the Hub leave out names that begin with an underscore.
UNFINISHED, REPLACED = "_saving-", "_replaced-"
# So little space is none, where an error does not tell.
FULL = 16 * 2**20


class DiskFullError(OSError):
    """There is no space left for what is being saved; the checkpoints before it are as they were."""


# Writing


def checkpoint_folder(output_dir: str, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return folder.with_name(UNFINISHED + folder.name)


def publish(folder: Path) -> None:
    """Seals what was written aside and gives it its name, in place of an older checkpoint of that name."""
    aside, replaced = unfinished(folder), folder.with_name(REPLACED + folder.name)
    seal(aside)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    _to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def seal(folder: Path) -> None:
    """Writes the manifest of a folder; when it returns, everything in the folder is on the disk.

    It reads what was just written: one second for a checkpoint of 1 GB, plus what the disk needs.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    content = {
        "files": {name: {"bytes": path.stat().st_size, "sha256": _checksum(path)} for name, path in files.items()}
    }
    for path in files.values():
        _to_disk(path)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))
    _to_disk(folder / MANIFEST)
    _to_disk(folder)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(output_dir: str) -> None:
    """Removes what runs that were killed while saving have left."""
    for prefix in (UNFINISHED, REPLACED):
        for folder in Path(output_dir).glob(f"{prefix}{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: str, count: int | None, newest: int, best: str | None) -> None:
    """Deletes all but `count` checkpoints: the oldest first, never the newest nor the best.

    Those of later steps than the newest are of a future that a resumed run has left, such as damaged ones: they go
    before all others.

    Args:
        count: how many stay; None or 0 = all.
        newest: step of the checkpoint that was saved last.
        best: folder of the best checkpoint, if there is one.
    """
    if not count or count < 0:
        return
    folders = _checkpoints(output_dir)
    kept = {newest, *(step for step, folder in folders.items() if best and folder == Path(best))}
    order = sorted(folders.keys() - kept, key=lambda step: (step < newest, step))
    for step in order[: max(0, len(folders) - max(count, len(kept)))]:
        shutil.rmtree(folders[step], ignore_errors=True)


@contextmanager
def explained_if_full(what: str, output_dir: str) -> Iterator[None]:
    """Tells errors of a full disk, which libraries word in their own ways, in one message.

    Raises:
        `DiskFullError`: naming what was being saved and the newest whole checkpoint.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error, output_dir):
            raise
        raise DiskFullError(
            f"No space left on the disk of `output_dir` {output_dir!r} while saving {what}. Last whole checkpoint:"
            f" {last_checkpoint(output_dir) or 'none was saved yet'}. With space made,"
            " --resume_from_checkpoint true goes on from it; --save_total_limit keeps fewer of them."
        ) from error


def _is_full(error: BaseException | None, folder: str) -> bool:
    if error is None:
        return False
    told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors tells in words only, torch's writer not at all.
    told = told or os.strerror(errno.ENOSPC) in str(error)
    untold = isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error)
    untold = untold and shutil.disk_usage(folder).free < FULL
    return told or untold or _is_full(error.__cause__ or error.__context__, folder)


# Reading


def _checkpoints(output_dir: str) -> dict[int, Path]:
    """Folders that have the name of a checkpoint, by step."""
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir()]
    steps = {folder: folder.name.rpartition("-")[2] for folder in folders}
    return {int(step): folder for folder, step in steps.items() if step.isdigit()}


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that is whole and whose weights are finite numbers; newer ones are named in the log."""
    folders = _checkpoints(output_dir)
    for step in sorted(folders, reverse=True):
        problem = damage(folders[step])
        if problem is None:
            return str(folders[step])
        logger.warning(f"Overlooked {folders[step]}: {problem}.")
    return None


def damage(folder: str | Path) -> str | None:
    """What makes a checkpoint useless, in words; None where it is whole and its weights are finite numbers."""
    folder = Path(folder)
    problem = _damage_by_manifest(folder) if (folder / MANIFEST).exists() else _damage_without_manifest(folder)
    return problem or _damage_of_weights(folder)


def _damage_by_manifest(folder: Path) -> str | None:
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, saved in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != saved["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, but {saved['bytes']:,} were saved"
            if _checksum(path) != saved["sha256"]:
                return f"{name} is not what was saved (its checksum differs)"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def _damage_without_manifest(folder: Path) -> str | None:
    # Of older versions, or of `Trainer` itself: what can be told without one is looked at.
    if not is_whole_checkpoint(folder):
        return "it was not saved to its end (there is no readable trainer_state.json)"
    has_moments = any(any(folder.glob(name)) for name in ("optimizer*", "global_step*"))
    if has_moments != (folder / "scheduler.pt").exists():
        return f"{'scheduler.pt' if has_moments else 'optimizer.pt'} is missing"
    unreadable = next((path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_readable(path)), None)
    if unreadable is not None:
        return f"{unreadable.relative_to(folder)} cannot be read"
    logger.warning(f"{folder} has no {MANIFEST}: whether its files are as they were saved cannot be told.")
    return None


def _is_readable(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:  # as torch writes them, with checksums
                return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return True


def _damage_of_weights(folder: Path) -> str | None:
    # A run may save after its weights broke and before a loss could tell.
    try:
        broken = next((name for name, weight in saved_weights(folder) if not _is_finite(weight)), None)
    except Exception as error:  # a damaged file raises anything
        return f"its weights cannot be read ({error})"
    return None if broken is None else f"its weights are not finite numbers ({broken})"


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def saved_weights(folder: str | Path, names: str = "*") -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the weights of a checkpoint: in safetensors, torch's files, or in parts (FSDP).

    Args:
        folder: the checkpoint.
        names: pattern of the names, without suffix, of files of safetensors: "model*" leaves out averages.
    """
    folder = Path(folder)
    for path in sorted(folder.glob(f"{names}.safetensors")):
        yield from load_file(path).items()
    for path in sorted(folder.glob("pytorch_model*.bin")):
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
    for parts in sorted(folder.glob("pytorch_model_fsdp_*/")):
        reader = FileSystemReader(parts)
        for name, saved in reader.read_metadata().state_dict_metadata.items():
            if isinstance(saved, TensorStorageMetadata):
                weight = torch.empty(saved.size, dtype=saved.properties.dtype)
                load_parts({name: weight}, storage_reader=reader, no_dist=True)
                yield name.removeprefix("model."), weight


def is_whole_checkpoint(folder: str | Path) -> bool:
    """Whether a checkpoint was saved to its end: the trainer's state is written after all else but the manifest."""
    try:
        json.loads(Path(folder, "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def find_checkpoint(args: TrainingArguments) -> str | None:
    """Checkpoint to resume from, the same in all processes; makes sure that no other run is overwritten.

    Raises:
        `ValueError`: when the output folder holds a run that is not resumed, no checkpoint to resume, a damaged one,
            or one that is the end of its run.
    """
    return on_main_process(args, lambda: _find_checkpoint(args))


def _find_checkpoint(args: TrainingArguments) -> str | None:
    resume = str(args.resume_from_checkpoint or "")  # a YAML file may say true
    if resume and resume.lower() != "false":
        if resume.lower() == "true":
            checkpoint = last_checkpoint(args.output_dir)
            if checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint` is {resume}, but {args.output_dir!r} has no whole checkpoint."
                )
        else:
            checkpoint, problem = resume, damage(resume)
            if problem is not None:
                raise ValueError(
                    f"`resume_from_checkpoint` is {resume!r}, which is no whole checkpoint of a run: {problem}."
                )
        if args.do_train:
            check_unfinished(checkpoint, args)
        return checkpoint
    output = Path(args.output_dir)
    # A checkpoint that was broken off is of no use to anyone.
    checkpoints = filter(is_whole_checkpoint, output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    traces = [*checkpoints, *output.glob("*.safetensors"), *output.glob("trainer_state.json")]
    if args.do_train and traces:
        raise ValueError(
            f"`output_dir` is {args.output_dir!r}, which already holds a run ({traces[0].name}). Continue it with"
            " --resume_from_checkpoint true, or choose another folder."
        )
    return None


def check_unfinished(checkpoint: str, args: TrainingArguments) -> None:
    """Refuses to resume a run that is at its end: `Trainer` would make one step more.

    Raises:
        `ValueError`: naming what to raise.
    """
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
    done, planned = state["epoch"], args.num_train_epochs
    name = "num_train_epochs"
    if args.max_steps > 0:
        done, planned, name = state["global_step"], args.max_steps, "max_steps"
    if done >= planned:
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} is the end of its run, `{name}` is {planned}. Its model is there;"
            f" raise {name} to train on."
        )
