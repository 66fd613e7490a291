# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What training uses of other libraries beyond their public interface, in one place.

Each entry has a canary in tests/test_compat.py that says what changed when a new version breaks it.
"""

import datasets


# transformers


# accelerate


# datasets


def datasets_fingerprint(records: datasets.Dataset) -> str:
    """What `datasets` calls the state of a data set by in its cache: the same in each run that makes it alike."""
    return records._fingerprint


def datasets_cache_folder() -> str:
    """Folder of the files that `datasets` keeps; the environment's HF_DATASETS_CACHE sets it."""
    return str(datasets.config.HF_DATASETS_CACHE)


# evaluate


# kornia
