# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""DICOM: the values that were measured, at their full depth, rescaled as the file says; no window is applied.

Where 0 is white (MONOCHROME1) values are inverted. They keep the type in which they are stored, unless slope and
intercept change them: then they are float32.
"""

import re
from io import BytesIO

import numpy as np

from modeling_greenmim.array_image import ArrayImage

from ...runs.extras import require
from .values import Whole


SUFFIXES, PACKAGE, EXTRA = (".dcm", ".dicom"), "pydicom", "dicom"
PREAMBLE = 128


def matches(start: bytes) -> bool:
    """Whether bytes have the mark of DICOM behind the preamble."""
    return start[PREAMBLE : PREAMBLE + 4] == b"DICM"


def open(file, page: int = 0) -> ArrayImage:
    """A frame; its pixels are decoded when they are asked for."""
    return _image(file, _header(file), page)


def page_numbers(file) -> list[int]:
    """Numbers of all frames."""
    return list(range(_frames(_header(file))))


def open_pages(file) -> list[ArrayImage]:
    """All frames."""
    header = _header(file)
    return [_image(file, header, number) for number in range(_frames(header))]


def _header(file):
    """All elements before the pixels."""
    pydicom = require("pydicom", EXTRA)
    if isinstance(file, BytesIO):
        file.seek(0)
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
    except pydicom.errors.InvalidDicomError:
        raise ValueError("no DICOM file: the mark DICM is missing at byte 128") from None
    missing = [name for name in ("Rows", "Columns", "BitsAllocated") if not header.get(name)]
    if missing:
        kind = header.get("SOPClassUID")
        raise ValueError(
            f"truncated, or no image ({getattr(kind, 'name', 'of no class')}): it lacks {', '.join(missing)}"
        )
    for name, right in (("BitsAllocated", (1, 8, 16, 32, 64)), ("PixelRepresentation", (None, 0, 1))):
        if header.get(name) not in right:
            raise ValueError(f"its {name} is {header.get(name)}; it must be one of {', '.join(map(str, right))}")
    return header


def _frames(header) -> int:
    return max(1, int(header.get("NumberOfFrames") or 1))


def _image(file, header, number: int) -> ArrayImage:
    if number >= _frames(header):
        raise ValueError(f"there is no page {number}: the last one is {_frames(header) - 1}")
    interpretation, samples = header.get("PhotometricInterpretation"), int(header.get("SamplesPerPixel", 1))
    shape = (int(header.Rows), int(header.Columns)) + ((samples,) if samples > 1 else ())
    slope, intercept = _rescaling(header, number)
    stored = _stored_type(header)

    if interpretation == "PALETTE COLOR":
        if "RedPaletteColorLookupTableDescriptor" not in header:
            raise ValueError("its palette is missing")
        bits = header.RedPaletteColorLookupTableDescriptor[2]
        look_up = require("pydicom.pixels", EXTRA).apply_color_lut
        return ArrayImage(Whole((*shape, 3), f"uint{bits}", lambda: look_up(_pixels(file, number), header)))

    def decode() -> np.ndarray:
        values = _pixels(file, number)
        if interpretation == "MONOCHROME1" and stored.kind in "iub":
            lowest = -(2 ** (header.BitsStored - 1)) if stored.kind == "i" else 0
            values = (2**header.BitsStored - 1 + 2 * lowest - values.astype(np.int64)).astype(values.dtype)
        values = values.astype(bool) if stored.kind == "b" else values
        return values if (slope, intercept) == (1, 0) else (values * slope + intercept).astype(np.float32)

    return ArrayImage(Whole(shape, stored if (slope, intercept) == (1, 0) else np.float32, decode))


def _stored_type(header) -> np.dtype:
    """Type of the stored values; floating-point ones have no representation of signs, and one bit is true or false."""
    if header.BitsAllocated == 1:
        return np.dtype(bool)
    kind = {None: "float", 0: "uint", 1: "int"}[header.get("PixelRepresentation")]
    return np.dtype(f"{kind}{header.BitsAllocated}")


def _rescaling(header, number: int) -> tuple[np.float64, np.float64]:
    """Slope and intercept of a frame: of its own, common to all frames, or of the file."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*frames[number : number + 1], *(header.get("SharedFunctionalGroupsSequence") or [])):
        if "PixelValueTransformationSequence" in group:
            header = group.PixelValueTransformationSequence[0]
            break
    return tuple(
        np.float64(default if header.get(name) is None else header.get(name))
        for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )


def _pixels(file, number: int) -> np.ndarray:
    """The stored values of a frame, colours as RGB; only this frame is read."""
    try:
        return require("pydicom.pixels", EXTRA).pixel_array(file, index=number)
    except AttributeError as error:
        raise ValueError("truncated, or no image: it has no pixels") from error
    except (RuntimeError, ValueError, NotImplementedError) as error:
        # One line, and no address in memory. It names the packages that lack, if that is the cause.
        text = re.sub(r":\s*\n\s*", ": ", re.sub(r" <[^>]* at 0x\w+>", "", str(error)))
        text = re.sub(r"\s*\n\s*", ", ", text)
        raise ValueError(f"its pixels cannot be decoded, or are truncated: {text}") from error
