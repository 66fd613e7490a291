# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Data sets of images, for the data loader: unlabelled folders, `datasets`, streams, and the default photographs."""

import copy
import importlib.resources
import itertools
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Image as ImageFeature
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from .images import EvalTransform, UnreadableImageError, decode, read
from .randomness import AUGMENTATION, SHUFFLE, derived_generator, derived_torch_generator


logger = logging.get_logger(__name__)

# How many images a start may find unreadable before it gives up looking for a readable one in a stream.
FIRST_READABLE_WITHIN = 1000


class ImageDataset(torch.utils.data.Dataset):
    """Images of a `datasets.Dataset`, decoded on access.

    An unreadable image is replaced by the next readable one, so that batches keep their size, and reported.

    Args:
        records: data set with an undecoded image column.
        column: name of that column.
        transform: function of (image source, generator) -> uint8 tensor.
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
            `pixel_values`, uint8 `(channels, height, width)`, `unreadable`, a list of messages, `labels`, a class
            number, where there is a label column, and, for a key, `place`: its epoch and position.

        Raises:
            `IndexError`: past the end.
            `UnreadableImageError`: when no image of the data set can be read.
        """
        epoch, position, first, *repetition = key if isinstance(key, tuple) else (0, None, key)
        place = {} if position is None else {"place": (epoch, position)}
        if first >= len(self):
            raise IndexError(first)
        unreadable = []
        for index in range(first, first + len(self)):
            index %= len(self)
            generator = derived_generator(self.seed, AUGMENTATION, epoch, index, *repetition)
            try:
                return {**self._read(index, generator), **place, "unreadable": unreadable}
            except UnreadableImageError as error:
                unreadable.append(str(error))
        raise UnreadableImageError(f"none of {len(self)} images can be read; the last: {unreadable[-1]}")

    def _read(self, index: int, generator: np.random.Generator) -> dict:
        record = self.records[index]
        pixel_values = read(record[self.column], self.transform, generator, f"image {index}")
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
            return {**self._read(index, None), "unreadable": [], "readable": True}
        except UnreadableImageError as error:
            sample = {"pixel_values": torch.zeros(self.transform.shape, dtype=torch.uint8), "readable": False}
            if self.label_column is not None:
                sample["labels"] = self.records[index][self.label_column]
            return {**sample, "unreadable": [str(error)]}


class ImageStream(torch.utils.data.IterableDataset):
    """Images of a stream of `datasets`, decoded as they come; unreadable ones are left out and reported.

    Args:
        records: stream with an undecoded image column.
        column: name of that column.
        transform: function of (image source, generator) -> uint8 tensor.
        seed: what augmentation is derived from, with epoch, process, worker and place in the worker's stream.
        process: number of the process, which reads a part of the stream of its own.
        repeat: go through the stream again and again, each time as a new epoch: a run that is resumed then finds its
            place by counting batches, whatever the length of the stream.
    """

    def __init__(
        self,
        records: datasets.IterableDataset,
        column: str,
        transform,
        seed: int,
        process: int = 0,
        repeat: bool = False,
    ):
        self.records, self.column, self.transform, self.seed = records, column, transform, seed
        self.process, self.repeat = process, repeat
        # Shared with workers, which may outlive an epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Makes the stream shuffle, and augmentation draw, for another (first) epoch."""
        self.epoch.fill_(epoch)

    def __iter__(self):
        for epoch in itertools.count(self.epoch.item()):
            empty = True
            for sample in self._pass(epoch):
                empty = False
                yield sample
            if empty or not self.repeat:
                return

    def _pass(self, epoch: int):
        worker = torch.utils.data.get_worker_info()
        records = copy.deepcopy(self.records)  # workers share the epoch of the original, and each is at its own
        records.set_epoch(epoch)
        unreadable = []
        for index, record in enumerate(records):
            place = (epoch, self.process, worker.id if worker else 0, index)
            generator = derived_generator(self.seed, AUGMENTATION, *place)
            try:
                pixel_values = read(record[self.column], self.transform, generator)
            except UnreadableImageError as error:
                unreadable.append(str(error))
                continue
            yield {"pixel_values": pixel_values, "place": place, "unreadable": unreadable}
            unreadable = []


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
            return ((self.epoch, *place) for place in enumerate(order[: self.count].tolist()))
        repeated = order.repeat_interleave(self.repetitions)[: self.count].tolist()
        return ((self.epoch, place, index, place % self.repetitions) for place, index in enumerate(repeated))


def collate(samples: list[dict]) -> dict:
    """Batch of samples.

    Returns:
        `pixel_values`, uint8 `(batch, channels, height, width)`, the messages on `unreadable` images, and, where the
        samples have them, `labels` and `readable`, both `(batch,)`.
    """
    batch = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "unreadable": [message for sample in samples for message in sample["unreadable"]],
    }
    for name in ("labels", "readable"):
        if name in samples[0]:
            batch[name] = torch.tensor([sample[name] for sample in samples])
    return batch


def collate_and_report(samples: list[dict]) -> dict:
    """`collate` where one process reads for all: only tensors reach the others, so messages are logged here."""
    batch = collate(samples)
    for message in batch["unreadable"]:
        logger.warning(f"Skipped an unreadable image: {message}")
    return {**batch, "unreadable": []}


def elpv() -> tuple[datasets.Dataset, datasets.Dataset]:
    """The ELPV photographs of solar cells from their installed package, in a fixed split.

    2,624 electroluminescence photographs, 300x300 px, grey (https://github.com/zae-bayern/elpv-dataset). A cell counts
    as defective when the probability of a defect is at least 0.5. The split, 75 % for training and 25 % for testing in
    each class, never changes: no photograph that a model is tested on was ever seen in pre-training.

    Returns:
        Training and test part with columns `image` (undecoded) and `label`.
    """
    folder = Path(str(importlib.resources.files("elpv_dataset"))) / "data"
    lines = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    labels = np.array([int(float(probability) >= 0.5) for _, probability, _ in lines])
    is_test = np.zeros(len(lines), dtype=bool)
    for label in (0, 1):
        members = derived_generator(0, SHUFFLE).permutation(np.flatnonzero(labels == label))
        is_test[members[: round(len(members) / 4)]] = True
    features = datasets.Features(
        {"image": ImageFeature(decode=False), "label": datasets.ClassLabel(names=["functional", "defective"])}
    )
    parts = []
    for chosen in (np.flatnonzero(~is_test), np.flatnonzero(is_test)):
        paths = [{"path": str(folder / lines[index][0]), "bytes": None} for index in chosen]
        parts.append(datasets.Dataset.from_dict({"image": paths, "label": labels[chosen].tolist()}, features))
    return parts[0], parts[1]


def find_images(folder: str, argument: str) -> list[str]:
    """Names of all image files below a folder, nested or not, in order.

    Raises:
        `ValueError`: when the folder does not exist or holds no image file.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"`{argument}` is {folder!r}, which is not a folder.")
    suffixes = tuple(ImageFolder.EXTENSIONS)
    paths = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        # Such as .ipynb_checkpoints and __MACOSX: as `datasets` does.
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        paths += [os.path.join(parent, name) for name in names if name.lower().endswith(suffixes)]
    paths.sort()
    if not paths:
        raise ValueError(f"`{argument}` is {folder!r}, which holds no image file.")
    return paths


def load_folder(folder: str, argument: str) -> datasets.Dataset:
    """All images below a folder, without labels; errors as in `find_images`."""
    records = [{"path": path, "bytes": None} for path in find_images(folder, argument)]
    return datasets.Dataset.from_dict({"image": records}, datasets.Features({"image": ImageFeature(decode=False)}))


def find_image_column(records, name: str | None) -> str:
    """The image column: the named one, or the only column of images.

    Raises:
        `ValueError`: when there is no such column, or the choice is not clear; it lists the columns.
    """
    features = records.features if records.features is not None else dict.fromkeys(next(iter(records)))
    if name is not None:
        if name not in features:
            raise ValueError(f"`image_column_name` is {name!r}, but the data set has the columns {list(features)}.")
        return name
    images = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
    # Streams of WebDataset shards name their columns after the files' suffixes.
    images = images or [column for column in features if column in ("image", "img", "jpg", "jpeg", "png", "webp")]
    if len(images) != 1:
        found = f"the image columns {images}" if images else f"no image column among {list(features)}"
        raise ValueError(f"`image_column_name` is not given and the data set has {found}; name the one to use.")
    return images[0]


def undecoded(records, column: str, *others: str):
    """The data set or stream with its image column left encoded, since the workers decode, and some other columns.

    Raises:
        `ValueError`: when the column cannot hold images.
    """
    feature = (records.features or {}).get(column)
    # Encoded bytes, file names and records of both are images too.
    is_image = (
        feature is None
        or isinstance(feature, (ImageFeature, dict))
        or getattr(feature, "dtype", None) in ("string", "binary")
    )
    if not is_image:
        raise ValueError(f"`image_column_name` is {column!r}, a column of {feature}; images are needed.")
    return records.select_columns([column, *others]).cast_column(column, ImageFeature(decode=False))


def decoded_once(records: datasets.Dataset, column: str) -> datasets.Dataset:
    """The data set with its images kept uncompressed, in a file of `datasets`' cache that all workers share.

    An unreadable image stays as it is.
    """

    def keep_decoded(record):
        try:
            return {column: {"bytes": decode(record[column]), "path": record[column]["path"]}}
        except UnreadableImageError:
            return record

    return records.map(keep_decoded, desc="Decoding images", writer_batch_size=100)


def check_first_readable(records, column: str, size: tuple[int, int], channels: int, argument: str) -> None:
    """Looks for an image that can be read, before anything else happens.

    Raises:
        `ValueError`: when there is none, naming the first that cannot be read.
    """
    unreadable = []
    for record in records:
        try:
            read(record[column], EvalTransform(size, channels), None)
        except UnreadableImageError as error:
            unreadable.append(str(error))
            if isinstance(records, datasets.IterableDataset) and len(unreadable) == FIRST_READABLE_WITHIN:
                break
            continue
        return
    examples = "; ".join(unreadable[:3]) or "it is empty"
    raise ValueError(f"`{argument}` has no readable image among {len(unreadable)}: {examples}.")
