# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""SimMIM (github.com/microsoft/SimMIM): Microsoft's Swin as `encoder.`, and a decoder that no other task uses.

Its fine-tuned models are Microsoft's Swin. Only read: our decoder is another.
"""

import re

from ..checkpoint import Checkpoint, Source
from . import microsoft


NAME, TITLE = "simmim", "SimMIM"
BACKBONE_TYPES, OUTPUT = ("swin",), None
LEFT_OUT = re.compile(r"^(encoder\.mask_token$|decoder\.)")


def matches(source: Source) -> bool:
    """Whether it has the patch embedding of a Swin as the encoder of something."""
    return f"encoder.{microsoft.PROJECTION}" in source.weights


def read(source: Source) -> Checkpoint:
    """The encoder."""
    weights = {
        name.removeprefix("encoder."): tensor for name, tensor in source.weights.items() if not LEFT_OUT.match(name)
    }
    encoder = microsoft.read(Source(source.path, weights, config=source.config))
    return Checkpoint(NAME, encoder.weights, encoder.values)
