# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Objects as pictures: boxes, masks and names over images, and what was found beside the truth."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .coco import decode_mask
from .detecting import Detections
from .pictures import GAP, LINE, OPACITY, SIDE, class_colours


def draw_objects(pixels: np.ndarray, found: Detections, names: list[str], factor: float = 1.0) -> Image.Image:
    """An image with boxes, masks in half, and names with scores below 1.

    Args:
        pixels: uint8 `(height, width, 3)`, of the size that the objects are for.
        factor: by which the picture is larger or smaller.
    """
    colours = class_colours(len(names))
    pixels = pixels.copy()
    for code, label in zip(found.masks, found.labels):
        inside = decode_mask(code, *pixels.shape[:2]).astype(bool)
        pixels[inside] = (pixels[inside] * (1 - OPACITY) + colours[label] * OPACITY).round().astype(np.uint8)
    size = max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor))
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for (left, top, width, height), label, score in zip(found.boxes * factor, found.labels, found.scores):
        colour = tuple(colours[label].tolist())
        draw.rectangle((left, top, max(left, left + width - 1), max(top, top + height - 1)), outline=colour, width=2)
        text = names[label] if score >= 1 else f"{names[label]} {score:.2f}"
        place = left + 3, max(0, top + 1)
        draw.rectangle(draw.textbbox(place, text, font=font), fill=colour)
        draw.text(place, text, fill="white", font=font)
    return picture


def comparison(rows: list[tuple[np.ndarray, Detections | None, Detections]], names: list[str]) -> Image.Image:
    """Images with their true objects, where they are known, and with those found, side by side.

    Args:
        rows: pixels, uint8 `(height, width, 3)`, true and found objects of each image.
    """
    drawn = []
    for pixels, true, found in rows:
        factor = min(1.0, SIDE / max(pixels.shape[:2]))
        none = found.above(np.inf)
        drawn.append([draw_objects(pixels, one, names, factor) for one in (none if true is None else true, found)])
    width = max(tile.width for tiles in drawn for tile in tiles)
    picture = Image.new("RGB", (2 * width + GAP, LINE + sum(tiles[0].height + GAP for tiles in drawn)), "white")
    draw, top = ImageDraw.Draw(picture), LINE
    for column, title in enumerate(("truth" if rows[0][1] is not None else "image", "prediction")):
        draw.text((column * (width + GAP) + 2, 1), title, fill="black", font=ImageFont.load_default(12))
    for tiles in drawn:
        for column, tile in enumerate(tiles):
            picture.paste(tile, (column * (width + GAP), top))
        top += tiles[0].height + GAP
    return picture
