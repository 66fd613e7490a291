# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images and their class maps: from folders and data sets to records, checks before a run, samples to train on.

A class map, or mask, has the class number of every pixel of its upright image; what has the ignore index counts
nowhere.
"""

import os
from collections import Counter
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from datasets import Image as ImageFeature
from huggingface_hub.utils import tqdm
from transformers.utils import logging

from modeling_greenmim.array_image import ArrayImage, FullDepth
from modeling_greenmim.conversion import read_labels

from ..data.folders import find_images
from ..data.image_dataset import EveryImage, ImageDataset
from ..data.images import UnreadableImageError, image_name, limit_pixels, load_image, open_image
from ..data.readers import ARRAYS, DataSource, Part, load_folder, read_records, undecoded
from ..data.transforms import Geometry, apply_geometry, upright_size
from ..randomness import SHUFFLE, derived_generator
from .geometry import apply_to_image, apply_to_map, draw_crop


logger = logging.get_logger(__name__)

IMAGE, MASK = "image", "mask"
# Folders of images and masks of one name, and what else may hold the names of the classes.
IMAGES_FOLDER, MASKS_FOLDER = "images", "masks"
LABEL_FILES = ("labels.txt", "labels.json", "id2label.json")
MASK_COLUMNS = ("annotation", "annotations", "mask", "masks", "label", "labels", "segmentation", "segmentation_mask")
# Masks that are opened before a run where the number of classes is known, and names that a message lists.
LOOKED_AT, EXAMPLES = 1000, 3
# Crops that are drawn before one is taken in which a class covers too much.
DRAWS = 10


def read_pairs(data) -> dict[str, Part]:
    """The parts `train`, `validation` and `test`, those that there are: records with columns `image` and `mask`.

    Args:
        data: arguments of the data; folders hold images/ and masks/, `test_dir` may be a folder of images alone.

    Raises:
        `ValueError`: for folders and data sets that cannot be read or have no pair.
    """
    limit_pixels(data.max_image_pixels)
    if data.dataset_name:
        source = DataSource(dataset_name=data.dataset_name, dataset_config_name=data.dataset_config_name)
        columns = (data.image_column_name, data.annotation_column_name)
        parts = {name: Part(_columns(part, *columns), part.argument) for name, part in read_records(source).items()}
    else:
        folders = {name: getattr(data, f"{name}_dir") for name in ("train", "validation")}
        parts = {name: Part(pairs_of(path, f"{name}_dir"), f"{name}_dir") for name, path in folders.items() if path}
    if data.test_dir:
        has_masks = os.path.isdir(os.path.join(data.test_dir, MASKS_FOLDER))
        load = pairs_of if has_masks else load_folder
        parts["test"] = Part(load(data.test_dir, "test_dir"), "test_dir")
    return parts


def pairs_of(folder: str, argument: str) -> datasets.Dataset:
    """Images below images/ and masks below masks/ of a folder that have the same name, up to their suffix.

    What has no counterpart is left out, counted and named in the log.

    Raises:
        `ValueError`: when there are no images or no masks, no pair, and for two files of one name.
    """
    images, masks = (_by_name(folder, part, argument) for part in (IMAGES_FOLDER, MASKS_FOLDER))
    for found, others, kind, lacking in ((images, masks, "image", "mask"), (masks, images, "mask", "image")):
        alone = sorted(found.keys() - others.keys())
        if alone:
            names = ", ".join(alone[:EXAMPLES]) + (", ..." if len(alone) > EXAMPLES else "")
            logger.warning(f"`{argument}`: skipped {len(alone)} {kind}(s) without {lacking}: {names}.")
    names = sorted(images.keys() & masks.keys())
    if not names:
        raise ValueError(
            f"`{argument}` is {folder!r}: no image in {IMAGES_FOLDER}/ has a mask of its name in {MASKS_FOLDER}/;"
            f" there are {len(images)} images such as {min(images)!r} and {len(masks)} masks such as {min(masks)!r}."
        )
    records = {
        column: [{"path": paths[name], "bytes": None} for name in names]
        for column, paths in ((IMAGE, images), (MASK, masks))
    }
    feature = ImageFeature(decode=False)
    return datasets.Dataset.from_dict(records, datasets.Features({IMAGE: feature, MASK: feature}))


def _by_name(folder: str, part: str, argument: str) -> dict[str, str]:
    """Image files by their names below a sub-folder, without suffix."""
    below, paths = os.path.join(folder, part), {}
    if not os.path.isdir(below):
        raise ValueError(
            f"`{argument}` is {folder!r}, which has no folder {part!r}; it must hold {IMAGES_FOLDER}/ and"
            f" {MASKS_FOLDER}/ with files of the same names."
        )
    for path in find_images(below, argument):
        name = os.path.splitext(os.path.relpath(path, below))[0]
        if name in paths:
            raise ValueError(f"`{argument}`: {paths[name]!r} and {path!r} have one name, so pairs are not clear.")
        paths[name] = path
    return paths


def _columns(part: Part, image: str | None, mask: str | None) -> datasets.Dataset:
    """Records of a data set with its columns called `image` and `mask`, undecoded."""
    features = part.records.features
    found = [column for column, kind in features.items() if isinstance(kind, (ImageFeature, *ARRAYS))]
    masks = [column for column in features if column in MASK_COLUMNS and column != image]
    for argument, name in (("image_column_name", image), ("annotation_column_name", mask)):
        if name is not None and name not in features:
            raise ValueError(f"`{argument}` is {name!r}, but the data set has the columns {list(features)}.")
    if mask is None:
        masks = [column for column in masks if column in found] or masks
        if len(masks) != 1:
            raise ValueError(
                f"`annotation_column_name` is not given and the data set has the columns {list(features)}; name the"
                " one of the masks."
            )
        mask = masks[0]
    if image is None:
        images = [column for column in found if column != mask]
        if len(images) != 1:
            raise ValueError(
                f"`image_column_name` is not given and the data set has the image columns {images} beside {mask!r};"
                " name the one to use."
            )
        image = images[0]
    both = undecoded(part.records, image, mask)
    if not isinstance(features[mask], ARRAYS):
        both = both.cast_column(mask, ImageFeature(decode=False))
    names = {old: new for old, new in ((image, IMAGE), (mask, MASK)) if old != new}
    # Through names of their own, since the columns may be called the other way round.
    return both.rename_columns({old: f"new_{new}" for old, new in names.items()}).rename_columns(
        {f"new_{new}": new for new in names.values()}
    )


def split(records: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Records to train on, and a share of them to evaluate on, drawn by the seed; at least one of each.

    Raises:
        `ValueError`: for fewer than two records.
    """
    if len(records) < 2:
        raise ValueError(f"`train_val_split` is {share}, but there is {len(records)} image to divide.")
    order = derived_generator(seed, SHUFFLE).permutation(len(records))
    count = min(len(records) - 1, max(1, round(share * len(records))))
    return records.select(sorted(order[count:].tolist())), records.select(sorted(order[:count].tolist()))


def subset(records: datasets.Dataset, count: int | None, seed: int) -> datasets.Dataset:
    """So many records, drawn by the seed; all where there are no more, or no number."""
    if count is None or count >= len(records):
        return records
    return records.select(sorted(derived_generator(seed, SHUFFLE).permutation(len(records))[:count].tolist()))


def find_label_names(data) -> list[str] | None:
    """Names of the classes: those of `labels_file`, or of a file of `LABEL_FILES` beside the data; None without.

    Raises:
        `ValueError`: as `read_labels`, and for a single class.
    """
    beside = [
        os.path.join(folder, name)
        for folder in (data.train_dir, data.validation_dir, data.dataset_name)
        for name in LABEL_FILES
        if folder
    ]
    path = data.labels_file or next((path for path in beside if os.path.isfile(path)), None)
    if path is None:
        return None
    names = list(read_labels(path, "labels_file").values())
    if len(names) < 2:
        raise ValueError(f"`labels_file` is {path!r}, which names {len(names)} class; two or more are needed.")
    logger.info(f"Names of the classes: {path}.")
    return names


def open_class_map(source) -> np.ndarray:
    """Class numbers of a mask, `(height, width)`, integers: grey values, or numbers of colours in a palette.

    Raises:
        `ValueError`: for pictures in colours, and for numbers that are not whole.
    """
    image = open_image(source)
    if not isinstance(image, ArrayImage) and image.mode not in ("1", "L", "P", "I", "F") and image.mode[:2] != "I;":
        raise ValueError(
            f"it is a picture in colours (mode {image.mode}); a mask has class numbers as grey values, or a palette"
        )
    values = np.asarray(image)
    if values.ndim == 3:
        if values.shape[2] != 1:
            raise ValueError(f"it has {values.shape[2]} channels; a mask has one, of class numbers")
        values = values[..., 0]
    if values.dtype.kind == "f" and not (values == np.floor(values)).all():
        raise ValueError("its values are no whole numbers, and so no class numbers")
    return values.astype(np.int32)


@dataclass(frozen=True)
class ClassMaps:
    """How masks are read.

    Args:
        num_labels: number of classes; None = any.
        ignore_index: the number that counts nowhere.
    """

    num_labels: int | None
    ignore_index: int

    def __call__(self, source, generator=None) -> np.ndarray:
        """Class numbers of a mask, `(height, width)`.

        Raises:
            `ValueError`: as in `open_class_map`, and for numbers that are no class.
        """
        values = open_class_map(source)
        if self.num_labels is not None:
            strange = (values < 0) | (values >= self.num_labels)
            strange &= values != self.ignore_index
            if strange.any():
                raise ValueError(
                    f"it has the class number {values[strange].max()}, but there are {self.num_labels} classes, from"
                    f" 0, and {self.ignore_index} for what is ignored"
                )
        return values


def check_size(mask: np.ndarray, width: int, height: int) -> None:
    """Refuses a mask that is not of the size of its upright image.

    Raises:
        `ValueError`: naming both.
    """
    if mask.shape != (height, width):
        raise ValueError(f"its mask has {mask.shape[1]}x{mask.shape[0]} px, but it has {width}x{height} px")


@dataclass
class Census:
    """What masks hold.

    Attributes:
        pixels: by class number, what is ignored left out.
        ignored: pixels.
        looked_at: number of masks.
        bad: messages on pairs that cannot be used.
        empty: names of masks in which everything is ignored.
    """

    pixels: Counter = field(default_factory=Counter)
    ignored: int = 0
    looked_at: int = 0
    bad: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def take_census(records: datasets.Dataset, ignore_index: int, count: int | None = None) -> Census:
    """Opens masks, and compares their sizes with their images'.

    Args:
        count: of masks, from all over the data; None = all.
    """
    census = Census()
    numbers = np.linspace(0, len(records) - 1, min(count or len(records), len(records))).astype(int).tolist()
    for index in tqdm(numbers, "Looking at masks", leave=False):
        record = records[index]

        def look(source, generator, record=record):
            mask = load_image(record[MASK], ClassMaps(None, ignore_index), None)
            check_size(mask, *upright_size(open_image(source)))
            return mask

        census.looked_at += 1
        try:
            mask = load_image(record[IMAGE], look, None, f"image {index}")
        except UnreadableImageError as error:
            census.bad.append(str(error))
            continue
        values, counts = np.unique(mask, return_counts=True)
        found = dict(zip(values.tolist(), counts.tolist()))
        ignored = found.pop(ignore_index, 0)
        census.ignored += ignored
        census.pixels.update(found)
        if not found:
            census.empty.append(image_name(record[MASK], f"mask {index}"))
    return census


def check_masks(part: Part, names: list[str] | None, ignore_index: int) -> list[str]:
    """Looks at masks before a run: sizes, numbers, and which classes there are.

    Classes that are absent, and masks in which everything is ignored, are named in the log; so are pairs that cannot
    be used, which training skips.

    Args:
        names: of the classes; None = their numbers, for which every mask is looked at.

    Returns:
        The names.

    Raises:
        `ValueError`: when no pair can be used, for class numbers beyond the names, and for fewer than two classes.
    """
    census = take_census(part.records, ignore_index, None if names is None else LOOKED_AT)
    argument, of_all = part.argument, f"{census.looked_at:,} masks"
    if census.looked_at < len(part.records):
        of_all += f" that were looked at, of {len(part.records):,},"
    if len(census.bad) == census.looked_at:
        raise ValueError(f"`{argument}` has no pair that can be used: {'; '.join(census.bad[:EXAMPLES])}.")
    if census.bad:
        logger.warning(
            f"`{argument}`: {len(census.bad)} of {of_all} cannot be used: {'; '.join(census.bad[:EXAMPLES])}."
        )
    if census.empty:
        examples = ", ".join(census.empty[:EXAMPLES])
        logger.warning(f"`{argument}`: in {len(census.empty)} of {of_all} everything is ignored: {examples}.")
    found = sorted(census.pixels)
    if not found:
        raise ValueError(
            f"`{argument}`: in all masks everything is ignored. `ignore_index` is {ignore_index}, the number of pixels"
            " that count nowhere."
        )
    if names is None:
        names = [str(number) for number in range(max(2, found[-1] + 1))]
    beyond = [number for number in found if not 0 <= number < len(names)]
    if beyond:
        raise ValueError(
            f"`{argument}`: masks have the class number(s) {', '.join(map(str, beyond[:10]))}, but there are"
            f" {len(names)} classes, 0 to {len(names) - 1}. Give all names in `labels_file`, or the number that is to"
            f" be ignored as `ignore_index`, which is {ignore_index}."
        )
    absent = [names[number] for number in range(len(names)) if number not in found and number != ignore_index]
    if absent:
        logger.warning(f"`{argument}`: no pixel of {of_all} is of the class(es) {', '.join(absent)}.")
    return names


class CropTransform:
    """Training: a crop of one size with scale jitter and flip, of an image and its mask alike.

    Args:
        crop: height and width in pixels.
        channels, depth: as in `apply_geometry`.
        scales: range of the factor that the image is scaled by.
        ignore_index: what padding has in the mask.
        max_class_share: another crop is drawn, ten times at most, while one class covers more of its labelled pixels.
    """

    def __init__(
        self,
        crop: tuple[int, int],
        channels: int,
        scales: tuple[float, float],
        ignore_index: int,
        max_class_share: float = 1.0,
        depth: FullDepth | None = None,
    ):
        self.crop, self.channels, self.scales, self.depth = crop, channels, scales, depth
        self.ignore_index, self.max_class_share = ignore_index, max_class_share

    def __call__(self, source, mask: np.ndarray, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """`pixel_values`, `(channels, height, width)`, and `labels`, `(height, width)`.

        Raises:
            `ValueError`: for a mask of another size than its image.
        """
        image = open_image(source)
        width, height = upright_size(image)
        check_size(mask, width, height)
        for _ in range(DRAWS):
            geometry = draw_crop(width, height, self.crop, generator, self.scales)
            labels = apply_to_map(mask, geometry, self.ignore_index)
            if self.max_class_share == 1 or _largest_share(labels, self.ignore_index) <= self.max_class_share:
                break
        pixels = apply_to_image(image, geometry, self.channels, self.depth)
        return {"pixel_values": pixels, "labels": torch.from_numpy(np.ascontiguousarray(labels))}


def _largest_share(labels: np.ndarray, ignore_index: int) -> float:
    _, counts = np.unique(labels[labels != ignore_index], return_counts=True)
    return counts.max() / counts.sum() if len(counts) else 1.0


class WholeTransform:
    """Evaluation and prediction: the upright image as it is, and its mask if there is one.

    Args:
        channels, depth: as in `apply_geometry`.
    """

    def __init__(self, channels: int, depth: FullDepth | None = None):
        self.channels, self.depth = channels, depth

    def __call__(self, source, mask: np.ndarray | None = None, generator=None) -> dict[str, torch.Tensor]:
        """`pixel_values`, `(channels, height, width)`, and `labels`, `(height, width)`, where there is a mask.

        Raises:
            `ValueError`: for a mask of another size than its image.
        """
        image = open_image(source)
        width, height = upright_size(image)
        if mask is not None:
            check_size(mask, width, height)
        pixels = apply_geometry(image, Geometry((0, 0, width, height), (height, width)), self.channels, self.depth)
        return {"pixel_values": pixels} | ({} if mask is None else {"labels": torch.from_numpy(mask)})

    def blank(self) -> torch.Tensor:
        """What stands for an image that cannot be read: a pixel."""
        return torch.zeros(self.channels, 1, 1, dtype=torch.uint8 if self.depth is None else torch.float32)


def _load_pair(dataset: ImageDataset, maps: ClassMaps, index: int, generator) -> dict:
    record, name = dataset.records[index], f"image {index}"
    mask = None
    if dataset.label_column is not None:
        mask = load_image(record[dataset.label_column], maps, None, f"mask {index}")
    return load_image(
        record[dataset.column],
        lambda source, generator: dataset.transform(source, mask, generator),
        generator,
        name,
    )


class PairDataset(ImageDataset):
    """Crops of images and masks for training: what `CropTransform` makes, and what `ImageDataset` adds.

    A pair that cannot be used is reported and replaced as an unreadable image is.

    Args:
        records: data set with columns `image` and `mask`.
        transform: a `CropTransform`.
        seed: as in `ImageDataset`.
        maps: how masks are read.
    """

    def __init__(self, records: datasets.Dataset, transform: CropTransform, seed: int, maps: ClassMaps):
        super().__init__(records, IMAGE, transform, seed, MASK)
        self.maps = maps

    def _load(self, index: int, generator: np.random.Generator) -> dict:
        return _load_pair(self, self.maps, index, generator)


class EveryPair(EveryImage):
    """Whole images and their masks, if they have some, for evaluation and prediction: one sample for each, in order.

    Arguments as of `PairDataset`, with a `WholeTransform`. A sample has its `index` too. Pairs that cannot be used
    become an empty image whose `readable` is False.
    """

    def __init__(self, records: datasets.Dataset, transform: WholeTransform, seed: int, maps: ClassMaps):
        super().__init__(records, IMAGE, transform, seed, MASK if MASK in records.features else None)
        self.maps = maps

    def __getitem__(self, index: int) -> dict:
        """Sample `index`."""
        if index >= len(self):
            raise IndexError(index)
        try:
            return {**_load_pair(self, self.maps, index, None), "unreadable": [], "readable": True, "index": index}
        except UnreadableImageError as error:
            blank = {"pixel_values": self.transform.blank(), "unreadable": [str(error)]}
            return {**blank, "readable": False, "index": index}


def collate_crops(samples: list[dict]) -> dict:
    """Batch of crops: `pixel_values`, `(batch, channels, height, width)`, `labels`, `(batch, height, width)`, and the
    messages on `unreadable` pairs."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
        "unreadable": [message for sample in samples for message in sample["unreadable"]],
    }


def collate_whole(samples: list[dict]) -> dict:
    """Whole images of any sizes: `readable` and `index`, both `(batch,)`, lists `pixel_values` and `labels` (None
    where there is no mask), and the messages on `unreadable` pairs."""
    return {
        "readable": torch.tensor([sample["readable"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "pixel_values": [sample["pixel_values"] for sample in samples],
        "labels": [sample.get("labels") for sample in samples],
        "unreadable": [message for sample in samples for message in sample["unreadable"]],
    }
