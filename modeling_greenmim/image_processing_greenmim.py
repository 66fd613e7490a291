# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processor of GreenMIM: that of ViT, for models of one channel and images of any mode too."""

import os
from os import PathLike

from PIL import Image, ImageOps
from transformers import ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_greenmim import GreenMIMConfig
from .pixels import to_8_bit


class GreenMIMImageProcessorPil(ViTImageProcessorPil):
    """ViT's image processor for images of any mode: upright, 8-bit, grey if `image_mean` has one number, else RGB.

    Training converts by the same function. Pipelines hand over RGB images, grey models' ones too, which agree with
    training but for images of more than 8 bits: those go through `open_image` first.
    """

    @staticmethod
    def open_image(source: str | PathLike | Image.Image) -> Image.Image:
        """Upright 8-bit image, grey or RGB, of a file or of an image of any mode; see `to_8_bit`.

        For pipelines, which make images of 16 bits white: `pipe(pipe.image_processor.open_image("scan.png"))`.
        """
        image = source if isinstance(source, Image.Image) else Image.open(source)
        return to_8_bit(ImageOps.exif_transpose(image))

    def fetch_images(self, image_url_or_urls):
        """Opens files; `load_image`, which the parent calls, makes images of 16 bits white. The rest is its own."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return self.open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, *args, **kwargs):
        """An image -> array `(channels, height, width)`; arrays are taken as they are."""
        if isinstance(image, Image.Image):
            is_grey = isinstance(self.image_mean, (list, tuple)) and len(self.image_mean) == 1
            image = self.open_image(image).convert("L" if is_grey else "RGB")
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
