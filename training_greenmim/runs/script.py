# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the scripts share: how errors are shown, checks, training, evaluation and the end of a run."""

import errno
import gc
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError

import datasets
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .processes import leave_processes
from .trainer import ImageTrainer, NonFiniteLossError


logger = logging.getLogger(__name__)

# What a user can mend. `ValueError` and `OSError` are what this package, Transformers and `datasets` raise for wrong
# arguments, missing files and whatever the system refuses.
EXPECTED_ERRORS = (
    ValueError,
    OSError,
    StrictDataclassError,
    NonFiniteLossError,
    SafetensorError,
    datasets.exceptions.DatasetsError,
    torch.OutOfMemoryError,
)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script from the command line: an error that a user can mend is one message, and exit code 2.

    These are `EXPECTED_ERRORS`, missing packages and full disks; argparse ends likewise. Any other is a defect and
    keeps its traceback, as every error does with --debug. Of several processes only the first one prints.
    """
    # What was imported stays: no look for garbage goes through it again, and workers, which are forks, do not copy it.
    gc.freeze()
    gc.enable()
    try:
        main()
        leave_processes()
    except Exception as error:
        message = expected_message(error)
        if message is None or "--debug" in sys.argv:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {message} (--debug shows where)", file=sys.stderr)
        sys.exit(2)


def expected_message(error: Exception) -> str | None:
    """What to tell the user of an error; None where it is none of those to expect."""
    if _is_full_disk(error):
        return (
            f"No space left on device: {str(error).strip().rstrip('.')}. Whole checkpoints that were written before"
            " stay as they are: free some space and go on with --resume_from_checkpoint true."
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"Out of memory: {str(error).splitlines()[0]} A smaller --per_device_train_batch_size with more"
            " --gradient_accumulation_steps, or --gradient_checkpointing true, needs less."
        )
    if isinstance(error, StrictDataclassError):
        return str(error.__cause__ or error)  # its own message repeats that of its cause under a headline
    is_expected = isinstance(error, EXPECTED_ERRORS) or _tells_of_missing_package(error)
    return str(error).strip() if is_expected else None


def _tells_of_missing_package(error: Exception) -> bool:
    """Whether an error was raised to name a package to install, as `MissingPackageError` and Transformers' are.

    Python's own errors of an import that fails name the module; they are defects.
    """
    return isinstance(error, PackageNotFoundError) or (isinstance(error, ImportError) and error.name is None)


def _is_full_disk(error: Exception) -> bool:
    """Whether a disk is full or a quota used up; torch.save only tells that it could not write on."""
    text = str(error)
    return (
        (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in text
        or ("inline_container.cc" in text and ("unexpected pos" in text or "file write failed" in text))
    )


def check_channels(channels: int) -> None:
    """Refuses models of other images than grey and RGB ones.

    Raises:
        `ValueError`: naming the number.
    """
    if channels not in (1, 3):
        raise ValueError(f"`num_channels` is {channels}; images have 1 (grey) or 3 (RGB).")


def train(trainer: ImageTrainer, checkpoint: str | None) -> None:
    """Trains, from a checkpoint on if there is one, and keeps the numbers."""
    _keep(trainer, "train", trainer.train(resume_from_checkpoint=checkpoint).metrics)


def evaluate(trainer: ImageTrainer) -> None:
    """Evaluates and keeps the numbers."""
    _keep(trainer, "eval", trainer.evaluate())


def _keep(trainer: ImageTrainer, part: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(part, metrics)
    trainer.save_metrics(part, metrics)


def finish(trainer: ImageTrainer) -> None:
    """Writes the state and the card of a run that trained and whose model is saved; pushes it if that is asked for."""
    if trainer.args.do_train:
        trainer.save_state()
        trainer.create_model_card()
        logger.info(f"Model, card and results: {trainer.args.output_dir}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
