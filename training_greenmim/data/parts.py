# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Parts of image files, which stand behind a `#` in a name and are images of their own.

`scan.tif#page=3` is a page, counted from 0; `scan.tif#pages` all pages, as channels of one image;
`photo.jpg#box=0,0,512,512` what lies between left, top, right and lower edge in pixels;
`scan.tif#page=3&box=0,0,512,512` is both. A file whose name ends so is itself.
"""

import os
import re
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, ImageOps

from modeling_greenmim.array_image import ArrayImage

from .formats import format_of, open_file
from .formats.values import Stacked, Window


_PART = re.compile(r"#(?:(?:page=(\d+)|(pages))(?:&box=([\d,]+))?|box=([\d,]+))$")


# The last file that a part was read from, and how many pixels it may have.
_last: dict[tuple, Image.Image] = {}
KEPT_PIXELS = 2**26


@dataclass(frozen=True)
class Part:
    """A part of a file.

    Args:
        page: number of the page; None for all pages as channels.
        box: (left, top, right, bottom) in pixels of the upright image; None for all of it.
    """

    page: int | None = 0
    box: tuple[int, int, int, int] | None = None

    def name(self, path: str) -> str:
        """The name of this part of a file."""
        words = ["pages"] if self.page is None else [f"page={self.page}"] * bool(self.page)
        words += [] if self.box is None else ["box=" + ",".join(map(str, self.box))]
        return f"{path}#{'&'.join(words)}" if words else path


WHOLE = Part()


def split_name(name: str | os.PathLike) -> tuple[str | os.PathLike, Part]:
    """The file that a name is of, and which part of it.

    Raises:
        `ValueError`: for a box that is not four edges.
    """
    text = os.fspath(name)
    match = _PART.search(text) if "#" in text else None
    if match is None or os.path.exists(text):
        return name, WHOLE
    page, pages, *boxes = match.groups()
    box = next(filter(None, boxes), None)
    edges = None if box is None else tuple(int(edge or -1) for edge in box.split(","))
    if edges is not None and (len(edges) != 4 or -1 in edges):
        raise ValueError(f"box={box}; left, top, right and lower edge are needed, such as box=0,0,512,512")
    return text[: match.start()], Part(None if pages else int(page or 0), edges)


def open_part(source: str | os.PathLike | bytes, part: Part) -> Image.Image:
    """Opens a part of a file or of encoded bytes; of a box, images that Pillow opens are decoded.

    Raises:
        `ValueError`: for pages that there are not, or that differ, and for boxes beyond the image.
    """
    if part.box is None:
        return _opened(source, part.page)
    image = _upright(source, part.page) if isinstance(source, bytes) else _kept(source, part.page)
    left, top, right, bottom = part.box
    if not (left < right <= image.width and top < bottom <= image.height):
        raise ValueError(f"box={','.join(map(str, part.box))} is not within its {image.width}x{image.height} px")
    if not isinstance(image, ArrayImage):
        return image.crop(part.box)
    window = ArrayImage(Window(image.values, part.box))
    window.info = image.info
    return window


def _opened(source, page: int | None) -> Image.Image:
    return _all_pages(source) if page is None else open_file(source, page)


def _upright(source, page: int | None) -> Image.Image:
    image = _opened(source, page)
    return image if isinstance(image, ArrayImage) else ImageOps.exif_transpose(image)


def _kept(path, page: int | None) -> Image.Image:
    """The upright image of a file, kept until another is asked for: what is decoded as a whole is decoded once."""
    status = os.stat(path)
    # Of the process too: those that are forked would share the position in an open file.
    key = (os.fspath(path), page, status.st_size, status.st_mtime_ns, os.getpid())
    if key not in _last:
        _last.clear()
        image = _upright(path, page)
        if image.width * image.height > KEPT_PIXELS:
            return image
        _last[key] = image
    return _last[key]


def _all_pages(source) -> Image.Image:
    """All pages of a file as channels of one image; a single one as it is."""
    module = format_of(source)
    pages = (
        module.open_pages(BytesIO(source) if isinstance(source, bytes) else source)
        if hasattr(module, "open_pages")
        else []
    )
    return ArrayImage(Stacked([page.values for page in pages])) if len(pages) > 1 else open_file(source)
