# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Heads of Transformers for dense tasks, on a backbone of ours.

The classes are Transformers' own under a model type of ours. Its configuration of such a model names no code, so that
loading it where this project is not installed would end at the backbone; and had it the model type of Transformers, a
folder that others load, train and save would lose the code. Here Auto classes find ours, and saving writes this file
and what it imports beside the weights.
"""

import torch
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.backbone_utils import BackboneMixin
from transformers.models.mask2former.configuration_mask2former import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentation
from transformers.models.rt_detr_v2.configuration_rt_detr_v2 import RTDetrV2Config
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2ForObjectDetection
from transformers.models.upernet.configuration_upernet import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetForSemanticSegmentation

from .configuration_greenmim import AUTO_MAP, GreenMIMConfig
from .modeling_greenmim import GreenMIMBackbone


class _FindsOurImageProcessor:
    """Names our image processor to those who have not installed the project; saving adds configuration and model."""

    def __post_init__(self, **kwargs):
        own = {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}
        super().__post_init__(**{"auto_map": own, **kwargs})


class GreenMIMUperNetConfig(_FindsOurImageProcessor, UperNetConfig):
    """Configuration of a UperNet whose backbone is a GreenMIM; its values are those of `UperNetConfig`."""

    model_type = "greenmim_upernet"


class GreenMIMUperNetForSemanticSegmentation(UperNetForSemanticSegmentation):
    """UperNet (https://huggingface.co/papers/1807.10221) on a GreenMIM backbone."""

    config: GreenMIMUperNetConfig
    supports_gradient_checkpointing = True


class GreenMIMMask2FormerConfig(_FindsOurImageProcessor, Mask2FormerConfig):
    """Configuration of a Mask2Former whose backbone is a GreenMIM; its values are those of `Mask2FormerConfig`."""

    model_type = "greenmim_mask2former"
    backbones_supported = [GreenMIMConfig.model_type]


class GreenMIMMask2FormerForUniversalSegmentation(Mask2FormerForUniversalSegmentation):
    """Mask2Former (https://huggingface.co/papers/2112.01527) on a GreenMIM backbone."""

    config: GreenMIMMask2FormerConfig
    supports_gradient_checkpointing = True


class GreenMIMRTDetrV2Config(_FindsOurImageProcessor, RTDetrV2Config):
    """Configuration of a RT-DETRv2 whose backbone is a GreenMIM; its values are those of `RTDetrV2Config`."""

    model_type = "greenmim_rt_detr_v2"


class GreenMIMRTDetrV2ForObjectDetection(RTDetrV2ForObjectDetection):
    """RT-DETRv2 (https://huggingface.co/papers/2407.17140) on a GreenMIM backbone.

    Images of any size are taken: those that are no whole units, with which Transformers' own fails, are resized to the
    next size that is. Boxes are relative to the image, and stay so.
    """

    config: GreenMIMRTDetrV2Config
    supports_gradient_checkpointing = True

    def __init__(self, config: GreenMIMRTDetrV2Config):
        super().__init__(config)
        # Transformers draws these scales from N(0, 0.01), with which a new head hardly begins to learn.
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)

    def forward(self, pixel_values: torch.Tensor, *args, **kwargs):
        """Detects objects; see `RTDetrV2ForObjectDetection`.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`, any size.
        """
        unit = self.config.feat_strides[-1]
        size = [-(-side // unit) * unit for side in pixel_values.shape[2:]]
        if size != list(pixel_values.shape[2:]):
            pixel_values = nn.functional.interpolate(pixel_values, size, mode="bilinear", align_corners=False)
        outputs = super().forward(pixel_values, *args, **kwargs)
        if self.training and self.config.num_denoising > 0 and getattr(outputs, "loss", None) is not None:
            # Without an object in the batch nothing is denoised, but all processes of DDP wait for this gradient.
            outputs.loss = outputs.loss + 0 * self.model.denoising_class_embed.weight.sum()
        return outputs


def backbone_of(model: nn.Module) -> GreenMIMBackbone:
    """The backbone of ours in a model with a head.

    Raises:
        `ValueError`: for a model without one.
    """
    for module in model.modules():
        # By the configuration: a model that was loaded as remote code has classes of its own.
        if isinstance(module, BackboneMixin) and module.config.model_type == GreenMIMConfig.model_type:
            return module
    raise ValueError(f"`model` is a {type(model).__name__} without a backbone of GreenMIM.")


# Published folders come without the package's `__init__`, which registers the other models.
AutoConfig.register(GreenMIMConfig.model_type, GreenMIMConfig, exist_ok=True)
AutoBackbone.register(GreenMIMConfig, GreenMIMBackbone, exist_ok=True)
for auto_class, model_class in (
    (AutoModelForSemanticSegmentation, GreenMIMUperNetForSemanticSegmentation),
    (AutoModelForUniversalSegmentation, GreenMIMMask2FormerForUniversalSegmentation),
    (AutoModelForObjectDetection, GreenMIMRTDetrV2ForObjectDetection),
):
    AutoConfig.register(model_class.config_class.model_type, model_class.config_class, exist_ok=True)
    auto_class.register(model_class.config_class, model_class, exist_ok=True)
    # Saving writes the files, and the names of both classes into the configuration.
    model_class.config_class.register_for_auto_class()
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "GreenMIMMask2FormerConfig",
    "GreenMIMMask2FormerForUniversalSegmentation",
    "GreenMIMRTDetrV2Config",
    "GreenMIMRTDetrV2ForObjectDetection",
    "GreenMIMUperNetConfig",
    "GreenMIMUperNetForSemanticSegmentation",
    "backbone_of",
]
