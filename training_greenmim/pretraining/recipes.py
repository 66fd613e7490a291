# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Recipes of `run_mim.py`: named sets of arguments, each of which a flag or file may change."""

import math
from pathlib import Path

from modeling_greenmim import GreenMIMConfig

from ..runs.arguments import MIMTrainingArguments
from ..runs.auto import Choice, Facts, shared_choices
from ..runs.models import changed_config, read_config


# Settings of a teacher's targets where they differ from those of pixels; see docs/pre-training.md for their sources.
_TEACHER = {"target": "teacher", "drop_path_rate": 0.1, "max_grad_norm": 3.0, "warmup_steps": 0.1}
RECIPES = {
    "teacher-align": {**_TEACHER, "teacher_mode": "align", "mask_ratio": 0.7},
    "teacher-predict": {**_TEACHER, "teacher_mode": "predict", "mask_ratio": 0.75},
}
# Base rates from scratch of models as small as `auto` makes them for a CPU: so many channels in the last stage.
SMALL_WIDTH, SMALL_RATE, SMALL_RATE_TAUGHT = 192, 8e-3, 6e-3
# Going on: share of the rate from scratch, factor of the rate from layer to layer, share of steps that warm up.
SHARE_ON, DECAY_ON, WARMUP_ON = 0.5, 0.9, 0.01
# The batch that rates of small models are for, and up to how many images the features of a teacher are kept.
BATCH, FITS_CACHED = 64, 20_000
# Least epochs and steps; see docs/recipes.md.
LEAST_EPOCHS, LEAST_EPOCHS_TAUGHT, LEAST_STEPS = 100, 60, 2000
# GB of memory for an image of Swin-B at 224 px (docs/performance.md).
MEMORY_OF_AN_IMAGE = 0.12


def recipe_defaults(chosen: dict) -> dict:
    """Arguments that the chosen recipe sets.

    Args:
        chosen: all arguments as given, with their defaults.

    Raises:
        `ValueError`: for an unknown recipe, and for `continue` without a model to go on from.
    """
    name = chosen["recipe"]
    if name is None:
        return {}
    if name in RECIPES:
        return RECIPES[name]
    if name != "continue":
        raise ValueError(f"`recipe` is {name!r}; it must be one of {', '.join((*RECIPES, 'continue', 'auto'))}.")
    if not chosen["model_name_or_path"]:
        raise ValueError("`recipe` is 'continue', but there is nothing to go on from: give `model_name_or_path`.")
    values = {argument: choice.value for argument, choice in _going_on(chosen).items()}
    if chosen["learning_rate"] is not None:
        del values["base_learning_rate"]
    return values


def auto(facts: Facts, chosen: dict) -> dict[str, Choice]:
    """Arguments for the images and the device; docs/recipes.md has the measurements behind each.

    Args:
        chosen: all arguments as given, with their defaults.

    Raises:
        `ValueError`: for changes to a model that is not given.
    """
    has_model = chosen["config_name"] or chosen["model_name_or_path"]
    if chosen["config_overrides"] and not has_model:
        raise ValueError(
            f"`config_overrides` is {chosen['config_overrides']!r}, by which `recipe` 'auto' says what the model is:"
            " give `config_name` or `model_name_or_path` too, or what has a flag of its own, such as --mask_ratio."
        )
    choices = _taught(facts, chosen) if chosen["teacher"] else {}
    if not has_model:
        choices |= _for_gpu(facts) if facts.gpu_memory else _for_cpu(facts, is_taught=bool(chosen["teacher"]))
    if chosen["model_name_or_path"]:
        choices |= _going_on(chosen)
    choices["per_device_train_batch_size"] = _batch(facts)
    if chosen["max_steps"] <= 0:
        steps = math.ceil(facts.count / choices["per_device_train_batch_size"].value)
        least = LEAST_EPOCHS_TAUGHT if chosen["teacher"] else LEAST_EPOCHS
        epochs = max(least, math.ceil(LEAST_STEPS / steps))
        choices["num_train_epochs"] = Choice(epochs, f"at least {least}, and at least {LEAST_STEPS:,} steps")
    if chosen["probe_dir"] and chosen["do_eval"]:
        choices |= _keeping_the_best()
    return choices | shared_choices(facts)


def _keeping_the_best() -> dict[str, Choice]:
    each = "ten times a run"
    return {
        "eval_strategy": Choice("steps", each),
        "eval_steps": Choice(0.1, each),
        "save_strategy": Choice("steps", each),
        "save_steps": Choice(0.1, each),
        "save_total_limit": Choice(2, "the best and the last checkpoint"),
        "metric_for_best_model": Choice("eval_probe_accuracy", "tells best how well a model is fine-tuned"),
        "load_best_model_at_end": Choice(True, "features of small data sets get worse again"),
    }


def _batch(facts: Facts) -> Choice:
    if facts.gpu_memory is None:
        return Choice(BATCH, "the batch that learning rates of small models were measured with")
    fitting = 2 ** int(math.log2(max(1, 0.8 * facts.gpu_memory / MEMORY_OF_AN_IMAGE)))
    return Choice(min(256, fitting), f"fits into {facts.gpu_memory:.0f} GB")


def _taught(facts: Facts, chosen: dict) -> dict[str, Choice]:
    choices = {
        "target": Choice("teacher", "a teacher is given"),
        "mask_ratio": Choice(0.5, "the best share of hidden units for a teacher's features"),
        "max_grad_norm": Choice(3.0, "as published for such targets"),
        "lr_scheduler_type": Choice("constant_with_warmup", "at falling rates few images are learned by heart"),
    }
    if facts.count <= FITS_CACHED:
        folder = Path(chosen["output_dir"] or "trainer_output")
        reason = "the teacher then runs once: for few images it is the larger cost"
        choices["cache_teacher"] = Choice(f"{folder}-teacher", reason)
        choices["teacher_crops"] = Choice(3, "eight views of an image generalise better than two")
        choices["min_crop_scale"] = Choice(0.3, "crops that still show what the image is of")
    return choices


def _going_on(chosen: dict) -> dict[str, Choice]:
    if _is_small(chosen["model_name_or_path"], chosen["config_overrides"]):
        rate = SMALL_RATE_TAUGHT if chosen["teacher"] else SMALL_RATE
    else:
        rate = MIMTrainingArguments.default_base_learning_rate
    return {
        "base_learning_rate": Choice(
            SHARE_ON * rate, f"{SHARE_ON:g} times the {rate:g} from scratch: what is learned"
        ),
        "layer_decay": Choice(DECAY_ON, "layers near the pixels change less than the decoder"),
        "warmup_steps": Choice(WARMUP_ON, "weights that are trained need little warm-up"),
    }


def _is_small(name: str, overrides: str | None) -> bool:
    """Whether a model is as small as those that `auto` makes for a CPU; weights of others are not."""
    values = {} if Path(name).is_file() else read_config(name, "model_name_or_path")
    if values.get("model_type") != GreenMIMConfig.model_type:
        return False
    config = changed_config(values, overrides, None, f"`model_name_or_path` is {name!r}")
    return config.hidden_size <= SMALL_WIDTH


def _for_cpu(facts: Facts, is_taught: bool) -> dict[str, Choice]:
    patch = 8 if facts.side >= 96 else 4
    unit = 2 * patch
    side = max(4 * unit, min(128, facts.side // unit * unit))
    width, heads = (96, "[3,6]") if is_taught else (64, "[2,4]")
    shape = (
        f"image_size={side},patch_size={patch},embed_dim={width},depths=[2,6],num_heads={heads},window_size=8,"
        "decoder_hidden_size=128,decoder_num_hidden_layers=2,decoder_num_attention_heads=4,"
        "decoder_intermediate_size=512"
    )
    if facts.channels != 3:
        shape += f",num_channels={facts.channels}"
    rate = SMALL_RATE_TAUGHT if is_taught else SMALL_RATE
    return {
        "config_name": Choice("tiny", "what config_overrides change"),
        "config_overrides": Choice(shape, "a model for a CPU: two stages, images of at most 128 px"),
        "base_learning_rate": Choice(rate, f"{rate * BATCH / 256:g} for {BATCH} images: small models bear high rates"),
    }


def _for_gpu(facts: Facts) -> dict[str, Choice]:
    name = "tiny" if facts.count < 20_000 else "small" if facts.count < 200_000 else "base"
    reason = "tiny up to 20,000 images, small up to 200,000, then base; not measured here"
    choices = {"config_name": Choice(name, reason)}
    if facts.channels != 3:
        reason = f"the images that were looked at have {facts.channels} channel(s)"
        choices["config_overrides"] = Choice(f"num_channels={facts.channels}", reason)
    return choices
