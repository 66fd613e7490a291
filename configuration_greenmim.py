# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Re-exports `GreenMIMConfig`; it lives in the package so that published models can carry it along."""

from modeling_greenmim.configuration_greenmim import GreenMIMConfig


__all__ = ["GreenMIMConfig"]
