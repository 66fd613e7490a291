# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Decisions that the processes of a run take together: the first one looks, all do the same."""

from collections.abc import Callable
from typing import TypeVar

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
