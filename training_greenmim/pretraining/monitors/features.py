# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Features of whole images, without a mask: computed once in an evaluation, for all monitors."""

import itertools
import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset, Subset

from ...data.image_dataset import collate
from ...randomness import SHUFFLE, derived_generator


if TYPE_CHECKING:
    from ..trainer import MIMTrainer

# Images that are looked at, at most: so many tell differences of a point.
MAX_IMAGES = 4096
# Share of the time of training that they may take, but not so few that they tell nothing.
SHARE_OF_TRAINING, MIN_IMAGES = 0.02, 256
# Of a stream, which is read once.
MAX_STREAMED_IMAGES = 512
# Images that take no more memory than this, in bytes, are kept decoded: reading files costs more than the encoder.
MAX_KEPT = 2**28
# RankMe asks for ten times as many features as they have dimensions (https://huggingface.co/papers/2210.02885).
ROWS_PER_DIMENSION = 10


@dataclass
class Features:
    """What the encoder makes of whole images, in single precision.

    Attributes:
        pooled: `(images, width)`, the mean over units: what a classifier starts from.
        units: `(rows, width)`, features of units, as many of each image; only where `pooled` has too few rows for
            RankMe and the units suffice.
        labels: `(images,)` class numbers, if known.
    """

    pooled: torch.Tensor
    units: torch.Tensor | None = None
    labels: torch.Tensor | None = None


class FeatureReader:
    """Reads images, the same at every evaluation and whatever the seed, and computes their features.

    Args:
        dataset: samples as `ImageDataset`, `EveryImage` or `ImageStream` have them; with labels or without.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.first_images: torch.Tensor | None = None
        self._batches: DataLoader | list[dict] | None = None
        self._count = 0

    def read(self, trainer: "MIMTrainer") -> Features:
        """Features by the model as it is, under the run's precision; every process takes part and has all of them.

        It draws no random number. `first_images` is then the first batch of this process, uint8.
        """
        model, width = trainer.model, trainer.model.config.hidden_size
        if self._batches is None:
            self._prepare(trainer)
        count = self._count
        rows, columns = model.config.unit_grid
        units = spread_units(rows * columns, count, width)
        pooled, of_units, labels, readable = [], [], [], []
        model.eval()
        for batch in self._batches:
            trainer.report_unreadable(batch["unreadable"])
            images = batch["pixel_values"]
            if self.first_images is None:
                self.first_images = images
            with torch.no_grad(), trainer.compute_loss_context_manager():
                outputs = encode(model, trainer.normalize(images.to(trainer.args.device)))
            pooled.append(outputs.pooler_output.float())
            of_units.append(outputs.last_hidden_state[:, units].float())
            everywhere = torch.ones(len(images), dtype=torch.bool)
            labels.append(batch.get("labels", -everywhere.long()))
            readable.append(batch.get("readable", everywhere))
        parts = (torch.cat(part).to(trainer.args.device) for part in (pooled, of_units, labels, readable))
        pooled, of_units, labels, readable = (_of_all_processes(part, trainer, count) for part in parts)
        has_labels = bool((labels >= 0).all())
        return Features(
            pooled[readable],
            of_units[readable].flatten(0, 1) if units else None,
            labels[readable] if has_labels else None,
        )

    def _prepare(self, trainer: "MIMTrainer") -> None:
        """Chooses the images, and this process's share of them, which is equally large in all processes."""
        args, dataset, num_workers = trainer.args, self.dataset, trainer.args.dataloader_num_workers
        if not isinstance(dataset, Sized):
            dataset, num_workers = list(itertools.islice(dataset, MAX_STREAMED_IMAGES)), 0
        self._count = min(len(dataset), affordable_images(trainer))
        chosen = derived_generator(0, SHUFFLE).permutation(len(dataset))[: self._count].tolist()
        # Models in parts compute on all processes together: the last images of shorter shares are first ones again.
        length = math.ceil(len(chosen) / args.world_size)
        own = itertools.islice(itertools.cycle(chosen), args.process_index, length * args.world_size, args.world_size)
        loader = DataLoader(
            Subset(dataset, list(own)),
            args.eval_batch_size,
            collate_fn=collate,
            num_workers=num_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context if num_workers else None,
            generator=torch.Generator(),  # by itself it would draw from the global one
        )
        height, width = trainer.model.config.image_height_and_width
        is_small = length * trainer.model.config.num_channels * height * width <= MAX_KEPT
        self._batches = list(loader) if is_small else loader


def affordable_images(trainer: "MIMTrainer") -> int:
    """How many images may be looked at, given how many are trained on from one evaluation to the next.

    A training step takes at least three forwards of the visible units, and a look one of all units.
    """
    args, images = trainer.args, trainer.train_dataset
    if args.eval_strategy == "steps":
        trained = trainer.state.eval_steps * args.total_batch_size
    elif args.eval_strategy == "epoch" and isinstance(images, Sized):
        trained = len(images)
    else:
        return MAX_IMAGES
    looks_per_step = 3 * (1 - trainer.model.config.mask_ratio)
    return min(MAX_IMAGES, max(MIN_IMAGES, int(SHARE_OF_TRAINING * looks_per_step * trained)))


def spread_units(num_units: int, num_images: int, width: int) -> list[int]:
    """Units of each image, evenly spread, that make enough rows for RankMe; none where the images or no units do."""
    rows = ROWS_PER_DIMENSION * width
    count = math.ceil(rows / max(num_images, 1))
    if num_images >= rows or count > num_units:
        return []
    return [place * num_units // count for place in range(count)]


def encode(model, pixel_values: torch.Tensor):
    """Output of a pre-training model's encoder for whole images.

    The parts of a sharded model (FSDP2) come together in a forward of the whole model, so this is made one.
    """
    if not isinstance(model, FSDPModule):
        return model.greenmim(pixel_values)
    if not hasattr(model, "encode_whole_images"):
        model.encode_whole_images = lambda images: model.greenmim(images)
        register_fsdp_forward_method(model, "encode_whole_images")
    return model.encode_whole_images(pixel_values)


def _of_all_processes(part: torch.Tensor, trainer: "MIMTrainer", count: int) -> torch.Tensor:
    """Joins the shares of all processes in the order of the images."""
    world_size = trainer.args.world_size
    if world_size == 1:
        return part
    return trainer.accelerator.gather(part).unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1)[:count]
