# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Where a run starts from: weights of ours, or of other projects, which are converted on the way."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoImageProcessor
from transformers.utils import logging

from modeling_greenmim import GreenMIMConfig, GreenMIMImageProcessorPil, GreenMIMModel
from modeling_greenmim.conversion import CheckpointError, import_checkpoint
from modeling_greenmim.conversion.releasing import licences_of_origin
from modeling_greenmim.image_processing_greenmim import build_image_processor

from ..data.statistics import carry_statistics
from .models import read_config


logger = logging.get_logger(__name__)

# What the weights fix; of stages the last ones may be dropped.
FIXED = ("backbone_type", "embed_dim", "patch_size", "mlp_ratio", "qkv_bias", "hidden_act")
OF_STAGES = ("depths", "num_heads")
CHANNEL_RULES = ("mean", "first", "new")
# What names of timm's models begin with that can be converted.
TIMM_ARCHITECTURES = ("swin_", "twins_svt_")
# Files of a repository of Transformers that make a model.
FILES = ["*.json", "*.safetensors", "*.bin"]


@dataclass(frozen=True)
class Start:
    """A checkpoint as something that `from_pretrained` of our classes, or of Transformers', loads.

    Args:
        name: as it was given.
        folder: or Hub repository.
        config: values of its configuration.
        origin: what cards say of it: its name, what was converted, its licence.
    """

    name: str
    folder: str
    config: dict
    origin: str


@contextmanager
def start_of(name: str, argument: str, any_model: bool = False) -> Iterator[Start]:
    """A checkpoint of GreenMIM as it is; any other Swin or Twins converted into a folder that is gone afterwards.

    Args:
        name: a folder or Hub repository of GreenMIM, of Transformers' Swin or of timm, or a file of Microsoft's Swin,
            timm, SimMIM, Twins or the official GreenMIM.
        argument: where the name comes from, for messages.
        any_model: whether all models of Transformers are taken as they are.

    Raises:
        `ValueError`: for anything else, telling what it is and what would work.
    """
    if Path(name).is_file():
        with _converted(name, name, argument) as folder:
            yield _start(folder, name, read_config(folder, argument), "converted")
        return
    values = read_config(name, argument)
    # Transformers gives timm's own configurations a type that wraps timm, which may not be installed.
    model_type, of_timm = values.get("model_type"), values.get("architecture", "")
    is_convertible = _is_of_timm(values)
    if model_type == GreenMIMConfig.model_type or (any_model and model_type and not is_convertible):
        yield _start(name, name, values)
    elif model_type == "swin":
        with _converted(_downloaded(name), name, argument) as folder:
            yield _start(folder, name, read_config(folder, argument), "Transformers' Swin, converted")
    elif is_convertible:
        size = values.get("pretrained_cfg", {}).get("input_size")  # (channels, height, width)
        told = {"image_size": size[-1]} if size else {}
        with _converted(_weights_of_timm(name, argument), name, argument, **told) as folder:
            _set_statistics_of_timm(folder, values)
            yield _start(folder, name, read_config(folder, argument), f"timm's {of_timm}, converted")
    else:
        what = f"a checkpoint of model type {model_type!r}" if model_type else "a config.json without a model type"
        what = f"timm's {of_timm}" if of_timm else what
        raise ValueError(
            f"`{argument}` is {name!r}, {what}. It can be a folder or a Hub repository of GreenMIM, of Transformers'"
            " Swin or of a Swin or Twins of timm, or a file of Microsoft's Swin, timm, SimMIM, Twins or official"
            " GreenMIM."
        )


def becomes_greenmim(name: str, argument: str) -> bool:
    """Whether classification makes a model of ours of it, be it converted, rather than one of Transformers.

    Raises:
        `ValueError`: when there is no such file, folder or repository.
    """
    if Path(name).is_file():
        return True
    values = read_config(name, argument)
    return _is_of_timm(values) or values.get("model_type") == GreenMIMConfig.model_type


def _is_of_timm(values: dict) -> bool:
    """Whether a configuration is timm's, of a model that can be converted."""
    return values.get("architecture", "").startswith(TIMM_ARCHITECTURES)


@contextmanager
def _converted(path: str, name: str, argument: str, **values) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, Path(name).stem or "model"))
        try:
            model = import_checkpoint(path, folder, **values)
        except CheckpointError as error:
            raise ValueError(
                f"`{argument}` is {name!r}, which cannot be converted: {error} What it does not tell can be given to"
                " `python -m modeling_greenmim.conversion import`, whose folder is a checkpoint to go on from."
            ) from error
        logger.info(f"{name} was converted: a {type(model).__name__}, embed_dim {model.config.embed_dim}.")
        yield folder


def _downloaded(name: str) -> str:
    return name if Path(name).is_dir() else snapshot_download(name, allow_patterns=FILES)


def _weights_of_timm(name: str, argument: str) -> str:
    for file in ("model.safetensors", "pytorch_model.bin"):
        if Path(name, file).is_file():
            return str(Path(name, file))
        if not Path(name).is_dir():
            try:
                return hf_hub_download(name, file)
            except (HfHubHTTPError, LocalEntryNotFoundError):
                continue
    raise ValueError(f"`{argument}` is {name!r}, a model of timm without model.safetensors or pytorch_model.bin.")


def _set_statistics_of_timm(folder: str, values: dict) -> None:
    """Mean and standard deviation of the pixels that the weights were trained with, in the image processor."""
    told = values.get("pretrained_cfg") or values
    path = Path(folder, "preprocessor_config.json")
    processor = json.loads(path.read_text())
    for theirs, ours in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in told:
            processor[ours] = list(told[theirs])
    path.write_text(json.dumps(processor, indent=2))


def _start(folder: str, name: str, config: dict, *what: str) -> Start:
    facts = ", ".join([*what, f"licence: {licence_of(name) or 'unknown'}"])
    return Start(name, folder, config, f"`{name}` ({facts})")


def licence_of(name: str) -> str | None:
    """The licence that the card of a folder or a Hub repository names, else that of what its model was made from.

    So a licence is not lost on the way through a model that has none yet. None without either.
    """
    try:
        card = ModelCard.load(Path(name, "README.md") if Path(name).is_dir() else name)
        return card.data.to_dict().get("license") or next(iter(licences_of_origin(card.text)), None)
    except Exception:  # no card, a broken one, or no network: the run does not depend on it
        return None


def check_changes(old: dict, new: dict, name: str) -> None:
    """Refuses overrides of what the weights of a checkpoint fix.

    Args:
        old, new: values of the checkpoint's configuration, and with overrides.
        name: of the checkpoint.

    Raises:
        `ValueError`: naming the first that changes.
    """
    for key in (*FIXED, *OF_STAGES):
        before, after = old.get(key), new.get(key)
        if key in OF_STAGES:
            same = list(after) == list(before)[: len(after)]
            hint = "; stages can only be dropped from the end"
        else:
            same, hint = before == after, ""
        if not same:
            raise ValueError(
                f"`config_overrides` changes `{key}` from {before} to {after}, which the weights of"
                f" `model_name_or_path` {name!r} fix{hint}."
            )


def image_processor_of(start: Start, config: GreenMIMConfig):
    """A checkpoint's image processor; one of ours, or none, is made anew for the configuration's size and channels."""
    try:
        own = AutoImageProcessor.from_pretrained(start.folder)
    except OSError:  # it has none
        return build_image_processor(config)
    if not isinstance(own, GreenMIMImageProcessorPil):
        return own
    processor = build_image_processor(config)
    if len(own.image_mean) == config.num_channels:
        carry_statistics(own, processor)
    return processor


def carry_channels(model, start: Start, rule: str) -> None:
    """Fills the patch embedding of a model from one for another number of channels, if it has another.

    Args:
        model: of ours, loaded from the start with another `num_channels`; is changed.
        rule: `mean`: each channel has the mean of the old channels' weights, scaled so that channels that are alike
            have the effect they had; `first`: the first channels keep theirs, more start anew; `new`: all do.
    """
    old_channels, channels = GreenMIMConfig(**start.config).num_channels, model.config.num_channels
    if channels == old_channels or rule == "new":
        return
    old = GreenMIMModel.from_pretrained(start.folder).embeddings.patch_embeddings.projection.weight
    new = model.greenmim.embeddings.patch_embeddings.projection.weight
    kernels = old.unflatten(1, (old_channels, -1))
    with torch.no_grad():
        target = new.unflatten(1, (channels, -1))
        if rule == "mean":
            target.copy_(kernels.mean(dim=1, keepdim=True).expand_as(target) * old_channels / channels)
        else:
            shared = min(old_channels, channels)
            target[:, :shared] = kernels[:, :shared]
    logger.info(f"Of {start.name}: weights of {old_channels} channels were carried to {channels} ({rule}).")
