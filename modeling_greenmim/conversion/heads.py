# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Models for dense tasks: a new head of Transformers on the pre-trained encoder of a checkpoint."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    AutoImageProcessor,
    Mask2FormerImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrImageProcessorPil,
    RTDetrV2Config,
    SegformerImageProcessorPil,
)

from modeling_greenmim import GreenMIMBackbone, GreenMIMConfig, GreenMIMImageProcessorPil
from modeling_greenmim.heads_greenmim import (
    GreenMIMMask2FormerForUniversalSegmentation,
    GreenMIMRTDetrV2ForObjectDetection,
    GreenMIMUperNetForSemanticSegmentation,
    backbone_of,
)
from modeling_greenmim.image_processing_greenmim import build_image_processor

from .checkpoint import CheckpointError
from .importing import import_checkpoint
from .reading import clear_errors, without_load_report


# Of the encoder's configuration, what a head has for itself.
_NOT_OF_BACKBONES = (
    *("architectures", "id2label", "label2id", "num_labels", "problem_type"),
    *("out_features", "out_indices"),
)


@dataclass(frozen=True)
class Head:
    """A kind of head.

    Attributes:
        model_class: the model with backbone and head.
        follows: values of its configuration that follow from the backbone's configuration and its own overrides; all
            else is Transformers' default.
        processor_class, processing: Transformers' image processor that knows what the outputs mean, and its values
            beyond size and statistics.
        min_maps, max_maps: how many maps of the backbone's last stages it needs, and reads at most; None: all.
    """

    model_class: type[PreTrainedModel]
    follows: Callable[[GreenMIMConfig, dict], dict]
    processor_class: type
    processing: dict = field(default_factory=dict)
    min_maps: int = 1
    max_maps: int | None = None


def _upernet(backbone: GreenMIMConfig, overrides: dict) -> dict:
    return {"use_auxiliary_head": len(backbone.out_features) > 2}  # it reads the third map


def _mask2former(backbone: GreenMIMConfig, overrides: dict) -> dict:
    strides = _strides(backbone)
    return {"feature_strides": strides, "common_stride": strides[0]}


def _rt_detr_v2(backbone: GreenMIMConfig, overrides: dict) -> dict:
    width = overrides.get("encoder_hidden_dim", RTDetrV2Config.encoder_hidden_dim)
    maps = len(backbone.out_features)
    return {
        "encoder_in_channels": [backbone.stage_widths[index - 1] for index in backbone.out_indices],
        "feat_strides": _strides(backbone),
        "encode_proj_layers": [maps - 1],
        "decoder_in_channels": [width] * maps,
        "num_feature_levels": maps,
        "decoder_n_levels": maps,
    }


def _strides(backbone: GreenMIMConfig) -> list[int]:
    """Pixels between the positions of each map."""
    return [backbone.patch_size * 2 ** (index - 1) for index in backbone.out_indices]


HEADS = {
    "upernet": Head(GreenMIMUperNetForSemanticSegmentation, _upernet, SegformerImageProcessorPil),
    "mask2former": Head(
        GreenMIMMask2FormerForUniversalSegmentation,
        _mask2former,
        Mask2FormerImageProcessorPil,
        {"ignore_index": 255},
        min_maps=3,
    ),
    "rt_detr_v2": Head(
        GreenMIMRTDetrV2ForObjectDetection,
        _rt_detr_v2,
        RTDetrImageProcessorPil,
        {"do_normalize": True, "do_convert_annotations": True},
        max_maps=3,
    ),
}


def build_head(
    folder: str,
    head: str,
    id2label: dict[int, str],
    config_overrides: dict | None = None,
    head_overrides: dict | None = None,
) -> PreTrainedModel:
    """A model for a dense task: the encoder of a checkpoint and a new head.

    What `save_pretrained` of the model writes loads by Transformers' Auto classes, with `trust_remote_code=True` where
    this project is not installed.

    Args:
        folder: folder or Hub repository of a GreenMIM model of any class, or what `import_checkpoint` reads.
        head: one of `HEADS`.
        id2label: name of each class, from number 0 on.
        config_overrides: values of the encoder's configuration, such as `drop_path_rate`, `image_size` and
            `window_size`; position bias tables are interpolated to other windows.
        head_overrides: values of the head's configuration.

    Raises:
        `CheckpointError`: for a head that there is not, a checkpoint that cannot be read, and values that do not
            fit it.
    """
    if head not in HEADS:
        raise CheckpointError(f"`head` is {head!r}; it must be one of {', '.join(HEADS)}.")
    if sorted(id2label) != list(range(len(id2label))) or not id2label:
        raise CheckpointError(f"`id2label` is {id2label!r}; it needs a name for each of the numbers 0, 1, ...")
    kind = HEADS[head]
    with _greenmim_folder(folder) as source:
        values = _read_config(source, folder)
        config = _backbone_config(values, head, config_overrides or {})
        backbone = _load_backbone(source, folder, config)
    model = kind.model_class(_head_config(kind, config, id2label, head_overrides or {}))
    backbone_of(model).load_state_dict(backbone.state_dict())
    return model.eval()


def write_head(folder: str, head: str, labels: str, output: str, **config_overrides) -> PreTrainedModel:
    """Writes the folder of `build_head`, its head untrained, with an image processor.

    Args:
        folder, head, config_overrides: as for `build_head`.
        labels: file of class names; see `read_labels`.
        output: folder to write.

    Raises:
        `CheckpointError`: as `build_head`; nothing is written then.
    """
    if Path(output).is_file():
        raise CheckpointError(f"`output` is {str(output)!r}, a file; a folder is needed.")
    id2label = read_labels(labels)
    with _greenmim_folder(folder) as source:
        model = build_head(source, head, id2label, config_overrides)
        has_processor = Path(source, "preprocessor_config.json").is_file() or not Path(source).is_dir()
        own = AutoImageProcessor.from_pretrained(source) if has_processor else None
    model.save_pretrained(output)
    head_image_processor(model, own).save_pretrained(output)
    return model


def read_labels(path: str, argument: str = "labels") -> dict[int, str]:
    """Name of each class by its number.

    Args:
        path: a text file with a name on each line, or JSON: `["wall", "floor"]` or `{"0": "wall", "1": "floor"}`.
        argument: what messages call the file.

    Raises:
        `CheckpointError`: for other files, and for names that are empty or given twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
        names = json.loads(text) if text[:1] in ("{", "[") else text.splitlines()
        numbered = names.items() if isinstance(names, dict) else enumerate(names)
        names = {int(number): name for number, name in numbered}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"`{argument}` is {str(path)!r}, which cannot be read ({error}); a text file with a class name on each"
            ' line is needed, or JSON such as {"0": "wall", "1": "floor"}.'
        ) from error
    names = {number: name.strip() if isinstance(name, str) else "" for number, name in sorted(names.items())}
    wrong = "" in names.values() or len(set(names.values())) < len(names)
    if wrong or not names or list(names) != list(range(len(names))):
        raise CheckpointError(
            f"`{argument}` is {str(path)!r}, which has {list(names.values())[:10]} as names of classes"
            f" {list(names)[:10]}; each of the numbers 0, 1, ... needs one of its own."
        )
    return names


def head_image_processor(model: PreTrainedModel, own: GreenMIMImageProcessorPil | None = None):
    """An image processor to save beside a model with a head.

    That of Transformers which pipelines and scripts of others expect for the head, with the encoder's statistics and
    image size; images that it cannot take, of other than 3 channels or at full depth, keep ours.

    Args:
        own: the encoder's; default: the one that goes with its configuration.
    """
    kind = next(kind for kind in HEADS.values() if isinstance(model, kind.model_class))
    config = backbone_of(model).config
    processor = build_image_processor(config)
    if own is not None:
        processor = GreenMIMImageProcessorPil(**{**own.to_dict(), "size": processor.size})
    if config.num_channels != 3 or processor.image_range is not None:
        return processor
    values = {name: getattr(processor, name) for name in ("image_mean", "image_std", "resample", "size")}
    return kind.processor_class(**values, **kind.processing)


@contextmanager
def _greenmim_folder(name: str) -> Iterator[str]:
    """A folder or repository of ours as it is; what can be converted in a folder that is gone afterwards."""
    if Path(name).is_file() or _read_config(name, name).get("model_type") != GreenMIMConfig.model_type:
        with tempfile.TemporaryDirectory() as output:
            _import(name, output)
            yield output
    else:
        yield name


def _import(name: str, output: str) -> None:
    try:
        import_checkpoint(name, output)
    except CheckpointError as error:
        raise CheckpointError(
            f"`folder` is {name!r}, which cannot be converted: {error} What it does not tell can be given to `python"
            " -m modeling_greenmim.conversion import`, whose folder can be given here."
        ) from error


def _read_config(source: str, name: str) -> dict:
    with clear_errors(f"`folder` {name!r}"):
        values, _ = PreTrainedConfig.get_config_dict(source)
    return values


def _backbone_config(values: dict, head: str, overrides: dict) -> GreenMIMConfig:
    unknown = [name for name in overrides if name not in GreenMIMConfig.__dataclass_fields__]
    if unknown:
        raise CheckpointError(f"`config_overrides` names {unknown}, which GreenMIMConfig does not have.")
    kept = {name: value for name, value in values.items() if name not in _NOT_OF_BACKBONES}
    kept |= overrides
    with clear_errors(f"`config_overrides` {overrides!r}"):
        config = GreenMIMConfig(**kept)
        stages = config.stage_names[1:]
        kind = HEADS[head]
        if len(stages) < kind.min_maps:
            raise CheckpointError(f"The encoder has {len(stages)} stages; {head} needs at least {kind.min_maps}.")
        config.out_features = stages[-kind.max_maps :] if kind.max_maps else stages
    return config


def _load_backbone(source: str, name: str, config: GreenMIMConfig) -> GreenMIMBackbone:
    """The backbone with the weights of a checkpoint; norms of its maps but the last may be new."""
    with clear_errors(f"`folder` {name!r}"), without_load_report():
        # All differences at once; Transformers' own error would only say that there are some.
        backbone, loading = GreenMIMBackbone.from_pretrained(
            source, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    missing = [key for key in sorted(loading["missing_keys"]) if not key.startswith("hidden_states_norms.")]
    if missing:
        raise CheckpointError(
            f"`folder` is {name!r}, which lacks weights of the encoder: {', '.join(missing[:5])}. They would be"
            " random."
        )
    if other := sorted(loading["mismatched_keys"]):
        name, theirs, ours = other[0]
        raise CheckpointError(
            f"`config_overrides` changes what the weights of the checkpoint fix: {name} has shape {tuple(theirs)}, but"
            f" {tuple(ours)} is needed."
        )
    return backbone


def _head_config(kind: Head, backbone: GreenMIMConfig, id2label: dict[int, str], overrides: dict):
    config_class = kind.model_class.config_class
    unknown = [name for name in overrides if name not in config_class.__dataclass_fields__]
    if unknown:
        raise CheckpointError(f"`head_overrides` names {unknown}, which {config_class.__name__} does not have.")
    values = {**kind.follows(backbone, overrides), **overrides}
    numbers = {label: number for number, label in id2label.items()}
    with clear_errors(f"`head_overrides` {overrides!r}"):
        return config_class(backbone_config=backbone, id2label=dict(id2label), label2id=numbers, **values)
