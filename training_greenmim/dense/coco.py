# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Boxes and masks of objects: COCO JSON and columns of `datasets`, checked, as records; predictions as COCO JSON.

COCO's format is described at https://cocodataset.org/#format-data: boxes are (left, top, width, height) in pixels.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel
from datasets import Image as ImageFeature
from transformers.utils import logging

from ..data.folders import find_images
from ..data.images import limit_pixels
from ..data.readers import DataSource, find_image_column, load_folder, read_records, undecoded


logger = logging.get_logger(__name__)

# Where annotations lie in a folder unless they are named, and its images, if there is such a folder.
ANNOTATIONS, IMAGES = "annotations.json", "images"
# Columns of records.
IMAGE_ID, OBJECTS = "image_id", "objects"
FEATURES = datasets.Features(
    {
        "image": ImageFeature(decode=False),
        IMAGE_ID: datasets.Value("int64"),
        # Of the upright image in pixels; 0 where the annotations do not tell.
        "width": datasets.Value("int64"),
        "height": datasets.Value("int64"),
        OBJECTS: {
            "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
            "category": datasets.List(datasets.Value("int64")),
            "area": datasets.List(datasets.Value("float64")),
            "iscrowd": datasets.List(datasets.Value("int64")),
            # JSON: polygons or a run-length code, "null" where there is neither.
            "segmentation": datasets.List(datasets.Value("string")),
        },
    }
)


@dataclass
class Objects:
    """A data set with its objects.

    Attributes:
        records: with the columns of `FEATURES`; categories are numbers of classes.
        names: of the classes, in the order of their numbers.
        category_ids: COCO's number of each class, for predictions.
        argument: where it comes from, for messages.
        skipped: how many boxes were left out or cut, and why.
    """

    records: datasets.Dataset
    names: list[str]
    category_ids: list[int]
    argument: str
    skipped: dict[str, int]

    def number_as(self, names: list[str], origin: str) -> None:
        """Gives classes the numbers that they have in a list of names.

        Raises:
            `ValueError`: for classes that the list lacks.
        """
        unknown = [name for name in self.names if name not in names]
        if unknown:
            raise ValueError(f"`{self.argument}` has classes that {origin} does not know: {unknown}; it has {names}.")
        numbers = [names.index(name) for name in self.names]
        ids = dict(zip(numbers, self.category_ids))
        free = iter(set(range(1, len(names) + len(ids) + 1)) - set(ids.values()))
        self.category_ids = [ids[number] if number in ids else next(free) for number in range(len(names))]
        if numbers != list(range(len(numbers))):
            self.records = self.records.map(
                lambda record: {
                    OBJECTS: {**record[OBJECTS], "category": [numbers[one] for one in record[OBJECTS]["category"]]}
                },
                features=self.records.features,
            )
        self.names = list(names)

    def boxes_of_classes(self) -> Counter:
        """How many boxes each class has, by its number; crowds do not count."""
        counts = Counter()
        for objects in self.records[OBJECTS]:
            counts.update(one for one, crowd in zip(objects["category"], objects["iscrowd"]) if not crowd)
        return counts


def read_parts(data) -> dict[str, Objects]:
    """The parts `train`, `validation` and `test` that a script's `DetectionDataArguments` name, those that there are.

    Raises:
        `ValueError`: for folders and data sets that do not fit.
    """
    limit_pixels(data.max_image_pixels)
    parts = {}
    if data.dataset_name:
        for name, part in read_records(DataSource(data.dataset_name, data.dataset_config_name)).items():
            column = find_image_column(part.records, data.image_column_name)
            parts[name] = read_objects_column(part.records, column, data.objects_column_name, part.argument)
    for name in ("train", "validation"):
        if folder := getattr(data, f"{name}_dir"):
            parts[name] = read_coco_folder(folder, getattr(data, f"{name}_annotations"), f"{name}_dir")
    if data.test_dir:
        has_annotations = os.path.isfile(os.path.join(data.test_dir, ANNOTATIONS))
        if has_annotations:
            parts["test"] = read_coco_folder(data.test_dir, None, "test_dir")
        else:
            parts["test"] = Objects(load_folder(data.test_dir, "test_dir"), [], [], "test_dir", {})
    return parts


def check_classes(objects: Objects) -> None:
    """Tells which classes no image of a part to train on shows.

    Raises:
        `ValueError`: where there is not a single object.
    """
    counts = objects.boxes_of_classes()
    if not counts:
        raise ValueError(f"`{objects.argument}` has {len(objects.records)} training images without an object.")
    absent = [name for number, name in enumerate(objects.names) if not counts[number]]
    if absent:
        logger.warning(f"`{objects.argument}` has no object of {len(absent)} of its classes: {', '.join(absent)}.")


def read_coco_folder(folder: str, annotations: str | None, argument: str) -> Objects:
    """Images of a folder with annotations in COCO's format.

    Args:
        folder: of the images, or with a folder `images` of them; names in the annotations are relative to it.
        annotations: the file; None = `annotations.json` in the folder.
        argument: that names the folder, for messages. Images of `test_dir` need no annotations, only their list.

    Raises:
        `ValueError`: for files that are no such annotations, for images that they name and the folder lacks, and for
            annotations of images or categories that they do not list.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"`{argument}` is {folder!r}, which is no folder.")
    path = annotations or os.path.join(folder, ANNOTATIONS)
    given = argument.replace("_dir", "_annotations")
    if not os.path.isfile(path):
        raise ValueError(
            f"`{argument}` is {folder!r}, without annotations: there is no file {path!r}. Name the COCO JSON file by"
            f" `{given}`."
        )
    is_test = argument == "test_dir"
    content = _read_json(path, f"`test_dir` has {path!r}" if is_test else f"`{given}` is {path!r}", is_test)
    root = os.path.join(folder, IMAGES) if os.path.isdir(os.path.join(folder, IMAGES)) else folder
    images = _by_id(content["images"], "images", path)
    categories = _by_id(content["categories"], "categories", path)
    _check_files(images, root, argument, path)
    objects = _objects_by_image(content["annotations"], images, categories, path)
    ids = sorted(categories)
    names = [str(categories[number]["name"]) for number in ids]
    if len(set(names)) < len(names):
        raise ValueError(f"{path!r} has categories of the same name: {names}.")
    records, counts = [], Counter()
    for number, image in images.items():
        size = int(image.get("width") or 0), int(image.get("height") or 0)
        kept = _checked(objects[number], size, counts, f"{path!r}, image {image['file_name']!r}")
        records.append(
            {
                "image": {"path": os.path.join(root, image["file_name"]), "bytes": None},
                IMAGE_ID: number,
                "width": size[0],
                "height": size[1],
                OBJECTS: _columns(kept, {one: order for order, one in enumerate(ids)}),
            }
        )
    _report(records, counts, argument)
    return Objects(_dataset(records), names, ids, argument, dict(counts))


def _read_json(path: str, given: str, is_test: bool) -> dict:
    """The content of a file that messages call `given`; one of images to predict may lack annotations."""
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{given}, which is not valid JSON: {error}") from error
    if is_test and isinstance(content, dict):
        content["annotations"] = content.get("annotations") or []
    wanted = ("images", "annotations", "categories")
    missing = [name for name in wanted if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        raise ValueError(f"{given}, which lacks the lists {missing} of a COCO JSON file.")
    if not content["images"] or not content["categories"]:
        raise ValueError(f"{given}, without images or without categories.")
    return content


def _by_id(entries: list[dict], what: str, path: str) -> dict[int, dict]:
    needed = "file_name" if what == "images" else "name"
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or needed not in entry:
            raise ValueError(f"{path!r} has an entry in {what!r} without a whole `id` and a `{needed}`: {entry!r}.")
    repeated = [number for number, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if repeated:
        raise ValueError(f"{path!r} has {len(repeated)} number(s) twice in {what!r}, such as {repeated[0]}.")
    return {entry["id"]: entry for entry in entries}


def _check_files(images: dict[int, dict], root: str, argument: str, path: str) -> None:
    missing = [one["file_name"] for one in images.values() if not os.path.isfile(os.path.join(root, one["file_name"]))]
    if missing:
        raise ValueError(
            f"`{argument}`: {len(missing)} of {len(images)} images that {path!r} names, such as {missing[0]!r}, are"
            f" not in {root!r}."
        )
    named = {os.path.normpath(os.path.join(root, one["file_name"])) for one in images.values()}
    others = [file for file in find_images(root, argument) if os.path.normpath(file) not in named]
    if others:
        logger.warning(
            f"`{argument}`: {len(others)} images, such as {others[0]!r}, are not in {path!r}; they are left out."
        )


def _objects_by_image(annotations: list[dict], images: dict, categories: dict, path: str) -> dict[int, list[dict]]:
    for what, known, key in (("images", images, "image_id"), ("categories", categories, "category_id")):
        unknown = [one.get(key) for one in annotations if one.get(key) not in known]
        if unknown:
            raise ValueError(
                f"{path!r} has {len(unknown)} annotation(s) of {what} that it does not list, such as {key}"
                f" {unknown[0]!r}."
            )
    objects = {number: [] for number in images}
    for annotation in annotations:
        objects[annotation["image_id"]].append(annotation)
    return objects


def _checked(objects: list[dict], size: tuple[int, int], counts: Counter, where: str) -> list[dict]:
    """Objects whose boxes lie in the image, cut to it; the others are counted.

    Raises:
        `ValueError`: for boxes that are not four finite numbers.
    """
    kept = []
    for one in objects:
        box = one.get("bbox")
        if not _is_box(box):
            raise ValueError(f"{where}: `bbox` is {box!r}; four finite numbers are right: left, top, width, height.")
        if not (box[2] > 0 and box[3] > 0):
            counts["empty boxes"] += 1
            continue
        cut = cut_box(box, size) if min(size) > 0 else list(map(float, box))
        if cut is None:
            counts["boxes outside their image"] += 1
            continue
        counts["boxes cut to their image"] += cut != list(map(float, box))
        kept.append({**one, "bbox": cut})
    return kept


def _is_box(box) -> bool:
    is_four = isinstance(box, (list, tuple, np.ndarray)) and len(box) == 4
    return is_four and all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)


def cut_box(box: list[float], size: tuple[int, int]) -> list[float] | None:
    """The part of a box (left, top, width, height) inside an image of (width, height); None where there is none.

    A box that only rounding carries beyond the edge, by less than a thousandth of a pixel, stays as it is.
    """
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if min(left, top) > -1e-3 and right < size[0] + 1e-3 and bottom < size[1] + 1e-3:
        return list(map(float, box))
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    return (
        [float(left), float(top), float(right - left), float(bottom - top)] if right > left and bottom > top else None
    )


def _columns(objects: list[dict], numbers: dict[int, int]) -> dict[str, list]:
    return {
        "bbox": [one["bbox"] for one in objects],
        "category": [numbers[one["category_id"]] for one in objects],
        "area": [float(one.get("area") or one["bbox"][2] * one["bbox"][3]) for one in objects],
        "iscrowd": [int(one.get("iscrowd") or 0) for one in objects],
        "segmentation": [json.dumps(one.get("segmentation") or None) for one in objects],
    }


def _dataset(records: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(records, features=FEATURES)


def _report(records: list[dict], counts: Counter, argument: str) -> None:
    backgrounds = sum(not record[OBJECTS]["bbox"] for record in records)
    if backgrounds == len(records) and not argument.startswith("test"):
        raise ValueError(f"`{argument}` has {len(records)} images and not a single box.")
    if backgrounds:
        logger.info(
            f"`{argument}`: {backgrounds} of {len(records)} images have no objects: all of them is background."
        )
    for what, count in sorted(counts.items()):
        if count:
            logger.warning(f"`{argument}`: {count} {what}{'' if 'cut' in what else ', left out'}.")
    for what in [what for what, count in counts.items() if not count]:
        del counts[what]


def read_objects_column(records: datasets.Dataset, column: str, objects: str, argument: str) -> Objects:
    """A data set with a column of images and one of objects, as Transformers' example of object detection has it.

    Args:
        records: `objects` holds, for each image, `bbox` (COCO's) and `category` (numbers or class labels), and may
            hold `area`, `iscrowd` and `segmentation` (polygons, run-length codes, or either as JSON). An `image_id`,
            `width` and `height` may stand beside it.

    Raises:
        `ValueError`: for columns that are not there or of another kind.
    """
    if objects not in records.column_names:
        raise ValueError(
            f"`objects_column_name` is {objects!r}, but `{argument}` has the columns {records.column_names}."
        )
    categories = _category_feature(records.features[objects])
    if categories is None:
        raise ValueError(
            f"`objects_column_name` is {objects!r}, a column of {records.features[objects]}; it must hold `bbox` and"
            " `category`."
        )
    others = [name for name in (IMAGE_ID, "width", "height") if name in records.column_names]
    plain = undecoded(records, column, objects, *others)
    found = [_as_list(one) for one in plain[objects]]
    numbers = sorted({one["category"] for entries in found for one in entries})
    if isinstance(categories, ClassLabel):
        names = categories.names
    elif numbers and isinstance(numbers[0], str):
        names = numbers
    else:
        names = [str(number) for number in range(numbers[-1] + 1)] if numbers else []
    order = {name: number for number, name in enumerate(names)} if numbers and isinstance(numbers[0], str) else None
    if order is None and numbers and not 0 <= numbers[0] <= numbers[-1] < len(names):
        raise ValueError(f"`{argument}` has the categories {numbers}, but there are the classes {names}.")
    made, counts = [], Counter()
    columns = {name: plain[name] for name in others}
    ids = columns.get(IMAGE_ID, range(len(plain)))
    if len(set(ids)) < len(plain):
        raise ValueError(f"`{argument}` has the same `{IMAGE_ID}` for several images.")
    for index, (image_id, entries) in enumerate(zip(ids, found)):
        size = tuple(int(columns[name][index] or 0) if name in columns else 0 for name in ("width", "height"))
        entries = [
            {**one, "category_id": one["category"] if order is None else order[one["category"]]} for one in entries
        ]
        for one in entries:
            if isinstance(one.get("segmentation"), str):
                one["segmentation"] = json.loads(one["segmentation"])
        kept = _checked(entries, size, counts, f"`{argument}`, image {image_id}")
        identity = {number: number for number in range(len(names))}
        made.append({IMAGE_ID: image_id, "width": size[0], "height": size[1], OBJECTS: _columns(kept, identity)})
    _report(made, counts, argument)
    features = datasets.Features({name: one for name, one in FEATURES.items() if name != "image"})
    images = plain.select_columns([column])
    images = images if column == "image" else images.rename_column(column, "image")
    joined = datasets.concatenate_datasets([images, datasets.Dataset.from_list(made, features=features)], axis=1)
    return Objects(joined, list(names), list(range(len(names))), argument, dict(counts))


def _category_feature(feature):
    """The feature of categories within that of objects: a struct of lists or a list of structs; None for others."""
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, dict) or not {"bbox", "category"} <= inner.keys():
        return None
    return getattr(inner["category"], "feature", inner["category"])


def _as_list(objects: dict | list | None) -> list[dict]:
    """A struct of lists or a list of structs -> a list; an image without either has no objects."""
    if objects is None:
        return []
    if isinstance(objects, dict):
        return [dict(zip(objects, values)) for values in zip(*objects.values())]
    return [dict(one) for one in objects]


def decode_mask(segmentation, height: int, width: int) -> np.ndarray | None:
    """The mask of an object, `(height, width)`, uint8 0 or 1, from polygons or a run-length code; None without one.

    Raises:
        `ValueError`: for codes of another size, and for what is neither.
    """
    from pycocotools import mask as codes  # an extra

    if not segmentation:
        return None
    try:
        if isinstance(segmentation, list):
            return codes.decode(codes.merge(codes.frPyObjects(segmentation, height, width)))
        if isinstance(segmentation["counts"], list):
            segmentation = codes.frPyObjects(segmentation, *segmentation["size"])
        mask = codes.decode(segmentation)
    except Exception as error:  # pycocotools raises this very class
        raise ValueError(f"a `segmentation` that is neither polygons nor a run-length code: {error}") from error
    if mask.shape != (height, width):
        raise ValueError(f"a `segmentation` of {mask.shape[1]}x{mask.shape[0]} px, but the image has {width}x{height}")
    return mask


def encode_mask(mask: np.ndarray) -> dict:
    """A mask `(height, width)` as COCO's compressed run-length code, ready for JSON."""
    from pycocotools import mask as codes

    code = codes.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def box_of_mask(mask: np.ndarray) -> np.ndarray | None:
    """Left, top, right and bottom of the pixels of a mask; None for an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)
