# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""GreenMIM model configuration."""

import math
from collections.abc import Callable, Iterable

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig


# Which class of the files beside a published model an Auto class makes, for those who have not installed the project.
AUTO_MAP = {
    "AutoConfig": "configuration_greenmim.GreenMIMConfig",
    "AutoModel": "modeling_greenmim.GreenMIMModel",
    "AutoModelForPreTraining": "modeling_greenmim.GreenMIMForPreTraining",
    "AutoModelForMaskedImageModeling": "modeling_greenmim.GreenMIMForPreTraining",
    "AutoModelForImageClassification": "modeling_greenmim.GreenMIMForImageClassification",
    "AutoBackbone": "modeling_greenmim.GreenMIMBackbone",
    "AutoImageProcessor": "image_processing_greenmim.GreenMIMImageProcessorPil",
}


def count_visible_units(num_units: int, mask_ratio: float) -> int:
    """Number of units that stay visible, `int(num_units * (1 - mask_ratio) + 1e-6)` (the epsilon absorbs rounding)."""
    return int(num_units * (1 - mask_ratio) + 1e-6)


# Values that follow from the others. Files of other tools may carry some: they must agree.
DERIVED = (
    *("encoder_stride", "hidden_size", "image_height_and_width", "num_hidden_layers"),
    *("stage_names", "stage_widths", "stage_windows", "unit_grid"),
)
# The smallest normal number of single precision: what is smaller may be 0 on a device.
TINY = 2.0**-126


def _require(condition: bool, name: str, value, expected: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` is {value!r}, but {expected}.")


def _require_name(config, field: str, names: Iterable[str]) -> None:
    known = ", ".join(f'"{name}"' for name in names)
    _require(getattr(config, field) in names, field, getattr(config, field), f"it must be one of {known}")


def _derived(compute: Callable) -> property:
    """A property that follows from other values, and takes no value but its own.

    Transformers' example scripts write the `encoder_stride` that they read, and files and keywords may name others.
    """

    def check(self, value) -> None:
        derived = compute(self)
        agrees = list(value) == list(derived) if isinstance(value, (list, tuple)) else value == derived
        _require(agrees, compute.__name__, value, f"the other values give {derived}")

    return property(compute, check)


@strict
class GreenMIMConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of every GreenMIM model. The defaults give `greenmim/swin-base` (Swin-B, window 7, 224 px) of
    [Green Hierarchical Vision Transformer for Masked Image Modeling](https://huggingface.co/papers/2205.13515).

    A *mask unit* is the patch of the last stage: `patch_size * 2 ** (len(depths) - 1)` pixels a side, here 32.

    Args:
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Image size in pixels, one side or (height, width); each side a multiple of the mask unit. It fixes the
            window of each stage; other input sizes are accepted at run time.
        patch_size (`int`, *optional*, defaults to 4): Side of the patches that the first stage sees, in pixels.
        num_channels (`int`, *optional*, defaults to 3): Number of image channels.
        backbone_type (`str`, *optional*, defaults to `"swin"`):
            Hierarchical encoder, a name of `encoders.ENCODERS`: `"swin"`, or `"twins"` (Twins-SVT), whose blocks
            alternate attention in windows with attention to one key per mask unit.
        embed_dim (`int`, *optional*, defaults to 128): Width of the first stage; each next stage doubles it.
        depths (`list[int]`, *optional*, defaults to `(2, 2, 18, 2)`): Number of blocks of each stage.
        num_heads (`list[int]`, *optional*, defaults to `(4, 8, 16, 32)`): Number of attention heads of each stage.
        window_size (`int`, *optional*, defaults to 7):
            Side of the attention windows in tokens. A stage whose smaller side is not larger uses that side.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Ratio of the MLPs' hidden width to the stage's width.
        qkv_bias (`bool`, *optional*, defaults to `True`): Whether queries, keys and values have a bias.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0): Dropout after embedding, projections and MLPs.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0): Dropout of attention probabilities.
        drop_path_rate (`float`, *optional*, defaults to 0.0): Stochastic depth of the last block, linear from 0.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the MLPs.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation that mask token, position bias tables and classifier are initialised with; above 0.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of every layer normalisation.
        mask_ratio (`float`, *optional*, defaults to 0.75): Share of the mask units that pre-training hides.
        reconstruction_target (`str`, *optional*, defaults to `"pixels"`):
            What pre-training predicts of each mask unit, a name of `targets.TARGETS`: `"pixels"`, `"hog"` (histograms
            of oriented gradients) or `"features"`, which the caller gives.
        target_width (`int`, *optional*): Values of each unit where `reconstruction_target` is `"features"`.
        target_loss (`str`, *optional*, defaults to `"mse"`):
            Error of predictions, a name of `losses.TARGET_LOSSES`: `"mse"`, `"smooth_l1"` or `"cosine"`.
        loss_on (`str`, *optional*, defaults to `"masked"`):
            Units whose error counts: `"masked"` or `"all"`. A linear decoder's is that of visible ones.
        pooled_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of the same error between the means of predictions and of targets over an image's units.
        norm_pix_loss (`bool`, *optional*, defaults to `True`):
            Whether target pixels are normalised by their unit's own mean and variance.
        decoder_type (`str`, *optional*, defaults to `"transformer"`):
            A name of `decoder.DECODERS`: `"transformer"`, `"prompting"` (visible units stay as they are), or
            `"linear"`, for features only: visible units are predicted from the last three stages, and `mask_ratio` may
            be 0.
        decoder_hidden_size (`int`, *optional*, defaults to 512): Width of the decoder, divisible by 4.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 1): Number of decoder blocks.
        decoder_num_attention_heads (`int`, *optional*, defaults to 16): Number of attention heads of the decoder.
        decoder_intermediate_size (`int`, *optional*, defaults to 2048): Hidden width of the decoder's MLP.
        out_features (`list[str]`, *optional*): Stages that the backbone returns, of `stage_names`; default: the last.
        out_indices (`list[int]`, *optional*): The same by number; 0 is the stem.

    Derived and read-only: `encoder_stride` (side of a mask unit in pixels), `hidden_size` (width of the last stage),
    `num_hidden_layers` (number of stages), `num_attention_heads`, `stage_names`, `stage_widths`, `stage_windows`.
    Given as keywords, as old files have them, they must agree with the other values.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: when values are of the wrong type or contradict one another,
        naming argument and value.

    Example:

    ```python
    >>> from configuration_greenmim import GreenMIMConfig
    >>> from modeling_greenmim import GreenMIMModel

    >>> config = GreenMIMConfig()  # greenmim/swin-base
    >>> model = GreenMIMModel(config)
    >>> config.encoder_stride
    32
    ```"""

    model_type = "greenmim"
    attribute_map = {"num_attention_heads": "num_heads"}

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 4
    num_channels: int = 3
    backbone_type: str = "swin"
    embed_dim: int = 128
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    num_heads: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 7
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    hidden_act: str = "gelu"
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    mask_ratio: float | int = 0.75
    reconstruction_target: str = "pixels"
    target_width: int | None = None
    target_loss: str = "mse"
    loss_on: str = "masked"
    pooled_loss_weight: float | int = 0.0
    norm_pix_loss: bool = True
    decoder_type: str = "transformer"
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 1
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        # JSON knows no tuples: a saved and reloaded configuration must equal the original.
        self.depths, self.num_heads = list(self.depths), list(self.num_heads)
        if not isinstance(self.image_size, int):
            self.image_size = list(self.image_size)
        given = {name: kwargs.pop(name) for name in DERIVED if name in kwargs}
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**{"auto_map": dict(AUTO_MAP), **kwargs})
        if given:
            self.validate()  # contradictions among the arguments come first: what follows from them is theirs
            for name, value in given.items():
                setattr(self, name, value)

    @_derived
    def stage_names(self) -> list[str]:
        """Names of the backbone's feature maps: the stem, then each stage."""
        return ["stem"] + [f"stage{index + 1}" for index in range(len(self.depths))]

    @_derived
    def num_hidden_layers(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @_derived
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of each stage: `embed_dim`, doubled from stage to stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @_derived
    def hidden_size(self) -> int:
        """Width of the last stage."""
        return self.stage_widths[-1]

    @_derived
    def encoder_stride(self) -> int:
        """Side of a mask unit in pixels."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @_derived
    def stage_windows(self) -> tuple[int, ...]:
        """Window of each stage: `window_size`, shrunk to the smaller side of the stage's grid at `image_size`."""
        smaller_side = min(self.image_height_and_width) // self.patch_size
        return tuple(min(self.window_size, smaller_side // 2**stage) for stage in range(len(self.depths)))

    @_derived
    def image_height_and_width(self) -> tuple[int, int]:
        """`image_size` as (height, width) in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)

    @_derived
    def unit_grid(self) -> tuple[int, int]:
        """Rows and columns of mask units in an image of `image_size`."""
        height, width = self.image_height_and_width
        return height // self.encoder_stride, width // self.encoder_stride

    def validate_architecture(self):
        """Refuses values that contradict one another (part of the validation of `strict` configurations)."""
        self._validate_encoder()
        self._validate_target()
        self._validate_decoder()
        self._validate_image_and_mask()

    def _validate_encoder(self):
        # Here, for encoders and targets import this file.
        from .encoders import ENCODERS

        _require_name(self, "backbone_type", ENCODERS)
        _require(len(self.depths) > 0, "depths", self.depths, "at least one stage is needed")
        same_length = f"it needs one entry per stage as `depths` ({self.depths}) has"
        _require(len(self.num_heads) == len(self.depths), "num_heads", self.num_heads, same_length)
        for name in ("depths", "num_heads"):
            value = getattr(self, name)
            _require(min(value) > 0, name, value, "every entry must be positive")
        for name in ("patch_size", "num_channels", "embed_dim", "window_size", "mlp_ratio"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, value, "it must be positive and finite")
        narrow = f"it leaves the first stage, of width {self.embed_dim}, no hidden value"
        _require(int(self.mlp_ratio * self.embed_dim) > 0, "mlp_ratio", self.mlp_ratio, narrow)
        for width, heads in zip(self.stage_widths, self.num_heads):
            _require(width % heads == 0, "num_heads", self.num_heads, f"{heads} does not divide stage width {width}")
        eps, std = self.layer_norm_eps, self.initializer_range
        _require(
            TINY <= eps < math.inf, "layer_norm_eps", eps, f"it must be positive, at least {TINY:.2g}, and finite"
        )
        _require(
            TINY <= std <= 1, "initializer_range", std, f"it must be positive, at least {TINY:.2g}, and at most 1"
        )
        _require(self.hidden_act in ACT2FN, "hidden_act", self.hidden_act, f"it must be one of {', '.join(ACT2FN)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "it must be in [0, 1)")

    def _validate_image_and_mask(self):
        from .decoder import DECODERS

        size, unit = self.image_height_and_width, self.encoder_stride
        _require(len(size) == 2, "image_size", self.image_size, "it must be one side or (height, width)")
        divisible = all(side > 0 and side % unit == 0 for side in size)
        expected = f"each side must be a positive multiple of {unit}, the mask unit (patch_size * 2 ** (stages - 1))"
        _require(divisible, "image_size", self.image_size, expected)
        num_units = self.unit_grid[0] * self.unit_grid[1]
        _require(0 <= self.mask_ratio <= 1, "mask_ratio", self.mask_ratio, "it must be between 0 and 1")
        num_visible = count_visible_units(num_units, self.mask_ratio)
        expected = f"of {num_units} units it leaves {num_visible} visible; at least one must be visible and one masked"
        # An image of a single unit can be classified but not masked; masking it is refused when it is tried.
        may_see_all = self.mask_ratio == 0 and DECODERS[self.decoder_type].predicts_visible_only
        fits = num_units == 1 or 0 < num_visible < num_units or may_see_all
        _require(fits, "mask_ratio", self.mask_ratio, expected)

    def _validate_target(self):
        from .losses import TARGET_LOSSES
        from .targets import TARGETS

        _require_name(self, "reconstruction_target", TARGETS)
        _require_name(self, "target_loss", TARGET_LOSSES)
        _require_name(self, "loss_on", ("masked", "all"))
        needs_width = self.reconstruction_target == "features"
        width, weight = self.target_width, self.pooled_loss_weight
        expected = "features need their width" if needs_width else "other targets than features have their own width"
        _require((width is not None) == needs_width, "target_width", width, expected)
        _require(width is None or width > 0, "target_width", width, "it must be positive")
        _require(0 <= weight < math.inf, "pooled_loss_weight", weight, "it must be 0 or more, and finite")

    def _validate_decoder(self):
        from .decoder import DECODERS

        _require_name(self, "decoder_type", DECODERS)
        of_visible = DECODERS[self.decoder_type].predicts_visible_only
        _require(
            not of_visible or self.reconstruction_target == "features",
            "decoder_type",
            self.decoder_type,
            "it predicts visible units, so `reconstruction_target` must be 'features'",
        )
        width, heads = self.decoder_hidden_size, self.decoder_num_attention_heads
        _require(width > 0 and width % 4 == 0, "decoder_hidden_size", width, "it must be a positive multiple of 4")
        _require(
            heads > 0 and width % heads == 0, "decoder_num_attention_heads", heads, f"it must divide the width {width}"
        )
        for name in ("decoder_num_hidden_layers", "decoder_intermediate_size"):
            value = getattr(self, name)
            _require(value > 0, name, value, "it must be positive")


__all__ = ["GreenMIMConfig"]
