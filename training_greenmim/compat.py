# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What training uses of other libraries beyond their public interface, in one place.

Each entry has a canary in tests/test_compat.py that says what changed when a new version breaks it.
"""

import contextlib
import logging
from collections.abc import Iterator


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


# accelerate


# datasets


# evaluate


# kornia
