# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Records of images, still encoded: unlabelled folders, `datasets`, and the default photographs."""

import importlib.resources
import os
from pathlib import Path

import datasets
import numpy as np
from datasets import Image as ImageFeature
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from ..randomness import SHUFFLE, derived_generator
from ..runs.extras import require
from .images import UnreadableImageError, decode, read
from .transforms import EvalTransform


logger = logging.get_logger(__name__)

# How many images a start may find unreadable before it gives up looking for a readable one in a stream.
FIRST_READABLE_WITHIN = 1000


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
