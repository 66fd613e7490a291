# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints in and out: official GreenMIM, SimMIM, Microsoft's, timm's and Transformers' Swin.

    python -m modeling_greenmim.conversion import --checkpoint FILE.pth --output DIR
    python -m modeling_greenmim.conversion export --model DIR --to timm --output FILE.safetensors

Every format is read by way of Microsoft Swin's names, which official GreenMIM, SimMIM and timm share but for details.
"""

import argparse
import copy
import math
import pickle
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTImageProcessorPil,
)

from . import GreenMIMConfig, GreenMIMForImageClassification, GreenMIMForPreTraining, GreenMIMModel
from .decoder import sincos_positions
from .image_processing_greenmim import GreenMIMImageProcessorPil, build_image_processor
from .resizing import BIAS_TABLE, window_of_table
from .swin import stage_windows


# Pairs of names, ours first. The first group begins a name, the second may be anywhere in it.
BEGINNINGS = [
    ("greenmim.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("greenmim.embeddings.norm.", "patch_embed.norm."),
    ("greenmim.encoder.layers.", "layers."),
    ("greenmim.layernorm.", "norm."),
    ("classifier.", "head."),
    ("decoder.decoder_layers.", "decoder_blocks."),
    ("decoder.decoder_embed.", "decoder_embed."),
    ("decoder.decoder_norm.", "decoder_norm."),
    ("decoder.decoder_pred.", "decoder_pred."),
    ("decoder.mask_token", "mask_token"),
]
PARTS = [(".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."), (".attention.", ".attn.")]
# Pairs of names within Transformers' Swin, ours first; queries, keys and values are apart there.
SWIN_PARTS = [
    ("attention.proj.", "attention.o_proj."),
    (f"attention.{BIAS_TABLE}", f"attention.relative_position_bias.{BIAS_TABLE}"),
]
PROJECTION = "patch_embed.proj.weight"
# What models compute anew, or what no other task uses.
BUFFERS = re.compile(r"(relative_position_index|attn_mask)$|^decoder_pos_embed$")
SIMMIM_ONLY = re.compile(r"^(encoder\.mask_token$|decoder\.)")
# Of the four tokens (row, column) that merging joins: where each of (0,0), (1,0), (0,1), (1,1) is in row order.
FROM_ROW_ORDER = [0, 2, 1, 3]
# Values of the configuration that no weight tells, by their names in `args`.
TOLD = {"decoder_num_attention_heads": "decoder_num_heads", "layer_norm_eps": "layer_norm_eps"}
FORMATS = ("transformers-swin", "microsoft-swin", "timm", "original")
# Width, depths and window of the models that were released, and their cards.
RELEASED = {
    (128, (2, 2, 18, 2), 7): "swin-base",
    (128, (2, 2, 18, 2), 14): "swin-base-win14",
    (192, (2, 2, 18, 2), 14): "swin-large-win14",
}
KINDS = {
    "official": "official GreenMIM",
    "simmim": "SimMIM",
    "microsoft": "Microsoft's Swin",
    "timm": "timm",
    "transformers": "Transformers' Swin",
}
MERGING = re.compile(r"(^|\.)layers\.\d+\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)$")


class CheckpointError(ValueError):
    """A file or model that cannot be converted; the text says why and what to do."""


@dataclass
class Checkpoint:
    """Weights by Microsoft Swin's names, and what else a source tells.

    Attributes:
        kind: where it comes from: official, simmim, microsoft, timm or transformers.
        weights: without buffers; those of official pre-training include the decoder's.
        model_name: `args.model` of official files, else empty.
        image_size: side in pixels, if the source tells it.
        values: more values of the configuration.
    """

    kind: str
    weights: dict[str, torch.Tensor]
    model_name: str = ""
    image_size: int | list[int] | None = None
    values: dict = field(default_factory=dict)


# Names


def _replace(name: str, column: int) -> str:
    """Our name of one of Microsoft's (`column` 0), or the other way round (1)."""
    for pair in BEGINNINGS:
        if name.startswith(pair[1 - column]):
            name = pair[column] + name.removeprefix(pair[1 - column])
            break
    for pair in PARTS:
        name = name.replace(pair[1 - column], pair[column])
    return name


def from_microsoft(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by Microsoft Swin's and official GreenMIM's names -> by those of our models with a head or decoder."""
    return {_replace(name, 0): tensor.flatten(1) if name == PROJECTION else tensor for name, tensor in weights.items()}


def to_microsoft(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of one of our models, by Microsoft Swin's and official GreenMIM's names."""
    config = model.config
    prefix = "greenmim." if isinstance(model, GreenMIMModel) else ""
    weights = {_replace(prefix + name, 1): tensor.detach() for name, tensor in model.state_dict().items()}
    shape = (config.embed_dim, config.num_channels, config.patch_size, config.patch_size)
    return {name: tensor.view(shape) if name == PROJECTION else tensor for name, tensor in weights.items()}


def _move_merging(weights: dict[str, torch.Tensor], stages: int) -> dict[str, torch.Tensor]:
    """Merging moved by so many stages: in timm a stage begins with what ends Microsoft's stage before it."""

    def moved(found: re.Match) -> str:
        return f"layers.{int(found[1]) + stages}.downsample."

    return {re.sub(r"^layers\.(\d+)\.downsample\.", moved, name): tensor for name, tensor in weights.items()}


def from_timm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names -> Microsoft's. Before version 0.9 timm's stages, too, ended with their merging."""
    if "layers.0.downsample.norm.weight" not in weights:
        weights = _move_merging(weights, -1)
    return {name.replace("head.fc.", "head.", 1): tensor for name, tensor in weights.items()}


def to_timm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Microsoft's names -> timm's."""
    return {re.sub(r"^head\.", "head.fc.", name): tensor for name, tensor in _move_merging(weights, 1).items()}


def from_transformers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder, and the classifier if there is one, of a Swin of Transformers, by Microsoft's names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(("decoder.", "swin.embeddings.mask_token", "embeddings.mask_token")):
            continue  # SimMIM's
        name = name if name.startswith("classifier.") else "greenmim." + name.removeprefix("swin.")
        for ours, theirs in SWIN_PARTS:
            name = name.replace(theirs, ours)
        state[name] = tensor
    for name in [name for name in state if ".q_proj." in name]:
        joined = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace(".q_proj.", ".qkv.")] = torch.cat(joined)
    return {_replace(name, 1): tensor for name, tensor in state.items()}


def to_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Microsoft's names -> those of `SwinForImageClassification`."""
    state = {}
    for name, tensor in weights.items():
        name = _replace(name, 0).replace("greenmim.", "swin.", 1)
        for ours, theirs in SWIN_PARTS:
            name = name.replace(ours, theirs)
        if ".attention.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3)):
                state[name.replace(".qkv.", f".{part}_proj.")] = piece
        else:
            state[name] = tensor
    return state


# Reading


def read_file(path: Path) -> dict:
    """What a `.safetensors` file or one of `torch.save` holds. Of pickled classes only `argparse.Namespace` is made.

    Raises:
        `CheckpointError`: when there is no such file, when it is damaged, or when it wants another class.
    """
    if not path.is_file():
        raise CheckpointError(f"`checkpoint` is {str(path)!r}, where there is no file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise CheckpointError(
                f"`checkpoint` {str(path)!r} is damaged or no file of torch.save: {error}"
            ) from error
        raise CheckpointError(
            f"`checkpoint` {str(path)!r} wants {found[1]}, which a file of weights does not need; nothing of it was"
            " executed. Only tensors and argparse.Namespace are read."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"`checkpoint` {str(path)!r} is truncated or damaged: {error}") from error


def _weights_of(content, path: Path) -> dict[str, torch.Tensor]:
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
    whole = [name for name, tensor in content.items() if not (tensor.is_floating_point() or BUFFERS.search(name))]
    if whole:
        raise CheckpointError(
            f"`checkpoint` {str(path)!r} has weights that are no floating-point numbers: {whole[:5]}."
        )
    if all(name.startswith("module.") for name in content):  # of DistributedDataParallel
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return content


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads an official, SimMIM, Microsoft or timm file, or a folder of Transformers' Swin.

    Raises:
        `CheckpointError`: when it is none of these.
    """
    if path.is_dir():
        return _read_folder(path)
    content = read_file(path)
    weights = _weights_of(content, path)
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    if any(name.removeprefix("encoder.").startswith("patch_embeds.") for name in weights):
        raise CheckpointError(f"`checkpoint` {str(path)!r} is a Twins; only Swin can be converted.")
    kind = "microsoft"
    if any(is_of_decoder(name) for name in weights):
        kind = "official"
    elif f"encoder.{PROJECTION}" in weights:
        kind = "simmim"
        weights = {name: tensor for name, tensor in weights.items() if not SIMMIM_ONLY.match(name)}
    elif "head.fc.weight" in weights or (
        "layers.0.downsample.norm.weight" not in weights and "layers.1.downsample.norm.weight" in weights
    ):
        kind = "timm"
        weights = from_timm(weights)
    weights = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    if PROJECTION not in weights or weights[PROJECTION].ndim != 4:
        raise CheckpointError(
            f"`checkpoint` {str(path)!r} is no Swin: it has no {PROJECTION!r} of four dimensions, but"
            f" {', '.join(list(weights)[:5])}, ..."
        )
    image_size = args.get("input_size") or _image_size(weights)
    weights = {name: tensor for name, tensor in weights.items() if not BUFFERS.search(name)}
    # Our exports in the official layout tell more than official files do.
    told = {ours: args[theirs] for ours, theirs in TOLD.items() if theirs in args}
    return Checkpoint(kind, weights, str(args.get("model", "")), image_size, told)


def _read_folder(path: Path) -> Checkpoint:
    """A folder of `SwinModel`, `SwinForImageClassification` or `SwinForMaskedImageModeling`."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"`checkpoint` is {str(path)!r}, a folder without config.json; name the file in it.")
    with clear_errors(f"`checkpoint` {str(path)!r}"):
        config = AutoConfig.from_pretrained(path)
    if config.model_type != "swin":
        raise CheckpointError(
            f"`checkpoint` {str(path)!r} is a folder of model type {config.model_type!r}; only 'swin' is converted."
        )
    if config.use_absolute_embeddings:
        raise CheckpointError(f"`checkpoint` {str(path)!r} adds absolute position embeddings, which GreenMIM has not.")
    kinds = (SwinModel, SwinForImageClassification, SwinForMaskedImageModeling)
    architecture = (config.architectures or ["SwinModel"])[0]
    kind = next((kind for kind in kinds if kind.__name__ == architecture), SwinModel)
    model = load_whole(kind, path, "checkpoint")
    same = (
        "problem_type",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "drop_path_rate",
        "layer_norm_eps",
    )
    values = {name: getattr(config, name) for name in same}
    if kind is SwinForImageClassification:
        values |= {"id2label": config.id2label, "label2id": config.label2id}
    return Checkpoint("transformers", from_transformers(model), image_size=config.image_size, values=values)


@contextmanager
def clear_errors(what: str):
    """Errors of reading or of impossible values become a `CheckpointError` that begins with `what`."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{what} wants to run code, which was not executed; only tensors are read.") from error
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(f"{what} cannot be read or is impossible: {error}") from error


def load_whole(kind: type, folder, argument: str) -> nn.Module:
    """A model of a class from a folder that has exactly its weights.

    Raises:
        `CheckpointError`: naming weights that are missing or unknown.
    """
    with clear_errors(f"`{argument}` {str(folder)!r}"):
        model, loading = kind.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys"):
        if loading[problem]:
            names = ", ".join(sorted(loading[problem])[:5])
            raise CheckpointError(f"`{argument}` {str(folder)!r} does not fit its configuration: {problem} {names}.")
    return model


def _image_size(weights: dict[str, torch.Tensor]) -> int | None:
    """Side of square images in pixels, from the buffers that depend on it."""
    patch, stages = weights[PROJECTION].shape[-1], _count(weights, r"layers\.(\d+)\.blocks")
    positions, mask = weights.get("decoder_pos_embed"), weights.get("layers.0.blocks.1.attn_mask")
    if positions is not None:  # (1, units, width)
        if positions.ndim != 3:
            raise CheckpointError(
                f"`decoder_pos_embed` has shape {tuple(positions.shape)} instead of (1, units, width)."
            )
        count, step = positions.shape[1], patch * 2 ** (stages - 1)
    elif mask is not None and mask.ndim == 3:  # (windows, tokens, tokens)
        count, step = mask.shape[0] * mask.shape[1], patch
    else:
        return None
    side = math.isqrt(count)
    return side * step if side**2 == count else None


def _count(weights: dict[str, torch.Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in weights if (found := re.match(pattern, name))), default=-1)


# Importing


def infer_config(checkpoint: Checkpoint, **values) -> GreenMIMConfig:
    """The configuration that weights have been made for.

    Args:
        values: what to set otherwise than inferred, such as `layer_norm_eps` or `image_size`.

    Raises:
        `CheckpointError`: when weights are missing that tell, or contradict one another.
    """
    weights = checkpoint.weights
    try:
        embed_dim, channels, patch, _ = weights[PROJECTION].shape
        stages = _count(weights, r"layers\.(\d+)\.blocks")
        depths = [_count(weights, rf"layers\.{stage}\.blocks\.(\d+)") for stage in range(stages)]
        tables = [weights[f"layers.{stage}.blocks.0.attn.{BIAS_TABLE}"] for stage in range(stages)]
        hidden = weights["layers.0.blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"The checkpoint is no whole Swin: {error} is missing or has a strange shape."
        ) from error
    windows = [window_of_table(table) for table in tables]
    if None in windows:
        shapes = [tuple(table.shape) for table in tables]
        raise CheckpointError(
            f"The position bias tables have the shapes {shapes}; window w has (2 * w - 1) ** 2 rows."
        )
    inferred = {
        "image_size": checkpoint.image_size or 224,
        "patch_size": patch,
        "num_channels": channels,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": [table.shape[1] for table in tables],
        "window_size": max(windows),
        "mlp_ratio": hidden / embed_dim,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in weights,
        # Official GreenMIM's; the others are made with torch's own.
        "layer_norm_eps": 1e-6 if checkpoint.kind == "official" or named_order(checkpoint) else 1e-5,
    }
    if checkpoint.kind == "official":
        inferred |= _infer_decoder(weights)
    if "head.weight" in weights:
        inferred["num_labels"] = weights["head.weight"].shape[0]
    if "id2label" in checkpoint.values:
        inferred.pop("num_labels", None)
    with clear_errors("The configuration"):
        config = GreenMIMConfig(**{**inferred, **checkpoint.values, **values})
    if list(stage_windows(config)) != windows:
        raise CheckpointError(
            f"The windows of the stages are {windows} in the checkpoint, but images of `image_size`"
            f" {config.image_size} have {list(stage_windows(config))}: give --image_size."
        )
    return config


def _infer_decoder(weights: dict[str, torch.Tensor]) -> dict:
    needed = ("mask_token", "decoder_blocks.0.mlp.fc1.weight", "decoder_pred.weight")
    missing = [name for name in needed if name not in weights or weights[name].ndim < 2]
    if missing:
        raise CheckpointError(f"The checkpoint has a part of a decoder: {missing} are missing or of a strange shape.")
    width = weights["mask_token"].shape[-1]
    return {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": _count(weights, r"decoder_blocks\.(\d+)"),
        # No weight tells. In published models a head has 32 channels.
        "decoder_num_attention_heads": max(1, width // 32),
        "decoder_intermediate_size": weights["decoder_blocks.0.mlp.fc1.weight"].shape[0],
    }


def named_order(checkpoint: Checkpoint) -> str | None:
    """The order that the name of an official model tells; None for other names."""
    endings = {"dec5121b1": "row", "dec512b1": "column"}
    return next((order for ending, order in endings.items() if checkpoint.model_name.endswith(ending)), None)


def merging_order(checkpoint: Checkpoint, order: str) -> str:
    """ "row" or "column": how the checkpoint's merging joins 2x2 tokens.

    Args:
        order: "row", "column", or "auto": official files by their model's name, all other Swins by column.

    Raises:
        `CheckpointError`: when an official file does not tell.
    """
    if order != "auto":
        return order
    if named_order(checkpoint):
        return named_order(checkpoint)
    if checkpoint.kind != "official":
        return "column"
    raise CheckpointError(
        f"The file does not tell the order in which it merges patches: its `args.model` is {checkpoint.model_name!r},"
        " which ends neither in 'dec5121b1' (2022: row) nor in 'dec512b1' (2023: column). Give --patch_merging_order."
    )


def rows_to_columns(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of merging in row order -> those that compute the same in column order."""
    return {
        name: tensor.unflatten(-1, (4, -1))[..., FROM_ROW_ORDER, :].flatten(-2) if MERGING.search(name) else tensor
        for name, tensor in weights.items()
    }


def convert(checkpoint: Checkpoint, order: str = "auto", **values) -> nn.Module:
    """The GreenMIM model of a checkpoint: for pre-training with a decoder, a classifier with a head, else an encoder.

    Args:
        order: of merging; see `merging_order`.
        values: of the configuration, instead of what the weights tell.

    Raises:
        `CheckpointError`: listing weights that are missing, unknown or of a wrong shape.
    """
    config = infer_config(checkpoint, **values)
    weights = checkpoint.weights
    order = merging_order(checkpoint, order)
    state = from_microsoft(weights)
    kind = GreenMIMForPreTraining if checkpoint.kind == "official" else GreenMIMForImageClassification
    if kind is GreenMIMForImageClassification and "classifier.weight" not in state:
        kind, state = GreenMIMModel, {name.removeprefix("greenmim."): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        model = kind(config)
    _check(model, state)
    if order == "row":
        state = rows_to_columns(state)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
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


def import_checkpoint(path: str, output: str, order: str = "auto", **values) -> nn.Module:
    """Writes a folder of GreenMIM: configuration, weights, image processor and model card.

    Raises:
        `CheckpointError`: when the checkpoint cannot be converted; nothing is written then.
    """
    if Path(output).is_file():
        raise CheckpointError(f"`output` is {str(output)!r}, a file; a folder is needed.")
    checkpoint = read_checkpoint(Path(path))
    model = convert(checkpoint, order, **values)
    model.save_pretrained(output)
    own_image_processor(path, model.config).save_pretrained(output)
    flags = "".join(f" --{name} {value}" for name, value in {"patch_merging_order": order, **values}.items())
    card = model_card(model, checkpoint, Path(path).name, Path(output).name, flags)
    (Path(output) / "README.md").write_text(card, encoding="utf-8")
    return model


def card_folder() -> Path:
    """Where the cards are: in the installed package, or in the clone."""
    installed = Path(__file__).parent / "model_cards"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "model_cards"


def own_image_processor(path: str, config: GreenMIMConfig) -> GreenMIMImageProcessorPil:
    """That of a folder of Transformers, as our class, or the one that goes with the configuration."""
    if not (Path(path) / "preprocessor_config.json").is_file():
        return build_image_processor(config)
    return GreenMIMImageProcessorPil(**AutoImageProcessor.from_pretrained(path).to_dict())


def model_card(model: nn.Module, checkpoint: Checkpoint, file: str, title: str, flags: str = "") -> str:
    """The card of a released model for its official weights, else one that tells where weights come from.

    The released ones were trained by the code of 2022, which nobody's own exports claim.

    Args:
        file: name of the checkpoint.
        title: name of the model.
        flags: of the command that imported it.
    """
    config = model.config
    shape = (config.embed_dim, tuple(config.depths), config.window_size)
    plain = config.image_size == 224 and config.num_channels == 3 and config.decoder_hidden_size == 512
    is_released = checkpoint.kind == "official" and named_order(checkpoint) == "row" and plain and shape in RELEASED
    if is_released:
        return (card_folder() / f"{RELEASED[shape]}.md").read_text(encoding="utf-8")
    has_head = isinstance(model, GreenMIMForImageClassification)
    values = {
        "title": title,
        "checkpoint": file,
        "kind": KINDS[checkpoint.kind],
        "flags": flags,
        "task": "image-classification" if has_head else "image-feature-extraction",
        "auto": "AutoModelForImageClassification" if has_head else "AutoModel",
    }
    text = (card_folder() / "converted.md").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return text


# Exporting


def buffers(config: GreenMIMConfig) -> dict[str, torch.Tensor]:
    """Microsoft Swin's index of position biases for each block."""
    found = {}
    for stage, window in enumerate(stage_windows(config)):
        rows, columns = (side.flatten() for side in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
        index = (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1
        for block in range(config.depths[stage]):
            found[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = index.clone()
    return found


def swin_config(config: GreenMIMConfig) -> SwinConfig:
    """Transformers' configuration of the same Swin.

    Raises:
        `CheckpointError`: when Transformers' Swin cannot express it.
    """
    windows = stage_windows(config)
    if set(windows) != {config.window_size}:
        raise CheckpointError(
            f"Transformers' Swin has one window for all stages, but `window_size` {config.window_size} at `image_size`"
            f" {config.image_size} gives windows {list(windows)}: it keeps position bias tables of the full window and"
            " fails on smaller grids. Export to microsoft-swin or timm, which shrink windows, or load the model with"
            f" window_size={min(windows)} (tables are interpolated) and export that."
        )
    same = ("image_size", "patch_size", "num_channels", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio")
    same += ("qkv_bias", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "hidden_act")
    values = {name: getattr(config, name) for name in (*same, "initializer_range", "layer_norm_eps")}
    return SwinConfig(**values, encoder_stride=config.encoder_stride, id2label=config.id2label)


@torch.no_grad()
def difference(model: nn.Module, other) -> float:
    """Largest difference of two encoders' last tokens on an image of noise, relative to the largest value.

    Args:
        other: function of an image that returns `(1, num_units, hidden_size)`.
    """
    encoder = getattr(model, "greenmim", model)
    height, width = model.config.image_height_and_width
    image = torch.randn(1, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    ours, theirs = encoder(image).last_hidden_state, other(image)
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def with_epsilon(model: nn.Module, epsilon: float) -> nn.Module:
    """A copy whose layer normalisations have another epsilon."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = epsilon
    return model


def export_model(folder: str, target: str, output: str) -> float:
    """Writes a model of GreenMIM in another format.

    Args:
        folder: of a GreenMIM model, or a repository's name.
        target: one of `FORMATS`.
        output: a folder for transformers-swin, else a file; timm's may end in .safetensors.

    Returns:
        Relative difference that the target's fixed epsilon of layer normalisations makes.

    Raises:
        `CheckpointError`: when the format cannot express the model.
    """
    if Path(output).is_dir() != (target == "transformers-swin") and Path(output).exists():
        raise CheckpointError(f"`output` is {output!r}; {target} needs a {_kind_of_output(target)}.")
    model = load_model(folder)
    if target == "original":
        return _export_original(model, Path(output))
    weights = {name: tensor for name, tensor in to_microsoft(model).items() if not is_of_decoder(name)}
    if target == "transformers-swin":
        return _export_transformers(model, weights, folder, output)
    if target == "timm":
        _save(to_timm(weights), Path(output))
    else:
        _save({"model": {**weights, **buffers(model.config)}}, Path(output))
    # Both make their norms with torch's own epsilon.
    other = with_epsilon(getattr(model, "greenmim", model), 1e-5)
    return difference(model, lambda image: other(image).last_hidden_state)


def _kind_of_output(target: str) -> str:
    return "folder" if target == "transformers-swin" else "file"


def is_of_decoder(name: str) -> bool:
    """Whether a weight by Microsoft's names is one of the decoder's."""
    return name == "mask_token" or name.startswith("decoder_")


def load_model(folder: str) -> nn.Module:
    """The model of a folder, of the class that it was saved as.

    Raises:
        `CheckpointError`: when it is no model of GreenMIM.
    """
    with clear_errors(f"`model` {folder!r}"):
        config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, GreenMIMConfig):
        raise CheckpointError(f"`model` is {folder!r} of model type {config.model_type!r}; a GreenMIM is needed.")
    kinds = (GreenMIMForPreTraining, GreenMIMForImageClassification, GreenMIMModel)
    architecture = (config.architectures or [""])[0]
    kind = next((kind for kind in kinds if kind.__name__ == architecture), GreenMIMModel)
    return load_whole(kind, folder, "model").eval()


def swin_image_processor(folder: str, config: GreenMIMConfig) -> ViTImageProcessorPil:
    """The image processor of a model as the one of Transformers' Swin, which needs no code of ours."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except OSError:  # saved without one
        processor = build_image_processor(config)
    return ViTImageProcessorPil(**processor.to_dict())


def _export_transformers(model: nn.Module, weights: dict[str, torch.Tensor], folder: str, output: str) -> float:
    config = swin_config(model.config)
    swin = SwinForImageClassification(config).eval()
    has_head = "head.weight" in weights
    if not has_head:
        swin.classifier = nn.Identity()
    swin.load_state_dict(to_transformers(weights))
    saved = swin if has_head else swin.swin
    saved.save_pretrained(output)
    swin_image_processor(folder, model.config).save_pretrained(output)
    return difference(model, lambda image: swin.swin(image).last_hidden_state)


def _export_original(model: nn.Module, path: Path) -> float:
    if not isinstance(model, GreenMIMForPreTraining):
        raise CheckpointError(
            f"The original layout is that of pre-training, but the model is a {type(model).__name__} without decoder;"
            " export to microsoft-swin."
        )
    config = model.config
    weights = to_microsoft(model)
    weights = {name if is_of_decoder(name) else f"encoder.{name}": tensor for name, tensor in weights.items()}
    weights |= {f"encoder.{name}": tensor for name, tensor in buffers(config).items()}
    positions = sincos_positions(config.unit_grid, config.decoder_hidden_size, torch.device("cpu"), torch.float32)
    weights["decoder_pos_embed"] = positions[None]
    # By the ending readers know the order of merging; no weight tells the others.
    name = f"green_mim_swin_patch{config.patch_size}_dec512b1"
    told = {theirs: getattr(config, ours) for ours, theirs in TOLD.items()}
    _save({"model": weights, "args": argparse.Namespace(model=name, input_size=config.image_size, **told)}, path)
    other = with_epsilon(model.greenmim, 1e-6)
    return difference(model, lambda image: other(image).last_hidden_state)


def _save(content: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        if "model" in content:
            raise CheckpointError(f"`output` is {str(path)!r}; this format is written by torch.save: end it in .pth.")
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)


# Command line


def build_parser() -> argparse.ArgumentParser:
    """Arguments of `python -m modeling_greenmim.conversion`."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_greenmim.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("import", help="make a GreenMIM folder of a checkpoint")
    reading.add_argument("--checkpoint", required=True, help="file, or folder of Transformers' Swin")
    reading.add_argument("--output", required=True, help="folder to write")
    reading.add_argument(
        "--patch_merging_order",
        choices=("auto", "row", "column"),
        default="auto",
        help="how the checkpoint joins 2x2 patches; auto: by args.model of official files",
    )
    reading.add_argument("--image_size", type=int, help="side in pixels; default: what the file tells, or 224")
    reading.add_argument(
        "--decoder_num_attention_heads", type=int, help="no weight tells; default: one for 32 channels, as published"
    )
    reading.add_argument("--layer_norm_eps", type=float, help="default: 1e-6 for official files, else the source's")
    writing = commands.add_parser("export", help="write a GreenMIM model in another format")
    writing.add_argument("--model", required=True, help="folder or repository of a GreenMIM model")
    writing.add_argument("--to", required=True, choices=FORMATS)
    writing.add_argument("--output", required=True, help="folder for transformers-swin, else a file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command; an error of the checkpoint is one message, not a traceback."""
    args = build_parser().parse_args(argv)
    try:
        if args.command == "import":
            names = ("image_size", "layer_norm_eps", "decoder_num_attention_heads")
            values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
            model = import_checkpoint(args.checkpoint, args.output, args.patch_merging_order, **values)
            count = sum(parameter.numel() for parameter in model.parameters())
            print(f"{type(model).__name__} of {count / 1e6:.2f} M parameters: {args.output}")
        else:
            relative = export_model(args.model, args.to, args.output)
            print(f"{args.output}; largest relative difference of features, by layer_norm_eps: {relative:.1e}")
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
