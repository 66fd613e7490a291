# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The encoders by name. A new one is a file with a subclass of `GreenMIMEncoder`, and a line here."""

from .blocks import GreenMIMEncoder
from .swin import GreenMIMSwinEncoder
from .twins import GreenMIMTwinsEncoder


# What `backbone_type` of a configuration names.
ENCODERS: dict[str, type[GreenMIMEncoder]] = {
    "swin": GreenMIMSwinEncoder,
    "twins": GreenMIMTwinsEncoder,
}


def named_sizes() -> dict[str, dict]:
    """Arguments of the configuration of each named size of each encoder."""
    return {
        name: {"backbone_type": backbone_type, **changes}
        for backbone_type, encoder in ENCODERS.items()
        for name, changes in encoder.sizes.items()
    }
