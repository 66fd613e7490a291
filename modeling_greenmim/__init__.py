# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""GreenMIM for Transformers. Importing this package registers its models with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    ViTImageProcessorPil,
)
from transformers.utils import is_torchvision_available

from .configuration_greenmim import GreenMIMConfig
from .modeling_greenmim import (
    GreenMIMBackbone,
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMModel,
    GreenMIMPreTrainedModel,
)


AutoConfig.register(GreenMIMConfig.model_type, GreenMIMConfig)
AutoModel.register(GreenMIMConfig, GreenMIMModel)
AutoModelForPreTraining.register(GreenMIMConfig, GreenMIMForPreTraining)
AutoModelForMaskedImageModeling.register(GreenMIMConfig, GreenMIMForPreTraining)
AutoModelForImageClassification.register(GreenMIMConfig, GreenMIMForImageClassification)
AutoBackbone.register(GreenMIMConfig, GreenMIMBackbone)
_image_processors = {"pil": ViTImageProcessorPil}
if is_torchvision_available():
    from transformers import ViTImageProcessor

    _image_processors["torchvision"] = ViTImageProcessor
AutoImageProcessor.register(GreenMIMConfig, image_processor_classes=_image_processors)

__all__ = [
    "GreenMIMBackbone",
    "GreenMIMConfig",
    "GreenMIMForImageClassification",
    "GreenMIMForPreTraining",
    "GreenMIMModel",
    "GreenMIMPreTrainedModel",
]
