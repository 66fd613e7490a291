# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A frozen model whose features are to be predicted: any vision model of Transformers.

MaskAlign (https://huggingface.co/papers/2211.08887), MILAN (https://huggingface.co/papers/2208.06049), dBOT
(https://huggingface.co/papers/2209.03917).
"""

import inspect
import math
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel, ViTConfig, ViTModel

from ..classification.models import image_height_and_width
from ..compat import without_load_report
from ..data.scaling import PixelScaling, scaling_of
from ..runs.models import weights_checksum
from ..runs.starts import licence_of


# Blocks whose features are averaged (MaskAlign, section 3.3), where a teacher has so many of one size.
NUM_BLOCKS = 5
# Tokens beside those of patches that a teacher may have: class tokens, registers.
MOST_SPECIAL_TOKENS = 16


@dataclass(frozen=True)
class TeacherFacts:
    """What a model card tells of a teacher."""

    name: str
    revision: str | None
    licence: str | None

    def __str__(self):
        revision = f" at revision {self.revision}" if self.revision else ""
        return f"{self.name}{revision}, licence: {self.licence or 'unknown'}"


class Teacher:
    """Feature maps of a frozen model, in eval mode and without gradients. It is no module: nothing saves or wraps it.

    Args:
        model: a model that takes `pixel_values` and has a map or patch tokens as `last_hidden_state`.
        scaling: what its image processor does to pixels.
        size: height and width of the images that it is given, in pixels.
        facts: what the model card tells of it.

    Raises:
        `ValueError`: when it makes no feature map of such images.
    """

    def __init__(self, model: PreTrainedModel, scaling: PixelScaling, size: tuple[int, int], facts: TeacherFacts):
        # Convolutions on a CPU in bf16 are three times as fast so, attention is not slower.
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.scaling, self.size, self.facts = scaling.to(model.device), size, facts
        self.channels = scaling.mean.shape[0]
        self.options = _options_of(model, size)
        self.grid, self.width = self._try_out()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

    def checksum(self) -> str:
        """Tells teachers of one name apart, such as a folder before and after another training."""
        return weights_checksum(self.model)

    def _try_out(self) -> tuple[tuple[int, int], int]:
        """Rows and columns of its map, and the width of its features."""
        name, (height, width) = self.facts.name, self.size
        try:
            # Any image but a plain one, in which all patches are alike.
            image = torch.arange(self.channels * height * width, device=self.device).square().to(torch.uint8)
            image = image.view(1, self.channels, height, width)
            features, again = self.features(image), self.features(image)
        except _NoMapError as error:
            raise ValueError(f"`teacher` is {name!r}, {error}; a vision model with feature maps is needed.") from None
        except Exception as error:  # whatever the model raises
            raise ValueError(
                f"`teacher_image_size` is {height}x{width}, which `teacher` {name!r} cannot take: {error}"
            ) from error
        if not torch.allclose(features, again, rtol=0.1, atol=0.1):
            raise ValueError(f"`teacher` is {name!r}, which gives other features of the same image each time.")
        return tuple(features.shape[1:3]), features.shape[3]

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images of any size, resized to its own.

        Of teachers with blocks of one size it is the mean of the last 5 blocks' features, each normalised per token
        without affine; of others the last stage's.

        Args:
            images: `(batch, channels, height, width)`, uint8 or in [0, 1]; grey ones are given to teachers of RGB as
                grey RGB.

        Returns:
            `(batch, rows, columns, width)` in single precision.
        """
        pixels = resized(images, self.size)
        if pixels.shape[1] < self.channels:
            pixels = pixels.expand(-1, self.channels, -1, -1)
        pixels = self.scaling(self.scaling.unit(pixels)).to(self.model.dtype, memory_format=torch.channels_last)
        outputs = self.model(pixel_values=pixels, output_hidden_states=True, return_dict=True, **self.options)
        last = getattr(outputs, "last_hidden_state", None)
        if last is None:
            raise _NoMapError(f"a {type(self.model).__name__} without `last_hidden_state`")
        blocks = (outputs.hidden_states or ())[1:]
        if len(blocks) >= NUM_BLOCKS and all(block.shape == last.shape for block in blocks):
            normalised = [_layer_norm(_to_map(block, self.size).float()) for block in blocks[-NUM_BLOCKS:]]
            return torch.stack(normalised).mean(dim=0)
        return _to_map(last, self.size).float()


def load_teacher(
    name: str,
    channels: int,
    student_size: tuple[int, int],
    image_size: int | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """Loads a teacher.

    Args:
        name: a folder or a Hub repository; of models of images and texts the part for images is taken.
        channels: of the images to train on.
        student_size: height and width of the student's images; the teacher's have the same aspect.
        image_size: shorter side of the teacher's images in pixels; default: what its image processor makes.
        revision: of the Hub repository.
        device, dtype: where and in which precision it computes.

    Raises:
        `ValueError`: for what is no vision model with feature maps, has no image processor, takes other channels, or
            has positions that do not allow the size, naming the argument.
    """
    try:
        model = _load_model(name, revision, dtype)
        processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`teacher` is {name!r}, which cannot be loaded as a vision model: {reason}") from error
    commit = getattr(model.config, "_commit_hash", None)
    model = getattr(model, "vision_model", model)
    if model.main_input_name != "pixel_values":
        raise ValueError(f"`teacher` is {name!r}, a {type(model).__name__}, which takes {model.main_input_name}.")
    own_channels = getattr(model.config, "num_channels", 3)
    if own_channels != channels and not (own_channels == 3 and channels == 1):
        raise ValueError(
            f"`teacher` is {name!r}, for images of {own_channels} channel(s), but those to train on have {channels};"
            " a teacher for as many is needed (one for RGB takes grey images too)."
        )
    shorter = image_size or min(image_height_and_width(model.config, processor))
    size = _size_of_aspect(student_size, shorter, _stride_of(model.config))
    facts = TeacherFacts(name, commit or revision, licence_of(name))
    return Teacher(model.to(device), scaling_of(processor, own_channels), size, facts)


def _load_model(name: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all of its weights but a pooler, which features do not need."""
    config = AutoConfig.from_pretrained(name, revision=revision)
    model_class, options = AutoModel, {}
    if config.model_type == "vit_mae":
        # MAE's own model hides most patches, in eval mode too; the same weights as a ViT see them all.
        values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        model_class, options = ViTModel, {"config": ViTConfig(**values), "add_pooling_layer": False}
    with without_load_report():
        model, info = model_class.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True, **options
        )
    lacking = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if lacking:
        raise ValueError(f"it lacks weights, {len(lacking)} of them, such as {lacking[0]}; they would be random.")
    return model


class TeacherTargets:
    """Feature maps of a teacher -> targets of each unit of the student.

    Args:
        unit_grid: rows and columns of units.
        mean: `(width,)`, which is subtracted from features; None = each unit's are normalised without affine instead.
    """

    def __init__(self, unit_grid: tuple[int, int], mean: torch.Tensor | None):
        self.unit_grid, self.mean = unit_grid, mean

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, rows, columns, width)` -> `(batch, num_units, width)`."""
        maps = features.float().permute(0, 3, 1, 2)
        if maps.shape[2:] != self.unit_grid:
            maps = nn.functional.interpolate(maps, self.unit_grid, mode="bilinear", antialias=True)
        units = maps.flatten(2).transpose(1, 2)
        return _layer_norm(units) if self.mean is None else units - self.mean


def resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images `(batch, channels, height, width)`, uint8 or in [0, 1], of another size, bicubic, or the same."""
    if tuple(images.shape[2:]) == size:
        return images
    other = nn.functional.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return other.round().clamp(0, 255).byte() if images.dtype == torch.uint8 else other.clamp(0, 1)


class Stopwatch:
    """Seconds that a device spends within its context, without waiting for it there."""

    def __init__(self, device: torch.device):
        self.device, self._spans = device, []

    def __enter__(self):
        self._start = self._now()

    def __exit__(self, *error):
        self._spans.append((self._start, self._now()))

    def _now(self) -> "torch.Event | float":
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def mean_seconds(self) -> float:
        """Of a time within the context, since it was last asked; 0 without one. Waits for the device."""
        spans, self._spans = self._spans, []
        if not spans:
            return 0.0
        if self.device.type == "cpu":
            return sum(end - start for start, end in spans) / len(spans)
        spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000 / len(spans)


class _NoMapError(Exception):
    """A model without feature maps."""


def _layer_norm(features: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(features, features.shape[-1:])


def _to_map(output: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Tokens `(batch, tokens, width)`, special ones first, or a map -> `(batch, rows, columns, width)`."""
    height, width = size
    if output.ndim == 4:
        # Some of timm's have their channels last: the grid tells, which has the aspect of the image.
        is_last = abs(output.shape[1] * width - output.shape[2] * height) < abs(
            output.shape[2] * width - output.shape[3] * height
        )
        return output if is_last else output.permute(0, 2, 3, 1)
    if output.ndim != 3:
        raise _NoMapError(f"whose `last_hidden_state` is of shape {tuple(output.shape)}")
    tokens = output.shape[1]
    common = math.gcd(height, width)
    strides = [stride for stride in range(1, common + 1) if common % stride == 0]
    grids = [(height // stride, width // stride) for stride in strides]
    fitting = [grid for grid in grids if 0 <= tokens - grid[0] * grid[1] <= MOST_SPECIAL_TOKENS]
    if not fitting:
        raise _NoMapError(f"whose {tokens} tokens are no map of an image of {height}x{width} pixels")
    rows, columns = max(fitting)
    return output[:, tokens - rows * columns :].unflatten(1, (rows, columns))


def _options_of(model: PreTrainedModel, size: tuple[int, int]) -> dict:
    """Keyword arguments that a model needs for images of a size other than its own."""
    own = getattr(model.config, "image_size", None)
    accepts = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    is_other = own is not None and tuple(size) != ((own, own) if isinstance(own, int) else tuple(own))
    return {"interpolate_pos_encoding": True} if accepts and is_other else {}


def _stride_of(config) -> int:
    patch = getattr(config, "patch_size", 1)
    return patch if isinstance(patch, int) else max(patch)


def _size_of_aspect(aspect_of: tuple[int, int], shorter: int, stride: int) -> tuple[int, int]:
    """Height and width of an aspect; the longer side a multiple of the stride."""
    height, width = aspect_of
    if height == width:
        return shorter, shorter
    longer = stride * round(shorter * max(aspect_of) / min(aspect_of) / stride)
    return (shorter, longer) if height < width else (longer, shorter)
