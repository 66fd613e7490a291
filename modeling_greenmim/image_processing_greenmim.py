# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processor of GreenMIM: that of ViT, for models of one channel too."""

from PIL import Image
from transformers import ViTImageProcessorPil


class GreenMIMImageProcessorPil(ViTImageProcessorPil):
    """ViT's image processor, which makes a PIL image grey if `image_mean` has one number, and RGB if it has three.

    Pipelines hand RGB images even to models of grey ones, and grey images may come to models of RGB.
    """

    def process_image(self, image, *args, **kwargs):
        """An image of any kind -> array `(channels, height, width)`."""
        if isinstance(image, Image.Image):
            image = image.convert("L" if len(self.image_mean) == 1 else "RGB")
        return super().process_image(image, *args, **kwargs)


__all__ = ["GreenMIMImageProcessorPil"]
