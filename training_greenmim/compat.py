# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What training uses of other libraries beyond their public interface, in one place.

Each entry has a canary in tests/test_compat.py that says what changed when a new version breaks it.
"""

import contextlib
import logging
from collections.abc import Iterator

import datasets
import evaluate
from transformers import Trainer


# transformers


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Keeps `from_pretrained` from logging its table of weights that are new or not used."""

    def is_other(record: logging.LogRecord) -> bool:
        return " LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def make_next_training_create_a_scheduler(trainer: Trainer) -> None:
    """Tells a trainer that its schedule is of its own making, so that a second `train` begins with a new one."""
    trainer._created_lr_scheduler = True


# accelerate


# datasets


def datasets_fingerprint(records: datasets.Dataset) -> str:
    """What `datasets` calls the state of a data set by in its cache: the same in each run that makes it alike."""
    return records._fingerprint


def datasets_cache_folder() -> str:
    """Folder of the files that `datasets` keeps; the environment's HF_DATASETS_CACHE sets it."""
    return str(datasets.config.HF_DATASETS_CACHE)


# evaluate


def evaluate_endpoint() -> str:
    """Address of the Hub that `evaluate` asks for metrics."""
    return evaluate.config.HF_ENDPOINT


@contextlib.contextmanager
def evaluate_offline() -> Iterator[None]:
    """Makes `evaluate` look into its cache only."""
    before = evaluate.config.HF_EVALUATE_OFFLINE
    evaluate.config.HF_EVALUATE_OFFLINE = True
    try:
        yield
    finally:
        evaluate.config.HF_EVALUATE_OFFLINE = before


# kornia
