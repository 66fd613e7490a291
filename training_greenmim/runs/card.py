# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The README.md of a trained model: data, recipe, results, pictures and the command."""

import os
import shlex
import shutil
from collections.abc import Sized
from dataclasses import asdict, dataclass, field

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_greenmim.conversion.releasing import licences_of_origin

from ..data.statistics import in_short
from .curves import loss_curve
from .energy import CO2
from .extras import is_installed


CITATION = """## Citation

```bibtex
@inproceedings{huang2022green,
  title = {Green Hierarchical Vision Transformer for Masked Image Modeling},
  author = {Huang, Lang and You, Shan and Zheng, Mingkai and Wang, Fei and Qian, Chen and Yamasaki, Toshihiko},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}
}
```
"""
FULL_DEPTH = """It sees all values of images, on the scale below. Pipelines cut files to 8 bits, so open them by the
image processor: `open_image(file_or_array)`, files of Pillow, `.npy`, or arrays (height, width, channels).

"""
RUN = """## Data

{data} {licence}

## Recipe

| | |
| --- | --- |
{recipe}

```
{command}
```

## Results

| | |
| --- | --- |
{results}

{curve}{pictures}

"""
PRETRAINED = (
    """---
{metadata}
---

# {title}

A {backbone} transformer pre-trained with [GreenMIM](https://huggingface.co/papers/2205.13515): {method} It holds
encoder and decoder; the encoder is what later tasks start from.

## Use

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{location}", trust_remote_code=True)
model = AutoModel.from_pretrained("{location}", trust_remote_code=True)
```

{opening}The model was not trained to classify anything. What it learned comes from the images below{and_from}; on
other kinds of images it may be of no use.

"""
    + RUN
)
CLASSIFIER = (
    """---
{metadata}
---

# {title}

An image classifier ({class_name}) of {num_labels} classes: {classes}.

## Use

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{location}", trust_remote_code=True)
```

{opening}It knows the classes of the images below and no others; on other kinds of images its answers mean nothing.

"""
    + RUN
)

SEGMENTER = (
    """---
{metadata}
---

# {title}

A model of semantic segmentation ({class_name}) with {num_labels} classes: {classes}.

## Use

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained("{location}", trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained("{location}", trust_remote_code=True).eval()
inputs = processor(Image.open("image.png"), return_tensors="pt")
classes = model(**inputs).logits.argmax(dim=1)
```

{opening}{windows} It knows the classes of the images below and no others; on other kinds of images its answers mean
nothing.

"""
    + RUN
)
DETECTOR = (
    """---
{metadata}
---

# {title}

A model of {task} ({class_name}) with {num_labels} classes: {classes}.

## Use

```python
{use}
```

{opening}It knows the classes of the images below and no others; on other kinds of images its answers mean nothing.

"""
    + RUN
)
# How a model of a task is used, where its image processor serves Transformers' pipelines, and elsewhere.
USE_OF_TASK = {
    "detection": """from transformers import pipeline

detect = pipeline("object-detection", model="{location}", trust_remote_code=True)
objects = detect("image.png", threshold=0.5)""",
    "instances": """from transformers import pipeline

segment = pipeline("image-segmentation", model="{location}", trust_remote_code=True)
objects = segment("image.png", subtask="instance", threshold=0.5)""",
}
PREDICT = """python examples/dense/run_object_detection.py --task {task} --model_name_or_path {location} \\
    --test_dir images --output_dir outputs --do_predict{more}"""


def _table(rows: dict) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _optimization(trainer) -> dict:
    args = trainer.args
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 2),
        "batch": args.total_batch_size,
        "learning rate": f"{args.learning_rate:.3g}, {args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g}",
        "layer_decay": args.layer_decay,
        "weight decay": args.weight_decay,
        "precision": "fp32" if args.mixed_precision == "no" else args.mixed_precision,
        "seed": args.seed,
    }


def _values(image_processor) -> dict:
    """How values are scaled that are not of 8 bits, or not by ImageNet's numbers."""
    if getattr(image_processor, "image_range", None) is None:
        return {}
    channels = f"{len(image_processor.image_range)} channel(s) in full depth"
    nodata = "" if image_processor.nodata is None else f"; {image_processor.nodata:g} stands for no data"
    return {"values": f"{channels}: {in_short(image_processor.image_range)} become 0 to 1{nodata}"}


def _pretraining_recipe(trainer) -> dict:
    args, config = trainer.args, trainer.model.config
    height, width = config.image_height_and_width
    return {
        "encoder": f"embed_dim {config.embed_dim}, depths {config.depths}, heads {config.num_heads},"
        f" window {config.window_size}",
        "image size": f"{height}x{width} px, patches of {config.patch_size} px",
        **_values(trainer.processing_class),
        "masks": f"{args.mask_strategy}, ratio {config.mask_ratio}, one per"
        f" {'image' if args.mask_per_sample else 'step and process'}",
        "target": trainer.model.target.description,
        **({"teacher": str(trainer.teacher.facts)} if trainer.teacher else {}),
        "optimizer": f"AdamW, betas {args.adam_beta1}/{args.adam_beta2}",
        **_optimization(trainer),
    }


def _classification_recipe(trainer) -> dict:
    args = trainer.args
    names = ("min_crop_scale", "rand_augment", "color_jitter", "random_erasing", "mixup", "cutmix")
    names += ("label_smoothing_factor", "repeated_augmentation", "ema_decay", "balance", "max_grad_norm")
    return {
        **_values(trainer.processing_class),
        "optimizer": "LARS" if args.lars else f"AdamW, betas {args.adam_beta1}/{args.adam_beta2}",
        **_optimization(trainer),
        "drop_path_rate": getattr(trainer.model.config, "drop_path_rate", 0),
        **{name: getattr(args, name) for name in names},
    }


def _results(log_history: list[dict]) -> dict:
    """The last numbers of training and of evaluation."""
    results = {}
    for name in ("train_loss", "eval_loss", "eval_ema_loss", "eval_map"):
        entries = [entry for entry in log_history if name in entry]
        results |= entries[-1] if entries else {}
    return {name: f"{value:.5g}" for name, value in results.items() if name not in ("step", "epoch", "total_flos")}


@dataclass
class RunFacts:
    """What a trainer does not know of its run.

    Attributes:
        command: what started it.
        data: a sentence on the images.
        dataset: name of the data.
        license_name: the Hub's name of the licence that the data asks for, if known.
        arguments: those of the script beside the trainer's, for the record in checkpoints.
        origin: what it went on from, with its licence; None for a run from scratch.
    """

    command: str
    data: str
    dataset: str
    license_name: str | None = None
    arguments: dict = field(default_factory=dict)
    origin: str | None = None


# Of evaluation's results, those that measure the machine and not the model, or one class alone.
_NOT_OF_THE_MODEL = ("runtime", "per_second", "unreadable", "_iou_", "_of_")


def _eval_results(trainer, facts: RunFacts, task: str) -> list[EvalResult]:
    """The last evaluation, as the Hub's metadata want it."""
    results = _results(trainer.state.log_history)
    return [
        EvalResult(
            task_type=task,
            dataset_type=facts.dataset,
            dataset_name=facts.dataset,
            dataset_split="evaluation",
            metric_type=name.removeprefix("eval_"),
            metric_value=float(value),
        )
        for name, value in results.items()
        if name.startswith("eval_") and not any(part in name for part in _NOT_OF_THE_MODEL)
    ]


def describe_run(
    script: str,
    argv: list[str],
    images: dict[str, object],
    dataset_name: str | None,
    folder: str | None,
    elpv_labels: str = "",
    arguments: tuple = (),
    origin: str | None = None,
) -> RunFacts:
    """What the model card and checkpoints tell of a run of a script.

    Args:
        images: the data set of each purpose, if there is one; streams have no length.
        dataset_name, folder: where the images come from; without either they are the ELPV photographs.
        elpv_labels: a sentence on the labels of the ELPV photographs, if they are used.
        arguments: dataclasses of arguments beside those of the trainer.
        origin: what the run goes on from.
    """
    given = {name: value for part in arguments for name, value in asdict(part).items()}
    counts = [f"{len(part):,} for {purpose}" for purpose, part in images.items() if isinstance(part, Sized)]
    counts = " and ".join(counts) or "as a stream"
    command = shlex.join(["python", script, *argv])
    if dataset_name or folder:
        name = dataset_name or os.path.basename(os.path.abspath(folder))
        return RunFacts(command, f"Images of `{name}`: {counts}.", name, arguments=given, origin=origin)
    page = "[ELPV](https://github.com/zae-bayern/elpv-dataset)"
    sentence = f"{page}, electroluminescence photographs of solar cells (CC-BY-NC-SA-4.0): {counts}."
    return RunFacts(command, f"{sentence} {elpv_labels}The split is fixed.", "ELPV", "cc-by-nc-sa-4.0", given, origin)


def write_model_card(trainer, facts: RunFacts) -> None:
    """Writes README.md of a pre-trained model, with its pictures, into the output folder of its trainer."""
    folder, config = trainer.args.output_dir, trainer.model.config
    pictures = ""
    if trainer.last_picture:
        shutil.copy(trainer.last_picture, os.path.join(folder, "reconstruction.png"))
        pictures = (
            "Images that were not trained on: original, masked input, reconstruction (visible units pasted in, hidden"
            " ones scaled back by their own mean and variance).\n\n![Reconstructions](reconstruction.png)"
        )
    _write(
        trainer,
        facts,
        PRETRAINED,
        {
            "pipeline_tag": "image-feature-extraction",
            "tags": ["greenmim", config.backbone_type, "masked-image-modeling"],
        },
        recipe=_table(_started_from(facts) | _pretraining_recipe(trainer)),
        pictures=pictures,
        method=_method(trainer.model, trainer.teacher),
        and_from=_and_from(facts, trainer.teacher),
        backbone=config.backbone_type.capitalize(),
    )


def _started_from(facts: RunFacts) -> dict:
    return {"starts from": facts.origin} if facts.origin else {}


def _licence(facts: RunFacts) -> str:
    """Under which licence the model may be published, as far as a run knows."""
    origins = licences_of_origin(facts.origin or "")
    weights = f" of the weights that it started from, {', '.join(origins)}" if origins else ""
    if facts.license_name:
        return f"The licence of the images holds for the model{f', and so does that{weights}' if weights else ''}."
    bound = f"that of the images{f' and that{weights}' if weights else ''}"
    return f"Which licence the model has (`license` at the head of this card) its publisher says, within {bound}."


def _and_from(facts: RunFacts, teacher) -> str:
    """What a model learned from, beside its images."""
    sources = ["from the weights it started from"] * bool(facts.origin) + ["from its teacher"] * bool(teacher)
    return "".join(f" and {source}" for source in sources) or " alone"


def _method(model, teacher) -> str:
    """What was done, in a sentence or two."""
    config = model.config
    hidden = (
        f"{100 * config.mask_ratio:g} % of each image is hidden in units of {config.encoder_stride}x"
        f"{config.encoder_stride} px, the encoder runs on the visible units only, and"
    )
    target = model.target.description if teacher is None else f"features of a frozen teacher, `{teacher.facts.name}`"
    if not model.decoder.predicts_visible_only:
        ones = "the hidden ones" if config.loss_on == "masked" else "all units"
        return f"{hidden} a small decoder predicts {ones} ({target})."
    hidden = f"{hidden} its" if config.mask_ratio else "The encoder's"
    return f"{hidden} features become those of a frozen teacher, `{teacher.facts.name}`."


def write_classifier_card(trainer, facts: RunFacts) -> None:
    """Writes README.md of a classifier, with its pictures, into the output folder of its trainer."""
    config = trainer.model.config
    names = list(config.id2label.values())
    pictures = ""
    if os.path.exists(os.path.join(trainer.args.output_dir, "eval_confusion_matrix.png")):
        pictures = "![Confusion matrix](eval_confusion_matrix.png)"
    _write(
        trainer,
        facts,
        CLASSIFIER,
        {"pipeline_tag": "image-classification", "tags": [config.model_type]},
        recipe=_table(_started_from(facts) | _classification_recipe(trainer)),
        pictures=pictures,
        class_name=type(trainer.model).__name__,
        num_labels=len(names),
        classes=", ".join(names[:20]) + (", ..." if len(names) > 20 else ""),
    )


def write_segmentation_card(trainer, facts: RunFacts) -> None:
    """Writes README.md of a model of semantic segmentation, with its pictures, into its trainer's output folder."""
    args, names = trainer.args, trainer.names
    pictures = ""
    if trainer.last_picture:
        pictures = "Images that were not trained on: image, truth, prediction.\n\n![Predictions](predictions.png)"
    windows = "It was evaluated on whole images."
    if args.eval_window:
        windows = (
            f"Images larger than {args.eval_window} px were evaluated in windows of that side, which overlap by"
            f" {args.eval_overlap:.0%}."
        )
    _write(
        trainer,
        facts,
        SEGMENTER,
        {"pipeline_tag": "image-segmentation", "tags": [trainer.model.config.model_type, "semantic-segmentation"]},
        recipe=_table(_started_from(facts) | _segmentation_recipe(trainer)),
        pictures=pictures,
        windows=windows,
        class_name=type(trainer.model).__name__,
        num_labels=len(names),
        classes=", ".join(names[:20]) + (", ..." if len(names) > 20 else ""),
    )


def _segmentation_recipe(trainer) -> dict:
    return _dense_recipe(trainer, ("crop_size", "scale_range", "color_jitter", "max_class_share", "max_grad_norm"))


def _dense_recipe(trainer, names: tuple[str, ...]) -> dict:
    """What all dense tasks tell of a run, and some of its arguments."""
    args, backbone = trainer.args, trainer.model.config.backbone_config
    frozen = sum(parameter.numel() for parameter in trainer.model.parameters() if not parameter.requires_grad)
    return {
        "encoder": f"embed_dim {backbone.embed_dim}, depths {backbone.depths}, heads {backbone.num_heads},"
        f" window {backbone.window_size}",
        **_values(trainer.processing_class),
        "optimizer": f"AdamW, betas {args.adam_beta1}/{args.adam_beta2}",
        **_optimization(trainer),
        "drop_path_rate": backbone.drop_path_rate,
        **({"frozen parameters": f"{frozen:,}"} if frozen else {}),
        **{name: getattr(args, name) for name in names},
    }


def write_detection_card(trainer, facts: RunFacts) -> None:
    """Writes README.md of a model that finds objects, with its pictures, into its trainer's output folder."""
    args, names, task = trainer.args, trainer.names, "instances" if trainer.with_masks else "detection"
    location = args.hub_model_id or args.output_dir
    divisor = args.size_divisor
    serves_pipelines = getattr(trainer.processing_class, "image_range", None) is None and not divisor
    use = USE_OF_TASK[task] if serves_pipelines else PREDICT
    pictures = ""
    if trainer.last_picture:
        pictures = "Images that were not trained on: truth, prediction.\n\n![Predictions](predictions.png)"
    _write(
        trainer,
        facts,
        DETECTOR,
        {
            "pipeline_tag": "image-segmentation" if trainer.with_masks else "object-detection",
            "tags": [trainer.model.config.model_type, "instance-segmentation" if trainer.with_masks else "vision"],
        },
        recipe=_table(_started_from(facts) | _detection_recipe(trainer)),
        pictures=pictures,
        task="instance segmentation" if trainer.with_masks else "object detection",
        use=use.format(location=location, task=task, more=f" --size_divisor {divisor}" if divisor else ""),
        class_name=type(trainer.model).__name__,
        num_labels=len(names),
        classes=", ".join(names[:20]) + (", ..." if len(names) > 20 else ""),
    )


def _detection_recipe(trainer) -> dict:
    names = ("crop_size", "scale_range", "size_divisor", "color_jitter", "max_grad_norm")
    return _dense_recipe(trainer, names)


def _metadata(trainer, facts: RunFacts, title: str, values: dict) -> str:
    """The head of a card, which the Hub reads."""
    results = _eval_results(trainer, facts, values["pipeline_tag"])
    measured = {"model_name": title, "eval_results": results} if results else {}
    if trainer.energy_of_run is not None:
        measured["co2_eq_emissions"] = _emissions(trainer, values["pipeline_tag"])
    data = ModelCardData(license=facts.license_name, library_name="transformers", **values, **measured)
    return data.to_yaml()


def _emissions(trainer, task: str) -> dict:
    """Emissions of training in grams, as the Hub's metadata want them."""
    return {
        "emissions": float(f"{1000 * trainer.energy_of_run[CO2]:.4g}"),
        "source": "codecarbon, offline: the power of processors without a meter is estimated from their type and load",
        "training_type": "pre-training" if task == "image-feature-extraction" else "fine-tuning",
        "geographical_location": trainer.args.country_iso_code,
        "hardware_used": f"{trainer.args.world_size} x {_device_name()}",
    }


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU process"


def _write(trainer, facts: RunFacts, template: str, metadata: dict, **values) -> None:
    folder = trainer.args.output_dir
    curve = ""
    if is_installed("matplotlib"):
        loss_curve(trainer.state.log_history).savefig(os.path.join(folder, "loss_curve.png"), dpi=120)
        curve = "![Loss over steps](loss_curve.png)\n\n"
    location = trainer.args.hub_model_id or folder
    title = os.path.basename(os.path.normpath(location))
    unreadable = f" {len(trainer.unreadable)} of them could not be read." if trainer.unreadable else ""
    content = template.format(
        metadata=_metadata(trainer, facts, title, metadata),
        title=title,
        location=location,
        data=facts.data + unreadable,
        licence=_licence(facts),
        command=facts.command,
        results=_table(_results(trainer.state.log_history)),
        curve=curve,
        opening=FULL_DEPTH if getattr(trainer.processing_class, "image_range", None) is not None else "",
        **values,
    )
    ModelCard(content + CITATION).save(os.path.join(folder, "README.md"))
