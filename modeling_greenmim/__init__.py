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
)

from .configuration_greenmim import GreenMIMConfig
from .image_processing_greenmim import GreenMIMImageProcessorPil
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
AutoImageProcessor.register(GreenMIMConfig, image_processor_classes={"pil": GreenMIMImageProcessorPil})

__all__ = [
    "GreenMIMBackbone",
    "GreenMIMConfig",
    "GreenMIMForImageClassification",
    "GreenMIMForPreTraining",
    "GreenMIMImageProcessorPil",
    "GreenMIMModel",
    "GreenMIMPreTrainedModel",
]
