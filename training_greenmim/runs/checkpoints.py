# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of runs: which one to resume from, and which folders hold a run already."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was saved to its end and whose weights are finite numbers."""
    checkpoints = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdigit() and is_whole_checkpoint(folder):
            checkpoints[int(step)] = folder
    newest_first = (checkpoints[step] for step in sorted(checkpoints, reverse=True))
    return next((str(folder) for folder in newest_first if _has_finite_weights(folder)), None)


def is_whole_checkpoint(folder: str | Path) -> bool:
    """Whether a checkpoint was saved to its end: the trainer's state is written last."""
    try:
        json.loads(Path(folder, "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _has_finite_weights(folder: Path) -> bool:
    # A run may save after its weights broke and before a loss could tell.
    try:
        weights = [weight for file in folder.glob("*.safetensors") for weight in load_file(file).values()]
    except SafetensorError:
        return False
    return all(weight.isfinite().all() for weight in weights)


def find_checkpoint(args: TrainingArguments) -> str | None:
    """Checkpoint to resume from; makes sure that no other run is overwritten.

    Raises:
        `ValueError`: when the output folder holds a run that is not resumed, no checkpoint to resume, or one that is
            the end of its run.
    """
    resume = str(args.resume_from_checkpoint or "")  # a YAML file may say true
    if resume and resume.lower() != "false":
        checkpoint = last_checkpoint(args.output_dir) if resume.lower() == "true" else resume
        if checkpoint is None:
            raise ValueError(f"`resume_from_checkpoint` is {resume}, but {args.output_dir!r} has no whole checkpoint.")
        if not is_whole_checkpoint(checkpoint):
            raise ValueError(f"`resume_from_checkpoint` is {resume!r}, which is no whole checkpoint of a run.")
        if args.do_train:
            check_unfinished(checkpoint, args)
        return checkpoint
    output = Path(args.output_dir)
    # A checkpoint that was broken off is of no use to anyone.
    checkpoints = filter(is_whole_checkpoint, output.glob("checkpoint-*"))
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
