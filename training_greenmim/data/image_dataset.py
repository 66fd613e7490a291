# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images of a `datasets.Dataset` for the data loader, the order of an epoch, and batches."""

import datasets
import numpy as np
import torch
from transformers.utils import logging

from ..randomness import AUGMENTATION, REPLACEMENT, SHUFFLE, derived_generator, derived_torch_generator
from .images import KeepsPixelLimit, UnreadableImageError, load_image


logger = logging.get_logger(__name__)


class ImageDataset(KeepsPixelLimit, torch.utils.data.Dataset):
    """Images of a `datasets.Dataset`, decoded on access.

    An unreadable image is reported and replaced by one that is drawn from the seed and its key, so that batches keep
    their size and no image comes more often than others.

    Args:
        records: data set with an undecoded image column.
        column: name of that column.
        transform: function of (image source, generator) -> tensor.
        seed: what augmentation is derived from, with epoch, sample and repetition.
        label_column: column of class numbers to return too, if any.
    """

    def __init__(self, records: datasets.Dataset, column: str, transform, seed: int, label_column: str | None = None):
        self.records, self.column, self.transform, self.seed = records, column, transform, seed
        self.label_column = label_column

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, ...]) -> dict:
        """Sample for an index, or for a key of `EpochShuffle`.

        Returns:
            `pixel_values`, `(channels, height, width)`, `unreadable`, a list of messages, `labels`, a class
            number, where there is a label column, and, for a key, `sample_key`: its epoch and position.

        Raises:
            `IndexError`: past the end.
            `UnreadableImageError`: when no image of the data set can be read.
        """
        epoch, position, index, *repetition = key if isinstance(key, tuple) else (0, None, key)
        sample_key = {} if position is None else {"sample_key": (epoch, position)}
        if index >= len(self):
            raise IndexError(index)
        generator = derived_generator(self.seed, AUGMENTATION, epoch, index, *repetition)
        try:
            return {**self._load(index, generator), **sample_key, "unreadable": []}
        except UnreadableImageError as error:
            replacing = derived_generator(self.seed, REPLACEMENT, epoch, index, *repetition)
            return {**self._load_another(index, replacing, [str(error)]), **sample_key}

    def _load_another(self, index: int, generator: np.random.Generator, unreadable: list[str]) -> dict:
        """An image other than an unreadable one, drawn at random; messages of more unreadable ones are added."""
        for other in generator.permutation(len(self)).tolist():
            if other != index:
                try:
                    return {**self._load(other, generator), "unreadable": unreadable}
                except UnreadableImageError as error:
                    unreadable.append(str(error))
        raise UnreadableImageError(f"none of {len(self)} images can be read; the last: {unreadable[-1]}")

    def _load(self, index: int, generator: np.random.Generator) -> dict:
        record = self.records[index]
        pixel_values = load_image(record[self.column], self.transform, generator, f"image {index}")
        if self.label_column is None:
            return {"pixel_values": pixel_values}
        return {"pixel_values": pixel_values, "labels": record[self.label_column]}


class EveryImage(ImageDataset):
    """Images of a `datasets.Dataset` for evaluation and prediction: one sample for each record, in order.

    An unreadable image becomes zeros whose `readable` is False, so that it is not counted and keeps its line among the
    predictions.
    """

    def __getitem__(self, index: int) -> dict:
        """Sample `index`: what `ImageDataset` returns, and `readable`."""
        if index >= len(self):
            raise IndexError(index)
        try:
            return {**self._load(index, None), "unreadable": [], "readable": True}
        except UnreadableImageError as error:
            sample = {"pixel_values": self.transform.blank(), "readable": False}
            if self.label_column is not None:
                sample["labels"] = self.records[index][self.label_column]
            return {**sample, "unreadable": [str(error)]}


class EpochShuffle(torch.utils.data.Sampler):
    """Shuffles anew each epoch and yields (epoch, position in it, index), so that workers know where the run stands.

    With repeated augmentation (https://huggingface.co/papers/1901.09335) an epoch draws fewer images, each several
    times in a row, and yields (epoch, position, index, repetition).

    Args:
        length: number of samples of the data set.
        seed: what the order is derived from, with the epoch.
        repetitions: how often an image comes in an epoch that draws it.
        multiple_of: the last samples of an epoch that are fewer than so many are left out.
    """

    def __init__(self, length: int, seed: int, repetitions: int = 1, multiple_of: int = 1):
        self.length, self.seed, self.repetitions, self.epoch = length, seed, repetitions, 0
        self.count = length - length % multiple_of

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(self.length, generator=derived_torch_generator(self.seed, SHUFFLE, self.epoch))
        if self.repetitions == 1:
            return ((self.epoch, position, index) for position, index in enumerate(order[: self.count].tolist()))
        repeated = order.repeat_interleave(self.repetitions)[: self.count].tolist()
        return ((self.epoch, position, index, position % self.repetitions) for position, index in enumerate(repeated))


def collate(samples: list[dict]) -> dict:
    """Batch of samples.

    Returns:
        `pixel_values`, `(batch, channels, height, width)`, the messages on `unreadable` images, and, where the samples
        have them, `labels` and `readable`, both `(batch,)`, and `features` of a teacher, `(batch, ...)`.
    """
    batch = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "unreadable": [message for sample in samples for message in sample["unreadable"]],
    }
    for name in ("labels", "readable"):
        if name in samples[0]:
            batch[name] = torch.tensor([sample[name] for sample in samples])
    if "features" in samples[0]:
        batch["features"] = torch.stack([sample["features"] for sample in samples])
    return batch


def collate_and_report(samples: list[dict]) -> dict:
    """`collate` where one process reads for all: only tensors reach the others, so messages are logged here."""
    batch = collate(samples)
    for message in batch["unreadable"]:
        logger.warning(f"Skipped an unreadable image: {message}")
    return {**batch, "unreadable": []}
