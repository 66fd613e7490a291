# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Named sizes of models, configurations with overrides, and loading with one line of report."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from modeling_greenmim import GreenMIMConfig
from modeling_greenmim.encoders import named_sizes

from ..compat import without_load_report
from .argument_files import parse_yaml


logger = logging.get_logger(__name__)

MODEL_SIZES = named_sizes()


def parse_overrides(text: str | None, argument: str = "config_overrides") -> dict:
    """Reads `name=value` pairs separated by commas; lists in brackets: "image_size=128,depths=[2,2,6]".

    Raises:
        `ValueError`: for other text.
    """
    if not text:
        return {}
    try:
        overrides = parse_yaml("{" + text.replace("=", ": ") + "}")
    except yaml.YAMLError as error:
        raise ValueError(
            f"`{argument}` is {text!r}; it needs name=value pairs separated by commas, such as"
            ' "image_size=128,depths=[2,2,6]", each name once.'
        ) from error
    # YAML takes numbers without a point, such as 1e-5, for text.
    return {name: _as_number(value) for name, value in overrides.items()}


def check_overrides(overrides: dict, config_class: type[PreTrainedConfig]) -> None:
    """Refuses overrides of what a class of configurations does not have.

    Raises:
        `ValueError`: naming them.
    """
    unknown = [name for name in overrides if name not in config_class.__dataclass_fields__]
    if unknown:
        raise ValueError(f"`config_overrides` names {unknown}, which {config_class.__name__} does not have.")


def _as_number(value):
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_config(name: str, argument: str) -> dict:
    """The values in the `config.json` of a folder or a Hub repository.

    Args:
        argument: where the name comes from, for messages.

    Raises:
        `ValueError`: when there is none, naming the argument.
    """
    path = Path(name)
    if path.is_file():
        raise ValueError(
            f"`{argument}` is {name!r}, a file; a folder with a config.json is needed. Files of other projects become"
            " one by `python -m modeling_greenmim.conversion import`."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"`{argument}` is {name!r}, a folder without a config.json.")
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        if path.is_dir():
            raise ValueError(f"`{argument}` is {name!r}, whose config.json cannot be read: {error}") from error
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`{argument}` is {name!r}: there is no such folder, and the Hub does not give it ({reason})."
        ) from error
    return values


def read_greenmim_config(name: str, argument: str) -> dict:
    """As `read_config`, of a GreenMIM model.

    Raises:
        `ValueError`: for a checkpoint of another type too.
    """
    values = read_config(name, argument)
    found = values.get("model_type")
    if found != GreenMIMConfig.model_type:
        raise ValueError(
            f"`{argument}` is {name!r}, a checkpoint of model type {found!r}; one of GreenMIM is needed. Swins and"
            " Twins become one by `python -m modeling_greenmim.conversion import`."
        )
    return values


def build_config(name: str, overrides: str | None = None, defaults: dict | None = None) -> GreenMIMConfig:
    """Configuration of a named size, or of a folder or Hub repository, with overrides.

    Args:
        name: of the size, the folder or the repository.
        overrides: `config_overrides`.
        defaults: values of other arguments, over which overrides win.

    Raises:
        `ValueError`: for names that there are not, and for values that a configuration cannot have.
    """
    if name in MODEL_SIZES:
        values = MODEL_SIZES[name]
    elif os.path.exists(name) or "/" in name:
        values = read_greenmim_config(name, "config_name")
    else:
        raise ValueError(
            f"`config_name` is {name!r}; it must be one of {', '.join(MODEL_SIZES)}, a folder with a config.json or a"
            " Hub repository (owner/name)."
        )
    return changed_config(values, overrides, defaults, f"`config_name` is {name!r}")


def changed_config(values: dict, overrides: str | None, defaults: dict | None, given: str) -> GreenMIMConfig:
    """A configuration with changes.

    Args:
        values: of the configuration.
        overrides: `config_overrides`.
        defaults: values of other arguments, over which overrides win.
        given: the argument that the values come from, and its value, for messages.

    Raises:
        `ValueError`: for values that a configuration cannot have.
    """
    changes = parse_overrides(overrides)
    check_overrides(changes, GreenMIMConfig)
    if "depths" in changes:  # stages have other names then
        values = {key: value for key, value in values.items() if key not in ("out_features", "out_indices")}
    try:
        return GreenMIMConfig(**{**values, **(defaults or {}), **changes})
    except StrictDataclassError as error:
        # Its own message repeats that of its cause under a headline.
        given = f"`config_overrides` is {overrides!r}" if overrides else given
        raise ValueError(f"{given}: {error.__cause__ or error}") from None


def channels_of(config: PreTrainedConfig) -> int:
    """Channels of the images that a model takes, be it by its backbone; 3 where it does not say."""
    values = getattr(config, "backbone_config", None) or config
    return getattr(values, "num_channels", 3)


def weights_checksum(model: nn.Module) -> str:
    """Tells models of one name apart, such as a folder before and after another training."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class NewWeights(NamedTuple):
    """Names of weights that a checkpoint did not give: those it lacks, and those that have another shape in it."""

    missing: list[str]
    mismatched: list[str]


def from_pretrained(
    model_class, name: str, called: str | None = None, **options
) -> tuple[PreTrainedModel, NewWeights]:
    """`model_class.from_pretrained`, with one line of report where Transformers logs a table.

    Args:
        called: what messages call it; default: its name.

    Returns:
        The model, and which of its weights start anew.

    Raises:
        `ValueError`: for a checkpoint without the weights of the encoder, and for weights of another shape, unless
            `ignore_mismatched_sizes` is among the options.
    """
    called = called or name
    replaces = options.pop("ignore_mismatched_sizes", False)
    with without_load_report():
        # All differences at once; Transformers' own error would only say that there are some.
        model, info = model_class.from_pretrained(
            name, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    new = NewWeights(sorted(info["missing_keys"]), sorted(key for key, *_ in info["mismatched_keys"]))
    lacking = [weight for weight in new.missing if _is_of_encoder(weight, model)]
    if lacking:
        raise ValueError(
            f"`model_name_or_path` is {called!r}, which lacks weights of the encoder: {_some(lacking)}. They would be"
            " random."
        )
    if new.mismatched and not replaces:
        raise ValueError(
            f"`model_name_or_path` is {called!r}, of which {_some(new.mismatched)} have another shape than the model"
            " wants; --ignore_mismatched_sizes true starts them anew."
        )
    unused = sorted(info["unexpected_keys"])
    parts = []
    if started := [*new.missing, *new.mismatched]:
        parts.append(f"new weights are {_some(started)}")
    if unused:
        parts.append(f"not used are {_some(unused)}")
    if parts:
        logger.warning(f"Of {called}: {'; '.join(parts)}.")
    return model, new


def _is_of_encoder(weight: str, model: PreTrainedModel) -> bool:
    """Whether every checkpoint of a model of ours must bring a weight; other models are as Transformers has them."""
    of_encoder = ("greenmim.embeddings.", "greenmim.encoder.")
    return isinstance(model.config, GreenMIMConfig) and weight.startswith(of_encoder)


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
