# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Named sizes of models, and configurations with overrides."""

import yaml
from transformers import PreTrainedConfig

from modeling_greenmim import GreenMIMConfig
from modeling_greenmim.encoders import named_sizes


MODEL_SIZES = named_sizes()


def parse_overrides(text: str | None) -> dict:
    """Reads `name=value` pairs separated by commas; lists in brackets: "image_size=128,depths=[2,2,6]".

    Raises:
        `ValueError`: for other text.
    """
    if not text:
        return {}
    try:
        overrides = yaml.safe_load("{" + text.replace("=", ": ") + "}")
    except yaml.YAMLError as error:
        raise ValueError(
            f"`config_overrides` is {text!r}; it needs name=value pairs separated by commas, such as"
            ' "image_size=128,depths=[2,2,6]".'
        ) from error
    # YAML takes numbers without a point, such as 1e-5, for text.
    overrides = {name: _as_number(value) for name, value in overrides.items()}
    return overrides


def check_overrides(overrides: dict, kind: type[PreTrainedConfig]) -> None:
    """Refuses overrides of what a kind of configuration does not have.

    Raises:
        `ValueError`: naming them.
    """
    unknown = [name for name in overrides if name not in kind.__dataclass_fields__]
    if unknown:
        raise ValueError(f"`config_overrides` names {unknown}, which {kind.__name__} does not have.")


def _as_number(value):
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def build_config(name: str, overrides: str | None = None) -> GreenMIMConfig:
    """Configuration of a named size, or of a folder or Hub repository, with overrides."""
    values = MODEL_SIZES[name] if name in MODEL_SIZES else GreenMIMConfig.from_pretrained(name).to_dict()
    overrides = parse_overrides(overrides)
    check_overrides(overrides, GreenMIMConfig)
    return GreenMIMConfig(**{**values, **overrides})
