# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Named sizes, configurations with overrides, and the image processor that belongs to a model."""

import yaml
from transformers import ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_greenmim import GreenMIMConfig


MODEL_SIZES = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "base": {},
    "base-win14": {"window_size": 14},
    "large-win14": {"embed_dim": 192, "num_heads": [6, 12, 24, 48], "window_size": 14},
}


def parse_overrides(text: str | None) -> dict:
    """Reads `name=value` pairs separated by commas; lists in brackets: "image_size=128,depths=[2,2,6]".

    Raises:
        `ValueError`: for other text, or names that the configuration does not have.
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
    unknown = [name for name in overrides if name not in GreenMIMConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"`config_overrides` names {unknown}, which GreenMIMConfig does not have.")
    return overrides


def _as_number(value):
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def build_config(name: str, overrides: str | None = None) -> GreenMIMConfig:
    """Configuration of a named size, or of a folder or Hub repository, with overrides."""
    values = MODEL_SIZES[name] if name in MODEL_SIZES else GreenMIMConfig.from_pretrained(name).to_dict()
    return GreenMIMConfig(**{**values, **parse_overrides(overrides)})


def build_image_processor(config: GreenMIMConfig) -> ViTImageProcessorPil:
    """Image processor with GreenMIM's normalisation, bicubic resizing and the model's image size."""
    height, width = config.image_height_and_width
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if config.num_channels == 1:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    return ViTImageProcessorPil(
        size={"height": height, "width": width}, resample=3, image_mean=list(mean), image_std=list(std)
    )
