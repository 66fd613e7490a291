# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Class maps as pictures: palettes, overlays, predictions beside the truth."""

import colorsys
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.images import image_name


# Share of an overlay that is the colours of classes.
OPACITY = 0.5
# Colour of pixels that are ignored, and side in pixels of the images of a picture.
IGNORED, SIDE = (255, 255, 255), 320
GAP, LINE = 4, 16
# Most names that a legend has.
NAMED = 24


def class_colours(count: int) -> np.ndarray:
    """A colour for each class, uint8 `(count, 3)`: hues a golden ratio apart, in turns light and dark."""
    colours = []
    for number in range(count):
        hue, level = (number * 0.618034) % 1, number % 3
        colours.append(colorsys.hsv_to_rgb(hue, (0.9, 0.6, 0.9)[level], (0.95, 0.85, 0.6)[level]))
    return (np.array(colours) * 255).round().astype(np.uint8)


def prediction_names(dataset) -> list[str]:
    """Names for what is predicted of images: those of their files without suffix, numbered where one is taken.

    Args:
        dataset: an `ImageDataset`.
    """
    names, taken = [], set()
    for index in range(len(dataset)):
        name = Path(image_name(dataset.records[index][dataset.column], f"{index}")).stem or str(index)
        while name in taken:
            name = f"{name}_{index}"
        names.append(name)
        taken.add(name)
    return names


def save_class_map(classes: np.ndarray, num_labels: int, path: str | Path) -> None:
    """Writes class numbers `(height, width)` as PNG: with a palette of colours, or 16-bit for over 256 classes."""
    if num_labels > 256:
        image = Image.fromarray(classes.astype(np.uint16))
    else:
        image = Image.fromarray(classes.astype(np.uint8))
        image.putpalette(class_colours(256).tobytes())
    _replace(image, path)


def overlay(pixels: np.ndarray, classes: np.ndarray, num_labels: int) -> Image.Image:
    """An image with its classes in colours over it; numbers that are no class leave it as it is.

    Args:
        pixels: uint8 `(height, width, 3)`.
        classes: `(height, width)`.
    """
    is_class = (classes >= 0) & (classes < num_labels)
    colours = class_colours(num_labels)[np.where(is_class, classes, 0)]
    mixed = (pixels * (1 - OPACITY) + colours * OPACITY).round().astype(np.uint8)
    return Image.fromarray(np.where(is_class[..., None], mixed, pixels))


def save_overlay(pixels: np.ndarray, classes: np.ndarray, num_labels: int, path: str | Path) -> None:
    """Writes `overlay` as an image file."""
    _replace(overlay(pixels, classes, num_labels), path)


def _replace(image: Image.Image, path: str | Path) -> None:
    """Writes a file aside and renames it, since two processes may have the same last image."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    image.save(aside)
    aside.replace(path)


def coloured(classes: np.ndarray, num_labels: int) -> np.ndarray:
    """Colours of class numbers, uint8 `(height, width, 3)`; `IGNORED` for numbers that are no class."""
    is_class = (classes >= 0) & (classes < num_labels)
    colours = class_colours(num_labels)[np.where(is_class, classes, 0)]
    return np.where(is_class[..., None], colours, np.array(IGNORED, np.uint8))


def comparison(
    rows: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]], names: list[str], ignore_index: int
) -> Image.Image:
    """Images, truth and predictions side by side, with a legend of the classes in them.

    Args:
        rows: pixels, uint8 `(height, width, 3)`, true and predicted class numbers `(height, width)` of each image.
        names: of the classes.
        ignore_index: true pixels of this number are drawn white.
    """
    drawn, present = [], set()
    for pixels, true, predicted in rows:
        height, width = pixels.shape[:2]
        factor = min(1.0, SIDE / max(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        tiles = [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)]
        for classes in (true, predicted):
            if classes is None:
                tiles.append(Image.new("RGB", size, IGNORED))
                continue
            classes = np.where(classes == ignore_index, -1, classes)
            present |= {number for number in np.unique(classes).tolist() if 0 <= number < len(names)}
            tiles.append(Image.fromarray(coloured(classes, len(names))).resize(size, Image.Resampling.NEAREST))
        drawn.append(tiles)
    columns = max(tile.width for tiles in drawn for tile in tiles)
    width = 3 * columns + 2 * GAP
    legend = _legend([(number, names[number]) for number in sorted(present)], len(names), width)
    height = LINE + sum(tiles[0].height + GAP for tiles in drawn) + legend.height
    picture = Image.new("RGB", (width, height), (255, 255, 255))
    draw, top = ImageDraw.Draw(picture), LINE
    for column, title in enumerate(("image", "truth", "prediction")):
        draw.text((column * (columns + GAP) + 2, 1), title, fill="black", font=ImageFont.load_default(12))
    for tiles in drawn:
        for column, tile in enumerate(tiles):
            picture.paste(tile, (column * (columns + GAP), top))
        top += tiles[0].height + GAP
    picture.paste(legend, (0, top))
    return picture


def _legend(classes: list[tuple[int, str]], num_labels: int, width: int) -> Image.Image:
    """Names beside squares of their colours, in lines."""
    font, colours = ImageFont.load_default(12), class_colours(num_labels)
    rest = len(classes) - NAMED
    places, left, top = [], 0, 0
    for number, name in classes[:NAMED] + ([(None, f"and {rest} more")] if rest > 0 else []):
        extent = LINE + int(font.getlength(name)) + 2 * GAP
        if left and left + extent > width:
            left, top = 0, top + LINE
        places.append((left, top, number, name))
        left += extent
    legend = Image.new("RGB", (width, top + LINE), (255, 255, 255))
    draw = ImageDraw.Draw(legend)
    for left, top, number, name in places:
        if number is not None:
            draw.rectangle((left + 2, top + 3, left + 12, top + 13), fill=tuple(colours[number].tolist()))
        draw.text((left + LINE, top + 1), name, fill="black", font=font)
    return legend
