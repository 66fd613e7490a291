# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image files: opening, decoding, names in messages. Runs in the workers of the data loader."""

import functools
import os
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from modeling_greenmim.pixels import to_8_bit


class UnreadableImageError(Exception):
    """An image that cannot be decoded; its text names the image and the cause."""


def image_name(source, default: str = "an image without a name") -> str:
    """What to call an image in a message."""
    name = source.get("path") if isinstance(source, dict) else source
    return str(name) if isinstance(name, (str, Path)) and str(name) else default


def open_image(source) -> Image.Image:
    """Opens an image; nothing is decoded yet.

    Args:
        source: a file name, an address such as `zip://member.png::photos.zip`, encoded bytes, a record {"path",
            "bytes"} of `datasets`, or an image, which is returned.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if is_address(source):
        source = read_address(source)
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source)


def is_address(source) -> bool:
    """Whether a source is a member of an archive, or remote, rather than a file."""
    return isinstance(source, str) and "://" in source


def read_address(address: str) -> bytes:
    """The content at an address of fsspec, as `datasets` gives them for images in archives and on the Hub."""
    member, _, archive = address.partition("::")
    protocol, _, name = member.partition("://")
    if archive:
        return _open_archive(protocol, archive, os.getpid()).cat_file(name)
    with fsspec.open(address, "rb") as file:
        return file.read()


@functools.lru_cache(maxsize=8)
def _open_archive(protocol: str, archive: str, process: int) -> fsspec.AbstractFileSystem:
    """Kept open, since its table of contents may be long; for each process, since they would share its position."""
    return fsspec.filesystem(protocol, fo=archive)


def decode(source) -> bytes:
    """The upright image of a source, uncompressed, in the format of Netpbm: opening it again takes no decoding.

    Raises:
        `UnreadableImageError`: as in `load_image`.
    """

    def write(source, generator):
        encoded = BytesIO()
        to_8_bit(ImageOps.exif_transpose(open_image(source))).save(encoded, "PPM")
        return encoded.getvalue()

    return load_image(source, write, None)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 tensor `(channels, height, width)`."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def load_image(source, transform, generator: np.random.Generator | None, name: str = "an image without a name"):
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
