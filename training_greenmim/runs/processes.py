# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Decisions that the processes of a run take together: the first one looks, all do the same."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments


Answer = TypeVar("Answer")


def on_main_process(args: TrainingArguments, look: Callable[[], Answer]) -> Answer:
    """What `look()` returns in the first process, in every process; so is a `ValueError` that it raises."""
    answer: list = [None, None]
    if args.process_index == 0:
        try:
            answer[0] = look()
        except ValueError as error:
            answer[1] = error
    if args.world_size > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def leave_processes() -> None:
    """Takes leave of the other processes at the end of a script: a process that just ends is aborted now and then.

    Its connections have threads, which must not be running when it ends.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
