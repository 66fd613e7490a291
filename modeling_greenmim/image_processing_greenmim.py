# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processor of GreenMIM: that of ViT, for models of one channel too."""

import numpy as np
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_greenmim import GreenMIMConfig


class GreenMIMImageProcessorPil(ViTImageProcessorPil):
    """ViT's image processor, which makes a PIL image grey if `image_mean` has one number, and RGB if it has three.

    Pipelines hand RGB images even to models of grey ones, and grey images may come to models of RGB.
    """

    def process_image(self, image, *args, **kwargs):
        """An image -> array `(channels, height, width)`; of 16-bit images the upper byte counts."""
        if isinstance(image, Image.Image):
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            is_grey = isinstance(self.image_mean, (list, tuple)) and len(self.image_mean) == 1
            image = image.convert("L" if is_grey else "RGB")
        return super().process_image(image, *args, **kwargs)

    def to_dict(self) -> dict:
        """Values to save, without the name of this class: `auto_map` of the model's configuration has it.

        Were it here, pipelines would look for a processor of videos by it, and ask whether to trust its code.
        """
        values = super().to_dict()
        return {name: value for name, value in values.items() if name not in ("image_processor_type", "auto_map")}


def build_image_processor(config: GreenMIMConfig) -> GreenMIMImageProcessorPil:
    """Image processor with GreenMIM's normalisation, bicubic resizing and the model's image size."""
    height, width = config.image_height_and_width
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if config.num_channels == 1:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    return GreenMIMImageProcessorPil(
        size={"height": height, "width": width}, resample=3, image_mean=list(mean), image_std=list(std)
    )


__all__ = ["GreenMIMImageProcessorPil", "build_image_processor"]
