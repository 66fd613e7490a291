# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""GreenMIM models: masked-image pre-training of hierarchical vision transformers on visible patches only.

[Green Hierarchical Vision Transformer for Masked Image Modeling](https://huggingface.co/papers/2205.13515).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .blocks import GreenMIMEmbeddings
from .compat import ConvertsWhenLoading
from .configuration_greenmim import GreenMIMConfig
from .decoder import DECODERS
from .encoders import ENCODERS
from .layout import patchify, take_tokens, unpatchify
from .losses import reconstruction_loss
from .masking import sample_noise, unit_mask, visible_units_from_mask, visible_units_from_noise
from .planning import backbone_of, plan_dense, plan_mask
from .plans import MaskPlan, StagePlan
from .precision import GreenMIMLayerNorm
from .resizing import BiasTableResizing
from .targets import TARGETS


# Keyword arguments that Transformers, its Trainer and its pipelines hand to any model, whether it needs them or not.
# Sizes other than the configuration's need no `interpolate_pos_encoding` here.
PASSED_TO_ANY_MODEL = {*TransformersKwargs.__annotations__, "interpolate_pos_encoding"}


@dataclass
class GreenMIMModelOutput(ModelOutput):
    """Outputs of `GreenMIMModel`. Tokens are in raster order of the visible ones.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_visible, hidden_size)`):
            Latent of each visible unit.
        pooler_output (`torch.Tensor` of shape `(batch_size, hidden_size)`):
            Mean of the latents.
        mask (`torch.Tensor` of shape `(batch_size, num_units)`, *optional*, returned when units are masked):
            1 for masked units, 0 for visible ones.
        visible_units (`torch.LongTensor` of shape `(1 or batch_size, num_visible)`, *optional*, likewise):
            Raster numbers of the visible units.
        hidden_states (`tuple(torch.Tensor)`, *optional*, returned when `output_hidden_states=True`):
            Embeddings, then each stage's output after merging, `(batch_size, num_tokens, width)`.
        attentions (`tuple(torch.Tensor)`, *optional*, returned when `output_attentions=True`):
            Attention weights of each stage's last block, `(batch_size, num_heads, num_tokens, num_tokens)`, 0 across
            windows; of Twins' global attention `(batch_size, num_heads, num_tokens, num_visible)`. Empty but for
            attn_implementation "eager", the only one that keeps them.
        reshaped_hidden_states (`tuple(torch.Tensor)`, *optional*, with `hidden_states` when no unit is masked):
            The hidden states as maps `(batch_size, width, height, width)`.
        stage_tokens (`tuple(torch.Tensor)`, *optional*, returned when `output_stage_tokens=True`):
            Each stage's output before merging, `(batch_size, num_tokens, width)`, in nested order: the tokens of a
            unit follow one another.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    visible_units: torch.LongTensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None
    stage_tokens: tuple[torch.Tensor, ...] | None = None


@dataclass
class GreenMIMForPreTrainingOutput(ModelOutput):
    """Outputs of `GreenMIMForPreTraining`.

    Args:
        loss (`torch.Tensor`): Error of the predictions, `config.target_loss`, by default of the masked units.
        logits (`torch.Tensor` of shape `(batch_size, num_units, target_width)`):
            Predicted targets of every unit; of pixels `unit**2 * num_channels` in (row, column, channel) order,
            normalised if `norm_pix_loss` is set. Of a linear decoder `(batch_size, num_visible, target_width)`.
        mask (`torch.Tensor` of shape `(batch_size, num_units)`): 1 for masked units, 0 for visible ones.
        hidden_states, attentions: as in `GreenMIMModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class GreenMIMImageClassifierOutput(ModelOutput):
    """Outputs of `GreenMIMForImageClassification`.

    Args:
        loss (`torch.Tensor`, *optional*, returned when `labels` is given): Classification or regression loss.
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): Scores before the softmax.
        hidden_states, attentions, reshaped_hidden_states: as in `GreenMIMModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


class GreenMIMPreTrainedModel(ConvertsWhenLoading, PreTrainedModel):
    """Weight initialisation and what Transformers needs to know of every GreenMIM model.

    `from_pretrained` accepts another `image_size` or `window_size` than the checkpoint's: the position bias tables of
    stages whose window differs are interpolated, and one line of the log says which.
    """

    config: GreenMIMConfig
    base_model_prefix = "greenmim"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Losses are means over a micro-batch; Trainer averages them over the micro-batches of a step.
    accepts_loss_kwargs = False
    _no_split_modules = ["GreenMIMEmbeddings", "GreenMIMBlock", "GreenMIMDecoder"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _input_embed_layer = "patch_embeddings"
    load_conversion = BiasTableResizing

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif hasattr(module, "draw_weights"):
            module.draw_weights()
        else:
            super()._init_weights(module)

    def _refuse_unknown(self, arguments: dict) -> None:
        """Refuses keyword arguments that would change nothing, such as misspelt ones."""
        unknown = [name for name in arguments if name not in PASSED_TO_ANY_MODEL]
        if unknown:
            raise TypeError(f"{type(self).__name__}.forward() has no argument {', '.join(map(repr, unknown))}.")

    def _check_pixel_values(self, pixel_values: torch.Tensor | None) -> None:
        if pixel_values is None:
            raise ValueError("`pixel_values` is None; images of shape (batch, channels, height, width) are needed.")
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; the configuration needs"
                f" (batch, {channels}, height, width)."
            )
        if pixel_values.shape[0] == 0:
            raise ValueError(f"`pixel_values` has shape {tuple(pixel_values.shape)}; at least one image is needed.")

    def _unit_grid(self, pixel_values: torch.Tensor | None) -> tuple[int, int]:
        """Rows and columns of mask units of images whose shape and size fit."""
        self._check_pixel_values(pixel_values)
        height, width = pixel_values.shape[2:]
        unit = self.config.encoder_stride
        if height == 0 or width == 0 or height % unit or width % unit:
            raise ValueError(
                f"`pixel_values` has images of {height}x{width} pixels; each side must be a positive multiple of"
                f" {unit}, the mask unit. Resize or pad them (GreenMIMBackbone pads by itself)."
            )
        return height // unit, width // unit


class GreenMIMModel(GreenMIMPreTrainedModel):
    """The encoder without a head. It sees every unit, or the visible ones alone when a mask is given.

    With every unit visible it equals Swin, or Twins-SVT, on grids that the window divides. Elsewhere windows at the
    right and bottom edge are just smaller here, while those fill them with zero tokens that take part in attention.

    Args:
        config ([`GreenMIMConfig`]): Configuration of the model.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: GreenMIMConfig):
        super().__init__(config)
        self.embeddings = GreenMIMEmbeddings(config)
        self.encoder = ENCODERS[config.backbone_type](config)
        self.layernorm = GreenMIMLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        mask_ratio: float | None = None,
        plan: MaskPlan | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_stage_tokens: bool = False,
        **kwargs,
    ) -> GreenMIMModelOutput:
        """Encodes images.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`; each side a multiple of the mask unit.
            bool_masked_pos: `(1 or batch_size, num_units)` or `(1 or batch_size, num_patches)`; 1 or True = masked.
                Every row keeps equally many units.
            noise: `(1 or batch_size, num_units)`; the units of lowest noise stay visible. One row serves the batch.
            mask_ratio: share of units to mask; with it alone, one random mask serves the whole batch. Default: no
                mask, or `config.mask_ratio` when `noise` is given.
            plan: a mask with its plans, made by `plan_mask` ahead of time and on the device of the images, instead of
                any of these: nothing is planned here then, and no device is waited for.
            output_attentions: whether to return attention weights, which attn_implementation "eager" alone keeps.
            output_hidden_states: whether to return the hidden states of all stages.
            output_stage_tokens: whether to return the tokens of all stages as they lie.

        Raises:
            `ValueError`: for wrong shapes, sizes or masks, naming the argument.
            `TypeError`: for keyword arguments that are not known.
        """
        self._refuse_unknown(kwargs)
        unit_grid = self._unit_grid(pixel_values)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        needs_raster = output_hidden_states or output_attentions
        is_masked = any(choice is not None for choice in (bool_masked_pos, noise, mask_ratio))
        if plan is not None:
            if is_masked:
                raise ValueError(
                    "`plan` says what is masked; `bool_masked_pos`, `noise` and `mask_ratio` cannot be given too."
                )
            _check_plan(plan, self.config, unit_grid, pixel_values.shape[0], needs_raster)
        elif is_masked:
            plan = self._plan(pixel_values, unit_grid, bool_masked_pos, noise, mask_ratio, needs_raster)
        visible = None if plan is None else plan.visible_units
        plans = plan.stages if plan else plan_dense(self.config, pixel_values.shape[2:], pixel_values.device)

        embeddings = self.embeddings(pixel_values, visible)
        encoded = self.encoder(embeddings, plans, output_attentions=output_attentions)
        latents = self.layernorm(encoded.stage_outputs[-1])
        hidden_states = reshaped = mask = None
        if output_hidden_states:
            states = list(zip((*encoded.stage_inputs, encoded.stage_outputs[-1]), (*plans, plans[-1])))
            hidden_states = tuple(take_tokens(state, plan.raster_order) for state, plan in states)
            if visible is None:
                reshaped = tuple(_to_map(state, plan) for state, plan in states)
        if visible is not None:
            mask = unit_mask(visible, unit_grid[0] * unit_grid[1]).expand(pixel_values.shape[0], -1)
        return GreenMIMModelOutput(
            last_hidden_state=latents,
            pooler_output=latents.mean(dim=1),
            mask=mask,
            visible_units=visible,
            hidden_states=hidden_states,
            attentions=encoded.attentions,
            reshaped_hidden_states=reshaped,
            stage_tokens=encoded.stage_outputs if output_stage_tokens else None,
        )

    @torch.compiler.disable
    def _plan(self, pixel_values, unit_grid, bool_masked_pos, noise, mask_ratio, raster: bool) -> MaskPlan | None:
        """Plan of a mask on the device of the images; None when every unit is visible."""
        visible = self._visible_units(unit_grid, pixel_values.shape[0], bool_masked_pos, noise, mask_ratio)
        return None if visible is None else plan_mask(self.config, visible, unit_grid, raster).to(pixel_values.device)

    def _visible_units(self, unit_grid, batch_size, bool_masked_pos, noise, mask_ratio) -> torch.Tensor | None:
        """Visible units on the CPU, `(1 or batch_size, num_visible)`; None when every unit is visible."""
        num_units = unit_grid[0] * unit_grid[1]
        if bool_masked_pos is not None:
            if noise is not None or mask_ratio is not None:
                raise ValueError(
                    "`bool_masked_pos` says which units are masked; `noise` and `mask_ratio` cannot be given too."
                )
            patches_per_side = self.config.encoder_stride // self.config.patch_size
            visible = visible_units_from_mask(bool_masked_pos, unit_grid, patches_per_side, batch_size)
            return None if visible.shape[1] == num_units else visible
        noise = sample_noise(num_units) if noise is None else noise
        mask_ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        return visible_units_from_noise(noise, num_units, batch_size, mask_ratio)


def _check_plan(plan: MaskPlan, config: GreenMIMConfig, unit_grid, batch_size: int, needs_raster: bool) -> None:
    if plan.backbone != backbone_of(config):
        raise ValueError(
            f"`plan` was made for the backbone and windows {plan.backbone}, but the model has {backbone_of(config)}."
        )
    if plan.stages[-1].grid != unit_grid:
        raise ValueError(f"`plan` was made for {plan.stages[-1].grid} mask units, but the images have {unit_grid}.")
    masks = 1 if plan.visible_units is None else plan.visible_units.shape[0]
    if masks not in (1, batch_size):
        raise ValueError(
            f"`plan` has {masks} masks, but the batch has {batch_size} images; one or as many are needed."
        )
    if needs_raster and plan.stages[0].raster_order is None:
        raise ValueError("`plan` was made without `raster=True`, which hidden states and attention weights need.")


def _to_map(tokens: torch.Tensor, plan: StagePlan) -> torch.Tensor:
    """All tokens of a stage in nested order -> map `(batch, width, *plan.grid)`, without padding."""
    return take_tokens(tokens, plan.raster_order).unflatten(1, plan.grid).permute(0, 3, 1, 2).contiguous()


class GreenMIMForPreTraining(GreenMIMPreTrainedModel):
    """The encoder on visible units with a decoder that predicts `config.reconstruction_target`, as a rule of the
    masked ones.

    Args:
        config ([`GreenMIMConfig`]): Configuration of the model.
    """

    def __init__(self, config: GreenMIMConfig):
        super().__init__(config)
        self.greenmim = GreenMIMModel(config)
        self.target = TARGETS[config.reconstruction_target](config)
        self.decoder = DECODERS[config.decoder_type](config, self.target.width)
        self.post_init()

    def patchify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cuts images into units.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`; each side a multiple of the mask unit.

        Returns:
            `(batch_size, num_units, unit**2 * num_channels)`, values in (row, column, channel) order.

        Raises:
            `ValueError`: for wrong shapes or sizes.
        """
        self._unit_grid(pixel_values)
        return patchify(pixel_values, self.config.encoder_stride)

    def unpatchify(
        self, patchified_pixel_values: torch.Tensor, original_image_size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Puts units together: the inverse of `patchify`.

        Args:
            patchified_pixel_values: `(batch_size, num_units, unit**2 * num_channels)`.
            original_image_size: (height, width) in pixels; default: `config.image_size`.

        Returns:
            `(batch_size, num_channels, height, width)`.

        Raises:
            `ValueError`: when the size does not fit the number of units.
        """
        height, width = original_image_size or self.config.image_height_and_width
        unit, shape = self.config.encoder_stride, tuple(patchified_pixel_values.shape)
        expected = ((height // unit) * (width // unit), unit**2 * self.config.num_channels)
        if height % unit or width % unit or shape[1:] != expected:
            raise ValueError(
                f"`patchified_pixel_values` has shape {shape}, but an image of {height}x{width} pixels has units of"
                f" shape (batch, {expected[0]}, {expected[1]})."
            )
        return unpatchify(patchified_pixel_values, unit, height, width)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        mask_ratio: float | None = None,
        plan: MaskPlan | None = None,
        targets: torch.Tensor | None = None,
        valid_pixels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> GreenMIMForPreTrainingOutput:
        """Predicts masked units; by default one random mask of `config.mask_ratio` serves the batch.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`; each side a multiple of the mask unit.
            bool_masked_pos: `(1 or batch_size, num_units)` or `(1 or batch_size, num_patches)`; 1 or True = masked.
            noise: `(1 or batch_size, num_units)`; the units of lowest noise stay visible.
            mask_ratio: share of units to mask, at random or by `noise`; default: `config.mask_ratio`.
            plan: a mask with its plans, instead of these; see `GreenMIMModel`.
            targets: `(batch_size, num_units, target_width)`, what is to be predicted of every unit, made ahead;
                default: what `config.reconstruction_target` makes of the images. Features must be given.
            valid_pixels: booleans of the shape of `pixel_values`; values where they are False are no data: they count
                neither in the loss nor in the normalisation of their unit. For the target pixels.
            output_attentions, output_hidden_states: as in `GreenMIMModel`.

        Raises:
            `ValueError`: for wrong shapes, sizes or masks, naming the argument.
            `TypeError`: for keyword arguments that are not known.
        """
        self._refuse_unknown(kwargs)
        unit_grid = self._unit_grid(pixel_values)
        of_visible = self.decoder.predicts_visible_only
        if mask_ratio is None and bool_masked_pos is None and plan is None:
            mask_ratio = self.config.mask_ratio
        if mask_ratio == 0 and of_visible:
            mask_ratio = None  # every unit is visible
        outputs = self.greenmim(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            noise=noise,
            mask_ratio=mask_ratio,
            plan=plan,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_stage_tokens=of_visible,
        )
        if outputs.mask is None and not of_visible:
            raise ValueError("`bool_masked_pos` masks no unit; pre-training needs at least one masked unit.")
        visible = outputs.visible_units
        logits = self.decoder(outputs.last_hidden_state, visible, unit_grid, outputs.stage_tokens)
        counts = None
        if valid_pixels is not None:
            targets, counts = self._targets_of_valid(pixel_values, valid_pixels, targets)
        elif targets is None:
            targets = self.target.targets(pixel_values)
        expected = (pixel_values.shape[0], unit_grid[0] * unit_grid[1], self.target.width)
        if targets.shape != expected:
            raise ValueError(f"`targets` has shape {tuple(targets.shape)}, but {expected} is needed.")
        return GreenMIMForPreTrainingOutput(
            loss=self._loss(logits, targets, outputs.mask, visible, counts),
            logits=logits,
            mask=outputs.mask,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _targets_of_valid(self, pixel_values, valid_pixels, targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets of pixels, and which of their values count."""
        if targets is not None or self.config.reconstruction_target != "pixels":
            raise ValueError(
                "`valid_pixels` is given, which is for targets that are the pixels of the images, but"
                f" `reconstruction_target` is {self.config.reconstruction_target!r} and `targets` is"
                f" {'None' if targets is None else 'given'}."
            )
        if valid_pixels.shape != pixel_values.shape or valid_pixels.dtype != torch.bool:
            raise ValueError(
                f"`valid_pixels` has shape {tuple(valid_pixels.shape)} and type {valid_pixels.dtype}, but booleans of"
                f" the shape {tuple(pixel_values.shape)} of `pixel_values` are needed."
            )
        return self.target.targets(pixel_values, valid_pixels), self.target.cut(valid_pixels)

    def _loss(self, logits, targets, mask, visible, counts=None) -> torch.Tensor:
        """Error of the units that count, and of the mean over all units."""
        config = self.config
        of_units, of_mask = targets, mask if config.loss_on == "masked" else None
        if self.decoder.predicts_visible_only:
            of_mask = None
            if visible is not None:
                index = visible[:, :, None].expand(targets.shape[0], -1, targets.shape[2])
                of_units, counts = targets.gather(1, index), None if counts is None else counts.gather(1, index)
        loss = reconstruction_loss(logits, of_units, of_mask, config.target_loss, counts)
        if config.pooled_loss_weight == 0:
            return loss
        pooled = reconstruction_loss(logits.mean(dim=1), targets.mean(dim=1), None, config.target_loss)
        return loss + config.pooled_loss_weight * pooled


class GreenMIMForImageClassification(GreenMIMPreTrainedModel):
    """The encoder with a linear classifier on the mean of its tokens.

    Args:
        config ([`GreenMIMConfig`]): Configuration of the model; `num_labels` is the number of classes.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: GreenMIMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.greenmim = GreenMIMModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self.classifier and self.num_labels > 0:
            init.normal_(module.weight, std=self.config.initializer_range)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> GreenMIMImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`; each side a multiple of the mask unit.
            labels: `(batch_size,)` class numbers, or targets of a regression when `num_labels` is 1.
            output_attentions, output_hidden_states: as in `GreenMIMModel`.

        Raises:
            `ValueError`: for images of wrong shapes or sizes.
            `TypeError`: for keyword arguments that are not known.
        """
        self._refuse_unknown(kwargs)
        outputs = self.greenmim(
            pixel_values, output_attentions=output_attentions, output_hidden_states=output_hidden_states
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return GreenMIMImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class GreenMIMBackbone(BackboneMixin, GreenMIMPreTrainedModel):
    """The encoder as a backbone: feature maps of the stages in `out_features`, before merging.

    Images of any size are padded right and bottom to whole units. Padding takes no part in attention, merging sees
    zeros there, and maps have `ceil(side / stride)` rows and columns, as Swin's. Each map has its LayerNorm: the last
    stage's is the encoder's own, the others are new.

    Args:
        config ([`GreenMIMConfig`]): Configuration of the model.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: GreenMIMConfig):
        super().__init__(config)
        self.greenmim = GreenMIMModel(config)
        self.num_features = [config.embed_dim, *config.stage_widths]
        self.hidden_states_norms = nn.ModuleDict(
            {
                name: GreenMIMLayerNorm(width, eps=config.layer_norm_eps)
                for name, width in zip(self.out_features, self.channels)
                if name != self.stage_names[-1]
            }
        )
        self.num_frozen_stages = 0
        self.post_init()

    def freeze_stages(self, count: int) -> None:
        """Freezes the embedding and the first stages, each with the merging that ends it; 0 freezes nothing.

        Their parameters need no gradient and stay in evaluation, without dropout and stochastic depth, while the model
        trains. The norms of maps go on learning.

        Raises:
            `ValueError`: for fewer than 0, or more than there are.
        """
        if not 0 <= count <= len(self.greenmim.encoder.layers):
            raise ValueError(
                f"`count` is {count}; it must be between 0 and the {len(self.greenmim.encoder.layers)} stages."
            )
        self.num_frozen_stages = count
        for part in self._first_parts(count):
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "GreenMIMBackbone":
        """As of any module, but for frozen stages, which stay in evaluation."""
        super().train(mode)
        for part in self._first_parts(self.num_frozen_stages):
            part.eval()
        return self

    def _first_parts(self, count: int) -> list[nn.Module]:
        """The embedding and the first stages; nothing for none."""
        return [self.greenmim.embeddings, *self.greenmim.encoder.layers[:count]] if count else []

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """Computes feature maps.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`, any size.
            output_attentions: as in `GreenMIMModel`.
            output_hidden_states: whether to return all stages' maps before their norms, the stem first.

        Returns:
            `feature_maps`: for each of `out_features` a map `(batch_size, channels, height, width)`.

        Raises:
            `ValueError`: for images of a wrong shape.
            `TypeError`: for keyword arguments that are not known.
        """
        self._refuse_unknown(kwargs)
        self._check_pixel_values(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        plans = plan_dense(self.config, pixel_values.shape[2:], pixel_values.device)
        unit = self.config.encoder_stride
        padding = (0, -pixel_values.shape[3] % unit, 0, -pixel_values.shape[2] % unit)
        embeddings = self.greenmim.embeddings(nn.functional.pad(pixel_values, padding), None)
        encoded = self.greenmim.encoder(
            embeddings,
            plans,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
        )
        states = dict(zip(self.stage_names, (embeddings, *encoded.stage_outputs)))
        plan_of = dict(zip(self.stage_names, (plans[0], *plans)))
        feature_maps = tuple(_to_map(self._norm(name)(states[name]), plan_of[name]) for name in self.out_features)
        hidden_states = None
        if output_hidden_states:
            hidden_states = tuple(_to_map(states[name], plan_of[name]) for name in self.stage_names)
        return BackboneOutput(feature_maps=feature_maps, hidden_states=hidden_states, attentions=encoded.attentions)

    def _norm(self, name: str) -> nn.Module:
        return self.greenmim.layernorm if name == self.stage_names[-1] else self.hidden_states_norms[name]


__all__ = [
    "GreenMIMBackbone",
    "GreenMIMForImageClassification",
    "GreenMIMForPreTraining",
    "GreenMIMModel",
    "GreenMIMPreTrainedModel",
]
