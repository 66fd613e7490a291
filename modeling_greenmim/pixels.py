# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The one conversion of images that training, the image processor and what uses it share."""

import numpy as np
from PIL import Image


# Mode of `ArrayImage`, which is none of Pillow's.
ARRAY = "array"


def to_8_bit(image: Image.Image) -> Image.Image:
    """8-bit grey or RGB image of an image of any mode.

    It is what Transformers' pipelines make of an image before the image processor sees it, `image.convert("RGB")`: an
    alpha channel is dropped, so that transparent parts show the colours beneath. Laying them on white would look
    better, but a model trained so would meet other pixels in a pipeline. The exception are images of 16 or 32 bits:
    the upper byte of 16 counts, where Pillow turns all values above 255 white.

    Args:
        image: an image of Pillow; one of mode L or RGB is returned as it is.

    Returns:
        An image of mode L or RGB; grey ones may be converted to RGB without a change of value.

    Raises:
        `ValueError`: for floating-point images, and for modes that Pillow cannot convert.
    """
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == ARRAY:
        image = _in_pillows_mode(np.asarray(image))
    if image.mode == "F":
        raise ValueError("floating-point images have no defined range of values")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, and no warning of Pillow's
    return image.convert("RGB")


def _in_pillows_mode(values: np.ndarray) -> Image.Image:
    dtype = values.dtype
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim == 3 and values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)  # colours, for which Pillow has no mode
    try:
        return Image.fromarray(values)
    except TypeError:
        channels = values.shape[2] if values.ndim == 3 else 1
        raise ValueError(f"{channels} channel(s) of {dtype} are neither grey nor RGB of 8 bits") from None
