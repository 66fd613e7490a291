# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Decisions that the processes of a run take together: the first one looks, all do the same."""

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments


Answer = TypeVar("Answer")


def on_main_process(args: TrainingArguments, look: Callable[[], Answer]) -> Answer:
    """What `look()` returns in the first process, in every process.

    An error that it raises is raised in every process, where the others would wait for an answer in vain: itself, or a
    `RuntimeError` that names it, if it cannot travel.
    """
    answer, raised = [None, None], None
    if args.process_index == 0:
        try:
            answer[0] = look()
        except Exception as error:
            raised, answer[1] = error, _travelling(error)
    if args.world_size > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise raised or answer[1]
    return answer[0]


def _travelling(error: Exception) -> Exception:
    """An error as other processes can have it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of errors makes of it
        return RuntimeError(f"The first process ended with {type(error).__name__}: {error}")
    return error


def leave_processes() -> None:
    """Takes leave of the other processes at the end of a script: a process that just ends is aborted now and then.

    Its connections have threads, which must not be running when it ends.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
