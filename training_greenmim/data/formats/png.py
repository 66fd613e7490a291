# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""PNG: colours of 16 bits, of which Pillow keeps the upper byte, at their full depth; all others are Pillow's."""

from io import BytesIO

import numpy as np
from PIL import Image

from modeling_greenmim.array_image import ArrayImage

from .values import Upright, Whole


SUFFIXES, PACKAGE, EXTRA = (".png",), None, None

# As Pillow unpacks 16 bits: to upper bytes, in the order of files, big-endian. The other order gives the lower ones.
LOWER = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}
GREY_AND_ALPHA = "LA;16B"
ORIENTATION = 274  # of EXIF


def matches(start: bytes) -> bool:
    """Whether bytes begin with the mark of PNG."""
    return start.startswith(b"\x89PNG")


def open(file, page: int = 0) -> Image.Image:
    """Pillow's image, or an `ArrayImage` of 16-bit colours; as pipelines do, it drops their transparency."""
    if page:
        raise ValueError(f"there is no page {page}: images of this format are of one")
    image = Image.open(file)
    unpacking = image.tile[0].args if image.format == "PNG" and image.tile else None
    if unpacking not in (*LOWER, GREY_AND_ALPHA):
        return image

    def decode() -> np.ndarray:
        if unpacking == GREY_AND_ALPHA:
            pairs = _unpacked(file, "RGBA").astype(np.uint16)  # four bytes a pixel, two of them grey
            return pairs[..., 0] << 8 | pairs[..., 1]
        upper, lower = (_unpacked(file, way)[..., :3].astype(np.uint16) for way in (unpacking, LOWER[unpacking]))
        return upper << 8 | lower

    shape = image.size[::-1] + (() if unpacking == GREY_AND_ALPHA else (3,))
    values, orientation = Whole(shape, np.uint16, decode), image.getexif().get(ORIENTATION)
    return ArrayImage(Upright(values, orientation) if orientation in range(2, 9) else values)


def _unpacked(file, way: str) -> np.ndarray:
    """The bytes of the image in a file that one of Pillow's ways to unpack them gives."""
    if isinstance(file, BytesIO):
        file.seek(0)
    with Image.open(file) as image:
        image.tile = [tile._replace(args=way) for tile in image.tile]
        return np.asarray(image)
