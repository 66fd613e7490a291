# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Groups of parameters with their learning rates and decays, the schedule of fine-tuning, and LARS for probes."""

import math
import re
from collections.abc import Iterable

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from modeling_greenmim.encoders import ENCODERS


# Blocks of hierarchical models have a stage and a number, those of ViT a number alone.
_HIERARCHICAL = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.(?:blocks\.(\d+)|(\w+))(?:\.|$)")
_PLAIN = re.compile(r"(?:^|\.)vit\.layers\.(\d+)\.")
# Model types whose layers are known, and where their configuration says how many blocks each stage has.
_DEPTHS_OF = {
    "greenmim": lambda config: ENCODERS[config.backbone_type].layer_depths(config),
    "swin": lambda config: list(config.depths),
    "vit": lambda config: [config.num_hidden_layers],
}
# What our encoder is called inside the backbone of a model of a dense task; all else there is norms of maps and head.
_IN_BACKBONES = "greenmim"
# What follows the encoder; all of it learns at the full rate.
_HEADS = ("classifier", "decoder")
_SPARED = ("relative_position_bias_table", "mask_token", "cls_token", "position_embeddings")


def no_decay_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone: 1-D parameters, position biases and tokens."""
    return {name for name, parameter in model.named_parameters() if parameter.ndim <= 1 or name.endswith(_SPARED)}


def layer_of_parameter(name: str, depths: list[int]) -> int:
    """Number of the layer that a parameter of a classifier (GreenMIM, Swin or ViT) or pre-training model belongs to.

    The embedding is layer 0, block i (counted through the stages) layer i + 1, and the final norm and what follows it,
    a classifier or a whole decoder, are layer `sum(depths) + 1`. A merge goes with the last block of the stage that it
    ends, whatever else a stage has, such as Twins' position encoding, with the first.

    Args:
        name: as `named_parameters` gives it, of the model itself or of one that is wrapped.
        depths: blocks of each stage.

    Raises:
        `ValueError`: for a parameter that such models do not have.
    """
    parts = name.split(".")
    if match := _HIERARCHICAL.search(name):
        stage, block, module = match.groups()
        blocks_before, blocks = sum(depths[: int(stage)]), depths[int(stage)]
        if block is not None:
            return blocks_before + int(block) + 1
        return blocks_before + (blocks if module == "downsample" else 1)
    if match := _PLAIN.search(name):
        return int(match[1]) + 1
    if "embeddings" in parts:
        return 0
    if "layernorm" in parts or any(head in parts for head in _HEADS):
        return sum(depths) + 1
    raise ValueError(
        f"`name` is {name!r}; image classifiers of GreenMIM, Swin and ViT, and pre-training models of GreenMIM, have"
        " no such parameter."
    )


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Groups of the parameters to train, for an optimizer of torch.

    The learning rate falls from each layer to the one below it, so that layers near the pixels, which pre-training
    taught most, change least (BEiT, https://huggingface.co/papers/2106.08254, and SimMIM's recipe).

    Args:
        model: any model; unless `layer_decay` is 1 an image classifier of GreenMIM, Swin or ViT, a pre-training model
            of GreenMIM, or a model of a dense task with its backbone.
        learning_rate: that of the head or decoder.
        weight_decay: for all parameters but those of `no_decay_parameters`.
        layer_decay: factor of the learning rate from each layer to the one below it; see `layer_of_parameter`.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, from the head down: `Trainer` logs the first one's rate.

    Raises:
        `ValueError`: for a `layer_decay` other than 1 and a model whose layers are not known.
    """
    depths = [] if layer_decay == 1 else _depths(model, layer_decay)
    has_backbone = _backbone_config(model) is not None
    spared = no_decay_parameters(model)
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_of_head = layer_decay == 1 or (has_backbone and _IN_BACKBONES not in name.split("."))
        below_head = 0 if is_of_head else sum(depths) + 1 - layer_of_parameter(name, depths)
        rate, decay = learning_rate * layer_decay**below_head, 0.0 if name in spared else weight_decay
        group = {"params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault((below_head, name in spared), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _depths(model: nn.Module, layer_decay: float) -> list[int]:
    # By the configuration: a model that was loaded as remote code has classes of its own.
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    backbone = _backbone_config(model)
    config = backbone or getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    has_head = backbone is not None or any(hasattr(model, head) for head in _HEADS)
    if model_type not in _DEPTHS_OF or not has_head:
        raise ValueError(
            f"`layer_decay` is {layer_decay}, but the model is a {type(model).__name__}; only the layers of image"
            " classifiers of GreenMIM, Swin and ViT, of GreenMIM's pre-training, and of its backbones are known. 1.0"
            " fits every model."
        )
    return _DEPTHS_OF[model_type](config)


def _backbone_config(model: nn.Module):
    """The configuration of the backbone of a model of a dense task; None for other models, and other backbones."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    config = getattr(getattr(model, "config", None), "backbone_config", None)
    return config if getattr(config, "model_type", None) == "greenmim" else None


def cosine_schedule(
    optimizer: torch.optim.Optimizer,
    warmup_steps: int,
    total_steps: int,
    learning_rate: float,
    min_learning_rate: float = 0.0,
    warmup_learning_rate: float = 0.0,
) -> LambdaLR:
    """Linear warm-up, then a cosine that ends at the minimum.

    Step 0 has the warm-up's learning rate, step `warmup_steps` has `learning_rate`, and the last step,
    `total_steps - 1`, the minimum. Transformers' "cosine_warmup_with_min_lr" never gets to `learning_rate` when the
    warm-up has 0 or 1 steps, and short runs here have such.

    Args:
        optimizer: the three learning rates are those of a group whose own is `learning_rate`; a group with a share of
            it has the same share of all three.
        warmup_steps: steps of the warm-up.
        total_steps: steps of the whole run.
        learning_rate: the highest one.
        min_learning_rate: the last one.
        warmup_learning_rate: the first one, if there is a warm-up.

    Raises:
        `ValueError`: for a learning rate that is not positive, or others that are not between 0 and it.
    """
    if learning_rate <= 0:
        raise ValueError(f"`learning_rate` is {learning_rate}; it must be above 0.")
    for name, rate in (("min_learning_rate", min_learning_rate), ("warmup_learning_rate", warmup_learning_rate)):
        if not 0 <= rate <= learning_rate:
            raise ValueError(f"`{name}` is {rate}; it must be between 0 and `learning_rate`, {learning_rate}.")
    lowest, first = min_learning_rate / learning_rate, warmup_learning_rate / learning_rate

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return first + (1 - first) * step / warmup_steps
        # The scheduler also asks for the step after the last one.
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, multiplier)


def lars(parameters: Iterable, learning_rate: float) -> torch.optim.Optimizer:
    """LARS (https://huggingface.co/papers/1708.03888) as linear probes of MAE use it.

    Momentum 0.9, no weight decay; matrices are scaled by 0.001 times the norm of the weight over that of the gradient,
    vectors are not scaled. Its step overwrites the gradients.

    Args:
        parameters: parameters, or groups of them, whose own settings win.
        learning_rate: MAE: 0.1 * total batch / 256.
    """
    # Here, for the import takes most of a second and few runs need it.
    from pytorch_optimizer import LARS

    return LARS(parameters, lr=learning_rate, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001)
