# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Augmentation of whole batches for fine-tuning, on the device of the batch: RandAugment, erasing, mixup and cutmix.

The recipe is SimMIM's fine-tuning, that is, timm's transforms, on kornia. Where kornia lacks a part (magnitude noise
and increasing severity, noise per pixel), a small subclass adds it; mixup and cutmix are a line each.

Parameters are drawn per image from torch's global CPU generator, so that no step waits for an accelerator; noise is
drawn where the images are. `torch.manual_seed` before a call repeats it exactly.
"""

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kornia import enhance
from kornia.augmentation import AugmentationBase2D, ColorJitter, RandomErasing
from torch import nn

from ..data.scaling import PixelScaling


MAX_MAGNITUDE = 10.0


class RandAugmentSettings(NamedTuple):
    """What timm's text for RandAugment says.

    magnitude: mean magnitude, 0 to 10.
    num_layers: operations drawn for each image.
    magnitude_std: standard deviation of the magnitude.
    probability: that a drawn operation is applied.
    """

    magnitude: float = 10.0
    num_layers: int = 2
    magnitude_std: float = 0.0
    probability: float = 0.5


def parse_rand_augment(text: str) -> RandAugmentSettings:
    """Settings of RandAugment from timm's notation, such as "m9-n2-mstd0.5-inc1" or "rand-m9-n2-mstd0.5-inc1".

    m = magnitude, n = operations for each image, mstd = standard deviation of the magnitude, p = probability of an
    operation, inc1 = severity increases with the magnitude (there is no other, so it must be there).

    Raises:
        `ValueError`: for other parts, parts given twice, numbers out of range, or without inc1.
    """
    parts = [re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part) for part in text.removeprefix("rand-").split("-")]
    values = {part[1]: float(part[2]) for part in parts if part}
    if len(values) < len(parts) or values.pop("inc", None) != 1:
        raise ValueError(
            f"`rand_augment` is {text!r}; it needs parts m<magnitude>, n<operations>, mstd<deviation> or"
            ' p<probability>, each once, and inc1, joined by "-", such as "m9-n2-mstd0.5-inc1".'
        )
    settings = RandAugmentSettings(
        values.get("m", 10.0), values.get("n", 2), values.get("mstd", 0.0), values.get("p", 0.5)
    )
    if settings.magnitude > MAX_MAGNITUDE or settings.magnitude_std > MAX_MAGNITUDE or settings.probability > 1:
        raise ValueError(f"`rand_augment` is {text!r}; m and mstd must be at most {MAX_MAGNITUDE:g}, and p at most 1.")
    if settings.num_layers < 1 or settings.num_layers % 1:
        raise ValueError(f"`rand_augment` is {text!r}; n must be a whole number, at least 1.")
    return settings._replace(num_layers=int(settings.num_layers))


# Operations of RandAugment. All take images in [0, 1], (batch, channels, height, width), and levels, (batch,): the
# magnitude as a share of the largest, with a random sign. Operations that know no direction ignore the sign.


def _auto_contrast(images, levels):
    # kornia turns a channel of one value black; Pillow leaves it alone.
    flat = images.amax((2, 3), keepdim=True) == images.amin((2, 3), keepdim=True)
    return torch.where(flat, images, enhance.normalize_min_max(images))


def _equalize(images, levels):
    return enhance.equalize(images)


def _invert(images, levels):
    return 1 - images


def _posterize(images, levels):
    # The largest magnitude would keep no bit: a black image. Recent versions of Pillow refuse that.
    return enhance.posterize(images, (4 - (4 * levels.abs()).int()).clamp(min=1))


def _solarize(images, levels):
    # Half a step below the value of 8 bits that is inverted first: no rounding decides.
    thresholds = 256 - (256 * levels.abs()).int()
    return enhance.solarize(images, (thresholds - 0.5) / 255)


def _solarize_add(images, levels):
    # kornia's additions come before its inversion and apply to every value.
    additions = (110 * levels.abs()).int() / 255
    return torch.where(images < 127.5 / 255, (images + additions.view(-1, 1, 1, 1)).clamp(max=1), images)


def _factors(levels):
    return (1 + 0.9 * levels).clamp(min=0.1)


def _color(images, levels):
    return enhance.adjust_saturation_with_gray_subtraction(images, _factors(levels))


def _contrast(images, levels):
    return enhance.adjust_contrast_with_mean_subtraction(images, _factors(levels))


def _brightness(images, levels):
    return enhance.adjust_brightness_accumulative(images, _factors(levels))


def _sharpness(images, levels):
    return enhance.sharpness(images, _factors(levels))


INTENSITY = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*INTENSITY, *GEOMETRIC)
# What needs colours to be red, green and blue.
RGB_ONLY = ("color",)


def _affine(operation: str, level: torch.Tensor, aspect: float) -> torch.Tensor:
    """Matrix (2, 3) from output to input coordinates, both in [-1, 1], of a geometric operation.

    Rotation by at most 30 degrees around the centre, shear by at most 0.3 pixels per pixel that leaves the top left
    corner where it is, translation by at most 0.45 of the side.

    Args:
        level: (), from -1 to 1.
        aspect: width / height.
    """
    matrix = torch.eye(2, 3)
    if operation == "rotate":
        angle = level * math.radians(30)
        matrix[0, 0] = matrix[1, 1] = angle.cos()
        matrix[0, 1], matrix[1, 0] = -angle.sin() / aspect, angle.sin() * aspect
    elif operation == "shear_x":
        matrix[0, 1:] = 0.3 * level / aspect
    elif operation == "shear_y":
        matrix[1, 0] = matrix[1, 2] = 0.3 * level * aspect
    elif operation == "translate_x":
        matrix[0, 2] = 2 * 0.45 * level
    elif operation == "translate_y":
        matrix[1, 2] = 2 * 0.45 * level
    return matrix


def _warp(images: torch.Tensor, matrices: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Bicubic warp as Pillow does it: what comes from outside of the image is filled, the border is not blended."""
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    warped = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1).all(-1)[:, None]
    return torch.where(inside, warped.clamp(0, 1), fill.view(1, -1, 1, 1))


def _round(images: torch.Tensor) -> torch.Tensor:
    """To values of 8 bits: the next operation may truncate, and a value a hair below k / 255 would become k - 1."""
    return (images * 255).round() / 255


class RandAugment(AugmentationBase2D):
    """RandAugment (Cubuk et al., 2020) with timm's magnitude noise and increasing severity, drawn for each image.

    Each of `num_layers` times, an image draws one operation of `OPERATIONS`, a magnitude from a normal distribution
    and whether the operation is applied. kornia's own RandAugment draws operations once a batch and without noise, and
    its operations mean other things by shear, brightness, contrast and saturation than Pillow's.

    Takes and returns floating-point images in [0, 1], (batch, channels, height, width). Where these are neither grey
    nor RGB, no image draws an operation of `RGB_ONLY`.

    Args:
        settings: see `parse_rand_augment`.
        fill: value of each channel for what a geometric operation moves in from outside.
    """

    def __init__(self, settings: RandAugmentSettings, fill: torch.Tensor):
        super().__init__(p=1.0)
        self.settings, self.fill = settings, fill
        of_any = len(fill) in (1, 3)
        self.operations = torch.tensor([i for i, name in enumerate(OPERATIONS) if of_any or name not in RGB_ONLY])

    def generate_parameters(self, batch_shape) -> dict[str, torch.Tensor]:
        """`operations`, numbers into `OPERATIONS` or -1 for none, and `levels` from -1 to 1: (num_layers, batch)."""
        magnitude, num_layers, magnitude_std, probability = self.settings
        shape = (num_layers, batch_shape[0])
        operations = self.operations[torch.randint(len(self.operations), shape)]
        operations[torch.rand(shape) >= probability] = -1
        magnitudes = (magnitude + magnitude_std * torch.randn(shape)).clamp(0, MAX_MAGNITUDE)
        signs = torch.randint(2, shape) * 2 - 1
        return {"operations": operations, "levels": signs * magnitudes / MAX_MAGNITUDE}

    def apply_transform(self, input, params, flags, transform=None) -> torch.Tensor:
        """Applies drawn operations, each to all images that drew it."""
        for operations, levels in zip(params["operations"], params["levels"]):
            input = self._apply_layer(input, operations, levels)
        return input

    def _apply_layer(self, images, operations, levels):
        output = images.clone()
        for number, operation in enumerate(INTENSITY.values()):
            rows = (operations == number).nonzero()[:, 0]
            if len(rows):
                index = rows.to(images.device)
                output[index] = _round(operation(images[index], levels[rows].to(images)))
        rows = (operations >= len(INTENSITY)).nonzero()[:, 0]
        if len(rows):
            aspect = images.shape[3] / images.shape[2]
            matrices = [_affine(OPERATIONS[operations[row]], levels[row], aspect) for row in rows]
            index = rows.to(images.device)
            output[index] = _round(_warp(images[index], torch.stack(matrices).to(images), self.fill.to(images)))
        return output


class PixelErasing(RandomErasing):
    """Random erasing (Zhong et al., 2020) that fills the rectangle with normal noise of each pixel and channel.

    Takes and returns normalised images. One rectangle of 2 % to 1/3 of the image, aspect ratio 0.3 to 1/0.3.

    Args:
        probability: that an image is erased.
    """

    def __init__(self, probability: float):
        # The value 1 marks what is erased.
        super().__init__(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=1.0, p=probability)

    def apply_transform(self, input, params, flags, transform=None) -> torch.Tensor:
        """Replaces kornia's constant value by noise."""
        erased = super().apply_transform(torch.zeros_like(input[:, :1]), params, flags)
        return torch.where(erased == 1, torch.randn_like(input), input)


class BatchAugmentation(nn.Module):
    """RandAugment or colour jitter, normalisation, then random erasing; every image by draws of its own.

    As in timm, colour jitter plays no part where RandAugment is on. With everything off, images are only normalised.
    `scaling` must be where the images are; nothing else has a device.

    Args:
        rand_augment: see `parse_rand_augment`; None = off.
        color_jitter: brightness, contrast and saturation are multiplied by factors within 1 +- this; 0 = off.
        random_erasing: probability of erasing an image; 0 = off.
        scaling: what normalises; what geometric operations move in from outside becomes zero by it.

    Raises:
        `ValueError`: for values out of range.
    """

    def __init__(self, rand_augment: str | None, color_jitter: float, random_erasing: float, scaling: PixelScaling):
        super().__init__()
        if color_jitter < 0:
            raise ValueError(f"`color_jitter` is {color_jitter!r}; it must be at least 0.")
        channels = len(scaling.order)
        if color_jitter > 0 and rand_augment is None and channels not in (1, 3):
            raise ValueError(
                f"`color_jitter` is {color_jitter!r}, whose saturation is for RGB, but images have {channels}"
                " channels: give 0, or `rand_augment`, which then goes without what is for RGB."
            )
        if not 0 <= random_erasing <= 1:
            raise ValueError(f"`random_erasing` is {random_erasing!r}; a probability is from 0 to 1.")
        self.scaling = scaling
        self.distort = nn.Identity()
        if rand_augment is not None:
            self.distort = RandAugment(parse_rand_augment(rand_augment), scaling.mean)
        elif color_jitter > 0:
            self.distort = ColorJitter(color_jitter, color_jitter, color_jitter)
        self.erase = PixelErasing(random_erasing) if random_erasing > 0 else nn.Identity()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Augments and normalises.

        Args:
            images: `(batch, channels, height, width)`, uint8, or floating point in [0, 1].

        Returns:
            Normalised floating-point images of the same shape.

        Raises:
            `ValueError`: when images have other channels than `scaling`, or another type.
        """
        channels = len(self.scaling.order)
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"`images` has shape {tuple(images.shape)}; it must be (batch, {channels}, height, width), with the"
                " channels of `scaling`."
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"`images` is of type {images.dtype}; it must be uint8, or floating point in [0, 1].")
        return self.erase(self.scaling(self.distort(self.scaling.unit(images))))


def cutmix(images: torch.Tensor, share: float) -> tuple[torch.Tensor, float]:
    """CutMix (Yun et al., 2019, section 3): one box of each image is replaced by that of its partner.

    The box has the image's aspect ratio, a centre drawn uniformly, and is clipped to the image, as in timm; kornia's
    lies inside, and its masked assignment takes thirty times as long as a slice and waits for the device.

    Args:
        images: `(batch, channels, height, width)`.
        share: of the image that the box takes before it is clipped.

    Returns:
        New images, and the share of each that comes from its partner, the one at its place counted from the end.
    """
    sides = []
    for size in images.shape[2:]:
        half = int(size * math.sqrt(share)) // 2
        center = int(torch.randint(size, ()))
        sides.append((max(0, center - half), min(size, center + half)))
    (top, bottom), (left, right) = sides
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])


class Mixing(nn.Module):
    """Mixup or cutmix of every batch, with soft targets; one draw for the whole batch, as timm's "batch" mode.

    Label smoothing is left to the loss.

    Args:
        num_labels: number of classes.
        mixup_alpha, cutmix_alpha: parameter of the Beta distributions; 0 turns it off.
        switch_probability: of cutmix, where both are on.

    Raises:
        `ValueError`: for values out of range, or both off.
    """

    def __init__(self, num_labels: int, mixup_alpha: float, cutmix_alpha: float, switch_probability: float = 0.5):
        super().__init__()
        if mixup_alpha < 0 or cutmix_alpha < 0 or mixup_alpha == cutmix_alpha == 0:
            raise ValueError(
                f"`mixup_alpha` is {mixup_alpha!r} and `cutmix_alpha` is {cutmix_alpha!r}; neither may be negative,"
                " and one must be above 0."
            )
        if not 0 <= switch_probability <= 1:
            raise ValueError(f"`switch_probability` is {switch_probability!r}; a probability is from 0 to 1.")
        self.num_labels = num_labels
        self.mixup_share = torch.distributions.Beta(mixup_alpha, mixup_alpha) if mixup_alpha > 0 else None
        self.cutmix_share = torch.distributions.Beta(cutmix_alpha, cutmix_alpha) if cutmix_alpha > 0 else None
        if mixup_alpha == 0:
            switch_probability = 1.0
        elif cutmix_alpha == 0:
            switch_probability = 0.0
        self.switch_probability = switch_probability

    @torch.no_grad()
    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes each image with its partner: the one at its place counted from the end.

        Args:
            images: `(batch, channels, height, width)`, floating point.
            labels: `(batch,)`, int64 numbers of classes.

        Returns:
            Mixed images, and float targets `(batch, num_labels)` whose rows sum to 1.

        Raises:
            `ValueError`: for a batch of one.
        """
        if len(images) < 2:
            raise ValueError(
                f"mixup and cutmix need at least 2 images in a batch, not {len(images)}; raise the batch size."
            )
        if torch.rand(()) < self.switch_probability:
            images, share = cutmix(images, float(self.cutmix_share.sample()))
        else:
            # Zhang et al., 2018; kornia's draws a partner and a share for each image, and not from Beta.
            share = float(self.mixup_share.sample())
            images = torch.lerp(images, images.flip(0), share)
        targets = F.one_hot(labels, self.num_labels).float()
        return images, torch.lerp(targets, targets.flip(0), share)
