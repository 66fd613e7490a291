# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints in and out: official GreenMIM, SimMIM, Microsoft's, timm's and Transformers' Swin, and Twins.

    python -m modeling_greenmim.conversion import --checkpoint FILE.pth --output DIR
    python -m modeling_greenmim.conversion export --model DIR --to timm --output FILE.safetensors

What weights are called in each format is in formats.py.
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
from .formats import (
    PROJECTION,
    from_microsoft,
    from_timm,
    from_transformers,
    from_twins,
    is_twins,
    rows_to_columns,
    to_microsoft,
    to_timm,
    to_transformers,
    to_twins,
)
from .image_processing_greenmim import GreenMIMImageProcessorPil, build_image_processor
from .resizing import BIAS_TABLE, window_of_table


# What models compute anew, or what no other task uses.
BUFFERS = re.compile(r"(relative_position_index|attn_mask)$|^decoder_pos_embed$")
SIMMIM_ONLY = re.compile(r"^(encoder\.mask_token$|decoder\.)")
# Values of the configuration that no weight tells, by their names in `args`.
TOLD = {"decoder_num_attention_heads": "decoder_num_heads", "layer_norm_eps": "layer_norm_eps"}
TOLD_OF_TWINS = {"num_heads": "num_heads", "window_size": "window_size"}
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
    "twins": "Twins",
    "transformers": "Transformers' Swin",
}


class CheckpointError(ValueError):
    """A file or model that cannot be converted; the text says why and what to do."""


@dataclass
class Checkpoint:
    """Weights by Microsoft Swin's names, and what else a source tells.

    Attributes:
        kind: where it comes from: official, simmim, microsoft, timm, twins or transformers.
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
    """Reads an official, SimMIM, Microsoft, timm or Twins file, or a folder of Transformers' Swin.

    Raises:
        `CheckpointError`: when it is none of these.
    """
    if path.is_dir():
        return _read_folder(path)
    content = read_file(path)
    weights = _weights_of(content, path)
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    with clear_errors(f"`checkpoint` {str(path)!r}"):
        kind, weights = _recognize(weights)
    if PROJECTION not in weights or weights[PROJECTION].ndim != 4:
        raise CheckpointError(
            f"`checkpoint` {str(path)!r} is no Swin or Twins: it has no {PROJECTION!r} of four dimensions, but"
            f" {', '.join(list(weights)[:5])}, ..."
        )
    image_size = args.get("input_size") or _image_size(weights)
    weights = {name: tensor for name, tensor in weights.items() if not BUFFERS.search(name)}
    # Our exports in the official layout tell more than official files do.
    names = TOLD | TOLD_OF_TWINS if _is_of_twins(weights) else TOLD
    told = {ours: args[theirs] for ours, theirs in names.items() if theirs in args}
    return Checkpoint(kind, weights, str(args.get("model", "")), image_size, told)


def _recognize(weights: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    """The kind of a file's weights, and the weights by Microsoft's names."""
    bare = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    is_official = any(is_of_decoder(name) for name in weights)
    if is_twins(bare):
        return "official" if is_official else "twins", from_twins(bare, channels_last=is_official)
    if is_official:
        return "official", bare
    if f"encoder.{PROJECTION}" in weights:
        kept = {name: tensor for name, tensor in weights.items() if not SIMMIM_ONLY.match(name)}
        return "simmim", {name.removeprefix("encoder."): tensor for name, tensor in kept.items()}
    merges_first = "layers.0.downsample.norm.weight" not in weights and "layers.1.downsample.norm.weight" in weights
    if "head.fc.weight" in weights or merges_first:
        return "timm", from_timm(weights)
    return "microsoft", bare


def _is_of_twins(weights: dict[str, torch.Tensor]) -> bool:
    return "layers.0.position_encoding.conv.weight" in weights


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
        windows, attention = _infer_attention(weights, embed_dim, stages)
        hidden = weights["layers.0.blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"The checkpoint is not whole: {error} is missing or has a strange shape.") from error
    inferred = {
        "image_size": checkpoint.image_size or 224,
        "patch_size": patch,
        "num_channels": channels,
        "embed_dim": embed_dim,
        "depths": depths,
        **attention,
        "mlp_ratio": hidden / embed_dim,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in weights,
        # Official GreenMIM's and that of Twins' blocks; the others are made with torch's own.
        "layer_norm_eps": 1e-6 if checkpoint.kind in ("official", "twins") or named_order(checkpoint) else 1e-5,
    }
    if checkpoint.kind == "official":
        inferred |= _infer_decoder(weights)
    if "head.weight" in weights:
        inferred["num_labels"] = weights["head.weight"].shape[0]
    if "id2label" in checkpoint.values:
        inferred.pop("num_labels", None)
    with clear_errors("The configuration"):
        config = GreenMIMConfig(**{**inferred, **checkpoint.values, **values})
    if windows is not None and list(config.stage_windows) != windows:
        raise CheckpointError(
            f"The windows of the stages are {windows} in the checkpoint, but images of `image_size`"
            f" {config.image_size} have {list(config.stage_windows)}: give --image_size."
        )
    return config


def _infer_attention(weights: dict[str, torch.Tensor], embed_dim: int, stages: int) -> tuple[list[int] | None, dict]:
    """Window of each stage, None where no weight tells, and what the configuration says of attention."""
    if _is_of_twins(weights):
        # Published models have windows of 7 and 32 channels a head.
        heads = [max(1, embed_dim * 2**stage // 32) for stage in range(stages)]
        return None, {"backbone_type": "twins", "num_heads": heads, "window_size": 7}
    tables = [weights[f"layers.{stage}.blocks.0.attn.{BIAS_TABLE}"] for stage in range(stages)]
    windows = [window_of_table(table) for table in tables]
    if None in windows:
        shapes = [tuple(table.shape) for table in tables]
        raise CheckpointError(
            f"The position bias tables have the shapes {shapes}; window w has (2 * w - 1) ** 2 rows."
        )
    return windows, {"num_heads": [table.shape[1] for table in tables], "window_size": max(windows)}


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
    """ "row" or "column": how the checkpoint's merging joins 2x2 tokens; always "column" for Twins.

    Args:
        order: "row", "column", or "auto": official files by their model's name, all other Swins by column.

    Raises:
        `CheckpointError`: when an official file does not tell.
    """
    if _is_of_twins(checkpoint.weights):
        return "column"  # its kernels say which weight belongs to which token
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
    given = {"patch_merging_order": order, **values}
    texts = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in given.items()}
    flags = "".join(f" --{name} {text}" for name, text in texts.items())
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
    plain &= config.backbone_type == "swin"
    is_released = checkpoint.kind == "official" and named_order(checkpoint) == "row" and plain and shape in RELEASED
    if is_released:
        return (card_folder() / f"{RELEASED[shape]}.md").read_text(encoding="utf-8")
    has_head = isinstance(model, GreenMIMForImageClassification)
    values = {
        "title": title,
        "checkpoint": file,
        "kind": KINDS[checkpoint.kind],
        "backbone_type": config.backbone_type,
        "backbone": config.backbone_type.capitalize(),
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
    """Microsoft Swin's index of position biases for each block; Twins has none."""
    found = {}
    if config.backbone_type == "twins":
        return found
    for stage, window in enumerate(config.stage_windows):
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
    windows = config.stage_windows
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
    is_twins_model = model.config.backbone_type == "twins"
    if is_twins_model and target != "timm":
        raise CheckpointError(f"`model` {folder!r} is a Twins, which {target} cannot express; export it to timm.")
    weights = {name: tensor for name, tensor in to_microsoft(model).items() if not is_of_decoder(name)}
    if target == "transformers-swin":
        return _export_transformers(model, weights, folder, output)
    if target == "timm":
        weights = to_twins(weights, channels_last=False) if is_twins_model else to_timm(weights)
        _save(weights, Path(output))
    else:
        _save({"model": {**weights, **buffers(model.config)}}, Path(output))
    # Both make Swin's norms with torch's own epsilon, and timm most of Twins' with another.
    other = with_epsilon(getattr(model, "greenmim", model), 1e-6 if is_twins_model else 1e-5)
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
    weights, told = to_microsoft(model), TOLD
    if config.backbone_type == "twins":
        weights, told = to_twins(weights, channels_last=True), TOLD | TOLD_OF_TWINS
    weights = {name if is_of_decoder(name) else f"encoder.{name}": tensor for name, tensor in weights.items()}
    weights |= {f"encoder.{name}": tensor for name, tensor in buffers(config).items()}
    positions = sincos_positions(config.unit_grid, config.decoder_hidden_size, torch.device("cpu"), torch.float32)
    weights["decoder_pos_embed"] = positions[None]
    # By the ending readers know the order of merging; no weight tells the others.
    name = f"green_mim_{config.backbone_type}_patch{config.patch_size}_dec512b1"
    told = {theirs: getattr(config, ours) for ours, theirs in told.items()}
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
    reading.add_argument(
        "--num_heads", type=int, nargs="+", help="of each stage of a Twins, which no weight tells; default: likewise"
    )
    reading.add_argument("--window_size", type=int, help="of a Twins, which no weight tells; default: 7")
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
            names = ("image_size", "layer_norm_eps", "decoder_num_attention_heads", "num_heads", "window_size")
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
