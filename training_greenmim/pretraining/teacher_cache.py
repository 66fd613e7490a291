# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Features of a teacher on disk, for fixed views of each image: the teacher runs once."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image

from modeling_greenmim.array_image import FullDepth, center_crop_box

from ..data.image_dataset import ImageDataset
from ..data.images import UnreadableImageError, load_image, open_image
from ..data.readers import fingerprint_of_files
from ..data.transforms import EvalTransform, Geometry, TrainTransform, apply_geometry, upright_size
from ..randomness import VIEW, derived_generator
from .teacher import Teacher


# Images whose features are written together.
CHUNK = 32


class FixedViews:
    """Views of an image that are the same in every epoch: the whole, its mirror image, then crops and theirs.

    Args:
        size: height and width in pixels.
        channels, depth: as in `apply_geometry`.
        num_crops: crops beside the whole image, drawn from the seed.
        scale: range of a crop's share of the image's area.
        seed: what crops are derived from, with the image and the number of the crop.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        num_crops: int,
        scale: tuple[float, float],
        seed: int,
        depth: FullDepth | None = None,
    ):
        self.size, self.channels, self.num_crops, self.seed, self.depth = size, channels, num_crops, seed, depth
        self.crops = TrainTransform(size, channels, scale)

    def __len__(self) -> int:
        return 2 * (1 + self.num_crops)

    def of_size(self, size: tuple[int, int]) -> "FixedViews":
        """The same views in other sizes."""
        return FixedViews(size, self.channels, self.num_crops, self.crops.scale, self.seed, self.depth)

    def __call__(self, source, index: int, view: int) -> torch.Tensor:
        """View of image `index` of a data set, `(channels, height, width)`."""
        image: Image.Image = open_image(source)
        width, height = upright_size(image)
        crop, is_mirrored = view // 2, bool(view % 2)
        if crop == 0:
            box = center_crop_box(width, height, self.size[1] / self.size[0], 1.0)
        else:
            generator = derived_generator(self.seed, VIEW, index, crop)
            box = self.crops.draw_geometry(width, height, generator).box
        return apply_geometry(image, Geometry(box, self.size, is_mirrored), self.channels, self.depth)


class CachedDataset(ImageDataset):
    """Images in fixed views, with the features that a teacher has of them.

    Args:
        records, column, seed: as in `ImageDataset`.
        views: of the student's size.
        features: file of `cached_features`.
    """

    def __init__(self, records, column: str, views: FixedViews, seed: int, features: Path):
        super().__init__(records, column, views, seed)
        self.features = features

    def _load(self, index: int, generator: np.random.Generator) -> dict:
        view = int(generator.integers(len(self.transform)))
        pixel_values = _load_view(self.records[index][self.column], self.transform, index, view)
        # Mapped anew each time, which takes a tenth of a millisecond: an open map would be copied to workers whole.
        features = np.load(self.features, mmap_mode="r")[index, view].copy()
        return {"pixel_values": pixel_values, "features": torch.from_numpy(features)}


def cached_features(folder: str, records: datasets.Dataset, column: str, teacher: Teacher, views: FixedViews) -> Path:
    """File of the features of all views of all images; what is not there yet is made, and goes on if interrupted.

    Args:
        folder: for this and other caches; each has a sub-folder that is named after what it is made of.
        records, column: a data set with an undecoded image column.
        teacher: is asked for what is not there yet.
        views: of any size.

    Returns:
        Name of a NumPy file, `(images, views, rows, columns, width)` float16.

    Raises:
        `ValueError`: when the folder cannot be written.
    """
    made_of = {
        "teacher": teacher.facts.name,
        "checksum of its weights": teacher.checksum(),
        "teacher image size": teacher.size,
        "images": fingerprint_of_files(records, column),
        "views": [len(views), views.crops.scale, views.seed if views.num_crops else None],
        "channels": views.channels,
        "aspect": views.size[1] / views.size[0],
        **({} if views.depth is None else asdict(views.depth)),
    }
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    place, shape = Path(folder, key), (len(records), len(views), *teacher.grid, teacher.width)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`cache_teacher` is {folder!r}, where no folder can be made: {error}") from error
    features = _open(place / "features.npy", shape)
    progress = place / "progress.json"
    done = json.loads(progress.read_text())["images"] if progress.exists() else 0
    seen = views.of_size(teacher.size)
    for start in tqdm(range(done, len(records), CHUNK), desc="Features of the teacher", disable=done >= len(records)):
        indices = range(start, min(start + CHUNK, len(records)))
        images = [
            _view_or_zeros(records[index][column], seen, index, view)
            for index in indices
            for view in range(len(views))
        ]
        batch = teacher.features(torch.stack(images).to(teacher.device))
        features[start : indices.stop] = batch.half().cpu().numpy().reshape(len(indices), *shape[1:])
        features.flush()
        progress.write_text(json.dumps({"images": indices.stop, "of": shape[0], "made of": made_of}, indent=1))
    return place / "features.npy"


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    is_whole = path.exists()
    return np.lib.format.open_memmap(path, "r+" if is_whole else "w+", None if is_whole else np.float16, shape)


def _load_view(source, views: FixedViews, index: int, view: int) -> torch.Tensor:
    return load_image(source, lambda source, _: views(source, index, view), None, f"image {index}")


def _view_or_zeros(source, views: FixedViews, index: int, view: int) -> torch.Tensor:
    """Zeros for an unreadable image, whose features are never asked for."""
    try:
        return _load_view(source, views, index, view)
    except UnreadableImageError:
        return EvalTransform(views.size, views.channels, depth=views.depth).blank()
