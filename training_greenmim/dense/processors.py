# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processors of models that find objects, with what turns predictions into objects where there is such a one."""

from PIL import Image
from transformers import Mask2FormerImageProcessorPil, RTDetrImageProcessorPil

from modeling_greenmim import GreenMIMImageProcessorPil


def as_others_use_it(image_processor, task: str, size: int, size_divisor: int | None):
    """What to save beside a model, so that pipelines see images as evaluation does.

    Args:
        image_processor: of ours, with the statistics of the run; others stay as they are but for the size.
        task: `detection` or `instances`.
        size: side in pixels that images are brought to.
        size_divisor: of batches whose images keep their aspect; None = images are stretched to a square.

    Returns:
        Transformers' processor of such models for 8-bit colour images, ours for others, which have none there.
    """
    is_ours = isinstance(image_processor, GreenMIMImageProcessorPil)
    if is_ours and (image_processor.image_range is not None or len(image_processor.image_mean) != 3):
        image_processor.size, image_processor.crop_pct = {"height": size, "width": size}, None
        return image_processor
    has_square = size_divisor is None
    values = {
        "size": {"height": size, "width": size} if has_square else {"shortest_edge": size, "longest_edge": size},
        "resample": Image.Resampling.BICUBIC,
        "do_normalize": True,
        "image_mean": image_processor.image_mean,
        "image_std": image_processor.image_std,
        "do_pad": not has_square,
    }
    if task == "instances":
        return Mask2FormerImageProcessorPil(**values, size_divisor=size_divisor or 1)
    return RTDetrImageProcessorPil(**values)
