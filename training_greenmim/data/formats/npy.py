# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""NPY: one array of NumPy, `(height, width)` or `(height, width, channels)`; files are mapped into memory."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np

from modeling_greenmim.array_image import ArrayImage

from .values import Native


SUFFIXES, PACKAGE, EXTRA = (".npy",), None, None


def matches(start: bytes) -> bool:
    """Whether bytes begin with the mark of NPY."""
    return start.startswith(np.lib.format.MAGIC_PREFIX)


def open(file, page: int = 0) -> ArrayImage:
    """The array of a file, mapped into memory, or of bytes."""
    if page:
        raise ValueError(f"there is no page {page}: an array is one")
    if isinstance(file, BytesIO):
        shape, order, dtype = read_header(file)
        content = file.getbuffer()[file.tell() :]
        check_length(len(content), shape, dtype)
        return ArrayImage(Native(np.frombuffer(content, dtype, math.prod(shape)).reshape(shape, order=order)))
    with Path(file).open("rb") as opened:
        shape, order, dtype = read_header(opened)
        start = opened.tell()
        check_length(opened.seek(0, 2) - start, shape, dtype)
    return ArrayImage(Native(np.memmap(file, dtype, "r", start, shape, order)))


def read_header(file) -> tuple[tuple[int, ...], str, np.dtype]:
    """Shape, order ("C" or "F") and type of the array that begins in a binary file; leaves it before the values.

    Raises:
        `ValueError`: for what is no NPY, and for arrays that are no images, Python's objects among them: these are
            never unpickled.
    """
    version = np.lib.format.read_magic(file)
    # Version 3.0 is for names of fields in other alphabets, which no image has.
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    shape, is_fortran, dtype = (None, False, np.dtype("V")) if read is None else read(file)
    if dtype.hasobject:
        raise ValueError("an array of Python's objects, which are not unpickled; numbers are needed")
    if dtype.kind not in "buif":
        raise ValueError(f"an array of {dtype}; real numbers are needed")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"an array of the shape {shape}; (height, width) or (height, width, channels) is needed")
    return shape, "F" if is_fortran else "C", dtype


def check_length(length: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Compares the bytes of values that there are with those of the header."""
    expected = math.prod(shape) * dtype.itemsize
    if length < expected:
        raise ValueError(f"truncated: {length} of {expected} bytes of values")
