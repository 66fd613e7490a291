# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reading files and folders as data: nothing in them is ever executed."""

import argparse
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .checkpoint import CheckpointError, Source


# Classes other than tensors that files of weights name, and what is made in their place. yacs' node is a dictionary
# with attributes, which is what an OrderedDict is to the unpickler of torch; yacs itself is not imported.
STAND_INS = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
# What damaged files and impossible values raise.
READING_ERRORS = (OSError, EOFError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, SafetensorError)


def read_source(path: Path) -> Source:
    """A `.safetensors` file, one of `torch.save`, or a folder, which its format reads.

    Raises:
        `CheckpointError`: when there is no such file, when it is damaged, wants other classes or has no weights.
    """
    if path.is_dir():
        return Source(path)
    content = _read_file(path)
    weights = _weights_of(content, path)
    args, config = content.get("args"), content.get("config")
    return Source(
        path,
        weights,
        args=vars(args) if isinstance(args, argparse.Namespace) else {},
        config=config if isinstance(config, dict) else {},
    )


def _read_file(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"`checkpoint` is {str(path)!r}, where there is no file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(STAND_INS):
            return _plain(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise _damaged(path) from error
        raise CheckpointError(
            f"`checkpoint` {str(path)!r} wants {found[1]}, which a file of weights does not need; nothing of it was"
            " executed. Only tensors, argparse.Namespace and yacs.config.CfgNode are read."
        ) from error
    except PermissionError as error:
        raise CheckpointError(f"`checkpoint` {str(path)!r} cannot be opened: {error.strerror}.") from error
    except READING_ERRORS as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> CheckpointError:
    """One line: torch explains itself at length, and advises to load such a file with its code."""
    writer = "safetensors" if path.suffix == ".safetensors" else "torch.save"
    return CheckpointError(f"`checkpoint` {str(path)!r} is truncated, damaged or no file of {writer}.")


def _weights_of(content, path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file's content, without the prefix of DistributedDataParallel."""
    if isinstance(content, dict):
        for key in ("model", "state_dict", "module"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    is_named = isinstance(content, dict) and content and all(isinstance(name, str) for name in content)
    if not is_named or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise CheckpointError(
            f"`checkpoint` {str(path)!r} holds no weights: a dictionary of tensors is needed, itself or under 'model'"
            " or 'state_dict'."
        )
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return content


def _plain(value):
    """Nested dictionaries of any class -> of class dict, by `dict`'s own methods, for a file may set attributes."""
    return {key: _plain(inner) for key, inner in dict.items(value)} if isinstance(value, dict) else value


def load_whole(model_class: type, folder: str | Path, argument: str) -> nn.Module:
    """A model of a class of Transformers from a folder that has exactly its weights.

    Args:
        argument: what messages call the folder.

    Raises:
        `CheckpointError`: naming weights that are missing or unknown.
    """
    with clear_errors(f"`{argument}` {str(folder)!r}"):
        model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys"):
        if loading[problem]:
            names = ", ".join(sorted(loading[problem])[:5])
            raise CheckpointError(f"`{argument}` {str(folder)!r} does not fit its configuration: {problem} {names}.")
    return model


@contextmanager
def clear_errors(what: str):
    """Errors of reading or of impossible values become a `CheckpointError` that begins with `what`."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{what} wants to run code, which was not executed; only tensors are read.") from error
    except StrictDataclassError as error:
        # Its own message repeats that of its cause under a headline.
        raise CheckpointError(f"{what} cannot be read or is impossible: {error.__cause__ or error}") from error
    except READING_ERRORS as error:
        raise CheckpointError(f"{what} cannot be read or is impossible: {error}") from error


@contextmanager
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
