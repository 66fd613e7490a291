# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""TIFF, GeoTIFF and BigTIFF: any number of channels and bits, read by the tiles and strips that a part of them needs.

What Pillow holds in full at 8 bits, it reads as ever, unless the file is tiled or too large for it.
"""

import contextlib
import logging
import math
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

from modeling_greenmim.array_image import ArrayImage
from modeling_greenmim.pixels import to_8_bit

from ...runs.extras import is_installed, require
from .values import Inverted, Native, Upright, check_size, edges, is_too_large


# Pillow opens them too, hence no package that they need.
SUFFIXES, PACKAGE, EXTRA = (".tif", ".tiff", ".btf"), None, "tiff"
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Tags, and values of them.
BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES = 258, 259, 262, 274, 277
TILE_WIDTH, EXTRA_SAMPLES, SAMPLE_FORMAT = 322, 338, 339
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
VALUES = (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)  # what needs no conversion of colours
JPEG = 7  # of which tifffile converts YCbCr
GDAL_NODATA = 42113
UNSIGNED, SIGNED = 1, 2
PREMULTIPLIED, ALPHA = 1, (1, 2)  # transparency


def matches(start: bytes) -> bool:
    """Whether bytes begin as TIFF or BigTIFF does, in either order of bytes."""
    return start.startswith(MAGIC)


def open(file, page: int = 0) -> Image.Image:
    """A page, numbered as they lie in the file: Pillow's image or an `ArrayImage`.

    Where the file calls the last channel transparency, an `ArrayImage` has `info["alpha"]`; where it names
    a value for no data, `info["nodata"]`.

    Raises:
        `MissingPackageError`: where Pillow cannot hold the page in full, and tifffile is missing.
        `ValueError`: for a page that there is not, and pages that are no images.
    """
    if not matches(_start(file)):
        return Image.open(file)  # of another format, or none: Pillow says so
    if _suits_pillow(file, page):
        image = Image.open(_rewound(file))
        image.seek(page)
        return image
    return _image(_opened(file), page)


def page_numbers(file) -> list[int]:
    """Numbers of the pages that are images: all but smaller copies of others and masks of transparency."""
    pages = _opened(file).pages
    return [number for number, page in enumerate(pages) if number == 0 or not (page.is_reduced or page.is_mask)]


def open_pages(file) -> list[ArrayImage]:
    """All pages that are images, as arrays."""
    tiff, images = _opened(file), []
    for number in page_numbers(file):
        is_plain = tiff.pages[number].photometric in VALUES and tiff.pages[number].bitspersample >= 8
        image = _image(tiff, number) if is_plain else open(file, number)
        images.append(image if isinstance(image, ArrayImage) else ArrayImage(np.asarray(to_8_bit(image))))
    return images


def _suits_pillow(file, page: int) -> bool:
    """Whether Pillow holds a page in full, and reads it as well as tifffile would, or that is not there."""
    log = logging.getLogger(TiffImagePlugin.__name__)
    log.disabled = True  # it calls many channels an error
    try:
        # Not by `Image.open`, which refuses large images: parts of them can be read.
        image = TiffImagePlugin.TiffImageFile(_rewound(file))
        image.seek(page)
    except Exception:  # no mode for it, no such page, or broken: the other reader tells
        return False
    finally:
        log.disabled = False
    with image:
        tags, bands = image.tag_v2, len(image.getbands())
    bits, photometric = max(tags.get(BITS, (1,))), tags.get(PHOTOMETRIC)
    kind = max(tags.get(SAMPLE_FORMAT, (UNSIGNED,)))
    holds_values = (
        (bits <= 8 and kind == UNSIGNED)
        or (image.mode.startswith("I;16") and photometric != WHITE_IS_ZERO)
        or (image.mode == "I" and kind == SIGNED)
        or (image.mode == "F" and bits == 32)
    )
    if not holds_values or tags.get(SAMPLES, bands) != bands:
        return False
    has_reader = is_installed("tifffile") and is_installed("imagecodecs")
    is_plain = bits == 8 and PREMULTIPLIED not in tags.get(EXTRA_SAMPLES, ())
    is_plain &= photometric in VALUES or (photometric, tags.get(COMPRESSION)) == (YCBCR, JPEG)
    by_parts = is_plain and (TILE_WIDTH in tags or is_too_large(image.size))
    return not (has_reader and (bits > 8 or by_parts))


def _opened(file):
    return require("tifffile", EXTRA).TiffFile(_rewound(file))


def _rewound(file):
    if isinstance(file, BytesIO):
        file.seek(0)
    return file


def _start(file) -> bytes:
    with contextlib.nullcontext(_rewound(file)) if isinstance(file, BytesIO) else Path(file).open("rb") as opened:
        return opened.read(4)


def _image(tiff, number: int) -> ArrayImage:
    """A page of an opened file of tifffile."""
    if number and number >= len(tiff.pages):
        raise ValueError(f"there is no page {number}: the last one is {len(tiff.pages) - 1}")
    if not len(tiff.pages):
        raise ValueError("truncated: it has no page")
    page = tiff.pages[number]
    if page.photometric == PALETTE:
        raise ValueError(f"a palette of {page.bitspersample} bits")
    values = _values(tiff, page)
    if page.photometric == WHITE_IS_ZERO and np.dtype(values.dtype).kind in "bu":
        values = Inverted(values, 2**page.bitspersample - 1)
    orientation = page.tags.valueof(ORIENTATION, 1)
    if orientation in range(2, 9):
        values = Upright(values, orientation)
    image = ArrayImage(values)
    if page.extrasamples and page.extrasamples[-1] in ALPHA:
        image.info["alpha"] = True
    if GDAL_NODATA in page.tags:
        image.info["nodata"] = float(page.nodata)
    return image


def _values(tiff, page):
    """Values of a page: mapped into memory, where they lie in the file as they are, else read by segments."""
    planes, depth, height, width, samples = page.shaped
    if page.dtype is None:
        raise ValueError(f"a page of values of {page.bitspersample} bits in sample format {int(page.sampleformat)}")
    if page.dtype.kind not in "buif":
        raise ValueError(f"a page of {page.dtype}; real numbers are needed")
    if depth > 1:
        raise ValueError(f"a page of depth {depth}, a volume; images are needed")
    if 0 in page.shaped:
        raise ValueError("a page without pixels")
    if page.is_memmappable and page.databytecounts[0]:
        dtype = page.dtype.newbyteorder(tiff.byteorder)
        _check_end(tiff, page.dataoffsets[0] + math.prod(page.shaped) * dtype.itemsize)
        shape = (planes, height, width, samples)
        values = np.memmap(tiff.filehandle.path, dtype, "r", page.dataoffsets[0], shape)
        values = values[0] if planes == 1 else values[..., 0].transpose(1, 2, 0)
        return Native(values[..., 0] if planes * samples == 1 else values)
    return Segments(tiff, page)


def _check_end(tiff, end: int) -> None:
    if end > tiff.filehandle.size:
        raise ValueError(f"truncated: its pixels end at byte {end}, the file at {tiff.filehandle.size}")


class Segments:
    """Values in the tiles or strips of a page, of which those are decoded that a part needs.

    Of these, the ones that reach further down are kept until the next part is read: parts are read from the top.

    Raises:
        `DecompressionBombError`: when a single tile or strip is too large, as in `check_size`.
        `ValueError`: when there are too few of them, or they end beyond the file.
    """

    def __init__(self, tiff, page):
        self._tiff, self._page, self._kept = tiff, page, {}
        self._planes, _, height, width, self._samples = page.shaped
        channels = self._planes * self._samples
        self.shape = (height, width) if channels == 1 else (height, width, channels)
        self.dtype = page.dtype.newbyteorder("=")
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
        self._size = (min(rows, height) if not page.is_tiled else rows, columns)
        check_size((*self._size, self._samples), "tile" if page.is_tiled else "strip")
        self._grid = math.ceil(height / self._size[0]), math.ceil(width / self._size[1])
        expected, found = self._planes * math.prod(self._grid), min(len(page.dataoffsets), len(page.databytecounts))
        if found < expected:
            raise ValueError(f"it has {found} tiles or strips, {expected} are needed")

    def __getitem__(self, part) -> np.ndarray:
        top, bottom, left, right = edges(part, self.shape)
        (rows, columns), (down, across) = self._size, self._grid
        values = np.full((bottom - top, right - left, self._planes * self._samples), self._page.nodata, self.dtype)
        kept = {}
        for plane in range(self._planes):
            channels = slice(plane * self._samples, (plane + 1) * self._samples)
            for row in range(top // rows, math.ceil(bottom / rows)):
                for column in range(left // columns, math.ceil(right / columns)):
                    index = (plane * down + row) * across + column
                    segment = self._kept[index] if index in self._kept else self._decoded(index)
                    if segment is None:
                        continue  # nothing was written there
                    if (row + 1) * rows > bottom:
                        kept[index] = segment
                    # Where the two overlap, in pixels of the image.
                    start = max(top, row * rows), max(left, column * columns)
                    end = min(bottom, row * rows + len(segment)), min(right, column * columns + segment.shape[1])
                    values[start[0] - top : end[0] - top, start[1] - left : end[1] - left, channels] = segment[
                        start[0] - row * rows : end[0] - row * rows,
                        start[1] - column * columns : end[1] - column * columns,
                    ]
        self._kept = kept
        return values[..., 0] if len(self.shape) == 2 else values

    def _decoded(self, index: int) -> np.ndarray | None:
        """A tile or strip `(rows, columns, samples)`."""
        page, file = self._page, self._tiff.filehandle
        offset, length = page.dataoffsets[index], page.databytecounts[index]
        if not offset or not length:
            return None
        _check_end(self._tiff, offset + length)
        # These may be read from the file too, so they come first.
        decode, tables = page.decode, {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        file.seek(offset)
        return decode(file.read(length), index, **tables)[0][0]
