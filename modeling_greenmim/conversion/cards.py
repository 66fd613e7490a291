# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The model card that an import writes."""

from pathlib import Path

from torch import nn

from modeling_greenmim import GreenMIMForImageClassification

from .checkpoint import Checkpoint
from .formats import FORMATS


# Width, depths and window of the models that were released, and their cards.
RELEASED = {
    (128, (2, 2, 18, 2), 7): "swin-base",
    (128, (2, 2, 18, 2), 14): "swin-base-win14",
    (192, (2, 2, 18, 2), 14): "swin-large-win14",
}


def card_folder() -> Path:
    """Where the cards are: in the installed package, or in the clone."""
    package = Path(__file__).parents[1]
    installed = package / "model_cards"
    return installed if installed.is_dir() else package.parent / "model_cards"


def model_card(model: nn.Module, checkpoint: Checkpoint, file: str, title: str, flags: str = "") -> str:
    """The card of a released model for its official weights, else one that tells where weights come from.

    Args:
        file: name of the checkpoint.
        title: name of the model.
        flags: of the command that imported it.
    """
    released = _released(model, checkpoint)
    if released:
        return (card_folder() / f"{released}.md").read_text(encoding="utf-8")
    has_head = isinstance(model, GreenMIMForImageClassification)
    values = {
        "title": title,
        "checkpoint": file,
        "format": FORMATS[checkpoint.format].TITLE,
        "backbone_type": model.config.backbone_type,
        "backbone": model.config.backbone_type.capitalize(),
        "flags": flags,
        "task": "image-classification" if has_head else "image-feature-extraction",
        "auto": "AutoModelForImageClassification" if has_head else "AutoModel",
    }
    text = (card_folder() / "converted.md").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def _released(model: nn.Module, checkpoint: Checkpoint) -> str | None:
    """Name of the card, if this is a released model: the code of 2022 trained those, which merges in row order."""
    config = model.config
    plain = config.backbone_type == "swin" and config.image_size == 224 and config.num_channels == 3
    if checkpoint.format != "original" or checkpoint.merging_order != "row" or not plain:
        return None
    if config.decoder_hidden_size != 512:
        return None
    return RELEASED.get((config.embed_dim, tuple(config.depths), config.window_size))
