# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images that stand for pages and tiles of files: their names, from the headers of the files."""

from PIL import ExifTags

from modeling_greenmim.array_image import ArrayImage

from .formats import page_numbers
from .images import open_image
from .parts import Part


PAGES = ("first", "all", "as_channels")


def count_pages(path: str) -> int:
    """Number of the pages of a file that are images: smaller copies and masks in a TIFF file do not count.

    Raises:
        `MissingPackageError`: for a TIFF or DICOM file whose reader is not installed.
    """
    return len(page_numbers(path))


def image_size(source) -> tuple[int, int]:
    """Width and height of an image in pixels, upright, from its header; of what `open_image` takes."""
    image = open_image(source)
    # An ArrayImage is upright, and so is the size that Pillow tells of a TIFF file.
    is_upright = isinstance(image, ArrayImage) or image.format == "TIFF"
    is_turned = not is_upright and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if is_turned else image.size


def parts_of(path: str, pages: str = "first", tile: int | None = None) -> list[str]:
    """The names of the images that a file stands for; `open_image` opens them.

    Args:
        pages: "first" takes the first page of a file, "all" each page as an image, "as_channels" all as one image.
        tile: side in pixels of the tiles that cover an image. Those at the right and lower edge are moved inwards, so
            that all have this size; an image with a shorter side keeps that side. None takes images as a whole.

    Raises:
        `ValueError`: for other values; and what `open_image` raises for files that cannot be opened.
    """
    if pages not in PAGES:
        raise ValueError(f"`pages` is {pages!r}; it must be one of {', '.join(PAGES)}")
    if tile is not None and tile < 1:
        raise ValueError(f"`tile` is {tile!r}; it must be a positive number of pixels")
    numbers = [0] if pages == "first" else page_numbers(path)
    parts = [Part(None)] if pages == "as_channels" and len(numbers) > 1 else [Part(number) for number in numbers]
    if tile is not None:
        parts = [Part(part.page, box) for part in parts for box in _boxes(*image_size(part.name(path)), tile)]
    return [part.name(path) for part in parts]


def _boxes(width: int, height: int, tile: int) -> list[tuple[int, int, int, int] | None]:
    """Boxes of a grid from the upper left, row by row; [None] for an image within one tile."""
    if width <= tile and height <= tile:
        return [None]
    rows, columns = ([min(start, max(0, side - tile)) for start in range(0, side, tile)] for side in (height, width))
    return [(left, top, min(left + tile, width), min(top + tile, height)) for top in rows for left in columns]
