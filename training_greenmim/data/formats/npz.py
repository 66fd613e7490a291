# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""NPZ: arrays of NumPy in a ZIP archive, of which one is the image."""

import math
from zipfile import ZipFile

import numpy as np

from modeling_greenmim.array_image import ArrayImage

from .npy import check_length, read_header
from .values import Whole


SUFFIXES, PACKAGE, EXTRA = (".npz",), None, None


def matches(start: bytes) -> bool:
    """Whether bytes begin as a ZIP archive does."""
    return start.startswith(b"PK\3\4")


def open(file, page: int = 0) -> ArrayImage:
    """The only array, or the one that is named `image`; its header is read, the values when they are asked for."""
    if page:
        raise ValueError(f"there is no page {page}: an array is one")
    with ZipFile(file) as archive:
        member = _image_of(archive)
        with archive.open(member) as opened:
            shape, order, dtype = read_header(opened)
            check_length(archive.getinfo(member).file_size - opened.tell(), shape, dtype)

    def decode() -> np.ndarray:
        with ZipFile(file) as archive, archive.open(member) as opened:
            read_header(opened)
            size = math.prod(shape) * dtype.itemsize
            values = opened.read(size)
            check_length(len(values), shape, dtype)
            return np.frombuffer(values, dtype).reshape(shape, order=order)

    return ArrayImage(Whole(shape, dtype, decode))


def _image_of(archive: ZipFile) -> str:
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    if "image.npy" in names:
        return "image.npy"
    if len(names) != 1:
        found = f"the arrays {[name.removesuffix('.npy') for name in names]}" if names else "no array"
        raise ValueError(f"it holds {found}; one is needed, or one that is named 'image'")
    return names[0]
