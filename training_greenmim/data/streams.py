# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images of a stream of `datasets` for the data loader."""

import copy
import itertools

import datasets
import torch

from ..randomness import AUGMENTATION, derived_generator
from .images import KeepsPixelLimit, UnreadableImageError, load_image


class ImageStream(KeepsPixelLimit, torch.utils.data.IterableDataset):
    """Images of a stream of `datasets`, decoded as they come; unreadable ones are left out and reported.

    Args:
        records: stream with an undecoded image column.
        column: name of that column.
        transform: function of (image source, generator) -> tensor.
        seed: what augmentation is derived from, with epoch, process, worker and position in the worker's stream.
        process: number of the process, which reads a part of the stream of its own.
        repeat: go through the stream again and again, each time as a new epoch: a run that is resumed then finds
            where it was by counting batches, whatever the length of the stream.
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
            sample_key = (epoch, self.process, worker.id if worker else 0, index)
            generator = derived_generator(self.seed, AUGMENTATION, *sample_key)
            try:
                pixel_values = load_image(record[self.column], self.transform, generator)
            except UnreadableImageError as error:
                unreadable.append(str(error))
                continue
            yield {"pixel_values": pixel_values, "sample_key": sample_key, "unreadable": unreadable}
            unreadable = []
