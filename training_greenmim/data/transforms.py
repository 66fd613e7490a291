# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""From opened images to cropped tensors. Runs in the workers of the data loader."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from modeling_greenmim.array_image import ArrayImage, Box, FullDepth, at_8_bits, center_crop_box, crop_and_resize
from modeling_greenmim.pixels import to_8_bit

from .images import open_image, to_tensor


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


def apply_geometry(
    image: Image.Image, geometry: Geometry, channels: int, depth: FullDepth | None = None
) -> torch.Tensor:
    """Decodes the part of an opened image that is kept and resizes it, bicubic.

    JPEGs are decoded at a reduced size where the crop allows it.

    Args:
        channels: 1 for grey, 3 for RGB, or what images of full depth have.
        depth: None for 8 bits.

    Returns:
        `(channels, height, width)`: uint8, or in full depth float32 in [0, 1], nan where there is no data.

    Raises:
        `ValueError`: for images that the format cannot be made of.
    """
    pixels = _8_bit_pixels(image, geometry, channels) if depth is None else _values(image, geometry, depth)
    return pixels.flip(2) if geometry.flip else pixels


def _8_bit_pixels(image: Image.Image, geometry: Geometry, channels: int) -> torch.Tensor:
    box, size = geometry.box, geometry.size
    if isinstance(image, ArrayImage):
        # Only the part that is kept is read.
        values = crop_and_resize(at_8_bits(image, channels), box, size)
        return torch.from_numpy(values.round().clip(0, 255).astype(np.uint8))
    if _is_reducible(image):
        # The decoder may reduce the image as long as the crop keeps the pixels that it is resized to.
        factor = _reduce(image, max(size[1] / (box[2] - box[0]), size[0] / (box[3] - box[1])))
        ImageOps.exif_transpose(image, in_place=True)
        box = tuple(min(edge * factor, image.size[i % 2]) for i, edge in enumerate(box))
    else:
        ImageOps.exif_transpose(image, in_place=True)
    image = to_8_bit(image)
    if image.mode == "RGB" and channels == 3 and _suits_torch(box, size):
        return _resize_by_torch(image, box, size)
    image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    return to_tensor(image.convert("L" if channels == 1 else "RGB"))


def _values(image: Image.Image, geometry: Geometry, depth: FullDepth) -> torch.Tensor:
    if not isinstance(image, ArrayImage):
        ImageOps.exif_transpose(image, in_place=True)
    values = depth.crop(image, geometry.box, geometry.size)
    if np.isnan(values).all():
        raise ValueError("no value of it, or of the crop, is data")
    return torch.from_numpy(values)


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
    """Random resized crop and horizontal flip.

    Args:
        size: height and width of the result in pixels.
        channels, depth: as in `apply_geometry`.
        scale: range of the crop's share of the image's area.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        scale: tuple[float, float] = (0.2, 1.0),
        depth: FullDepth | None = None,
    ):
        self.size, self.channels, self.scale, self.depth = size, channels, scale, depth

    def __call__(self, source, generator: np.random.Generator) -> torch.Tensor:
        """Image source -> `(channels, height, width)`; the same generator state gives the same crop."""
        image = open_image(source)
        geometry = self.draw_geometry(*upright_size(image), generator)
        return apply_geometry(image, geometry, self.channels, self.depth)

    def draw_geometry(self, width: int, height: int, generator: np.random.Generator) -> Geometry:
        """Random geometry for an upright image of a size in pixels."""
        box = random_crop_box(width, height, self.size[1] / self.size[0], generator, self.scale)
        return Geometry(box, self.size, flip=bool(generator.random() < 0.5))


class EvalTransform:
    """Centre crop of a share of the smaller side: 224/256, as after the usual resizing, unless told otherwise.

    Args:
        size: height and width of the result in pixels.
        channels, depth: as in `apply_geometry`.
        share: of the smaller side; timm's `crop_pct`.
    """

    def __init__(self, size: tuple[int, int], channels: int, share: float = 224 / 256, depth: FullDepth | None = None):
        self.size, self.channels, self.share, self.depth = size, channels, share, depth

    def __call__(self, source, generator=None) -> torch.Tensor:
        """Image source -> `(channels, height, width)`."""
        image = open_image(source)
        box = center_crop_box(*upright_size(image), self.size[1] / self.size[0], self.share)
        return apply_geometry(image, Geometry(box, self.size), self.channels, self.depth)

    def blank(self) -> torch.Tensor:
        """What stands for an image that cannot be read."""
        return torch.zeros(self.channels, *self.size, dtype=torch.uint8 if self.depth is None else torch.float32)
