# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Labelled data sets: label columns, stratified draws, and agreement between the parts."""

from collections import Counter
from dataclasses import dataclass, fields

import datasets
from datasets import ClassLabel
from transformers.utils import logging

from .readers import LABEL, Part, find_image_column, undecoded


logger = logging.get_logger(__name__)


def find_label_column(records: datasets.Dataset, name: str | None) -> str:
    """The label column: the named one, the only one of classes, or one called label(s).

    Raises:
        `ValueError`: when there is no such column, or the choice is not clear; it lists the columns.
    """
    columns = list(records.features)
    if name is not None:
        if name not in columns:
            raise ValueError(f"`label_column_name` is {name!r}, but the data set has the columns {columns}.")
        return name
    found = [column for column, feature in records.features.items() if isinstance(feature, ClassLabel)]
    found = found or [column for column in columns if column in ("label", "labels")]
    if len(found) != 1:
        found = f"the label columns {found}" if found else f"no label column among {columns}"
        raise ValueError(f"`label_column_name` is not given and the data set has {found}; name the one to use.")
    return found[0]


def with_class_labels(records: datasets.Dataset, column: str, argument: str) -> datasets.Dataset:
    """The data set with its label column called `label` and of type `ClassLabel`.

    Text and numbers become classes in their order.

    Raises:
        `ValueError`: for labels that are missing or of another type.
    """
    if column != LABEL:
        records = records.remove_columns([LABEL]) if LABEL in records.features else records
        records = records.rename_column(column, LABEL)
    feature = records.features[LABEL]
    dtype = getattr(feature, "dtype", None)  # lists and records have none
    if dtype is None or not (dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint"))):
        raise ValueError(
            f"`label_column_name` is {column!r}, a column of {feature}; classes as numbers or text are needed."
        )
    values = records[LABEL][:]
    missing = [index for index, value in enumerate(values) if value is None or (_is_class(feature) and value < 0)]
    if missing:
        raise ValueError(
            f"`{argument}`: {len(missing)} of {len(values)} images have no label in column {column!r}, the first is"
            f" image {missing[0]}. Label them or leave them out."
        )
    if _is_class(feature):
        return records
    names = [str(value) for value in sorted(set(values))]
    number_of = {name: number for number, name in enumerate(names)}
    return _numbered(records, [number_of[str(value)] for value in values], names)


def _numbered(records: datasets.Dataset, numbers: list[int], names: list[str]) -> datasets.Dataset:
    return records.remove_columns([LABEL]).add_column(LABEL, numbers).cast_column(LABEL, ClassLabel(names=names))


def _is_class(feature) -> bool:
    return isinstance(feature, ClassLabel)


def label_names(records: datasets.Dataset) -> list[str]:
    """Names of the classes in the order of their numbers."""
    return records.features[LABEL].names


def check_classes(records: datasets.Dataset, argument: str) -> None:
    """Refuses data that cannot teach to tell classes apart.

    Raises:
        `ValueError`: when all images are of one class.
    """
    present = sorted({label_names(records)[number] for number in records[LABEL][:]})
    if len(present) < 2:
        found = f"the class {present[0]!r} only" if present else "no class"
        raise ValueError(f"`{argument}` has images of {found}; two or more are needed.")


def with_names(records: datasets.Dataset, names: list[str], argument: str, source: str) -> datasets.Dataset:
    """The data set with its classes numbered as in `names`.

    Args:
        argument: where the data set comes from.
        source: where the names come from, for the message.

    Raises:
        `ValueError`: when a label is not among the names.
    """
    own = label_names(records)
    used = {own[number] for number in records[LABEL][:]}
    unknown = sorted(used - set(names))
    if unknown:
        raise ValueError(
            f"`{argument}` has the labels {unknown}, which {source} does not have; it has {sorted(names)}. Labels"
            " must be named alike."
        )
    absent = sorted(set(names) - used)
    if absent:
        logger.warning(f"`{argument}` has no image of {len(absent)} of {len(names)} classes, such as {absent[0]!r}.")
    if own == names:
        return records
    return _numbered(records, [names.index(own[number]) for number in records[LABEL][:]], names)


def split(records: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Two parts, the second with a `share` of each class.

    Raises:
        `ValueError`: when a class is too small.
    """
    try:
        parts = records.train_test_split(share, stratify_by_column=LABEL, seed=seed)
    except ValueError as error:
        raise ValueError(
            f"`train_val_split` is {share}, but the classes are too small to be split so: {error}"
        ) from error
    return parts["train"], parts["test"]


def stratified_subset(records: datasets.Dataset, count: int | None, seed: int, argument: str) -> datasets.Dataset:
    """`count` images, or all if None, with the share of each class kept; the draw depends on the seed alone.

    Raises:
        `ValueError`: when a class is too small.
    """
    if count is None or count >= len(records):
        return records
    try:
        return records.train_test_split(train_size=count, stratify_by_column=LABEL, seed=seed)["train"]
    except ValueError as error:
        raise ValueError(f"`{argument}` is {count}, but the classes cannot be drawn so: {error}") from error


def class_weights(records: datasets.Dataset) -> list[float]:
    """Weight of each class that makes all classes count alike: samples / (classes * samples of the class)."""
    counts = Counter(records[LABEL][:])
    names = label_names(records)
    # A class without images takes no part in training; any weight does.
    return [len(records) / (len(names) * max(counts[number], 1)) for number in range(len(names))]


def prepare(
    records: datasets.Dataset,
    argument: str,
    image_column: str | None = None,
    label_column: str | None = None,
    may_lack_labels: bool = False,
) -> datasets.Dataset:
    """Records with the columns `image`, undecoded, and `label`, classes.

    Args:
        argument: where the records come from, for messages.
        image_column, label_column: names of the columns; None = the only ones of their type.
        may_lack_labels: without a single label there is no column `label` then, as in test parts that are kept secret.

    Raises:
        `ValueError`: for columns that do not exist or fit, and for missing labels.
    """
    image_column = find_image_column(records, image_column)
    has_labels = not may_lack_labels or _has_labels(records, label_column)
    label_columns = [find_label_column(records, label_column)] if has_labels else []
    if image_column in label_columns:
        raise ValueError(f"`label_column_name` is {image_column!r}, the column of the images; labels are needed.")
    records = undecoded(records, image_column, *label_columns)
    if image_column != "image":
        records = records.rename_column(image_column, "image")
    return with_class_labels(records, label_columns[0], argument) if has_labels else records


def _has_labels(records: datasets.Dataset, name: str | None) -> bool:
    try:
        column = find_label_column(records, name)
    except ValueError:
        return False
    return any(value not in (None, -1) for value in records[column][:])


@dataclass
class LabelledData:
    """What to train on, to evaluate on and to predict, each of it if there is any."""

    train: Part | None = None
    validation: Part | None = None
    test: Part | None = None

    def parts(self) -> list[Part]:
        """The parts that there are."""
        return [part for part in (getattr(self, field.name) for field in fields(self)) if part is not None]

    def number_as(self, names: list[str], source: str) -> None:
        """Numbers the classes of all parts as in `names`, which come from `source`."""
        for part in self.parts():
            if part.is_labelled:
                part.records = with_names(part.records, names, part.argument, source)
