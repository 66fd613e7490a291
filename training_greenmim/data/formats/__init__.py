# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The registry of image formats that Pillow does not read, or not in full. A format is a module, one file here, with

- `SUFFIXES`: of its files, in lower case; `PACKAGE`, `EXTRA`: what reads them and the extra that installs it, or None,
- `matches(start)`: whether encoded bytes are of this format; `start` are the first `START` ones,
- `open(file, page)`: the image of a file name or a binary file, nothing decoded yet where that is possible,
- if its files may have several pages: `page_numbers(file)`, those that are images, and `open_pages(file)`, all of
  these, as `ArrayImage`s.
"""

import os
from io import BytesIO
from types import ModuleType

from PIL import Image

from ...runs.extras import is_installed
from . import dicom, heif, npy, npz, png, tiff


FORMATS = (png, tiff, npy, npz, dicom, heif)
START = 132
_BY_SUFFIX = {suffix: module for module in FORMATS for suffix in module.SUFFIXES}


def suffix_of(path: str | os.PathLike) -> str:
    """Suffix of a file name, in lower case and with its dot; empty without one."""
    return os.path.splitext(path)[1].lower()


def readable_suffixes() -> set[str]:
    """Suffixes of the files that these formats read with what is installed."""
    return {suffix for suffix, module in _BY_SUFFIX.items() if module.PACKAGE is None or is_installed(module.PACKAGE)}


def missing_extra(suffix: str) -> str | None:
    """The extra that would read files of a suffix, where it is not installed."""
    module = _BY_SUFFIX.get(suffix)
    return None if module is None or suffix in readable_suffixes() else module.EXTRA


def format_of(source: str | os.PathLike | bytes) -> ModuleType | None:
    """The format of a file, by its suffix, or of encoded bytes, by how they begin; None for all that is Pillow's."""
    if isinstance(source, bytes):
        start = source[:START]
        return next((module for module in FORMATS if module.matches(start)), None)
    return _BY_SUFFIX.get(suffix_of(source))


def open_file(source: str | os.PathLike | bytes, page: int = 0) -> Image.Image:
    """Opens a file or encoded bytes, one page of them.

    Raises:
        `ValueError`: for a page that there is not; and whatever a decoder raises.
    """
    module, file = format_of(source), BytesIO(source) if isinstance(source, bytes) else source
    if module is not None:
        return module.open(file, page)
    if page:
        raise ValueError(f"there is no page {page}: images of this format are of one")
    return Image.open(file)


def page_numbers(path: str | os.PathLike) -> list[int]:
    """Numbers of a file's pages that are images; [0] for formats of one page."""
    module = format_of(path)
    return module.page_numbers(path) if hasattr(module, "page_numbers") else [0]
