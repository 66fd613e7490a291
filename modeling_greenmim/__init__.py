# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""GreenMIM for Transformers. Importing this package registers its models with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
)
from transformers.utils import is_vision_available

from .configuration_greenmim import AUTO_MAP, GreenMIMConfig
from .heads_greenmim import (
    GreenMIMMask2FormerConfig,
    GreenMIMMask2FormerForUniversalSegmentation,
    GreenMIMRTDetrV2Config,
    GreenMIMRTDetrV2ForObjectDetection,
    GreenMIMUperNetConfig,
    GreenMIMUperNetForSemanticSegmentation,
)
from .modeling_greenmim import (
    GreenMIMBackbone,
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMModel,
    GreenMIMPreTrainedModel,
)
from .planning import plan_mask
from .plans import MaskPlan


AutoConfig.register(GreenMIMConfig.model_type, GreenMIMConfig)
AutoModel.register(GreenMIMConfig, GreenMIMModel)
AutoModelForPreTraining.register(GreenMIMConfig, GreenMIMForPreTraining)
AutoModelForMaskedImageModeling.register(GreenMIMConfig, GreenMIMForPreTraining)
AutoModelForImageClassification.register(GreenMIMConfig, GreenMIMForImageClassification)
AutoBackbone.register(GreenMIMConfig, GreenMIMBackbone)

# Saving a model writes the files of this package beside it: others load it with trust_remote_code=True. The
# configuration names the class of every Auto class (`AUTO_MAP`); what is registered here makes saving copy the files.
GreenMIMConfig.register_for_auto_class()
for model_class in (GreenMIMModel, GreenMIMForPreTraining, GreenMIMForImageClassification, GreenMIMBackbone):
    model_class.register_for_auto_class(
        next(name for name, path in AUTO_MAP.items() if path.endswith(f".{model_class.__name__}"))
    )

__all__ = [
    "GreenMIMBackbone",
    "GreenMIMConfig",
    "GreenMIMForImageClassification",
    "GreenMIMForPreTraining",
    "GreenMIMMask2FormerConfig",
    "GreenMIMMask2FormerForUniversalSegmentation",
    "GreenMIMModel",
    "GreenMIMPreTrainedModel",
    "GreenMIMRTDetrV2Config",
    "GreenMIMRTDetrV2ForObjectDetection",
    "GreenMIMUperNetConfig",
    "GreenMIMUperNetForSemanticSegmentation",
    "MaskPlan",
    "plan_mask",
]

# The models need no Pillow, the image processor does.
if is_vision_available():
    from transformers import AutoImageProcessor

    from .image_processing_greenmim import GreenMIMImageProcessorPil

    for config_class in (GreenMIMConfig, GreenMIMUperNetConfig, GreenMIMMask2FormerConfig, GreenMIMRTDetrV2Config):
        AutoImageProcessor.register(config_class, image_processor_classes={"pil": GreenMIMImageProcessorPil})
    GreenMIMImageProcessorPil.register_for_auto_class()
    __all__ += ["GreenMIMImageProcessorPil"]
