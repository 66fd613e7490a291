# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""From a checkpoint of any format to a model and a folder of ours."""

import json
import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoImageProcessor
from transformers.utils import logging

from modeling_greenmim import (
    GreenMIMConfig,
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMImageProcessorPil,
    GreenMIMModel,
)
from modeling_greenmim.image_processing_greenmim import build_image_processor

from .cards import model_card
from .checkpoint import PROJECTION, Checkpoint, CheckpointError
from .formats import FORMATS
from .inference import infer_config
from .measuring import ORDERS, measure_orders, read_photographs
from .reading import clear_errors, read_source


logger = logging.get_logger(__name__)

# Of the four tokens (row, column) that merging joins: where each of (0,0), (1,0), (0,1), (1,1) is in row order.
FROM_ROW_ORDER = [0, 2, 1, 3]
# What an import writes: a model, the code that goes with it, its image processor and its card.
WRITTEN = re.compile(r"config\.json|model.*\.safetensors(\.index\.json)?|preprocessor_config\.json|README\.md|\w+\.py")
MERGING = re.compile(r"\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)$")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a file, or a folder of Transformers' Swin, of any format of `FORMATS`; the first that matches reads it.

    Raises:
        `CheckpointError`: when none matches, or when the file is damaged or not what it seems to be.
    """
    source = read_source(Path(path))
    what = f"`checkpoint` {str(path)!r}"
    with clear_errors(what):
        module = next((module for module in FORMATS.values() if module.matches(source)), None)
        checkpoint = module and module.read(source)
    kernel = checkpoint.weights.get(PROJECTION) if checkpoint else None
    if kernel is None or kernel.ndim != 4:
        raise CheckpointError(
            f"{what} is no Swin or Twins: it has no patch embedding of four dimensions"
            f" ('patch_embed.proj.weight'), but {', '.join(list(source.weights)[:5])}, ..."
        )
    whole = [name for name, tensor in checkpoint.weights.items() if not tensor.is_floating_point()]
    if whole:
        raise CheckpointError(f"{what} has weights that are no floating-point numbers: {whole[:5]}.")
    return checkpoint


def convert(checkpoint: Checkpoint, order: str = "auto", **values) -> nn.Module:
    """The GreenMIM model of a checkpoint: for pre-training with a decoder, a classifier with a head, else an encoder.

    Logs which values of the configuration nothing told, so that they were assumed.

    Args:
        order: of merging; see `merging_order`.
        values: of the configuration, instead of what the checkpoint tells.

    Raises:
        `CheckpointError`: listing weights that are missing, unknown or of a wrong shape.
    """
    model, assumed = _build(checkpoint, order, **values)
    if assumed:
        logger.warning(f"The checkpoint does not tell these values, so they were assumed:{flags(assumed)}")
    return model.eval()


def _build(checkpoint: Checkpoint, order: str, **values) -> tuple[nn.Module, dict]:
    """The model, and the values of its configuration that nothing told."""
    config, assumed = infer_config(checkpoint, **values)
    by_rows = config.backbone_type == "swin" and merging_order(checkpoint, order) == "row"
    state = dict(checkpoint.weights)
    state[PROJECTION] = state[PROJECTION].flatten(1)
    if any(name.startswith("decoder.") for name in state):
        model_class = GreenMIMForPreTraining
    elif "classifier.weight" in state:
        model_class = GreenMIMForImageClassification
    else:
        model_class, state = GreenMIMModel, {name.removeprefix("greenmim."): state[name] for name in state}
    with torch.device("meta"):
        model = model_class(config)
    _check_weights(model, state)
    model.load_state_dict(rows_to_columns(state) if by_rows else state, assign=True)
    return model, assumed


def merging_order(checkpoint: Checkpoint, order: str) -> str:
    """ "row" or "column": how a Swin's merging joins 2x2 tokens.

    Args:
        order: "row", "column", or "auto": what the checkpoint tells.

    Raises:
        `CheckpointError`: when it does not tell.
    """
    if order != "auto":
        return order
    if checkpoint.merging_order is None:
        raise CheckpointError(
            "The file does not tell the order in which it merges patches: it has no `args.model` that ends in"
            " 'dec5121b1' (2022: row) or in 'dec512b1' (2023: column). Give --patch_merging_order."
        )
    return checkpoint.merging_order


def measured_order(checkpoint: Checkpoint, photographs: str | Path | None = None, **values) -> str:
    """The order that the name tells, checked by the losses of the model under either, which are logged.

    Losses never choose: they tell little of a model that has learned little, or from other images.

    Args:
        photographs: a folder of images to measure on; see `read_photographs`.
        values: of the configuration, as for `convert`.

    Raises:
        `CheckpointError`: with the losses, when they tell another order than the name, or when there is no name.
    """
    models = {order: _build(checkpoint, order, **values)[0].float().eval() for order in ORDERS}
    with clear_errors("The losses of reconstruction"):
        losses = measure_orders(models, read_photographs(photographs))
    found, table = losses.order(), losses.table()
    try:
        told = merging_order(checkpoint, "auto")
    except CheckpointError as error:
        raise CheckpointError(f"{error} Its losses tell {found or 'neither'}.\n{table}") from error
    if found not in (told, None):
        raise CheckpointError(
            f"The file's name and losses disagree: its `args.model` is {checkpoint.name!r}, which tells the order"
            f" {told}, but its losses tell {found}. Give --patch_merging_order.\n{table}"
        )
    logger.warning(f"{table}\nThe name tells {told}, the losses tell {found or 'neither'}.")
    return told


def rows_to_columns(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of merging in row order -> those that compute the same in column order."""
    return {
        name: tensor.unflatten(-1, (4, -1))[..., FROM_ROW_ORDER, :].flatten(-2) if MERGING.search(name) else tensor
        for name, tensor in weights.items()
    }


def _check_weights(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise CheckpointError("The weights do not fit the architecture (by our names):\n  " + "\n  ".join(problems))


def import_checkpoint(
    path: str, output: str, order: str = "auto", photographs: str | Path | None = None, **values
) -> nn.Module:
    """Writes a folder of GreenMIM: configuration, weights, image processor and model card.

    Args:
        order: of merging. "auto", of a Swin with a decoder, is what its name tells, checked by `measured_order`.
        photographs: a folder of images for that check; default: two that are installed.
        values: of the configuration, instead of what the checkpoint tells.

    Raises:
        `CheckpointError`: when the checkpoint cannot be converted, or the folder holds anything but an earlier import;
            nothing is written then.
    """
    check_output(output)
    checkpoint = read_checkpoint(path)
    if order == "auto" and _can_be_measured(checkpoint):
        measured_order(checkpoint, photographs, **values)
    model = convert(checkpoint, order, **values)
    model.save_pretrained(output)
    image_processor(path, model.config).save_pretrained(output)
    given = {"patch_merging_order": order, **values}
    card = model_card(model, checkpoint, Path(path).name, Path(output).name, flags(given))
    (Path(output) / "README.md").write_text(card, encoding="utf-8")
    return model


def check_output(output: str) -> None:
    """Refuses a folder in which an import would replace, or lie among, anything else than an earlier import.

    Raises:
        `CheckpointError`: naming what is there.
    """
    folder = Path(output)
    if folder.is_file():
        raise CheckpointError(f"`output` is {str(output)!r}, a file; a folder is needed.")
    names = sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))
    others = [name for name in names if not WRITTEN.fullmatch(name)]
    if "config.json" not in names:
        others = names
    elif _model_type(folder / "config.json") != GreenMIMConfig.model_type:
        others = ["config.json", *others]
    if others:
        found = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise CheckpointError(
            f"`output` is {str(output)!r}, a folder that holds something else than an earlier import: {found}. Give"
            " a new or empty one."
        )


def _model_type(path: Path) -> str | None:
    try:
        return json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError):
        return None


def _can_be_measured(checkpoint: Checkpoint) -> bool:
    """Whether it is a Swin that predicts something of photographs, coloured or grey."""
    has_decoder = any(name.startswith("decoder.") for name in checkpoint.weights)
    is_swin = checkpoint.values.get("backbone_type", "swin") == "swin"
    return has_decoder and is_swin and checkpoint.weights[PROJECTION].shape[1] in (1, 3)


def image_processor(path: str, config: GreenMIMConfig) -> GreenMIMImageProcessorPil:
    """That of a folder of Transformers, as our class, or the one that goes with the configuration."""
    if not (Path(path) / "preprocessor_config.json").is_file():
        return build_image_processor(config)
    return GreenMIMImageProcessorPil(**AutoImageProcessor.from_pretrained(path).to_dict())


def flags(values: dict) -> str:
    """Values as the command line has them, such as " --image_size 224 --num_heads 1 2"."""
    words = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in values.items()}
    return "".join(" ".join([f" --{name}", *map(str, words[name])]) for name in words)
