# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""HEIC and other HEIF, which Pillow opens once pillow-heif has registered itself; 10 bits a value become 8."""

from PIL import Image

from ...runs.extras import require


SUFFIXES, PACKAGE, EXTRA = (".heic", ".heif", ".hif"), "pillow_heif", "heic"
# Major brands of still images; that of AVIF is Pillow's own.
BRANDS = (b"heic", b"heix", b"heim", b"heis")


def matches(start: bytes) -> bool:
    """Whether bytes begin as HEIF does."""
    return start[4:8] == b"ftyp" and (start[8:12] in BRANDS or (start[8:12] == b"mif1" and b"heic" in start))


def open(file, page: int = 0) -> Image.Image:
    """The image by Pillow, which pillow-heif has taught to read it."""
    if page:
        raise ValueError(f"there is no page {page}: images of this format are of one")
    require("pillow_heif", EXTRA).register_heif_opener()
    return Image.open(file)
