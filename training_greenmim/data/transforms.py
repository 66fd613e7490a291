# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""From opened images to cropped uint8 tensors. Runs in the workers of the data loader."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from modeling_greenmim.pixels import to_8_bit

from .images import open_image, to_tensor


Box = tuple[float, float, float, float]


def random_crop_box(
    width: int, height: int, aspect: float, generator: np.random.Generator, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)
) -> Box:
    """Random resized crop (Inception's): an area of `scale` of the image, distorted by a `ratio`.

    Args:
        width, height: size of the image in pixels.
        aspect: width / height of what the crop becomes.

    Returns:
        (left, top, right, bottom) in pixels; after ten crops that do not fit, the largest central one.
    """
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        distortion = aspect * math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * distortion)), round(math.sqrt(area / distortion))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(width - crop_width + 1))
            top = int(generator.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    return center_crop_box(width, height, aspect, 1.0)


def center_crop_box(width: int, height: int, aspect: float, share: float) -> Box:
    """Central crop of a given aspect (width / height) that takes `share` of the largest possible side."""
    crop_width = min(width, height * aspect) * share
    crop_height = crop_width / aspect
    # Rounding must not lead outside.
    left, top = max(0.0, (width - crop_width) / 2), max(0.0, (height - crop_height) / 2)
    return left, top, min(width, left + crop_width), min(height, top + crop_height)


@dataclass(frozen=True)
class Geometry:
    """What an augmentation does to the positions of an image: drawn once, applied to all that belongs to the image.

    A point (x, y) of the upright image lands at ((x - left) * width / (right - left), (y - top) * height / (bottom -
    top)) of the result, where x counts from the right if it is flipped.

    Args:
        box: the part of the upright image that is kept: (left, top, right, bottom) in pixels.
        size: height and width in pixels of what becomes of it.
        flip: whether left and right are exchanged at last.
    """

    box: Box
    size: tuple[int, int]
    flip: bool = False


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image as it is to be seen; JPEGs are not decoded for it, others are turned."""
    if not _is_reducible(image):
        ImageOps.exif_transpose(image, in_place=True)
        return image.size
    is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if is_turned else image.size


def apply_geometry(image: Image.Image, geometry: Geometry, channels: int) -> torch.Tensor:
    """Decodes the part of an opened image that is kept and resizes it, bicubic, to a uint8 tensor.

    JPEGs are decoded at a reduced size where the crop allows it.

    Args:
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 `(channels, height, width)`.
    """
    box, size = geometry.box, geometry.size
    if _is_reducible(image):
        # The decoder may reduce the image as long as the crop keeps the pixels that it is resized to.
        factor = _reduce(image, max(size[1] / (box[2] - box[0]), size[0] / (box[3] - box[1])))
        ImageOps.exif_transpose(image, in_place=True)
        box = tuple(min(edge * factor, image.size[i % 2]) for i, edge in enumerate(box))
    else:
        ImageOps.exif_transpose(image, in_place=True)
    image = to_8_bit(image)
    if image.mode == "RGB" and channels == 3 and _suits_torch(box, size):
        pixels = _resize_by_torch(image, box, size)
    else:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        pixels = to_tensor(image.convert("L" if channels == 1 else "RGB"))
    return pixels.flip(2) if geometry.flip else pixels


def _is_reducible(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def _suits_torch(box: Box, size: tuple[int, int]) -> bool:
    """Whether a box is of whole pixels, and not so large that Pillow would reduce it beforehand."""
    height, width = box[3] - box[1], box[2] - box[0]
    return all(edge == int(edge) for edge in box) and height < 4 * size[0] and width < 4 * size[1]


def _resize_by_torch(image: Image.Image, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """What Pillow computes, up to rounding and the pixels beyond the box's edge, in less than half the time."""
    left, top, right, bottom = map(int, box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, top:bottom, left:right]
    # With channels last, torch has a vectorised routine for bytes.
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    return resized[0].contiguous()


def _reduce(image: Image.Image, factor: float) -> float:
    """Makes a JPEG decode at a reduced size, by a factor not below the given one, and returns the factor."""
    width = image.width
    if factor >= 1:
        return 1.0
    # The second value is the rectangle that the whole image fills at the reduced size, which is rounded up.
    _, (_, _, reduced_width, _) = image.draft(None, tuple(math.ceil(side * factor) for side in image.size))
    return reduced_width / width


class TrainTransform:
    """Random resized crop and horizontal flip, straight to uint8.

    Args:
        size: height and width of the result in pixels.
        channels: 1 or 3.
        scale: range of the crop's share of the image's area.
    """

    def __init__(self, size: tuple[int, int], channels: int, scale: tuple[float, float] = (0.2, 1.0)):
        self.size, self.channels, self.scale = size, channels, scale

    def __call__(self, source, generator: np.random.Generator) -> torch.Tensor:
        """Image source -> uint8 `(channels, height, width)`; the same generator state gives the same crop."""
        image = open_image(source)
        return apply_geometry(image, self.draw_geometry(*upright_size(image), generator), self.channels)

    def draw_geometry(self, width: int, height: int, generator: np.random.Generator) -> Geometry:
        """Random geometry for an upright image of a size in pixels."""
        box = random_crop_box(width, height, self.size[1] / self.size[0], generator, self.scale)
        return Geometry(box, self.size, flip=bool(generator.random() < 0.5))


class EvalTransform:
    """Centre crop of a share of the smaller side: 224/256, as after the usual resizing, unless told otherwise.

    Args:
        size: height and width of the result in pixels.
        channels: 1 or 3.
        share: of the smaller side; timm's `crop_pct`.
    """

    def __init__(self, size: tuple[int, int], channels: int, share: float = 224 / 256):
        self.size, self.channels, self.share = size, channels, share
        self.shape = (channels, *size)

    def __call__(self, source, generator=None) -> torch.Tensor:
        """Image source -> uint8 `(channels, height, width)`."""
        image = open_image(source)
        box = center_crop_box(*upright_size(image), self.size[1] / self.size[0], self.share)
        return apply_geometry(image, Geometry(box, self.size), self.channels)
