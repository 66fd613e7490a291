# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Records of images, still encoded, from whatever names them: folders, `datasets`, the default photographs.

A new source of data is a subclass of `Reader`, in a file of its own, and its line in `READERS`.
"""

import contextlib
import hashlib
import importlib.resources
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel
from datasets import Image as ImageFeature
from huggingface_hub.utils import tqdm
from transformers.utils import logging

from ..compat import datasets_cache_folder, datasets_fingerprint
from ..randomness import SHUFFLE, derived_generator
from ..runs.extras import require
from .folders import find_images
from .images import UnreadableImageError, decode, is_address, limit_pixels, load_image
from .parts import split_name
from .tiles import PAGES, count_pages, parts_of
from .transforms import EvalTransform


logger = logging.get_logger(__name__)

# What the label column of every data set is called, and renamed to.
LABEL = "label"

# How many images a start may find unreadable before it gives up looking for a readable one in a stream.
FIRST_READABLE_WITHIN = 1000

# Files that are opened to see whether they have several pages.
LOOKED_FOR_PAGES = 32

# Columns of pixels, `(height, width)` or `(height, width, channels)`.
ARRAYS = (datasets.Array2D, datasets.Array3D)

# Part of the name of decoded files: to be raised when `decode` changes, so that older files are not used.
DECODING = 2
# Decoded images that are held in memory at once, and joined to one array, which holds less than 2 GB.
DECODED_AT_ONCE = 4


@dataclass(frozen=True)
class DataSource:
    """What names the data: arguments that both scripts have, by the same names."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_dir: str | None = None
    validation_dir: str | None = None
    test_dir: str | None = None
    streaming: bool = False
    pages: str = PAGES[0]
    tile: int | None = None
    max_image_pixels: int | None = None

    @classmethod
    def of(cls, arguments) -> "DataSource":
        """The source that a script's arguments name."""
        names = [field.name for field in fields(cls) if hasattr(arguments, field.name)]
        return cls(**{name: getattr(arguments, name) for name in names})


@dataclass
class Part:
    """A part of the data: its records, and the argument that it comes from, for messages."""

    records: datasets.Dataset | datasets.IterableDataset
    argument: str

    @property
    def is_labelled(self) -> bool:
        """Whether the classes of the images are known."""
        return LABEL in self.records.features


class Reader:
    """Reads one type of source. Subclasses say which sources are theirs, and read them."""

    def is_named_by(self, source: DataSource) -> bool:
        """Whether a source is of this type."""
        raise NotImplementedError

    def read(self, source: DataSource, labelled: bool) -> dict[str, Part]:
        """The parts `train`, `validation` and `test`, those that there are, whatever their columns.

        Args:
            labelled: whether the sub-folders of folders are classes.
        """
        raise NotImplementedError


class DatasetReader(Reader):
    """A data set of the Hub, or a local one, as `datasets` reads it, whole or as a stream."""

    def is_named_by(self, source: DataSource) -> bool:
        return source.dataset_name is not None

    def read(self, source: DataSource, labelled: bool) -> dict[str, Part]:
        name, config_name = source.dataset_name, source.dataset_config_name
        try:
            found = datasets.load_dataset(name, config_name, streaming=source.streaming)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            given = f" and `dataset_config_name` is {config_name!r}" if config_name else ""
            reason = str(error)
            if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
                reason = f"{reason}: {error.__cause__}"  # itself it only tells that there was an error
            if "Invalid string class label" in reason:
                reason += ". An archive with a folder for each class is to be unpacked and given as `train_dir`"
            raise ValueError(f"`dataset_name` is {name!r}{given}, which cannot be loaded: {reason}") from error
        return {split: Part(records, "dataset_name") for split, records in found.items()}


class FolderReader(Reader):
    """Folders of images; labelled ones have a sub-folder for each class."""

    def is_named_by(self, source: DataSource) -> bool:
        return any((source.train_dir, source.validation_dir, source.test_dir))

    def read(self, source: DataSource, labelled: bool) -> dict[str, Part]:
        load, parts = load_class_folders if labelled else load_folder, {}
        for name in ("train", "validation"):
            folder, argument = getattr(source, f"{name}_dir"), f"{name}_dir"
            if folder:
                parts[name] = Part(load(folder, argument, source), argument)
        return parts


class ElpvReader(Reader):
    """The default: the photographs of `elpv`."""

    def is_named_by(self, source: DataSource) -> bool:
        return True

    def read(self, source: DataSource, labelled: bool) -> dict[str, Part]:
        return {name: Part(records, "dataset_name") for name, records in zip(("train", "test"), elpv())}


# The first that a source names reads it.
READERS: list[Reader] = [DatasetReader(), FolderReader(), ElpvReader()]


def read_records(source: DataSource, labelled: bool = False, needs_train: bool = False) -> dict[str, Part]:
    """The parts `train`, `validation` and `test` of a source, those that there are.

    A test part stands in for a missing validation part. `test_dir` is the test part beside any source, without labels.
    From here on Pillow's limit of pixels is that of the source, if it has one.

    Args:
        labelled: whether the sub-folders of folders are classes.
        needs_train: whether there must be a part to train on.

    Raises:
        `ValueError`: for folders and data sets that cannot be read, and when a part that is needed lacks.
    """
    limit_pixels(source.max_image_pixels)
    parts = next(reader for reader in READERS if reader.is_named_by(source)).read(source, labelled)
    if needs_train and "train" not in parts:
        raise ValueError(f"`dataset_name` is {source.dataset_name!r}, which has no split train but {list(parts)}.")
    if "validation" not in parts and "test" in parts:
        parts["validation"] = parts.pop("test")
    if source.test_dir:
        parts["test"] = Part(load_folder(source.test_dir, "test_dir", source), "test_dir")
    parts = {name: parts[name] for name in ("train", "validation", "test") if name in parts}
    if source.pages == PAGES[0]:
        _tell_of_pages(part for part in parts.values() if part.argument.endswith("_dir"))
    return parts


def _tell_of_pages(folders: Iterable[Part]) -> None:
    """Logs a hint at `--pages` for the first of some folders where one of a few files has several pages."""
    for part in folders:
        step = max(1, len(part.records) // LOOKED_FOR_PAGES)
        names = [image["path"] for image in part.records[::step]["image"]]
        for path in dict.fromkeys(split_name(name)[0] for name in names):
            with contextlib.suppress(Exception):  # whatever a decoder raises: training tells of it
                count = count_pages(path)
                if count > 1:
                    logger.warning_once(
                        f"`{part.argument}`: {path} has {count} pages, of which the first is taken;"
                        f" --pages {' or '.join(PAGES[1:])} takes all."
                    )
                    return


def elpv() -> tuple[datasets.Dataset, datasets.Dataset]:
    """The ELPV photographs of solar cells from their installed package, in a fixed split.

    2,624 electroluminescence photographs, 300x300 px, grey (https://github.com/zae-bayern/elpv-dataset). A cell counts
    as defective when the probability of a defect is at least 0.5. The split, 75 % for training and 25 % for testing in
    each class, never changes: no photograph that a model is tested on was ever seen in pre-training.

    Returns:
        Training and test part with columns `image` (undecoded) and `label`.
    """
    folder = Path(str(importlib.resources.files(require("elpv_dataset", "elpv")))) / "data"
    lines = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    labels = np.array([int(float(probability) >= 0.5) for _, probability, _ in lines])
    is_test = np.zeros(len(lines), dtype=bool)
    for label in (0, 1):
        members = derived_generator(0, SHUFFLE).permutation(np.flatnonzero(labels == label))
        is_test[members[: round(len(members) / 4)]] = True
    features = datasets.Features(
        {"image": ImageFeature(decode=False), "label": ClassLabel(names=["functional", "defective"])}
    )
    parts = []
    for chosen in (np.flatnonzero(~is_test), np.flatnonzero(is_test)):
        paths = [{"path": str(folder / lines[index][0]), "bytes": None} for index in chosen]
        parts.append(datasets.Dataset.from_dict({"image": paths, "label": labels[chosen].tolist()}, features))
    return parts[0], parts[1]


def image_names(folder: str, argument: str, source: DataSource) -> list[str]:
    """Names of all images below a folder: of files, or of their pages and tiles as `source` says.

    Raises:
        `ValueError`: as in `find_images`.
    """
    paths = find_images(folder, argument)
    if source.pages == PAGES[0] and source.tile is None:
        return paths
    names = []
    for path in tqdm(paths, "Looking for pages and tiles", leave=False):
        try:
            names += parts_of(path, source.pages, source.tile)
        except Exception:  # whatever a decoder raises on a broken file, which is told of when it is to be read
            names.append(path)
    logger.info(f"`{argument}` is {folder!r}: {len(paths):,} files make {len(names):,} images.")
    return names


def load_folder(folder: str, argument: str, source: DataSource = DataSource()) -> datasets.Dataset:
    """All images below a folder, without labels; arguments and errors as of `image_names`."""
    records = [{"path": path, "bytes": None} for path in image_names(folder, argument, source)]
    return datasets.Dataset.from_dict({"image": records}, datasets.Features({"image": ImageFeature(decode=False)}))


def load_class_folders(folder: str, argument: str, source: DataSource = DataSource()) -> datasets.Dataset:
    """Images in one sub-folder for each class: columns `image` (undecoded) and `label`.

    Raises:
        `ValueError`: as in `image_names`, and when an image lies outside the sub-folders.
    """
    paths = image_names(folder, argument, source)
    below = [os.path.relpath(path, folder).split(os.sep) for path in paths]
    outside = [path for path, parts in zip(paths, below) if len(parts) == 1]
    if outside:
        raise ValueError(
            f"`{argument}` is {folder!r}: {len(outside)} images, such as {os.path.basename(outside[0])!r}, have no"
            " label; each image belongs into a sub-folder named after its class."
        )
    names = [parts[0] for parts in below]
    features = datasets.Features({"image": ImageFeature(decode=False), LABEL: ClassLabel(names=sorted(set(names)))})
    return datasets.Dataset.from_dict(
        {"image": [{"path": path, "bytes": None} for path in paths], LABEL: names}, features
    )


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
    images = [column for column, feature in features.items() if isinstance(feature, (ImageFeature, *ARRAYS))]
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
    if isinstance(feature, ARRAYS):
        return records.select_columns([column, *others]).with_format(
            "numpy", columns=[column], output_all_columns=True
        )
    if not is_image:
        raise ValueError(f"`image_column_name` is {column!r}, a column of {feature}; images are needed.")
    return records.select_columns([column, *others]).cast_column(column, ImageFeature(decode=False))


def decoded_once(records: datasets.Dataset, column: str, channels: int | None = None) -> datasets.Dataset:
    """The data set with its images kept uncompressed, in a file of `datasets`' cache that is mapped into memory.

    All processes and workers share the file, and so do later runs on the same data, as long as no image file has
    changed its name, size or time of modification. An unreadable image stays as it is.

    Args:
        channels: that a model takes in full depth; None for 8 bits.
    """

    def keep_decoded(record):
        try:
            return {column: {"bytes": decode(record[column], channels), "path": record[column]["path"]}}
        except UnreadableImageError:
            return record

    if isinstance(records.features[column], ARRAYS):  # there is nothing to decode
        return records
    fingerprint = fingerprint_of_files(records, column) + (f"-{channels}" if channels else "")
    folder = os.path.join(datasets_cache_folder(), "greenmim-decoded")
    os.makedirs(folder, exist_ok=True)
    # `datasets` writes to a file aside and renames it. Unless told where, it keeps what has no file in memory.
    return records.map(
        keep_decoded,
        desc="Decoding images",
        writer_batch_size=DECODED_AT_ONCE,
        cache_file_name=os.path.join(folder, f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        load_from_cache_file=True,
    )


def fingerprint_of_files(records: datasets.Dataset, column: str) -> str:
    """Changes with the records, with the sizes and times of the files that they name, and with `DECODING`."""
    digest = hashlib.sha256(f"{DECODING} {datasets_fingerprint(records)} {column}".encode())
    if isinstance(records.features[column], ARRAYS):  # which the records hold
        return digest.hexdigest()[:32]
    # The names alone: encoded images beside them are not read.
    name = f"{column}.path"
    for path in records.select_columns([column]).flatten().select_columns([name])[name]:
        file = path.rpartition("::")[2] if is_address(path) else path and split_name(path)[0]
        if file is not None and os.path.isfile(file):
            status = os.stat(file)
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def check_first_readable(records, column: str, transform: EvalTransform, argument: str) -> None:
    """Looks for an image that can be read, before anything else happens.

    Args:
        transform: what images are to become.

    Raises:
        `ValueError`: when there is none, naming the first that cannot be read.
    """
    unreadable = []
    for record in records:
        try:
            load_image(record[column], transform, None)
        except UnreadableImageError as error:
            unreadable.append(str(error))
            if isinstance(records, datasets.IterableDataset) and len(unreadable) == FIRST_READABLE_WITHIN:
                break
            continue
        return
    examples = "; ".join(unreadable[:3]) or "it is empty"
    raise ValueError(f"`{argument}` has no readable image among {len(unreadable)}: {examples}.")
