# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Named sizes of models, configurations with overrides, and loading with one line of report."""

from typing import NamedTuple

import yaml
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from modeling_greenmim import GreenMIMConfig
from modeling_greenmim.encoders import named_sizes

from ..compat import without_load_report


logger = logging.get_logger(__name__)

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


class NewWeights(NamedTuple):
    """Names of weights that a checkpoint did not give: it lacks them, or has them in another shape."""

    missing: list[str]
    mismatched: list[str]


def from_pretrained(model_class, name: str, **options) -> tuple[PreTrainedModel, NewWeights]:
    """`model_class.from_pretrained`, with one line of report where Transformers logs a table.

    Returns:
        The model, and which of its weights start anew.

    Raises:
        `ValueError`: for weights of another shape, unless `ignore_mismatched_sizes` is among the options.
    """
    replaces = options.pop("ignore_mismatched_sizes", False)
    with without_load_report():
        # All differences at once; Transformers' own error would only say that there are some.
        model, info = model_class.from_pretrained(
            name, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    new = NewWeights(sorted(info["missing_keys"]), sorted(key for key, *_ in info["mismatched_keys"]))
    if new.mismatched and not replaces:
        raise ValueError(
            f"`model_name_or_path` is {name!r}, of which {_some(new.mismatched)} have another shape than the model"
            " wants; --ignore_mismatched_sizes true starts them anew."
        )
    unused = sorted(info["unexpected_keys"])
    parts = []
    if started := [*new.missing, *new.mismatched]:
        parts.append(f"new weights are {_some(started)}")
    if unused:
        parts.append(f"not used are {_some(unused)}")
    if parts:
        logger.warning(f"Of {name}: {'; '.join(parts)}.")
    return model, new


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
