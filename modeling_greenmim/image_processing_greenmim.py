# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processor of GreenMIM: that of ViT, for images of any mode, number of channels and range of values too."""

import os
from os import PathLike

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.processing_utils import ImagesKwargs

from .array_image import ArrayImage, FullDepth, at_full_depth, center_crop_box
from .configuration_greenmim import GreenMIMConfig
from .pixels import to_8_bit


class GreenMIMImagesKwargs(ImagesKwargs, total=False):
    """What the image processor can be given beyond those of ViT; see `GreenMIMImageProcessorPil`."""

    image_range: list | None
    nodata: float | None
    crop_pct: float | None


class GreenMIMImageProcessorPil(ViTImageProcessorPil):
    """ViT's image processor for images of any kind.

    Without `image_range`, images are 8-bit: grey if `image_mean` has one number, else RGB, of any mode and upright.
    Training converts by the same function. Pipelines hand over RGB images, grey models' ones too, which agree with
    training but for images of more than 8 bits: those go through `open_image` first.

    With it, values keep their depth until they are scaled, `(value - low) / (high - low)` cut to [0, 1], then
    normalised, all in single precision as in training; `do_rescale` and the like have no say. Such images are arrays
    `(height, width, channels)`, or what `open_image` makes of them, which pipelines take too.

    Args:
        image_range: `[low, high]` of each channel: what becomes 0 and 1.
        nodata: the value that stands for none; like values that are not finite it becomes 0, as `low` does.
        crop_pct: share of the largest central crop that is resized; None resizes the whole image.
        kwargs: those of ViT's.
    """

    valid_kwargs = GreenMIMImagesKwargs
    image_range = None
    nodata = None
    crop_pct = None

    def open_image(self, source: str | PathLike | Image.Image | np.ndarray) -> Image.Image:
        """Upright image of a file, of an image of any mode or of an array, to be given to a pipeline.

        8-bit, grey or RGB, without `image_range` (see `to_8_bit`), else in full depth:
        `pipe(pipe.image_processor.open_image("scan.png"))`. Pipelines themselves make images of 16 bits white.

        Raises:
            `ValueError`: for files of other formats than Pillow's and `.npy`.
        """
        if isinstance(source, np.ndarray):
            source = ArrayImage(source)
        elif isinstance(source, (str, PathLike)) and str(source).endswith(".npy"):
            source = ArrayImage(np.load(source, mmap_mode="r"))
        try:
            image = source if isinstance(source, Image.Image) else Image.open(source)
        except UnidentifiedImageError as error:
            raise ValueError(
                f"{str(source)!r} is no file that Pillow or NumPy reads: give its values as an array (height, width,"
                " channels). What training reads, such as DICOM, is opened by"
                " `training_greenmim.data.images.open_image`, and then taken here."
            ) from error
        image = ImageOps.exif_transpose(image)
        return to_8_bit(image) if self.image_range is None else at_full_depth(image, len(self.image_range))

    def fetch_images(self, image_url_or_urls):
        """Opens files; `load_image`, which the parent calls, makes images of 16 bits white. The rest is its own."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return self.open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, *args, **kwargs):
        """An image -> array `(channels, height, width)`; arrays are taken as they are."""
        if self.image_range is not None:
            return self.open_image(image if isinstance(image, Image.Image) else np.asarray(image))
        if isinstance(image, Image.Image):
            is_grey = isinstance(self.image_mean, (list, tuple)) and len(self.image_mean) == 1
            image = self.open_image(image).convert("L" if is_grey else "RGB")
        return super().process_image(image, *args, **kwargs)

    def _preprocess(self, images, *args, **kwargs) -> BatchFeature:
        if self.image_range is None:
            return super()._preprocess(images, *args, **kwargs)
        values = [self._values(image, **kwargs) for image in images]
        return BatchFeature(data={"pixel_values": values}, tensor_type=kwargs["return_tensors"])

    def _values(
        self, image: ArrayImage, do_resize, size, image_mean, image_std, image_range, crop_pct, nodata, **kwargs
    ) -> np.ndarray:
        """Training's own steps, in its order: what comes out is equal to the last bit."""
        box, shape = (0, 0, *image.size), image.size[::-1]
        if do_resize:
            shape = (size.height, size.width)
            box = center_crop_box(*image.size, size.width / size.height, crop_pct) if crop_pct else box
        values = FullDepth(image_range, nodata).crop(image, box, shape)
        mean, std = (np.array(number, np.float32)[:, None, None] for number in (image_mean, image_std))
        return (np.nan_to_num(values, nan=0.0) - mean) / std

    def to_dict(self) -> dict:
        """Values to save, without the name of this class: `auto_map` of the model's configuration has it.

        Were it here, pipelines would look for a processor of videos by it, and ask whether to trust its code.
        """
        values = super().to_dict()
        return {name: value for name, value in values.items() if name not in ("image_processor_type", "auto_map")}


def build_image_processor(config: GreenMIMConfig) -> GreenMIMImageProcessorPil:
    """Image processor with GreenMIM's normalisation, bicubic resizing and the model's image size.

    ImageNet's numbers, or for models of other channels than 1 and 3 the mean of its colours for each.
    """
    height, width = config.image_height_and_width
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if config.num_channels != 3:
        mean, std = [sum(mean) / 3] * config.num_channels, [sum(std) / 3] * config.num_channels
    return GreenMIMImageProcessorPil(
        size={"height": height, "width": width}, resample=3, image_mean=list(mean), image_std=list(std)
    )


__all__ = ["GreenMIMImageProcessorPil", "build_image_processor"]
