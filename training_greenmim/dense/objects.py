# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images and their objects as tensors: crops for training, whole images for evaluation, padded batches."""

import json

import datasets
import numpy as np
import torch

from modeling_greenmim.array_image import FullDepth

from ..data.image_dataset import EveryImage, ImageDataset
from ..data.images import UnreadableImageError, load_image, open_image
from ..data.transforms import upright_size
from .coco import OBJECTS, decode_mask
from .geometry import DenseGeometry, apply_to_boxes, apply_to_image, apply_to_map, draw_crop


# Of an object that a crop cuts, the least share that is still to be found, and the least side in pixels.
LEAST_SHARE, LEAST_SIDE = 0.1, 1.0


def draw_stretched(
    width: int,
    height: int,
    size: int,
    generator: np.random.Generator,
    scales: tuple[float, float],
) -> DenseGeometry:
    """A crop, or the image on a larger canvas, brought to a square as evaluation brings whole images to it; a flip.

    The factor is uniform in `scales`: from 1 on it enlarges a part of the image that fills the square, below 1 the
    whole image fills so much of each side, and the rest is padding.
    """
    scale = generator.uniform(*scales)
    starts, lengths = [], []
    for side in (width, height):
        length = min(side, max(1, round(side / max(1.0, scale))))
        starts.append(int(generator.integers(side - length + 1)))
        lengths.append(length)
    (left, top), (columns, rows) = starts, lengths
    filled = max(1, round(size * min(1.0, scale)))
    box = (left, top, left + columns, top + rows)
    return DenseGeometry(box, (filled, filled), bool(generator.random() < 0.5), (size, size))


class TrainObjects:
    """A crop for training and what it shows of the objects.

    Args:
        size: side of the square in pixels.
        channels, depth: as in `apply_geometry`.
        scales: range of the factor that an image is scaled by before the crop, 1 being that of evaluation.
        keeps_aspect: whether height and width are scaled alike, else as in `draw_stretched`.
        with_masks: whether masks are needed, else boxes are.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        depth: FullDepth | None = None,
        scales: tuple[float, float] = (0.5, 2.0),
        keeps_aspect: bool = False,
        with_masks: bool = False,
    ):
        self.size, self.channels, self.depth, self.scales = size, channels, depth, scales
        self.keeps_aspect, self.with_masks = keeps_aspect, with_masks

    def __call__(self, source, record: dict, generator: np.random.Generator) -> dict:
        """Image source and its record -> tensors.

        Returns:
            `pixel_values`, `(channels, size, size)`, `filled`, height and width of what is no padding, `class_labels`,
            `(n,)`, and `boxes`, `(n, 4)`, left, top, right and bottom in pixels, or `masks`, `(n, size, size)`, uint8.

        Raises:
            `ValueError`: for an image of another size than its annotations are for, and masks that cannot be read.
        """
        image = open_image(source)
        width, height = upright_size(image)
        check_size(record, width, height)
        geometry = self.draw(width, height, generator)
        sample = {
            "pixel_values": apply_to_image(image, geometry, self.channels, self.depth),
            "filled": geometry.size,
        }
        return sample | self.objects(record[OBJECTS], geometry, width, height)

    def draw(self, width: int, height: int, generator: np.random.Generator) -> DenseGeometry:
        """Random geometry for an upright image of a size in pixels."""
        if not self.keeps_aspect:
            return draw_stretched(width, height, self.size, generator, self.scales)
        whole = self.size / max(width, height)
        scales = (self.scales[0] * whole, self.scales[1] * whole)
        return draw_crop(width, height, (self.size, self.size), generator, scales)

    def objects(self, objects: dict, geometry: DenseGeometry, width: int, height: int) -> dict:
        """What a geometry leaves of the objects of an image; crowds are left out."""
        single = np.flatnonzero(np.array(objects["iscrowd"], dtype=int) == 0)
        classes = np.array(objects["category"], dtype=np.int64)[single]
        boxes = corners(np.array(objects["bbox"], dtype=np.float64).reshape(-1, 4)[single])
        boxes, shares = apply_to_boxes(boxes, geometry)
        sides = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf)
        kept = np.flatnonzero((shares >= LEAST_SHARE) & (sides >= LEAST_SIDE))
        if not self.with_masks:
            return {"boxes": torch.from_numpy(boxes[kept]).float(), "class_labels": torch.from_numpy(classes[kept])}
        masks, seen = [], []
        for index in kept:
            mask = mask_of(objects, single[index], height, width)
            mask = apply_to_map(mask, geometry, 0)
            if mask.any():  # the box may show where the mask does not
                masks.append(mask)
                seen.append(index)
        size = geometry.canvas
        stacked = np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
        return {"masks": torch.from_numpy(stacked), "class_labels": torch.from_numpy(classes[seen])}


class WholeImage:
    """An image as a whole, for evaluation and prediction.

    Args:
        size: side in pixels of the square that the image is brought to.
        channels, depth: as in `apply_geometry`.
        keeps_aspect: whether only the longer side gets that size.
        with_masks: whether masks will be needed: images whose masks cannot be read are refused.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        depth: FullDepth | None = None,
        keeps_aspect: bool = False,
        with_masks: bool = False,
    ):
        self.size, self.channels, self.depth = size, channels, depth
        self.keeps_aspect, self.with_masks = keeps_aspect, with_masks

    def __call__(self, source, record: dict | None = None, generator=None) -> dict:
        """Image source -> `pixel_values`, `filled` as of `TrainObjects`, and `size`, its width and height in pixels.

        Raises:
            `ValueError`: as in `TrainObjects`.
        """
        image = open_image(source)
        width, height = upright_size(image)
        record = record or {}
        check_size(record, width, height)
        if self.with_masks and OBJECTS in record:
            for index in range(len(record[OBJECTS]["bbox"])):
                mask_of(record[OBJECTS], index, height, width)
        size = (self.size, self.size)
        if self.keeps_aspect:
            factor = self.size / max(width, height)
            size = max(1, round(height * factor)), max(1, round(width * factor))
        geometry = DenseGeometry((0, 0, width, height), size)
        pixels = apply_to_image(image, geometry, self.channels, self.depth)
        return {"pixel_values": pixels, "filled": size, "size": (width, height)}

    def blank(self) -> dict:
        """What stands for an image that cannot be read."""
        dtype = torch.uint8 if self.depth is None else torch.float32
        pixels = torch.zeros(self.channels, self.size, self.size, dtype=dtype)
        return {"pixel_values": pixels, "filled": (self.size, self.size), "size": (self.size, self.size)}


def check_size(record: dict, width: int, height: int) -> None:
    """Refuses an image of another size than its annotations were made for.

    Raises:
        `ValueError`: naming both.
    """
    told = record.get("width") or width, record.get("height") or height
    if told != (width, height):
        raise ValueError(
            f"it is {width}x{height} px upright, but its annotations are for an image of {told[0]}x{told[1]} px"
        )


def corners(boxes: np.ndarray) -> np.ndarray:
    """Boxes `(n, 4)`: left, top, width, height -> left, top, right, bottom."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def mask_of(objects: dict, index: int, height: int, width: int) -> np.ndarray:
    """Mask of an object, `(height, width)`, uint8; the whole box where it has none.

    Raises:
        `ValueError`: as in `decode_mask`.
    """
    mask = decode_mask(json.loads(objects["segmentation"][index]), height, width)
    if mask is None:
        left, top, right, bottom = corners(np.array([objects["bbox"][index]]))[0].round().astype(int)
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[top:bottom, left:right] = 1
    return mask


class ObjectDataset(ImageDataset):
    """Images and objects of a data set (`coco.FEATURES`) for training, by a `TrainObjects`.

    An image that cannot be used is reported and replaced as an unreadable one is.
    """

    def __init__(self, records: datasets.Dataset, transform: TrainObjects, seed: int):
        super().__init__(records, "image", transform, seed, OBJECTS)

    def _load(self, index: int, generator: np.random.Generator) -> dict:
        return _load(self, index, generator)


class EveryObjects(EveryImage):
    """Whole images of a data set, by a `WholeImage`, for evaluation and prediction: one sample for each, in order.

    A sample has its `index` too. Images that cannot be used become zeros whose `readable` is False.
    """

    def __init__(self, records: datasets.Dataset, transform: WholeImage, seed: int):
        super().__init__(records, "image", transform, seed, OBJECTS if OBJECTS in records.features else None)

    def __getitem__(self, index: int) -> dict:
        """Sample `index`."""
        if index >= len(self):
            raise IndexError(index)
        try:
            return {**_load(self, index, None), "unreadable": [], "readable": True, "index": index}
        except UnreadableImageError as error:
            return {**self.transform.blank(), "unreadable": [str(error)], "readable": False, "index": index}


def _load(dataset: ImageDataset, index: int, generator) -> dict:
    record = dataset.records[index]
    return load_image(
        record["image"],
        lambda source, generator: dataset.transform(source, record, generator),
        generator,
        f"image {index}",
    )


class CollateObjects:
    """Batches of images, padded right and bottom, black, to the largest, in whole steps of some pixels.

    Args:
        divisor: height and width of a batch are multiples of it.
    """

    def __init__(self, divisor: int = 1):
        self.divisor = divisor

    def __call__(self, samples: list[dict]) -> dict:
        """Batch of samples.

        Returns:
            `pixel_values`, `(batch, channels, height, width)`; `pixel_mask`, `(batch, height, width)`, 1 where there
            is an image; of training `labels`, for each image `class_labels`, `(n,)`, and `boxes`, `(n, 4)`, centre,
            width and height as shares of the batch's width and height, or `masks`, `(n, height, width)`; of evaluation
            `filled`, `size`, `index` and `readable`; and the messages on `unreadable` images.
        """
        height, width = (
            -(-max(sample["pixel_values"].shape[axis] for sample in samples) // self.divisor) * self.divisor
            for axis in (1, 2)
        )
        batch = {
            "pixel_values": torch.stack([_padded(sample["pixel_values"], height, width) for sample in samples]),
            "pixel_mask": torch.zeros(len(samples), height, width, dtype=torch.int64),
            "unreadable": [message for sample in samples for message in sample["unreadable"]],
        }
        for mask, sample in zip(batch["pixel_mask"], samples):
            mask[: sample["filled"][0], : sample["filled"][1]] = 1
        if "class_labels" in samples[0]:
            batch["labels"] = [_labels(sample, height, width) for sample in samples]
        for name in ("filled", "size", "index", "readable"):
            if "index" in samples[0]:
                batch[name] = torch.tensor([sample[name] for sample in samples])
        return batch


def _padded(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))


def _labels(sample: dict, height: int, width: int) -> dict[str, torch.Tensor]:
    labels = {"class_labels": sample["class_labels"]}
    if "masks" in sample:
        return labels | {"masks": _padded(sample["masks"], height, width)}
    left, top, right, bottom = sample["boxes"].unbind(dim=1)
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=1)
    return labels | {"boxes": boxes / torch.tensor([width, height, width, height])}
