# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image files: opening, decoding, conversion of modes, names in messages. Runs in the workers of the data loader."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


class UnreadableImageError(Exception):
    """An image that cannot be decoded; its text names the image and the cause."""


def image_name(source, default: str = "an image without a name") -> str:
    """What to call an image in a message."""
    name = source.get("path") if isinstance(source, dict) else source
    return str(name) if isinstance(name, (str, Path)) and str(name) else default


def open_image(source) -> Image.Image:
    """Opens a file name, a record {"path", "bytes"} of `datasets` or encoded bytes; nothing is decoded yet."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source)


def flatten_mode(image: Image.Image) -> Image.Image:
    """8-bit grey, RGB or CMYK image without transparency of any other image.

    16-bit values keep their upper byte; transparent parts are laid on white.

    Raises:
        `ValueError`: for modes without a defined range of values.
    """
    if image.mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ValueError("floating-point images have no defined range of values")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(source) -> bytes:
    """The upright image of a source, uncompressed, in the format of Netpbm: opening it again takes no decoding.

    Raises:
        `UnreadableImageError`: as in `read`.
    """

    def write(source, generator):
        image, encoded = flatten_mode(ImageOps.exif_transpose(open_image(source))), BytesIO()
        image.convert("L" if image.mode == "L" else "RGB").save(encoded, "PPM")
        return encoded.getvalue()

    return read(source, write, None)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 tensor `(channels, height, width)`."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def read(source, transform, generator: np.random.Generator | None, name: str = "an image without a name"):
    """Applies a transform to an image source; `name` is what to call one without a file.

    Raises:
        `UnreadableImageError`: for images that cannot be decoded, whatever the decoder raised.
    """
    try:
        return transform(source, generator)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files
        # Pillow's own text has an address in memory, a new one each time.
        cause = "no image of a known format" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImageError(f"{image_name(source, name)} ({cause})") from error
