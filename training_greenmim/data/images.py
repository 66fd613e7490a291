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

from modeling_greenmim.array_image import ArrayImage, at_full_depth
from modeling_greenmim.pixels import to_8_bit

from .formats import open_file
from .parts import WHOLE, open_part, split_name


class UnreadableImageError(Exception):
    """An image that cannot be decoded; its text names the image and the cause."""


def limit_pixels(count: int | None) -> None:
    """From here on images of more pixels are refused; None leaves Pillow's limit as it is."""
    if count is not None:
        Image.MAX_IMAGE_PIXELS = count


class KeepsPixelLimit:
    """An object that takes Pillow's limit of pixels along to another process: spawned workers start with its own."""

    def __getstate__(self) -> dict:
        return {**self.__dict__, "max_image_pixels": Image.MAX_IMAGE_PIXELS}

    def __setstate__(self, state: dict) -> None:
        state = dict(state)
        Image.MAX_IMAGE_PIXELS = state.pop("max_image_pixels")
        self.__dict__.update(state)


def image_name(source, default: str = "an image without a name") -> str:
    """What to call an image in a message."""
    name = source.get("path") if isinstance(source, dict) else source
    return str(name) if isinstance(name, (str, Path)) and str(name) else default


def open_image(source) -> Image.Image:
    """Opens an image; nothing is decoded yet.

    Args:
        source: a file name, an address such as `zip://member.png::photos.zip`, encoded bytes, a record {"path",
            "bytes"} of `datasets`, or an image, which is returned. Names may end with a part of the file (`parts.py`),
            which is decoded if it is a box of what Pillow reads. Arrays are images too.

    Returns:
        Pillow's image of what it holds in full, an `ArrayImage` of all else: more than 8 bits a value in TIFF, any
        other number of channels, arrays, DICOM, and tiled TIFF, of which only the parts are read that are asked for.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return ArrayImage(source)
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        return open_file(source)
    name, part = split_name(source)
    name = read_address(name) if is_address(name) else name
    return open_file(name) if part == WHOLE else open_part(name, part)


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


def decode(source, channels: int | None = None) -> bytes:
    """The upright image of a source, uncompressed: opening it again takes no decoding.

    Args:
        source: as in `open_image`.
        channels: that a model takes in full depth; None for 8 bits.

    Returns:
        A file in the format of Netpbm, or of NumPy in full depth.

    Raises:
        `UnreadableImageError`: as in `load_image`.
    """

    def write(source, generator):
        encoded, image = BytesIO(), ImageOps.exif_transpose(open_image(source))
        if channels is None:
            to_8_bit(image).save(encoded, "PPM")
        else:
            np.save(encoded, np.asarray(at_full_depth(image, channels)))
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
