# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints in and out: official GreenMIM, SimMIM, Microsoft's, timm's and Transformers' Swin, and Twins.

The command is in `__main__`. The way of a checkpoint

in:  a file or folder -> `reading` -> `Source` -> its format (`formats/`) -> `Checkpoint`, weights by our names
     -> `inference` (configuration) -> `importing` (model, folder), `measuring` (order of merging) and `cards`.
out: a model -> `exporting` -> a format; a folder -> `releasing` -> the Hub -> `clean_load`, which loads it back.
heads: a folder -> `heads` -> its encoder with a new head for a dense task.

A new format is one file in `formats/` and its place in the registry there. Nothing of this package travels with
published models.
"""

from .checkpoint import Checkpoint, CheckpointError
from .exporting import export_model
from .heads import HEADS, build_head, head_image_processor, read_labels, write_head
from .importing import convert, import_checkpoint, read_checkpoint
from .releasing import release_model


__all__ = [
    "HEADS",
    "Checkpoint",
    "CheckpointError",
    "build_head",
    "convert",
    "export_model",
    "head_image_processor",
    "import_checkpoint",
    "read_checkpoint",
    "read_labels",
    "release_model",
    "write_head",
]
