# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What reading, formats and models hand to one another."""

from dataclasses import dataclass, field
from pathlib import Path

import torch


# The weight that tells patch size and channels. In a `Checkpoint` it is a kernel (embed_dim, channels, side, side).
PROJECTION = "greenmim.embeddings.patch_embeddings.projection.weight"


class CheckpointError(ValueError):
    """A file or model that cannot be converted; the text says why and what to do."""


@dataclass
class Source:
    """A file that was read, or a folder, whose format is not known yet.

    Attributes:
        path: of the file or folder.
        weights: by the file's own names; none for a folder.
        args: the values of its `argparse.Namespace`, if it has one.
        config: its yacs configuration as nested dictionaries, if it has one.
    """

    path: Path
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    args: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)


@dataclass
class Checkpoint:
    """A model of any format in our terms.

    Attributes:
        format: `NAME` of the format that it comes from.
        weights: by the names of our model with a decoder or a classifier, buffers left out.
        values: of the configuration, which the source tells beside the weights.
        merging_order: how its patch merging joins 2x2 tokens, "row" or "column"; None if the source does not tell.
        name: what the source calls the model, `args.model` of official files.
    """

    format: str
    weights: dict[str, torch.Tensor]
    values: dict = field(default_factory=dict)
    merging_order: str | None = "column"
    name: str | None = None
