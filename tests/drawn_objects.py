"""Pictures of drawn shapes, each in a class of its own, with the numbers of their pixels, as data in COCO's format."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


NAMES = ["square", "disc", "triangle"]


def draw_picture(seed: int, index: int, size: int = 128) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A picture of up to four shapes that do not overlap.

    Returns:
        Pixels, uint8 `(size, size, 3)`, the number of the object of each pixel from 1 on, 0 for none, and the class of
        each object.
    """
    generator = np.random.default_rng((seed, index))
    picture = Image.new("RGB", (size, size), tuple(int(value) for value in generator.integers(0, 90, 3)))
    numbers, places, classes = Image.new("L", (size, size)), [], []
    count = int(generator.integers(2, 5))
    for _ in range(20):  # places, some of which are taken
        if len(classes) == count:
            break
        side = int(generator.integers(3 * size // 16, 7 * size // 16))
        left, top = (int(value) for value in generator.integers(0, size - side, 2))
        if any(left < x + s and x < left + side and top < y + s and y < top + side for x, y, s in places):
            continue
        kind, colour = int(generator.integers(3)), tuple(int(value) for value in generator.integers(120, 256, 3))
        for canvas, fill in ((picture, colour), (numbers, len(classes) + 1)):
            draw_shape(ImageDraw.Draw(canvas), kind, left, top, side, fill)
        places.append((left, top, side))
        classes.append(kind)
    pixels = np.asarray(picture).astype(np.int16) + generator.integers(-12, 13, (size, size, 1))
    return pixels.clip(0, 255).astype(np.uint8), np.asarray(numbers).copy(), classes


def draw_shape(draw: ImageDraw.ImageDraw, kind: int, left: int, top: int, side: int, fill) -> None:
    """A shape that fills a square."""
    right, bottom = left + side - 1, top + side - 1
    if kind == 0:
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif kind == 1:
        draw.ellipse((left, top, right, bottom), fill=fill)
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=fill)


def box_of(mask: np.ndarray) -> list[float]:
    """Left, top, width and height of the pixels of a mask."""
    rows, columns = np.nonzero(mask)
    left, top = columns.min(), rows.min()
    return [float(left), float(top), float(columns.max() + 1 - left), float(rows.max() + 1 - top)]


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed code of a mask: lengths of runs of 0 and 1 in turn, column by column."""
    values = mask.astype(np.uint8).flatten(order="F")
    edges = np.flatnonzero(np.diff(values)) + 1
    lengths = np.diff([0, *edges, len(values)]).tolist()
    return {"size": list(mask.shape), "counts": [0] * int(values[0]) + lengths}


def write_objects(folder: Path, count: int, seed: int = 0, size: int = 128) -> Path:
    """Writes images/ and annotations.json with boxes and masks; categories have the numbers 3, 5 and 7."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        pixels, numbers, classes = draw_picture(seed, index, size)
        Image.fromarray(pixels).save(folder / "images" / f"{index:03}.png")
        images.append({"id": 100 + index, "file_name": f"{index:03}.png", "width": size, "height": size})
        for number, kind in enumerate(classes, 1):
            mask = numbers == number
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + index,
                    "category_id": 2 * kind + 3,
                    "bbox": box_of(mask),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": run_lengths(mask),
                }
            )
    categories = [{"id": 2 * kind + 3, "name": name} for kind, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder
