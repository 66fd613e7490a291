#!/usr/bin/env python
# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Fine-tunes, probes and evaluates an image classifier.

    python run_image_classification.py --model_name_or_path outputs/photos --train_dir train \\
        --validation_dir validation --output_dir outputs/classifier --do_train --do_eval
    python run_image_classification.py --mode linear ...     # only a linear head learns
    python run_image_classification.py --mode knn ...        # nothing learns: k nearest neighbours
    python run_image_classification.py --mode embed ...      # features of images, as Parquet files
    accelerate launch run_image_classification.py ...        # any number of processes

Folders hold one sub-folder for each class. Without --train_dir and --dataset_name it classifies the ELPV photographs
of solar cells. Arguments may stand in a .yaml or .json file, named first; flags after it win.
"""

import gc


if __name__ == "__main__":
    gc.disable()  # for the imports: they leave no garbage, and looking for it takes a fifth of their time

import logging
import os
import sys
from dataclasses import dataclass, field, replace

from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from modeling_greenmim import GreenMIMConfig, GreenMIMForImageClassification
from modeling_greenmim.image_processing_greenmim import build_image_processor
from training_greenmim.classification.embedding import EmbeddingTrainer, draw_neighbours, save_embeddings
from training_greenmim.classification.metrics import load_metrics
from training_greenmim.classification.models import (
    as_evaluated,
    class_names,
    image_height_and_width,
    load_classifier,
)
from training_greenmim.classification.probes import (
    first_stages,
    fold_head,
    freeze_encoder,
    load_probe,
    use_neighbours,
)
from training_greenmim.classification.recipes import HELP, auto, recipe_defaults
from training_greenmim.classification.trainer import ClassificationTrainer, loss_of_batch
from training_greenmim.data import labels
from training_greenmim.data.image_dataset import EveryImage, ImageDataset
from training_greenmim.data.labels import LabelledData
from training_greenmim.data.readers import (
    DataSource,
    Part,
    check_first_readable,
    decoded_once,
    read_records,
)
from training_greenmim.data.statistics import (
    StatisticsSetting,
    check_values,
    depth_of,
    keep_statistics,
    set_statistics,
)
from training_greenmim.data.transforms import EvalTransform, TrainTransform
from training_greenmim.runs.arguments import (
    ClassificationTrainingArguments,
    ImageDataArguments,
    ModelSourceArguments,
    check_at_least,
    check_one_source,
    check_start,
    parse_arguments,
)
from training_greenmim.runs.auto import Recipe
from training_greenmim.runs.card import describe_run
from training_greenmim.runs.checkpoints import find_checkpoint
from training_greenmim.runs.lock import locked_output
from training_greenmim.runs.memory import fit_batch_size
from training_greenmim.runs.models import build_config, check_overrides, parse_overrides, read_config
from training_greenmim.runs.script import check_channels, evaluate, finish, run_script, train
from training_greenmim.runs.starts import Start, carry_channels, check_changes, image_processor_of, start_of


logger = logging.getLogger(__name__)

MODES = ("finetune", "linear", "knn", "embed")


@dataclass
class ModelArguments(ModelSourceArguments):
    """What to classify with."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to start from: GreenMIM's, pre-trained or fine-tuned, or any image classifier."},
    )
    mode: str = field(
        default="finetune",
        metadata={
            "help": "finetune, linear (frozen encoder, batch norm, linear head), knn (no training), or embed, which"
            " writes features with do_predict."
        },
    )
    recipe: str | None = field(default=None, metadata={"help": HELP})
    feature_stage: int | None = field(
        default=None, metadata={"help": "Stage that gives the features, from 1; default: the last."}
    )
    drop_path_rate: float = field(default=0.0, metadata={"help": "Stochastic depth of the last block."})
    embed_stages: list[int] | None = field(
        default=None, metadata={"help": "Stages, from 1, whose maps of features embed writes too (GreenMIM's models)."}
    )
    knn_k: int = field(default=20, metadata={"help": "Neighbours that vote."})
    knn_temperature: float = field(default=0.07, metadata={"help": "Temperature of the votes' weights."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a head that was trained for other classes."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"`mode` is {self.mode!r}; it must be one of {', '.join(MODES)}.")
        check_start(self)
        check_at_least(self, 1, "knn_k", "feature_stage")
        if not self.knn_temperature > 0:
            raise ValueError(f"`knn_temperature` is {self.knn_temperature}; it must be positive.")


@dataclass
class DataArguments(ImageDataArguments):
    """What to classify."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub or a local one (a folder of parquet files)."}
    )
    train_dir: str | None = field(default=None, metadata={"help": "Folder with a sub-folder for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same to evaluate on."})
    test_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of images to predict; default: the data set's test part, or validation."},
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images to evaluate on where there are no others."}
    )
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the labels."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many images only, drawn by the seed with each class's share."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many only, drawn likewise."})
    metrics: list[str] | None = field(
        default=None,
        metadata={"help": "Metrics: shipped ones (folder metrics/), paths or names on the Hub; default: what suits."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_one_source(self)


def load_data(data: DataArguments, args: ClassificationTrainingArguments) -> LabelledData:
    """Reads what the arguments name; images stay undecoded, labels become classes.

    Raises:
        `ValueError`: for folders or data sets that do not fit.
    """
    parts, columns = LabelledData(), (data.image_column_name, data.label_column_name)
    for name, part in read_records(DataSource.of(data), labelled=True).items():
        if name != "test" or args.do_predict:
            records = labels.prepare(part.records, part.argument, *columns, may_lack_labels=name == "test")
            setattr(parts, name, Part(records, part.argument))
    if parts.validation is None and parts.train is not None and (args.do_eval or args.do_predict):
        train, validation = labels.split(parts.train.records, data.train_val_split, args.seed)
        parts.train, parts.validation = Part(train, parts.train.argument), Part(validation, parts.train.argument)
    if parts.test is None and args.do_predict:
        parts.test = parts.validation
    return parts


def check_data(parts: LabelledData, args: ClassificationTrainingArguments, mode: str) -> None:
    """Makes sure that every part that is needed is there.

    Raises:
        `ValueError`: naming the arguments that would bring it.
    """
    if args.do_train or mode == "knn":
        if parts.train is None:
            raise ValueError("There are no training images: give `train_dir`, or a `dataset_name` with a split train.")
        labels.check_classes(parts.train.records, parts.train.argument)
    if args.do_eval and parts.validation is None:
        raise ValueError(
            "`do_eval` is set, but there is nothing to evaluate on: give `validation_dir` or `train_dir`."
        )
    if args.do_predict and parts.test is None:
        raise ValueError("`do_predict` is set, but there is nothing to predict: give `test_dir`.")


def check_work(model_args: ModelArguments, args: ClassificationTrainingArguments) -> None:
    """Refuses runs without anything to do, and training where nothing learns.

    Raises:
        `ValueError`: naming the arguments.
    """
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("Nothing to do: give `do_train`, `do_eval`, `do_predict` or some of them.")
    if model_args.mode == "knn" and args.do_train:
        raise ValueError(
            "`mode` is 'knn', in which nothing learns; give `do_eval` or `do_predict` without `do_train`."
        )
    if model_args.mode == "embed" and (args.do_train or args.do_eval or not args.do_predict):
        raise ValueError("`mode` is 'embed', which writes features and nothing else: give `do_predict` alone.")
    if model_args.mode == "embed" and model_args.config_name:
        raise ValueError(
            f"`config_name` is {model_args.config_name!r}, which starts from scratch, but `mode` is 'embed': give"
            " `model_name_or_path`."
        )
    if model_args.embed_stages and model_args.mode != "embed":
        raise ValueError(
            f"`embed_stages` is {model_args.embed_stages}, but `mode` is {model_args.mode!r}, not 'embed'."
        )


def build_model(model_args: ModelArguments, names: list[str] | None, checkpoint: str | None = None) -> tuple:
    """The classifier, its image processor, and what it goes on from.

    Args:
        names: of the classes; None keeps the classes and the head of a trained classifier.
        checkpoint: of the run itself, which then takes the place of what the arguments start from.

    Raises:
        `ValueError`: for checkpoints that do not fit.
    """
    if checkpoint:
        read_config(checkpoint, "resume_from_checkpoint")  # checkpoints in parts have none
        if model_args.mode == "linear":
            probe = load_probe(checkpoint, model_args.attn_implementation)
            return probe, AutoImageProcessor.from_pretrained(checkpoint), None
        # A checkpoint has its configuration and its stages.
        own = {"config_name": None, "config_overrides": None, "feature_stage": None}
        model_args = replace(model_args, model_name_or_path=checkpoint, **own)
    if model_args.config_name:
        model, image_processor = new_model(model_args, names)
        origin = None
    else:
        with start_of(model_args.model_name_or_path, "model_name_or_path", any_model=True) as start:
            model, image_processor = load_start(model_args, start, names)
        origin = None if checkpoint else start.origin
    return take_stages(model, model_args, names), image_processor, origin


def new_model(model_args: ModelArguments, names: list[str] | None) -> tuple:
    """A classifier from scratch, and its image processor.

    Raises:
        `ValueError`: without classes, and for configurations that there are not.
    """
    if names is None:
        raise ValueError("`config_name` starts from scratch, so there is no classifier yet: give `do_train` too.")
    values = build_config(model_args.config_name, model_args.config_overrides).to_dict()
    values["drop_path_rate"] = model_args.drop_path_rate
    overrides = parse_overrides(model_args.config_overrides)
    config = GreenMIMConfig(**{**values, **overrides, **class_names(names)})
    attention = model_args.attn_implementation
    model = AutoModelForImageClassification.from_config(config, attn_implementation=attention)
    return model, build_image_processor(config)


def load_start(model_args: ModelArguments, start: Start, names: list[str] | None) -> tuple:
    """The classifier that a checkpoint makes, and its image processor; errors as in `load_classifier`."""
    overrides = parse_overrides(model_args.config_overrides)
    if start.config.get("model_type") == GreenMIMConfig.model_type:
        check_overrides(overrides, GreenMIMConfig)
        check_changes(start.config, {**start.config, **overrides}, start.name)
    model = load_classifier(
        start.folder,
        names,
        overrides,
        # A frozen encoder drops nothing.
        model_args.drop_path_rate if model_args.mode == "finetune" else 0.0,
        # Probes replace the head.
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes or model_args.mode != "finetune",
        needs_head=model_args.mode != "embed",
        called=start.name,
        attn_implementation=model_args.attn_implementation,
    )
    if not isinstance(model, GreenMIMForImageClassification):
        return model, AutoImageProcessor.from_pretrained(start.folder)
    carry_channels(model, start, model_args.channel_weights)
    return model, image_processor_of(start, model.config)


def take_stages(model, model_args: ModelArguments, names: list[str] | None):
    """The model up to `feature_stage`, where one is given.

    Raises:
        `ValueError`: for other models, stages that there are not, and where a head that is needed is not trained.
    """
    stage = model_args.feature_stage
    if stage is None:
        return model
    if not isinstance(model, GreenMIMForImageClassification):
        raise ValueError(
            f"`feature_stage` is {stage}, which needs a GreenMIM model, but the model is a {type(model).__name__}."
        )
    shortened = first_stages(model, stage)
    if names is None and shortened is not model and model_args.mode != "embed":
        raise ValueError(
            f"`feature_stage` is {stage}, on which no classifier was trained: give `do_train`, or `mode` knn or embed."
        )
    return shortened


def scale_images(
    parts: LabelledData, data: DataArguments, args: ClassificationTrainingArguments, config, image_processor
) -> None:
    """Gives an image processor of ours what training images are scaled by; without training it stays as it is.

    Raises:
        `ValueError`: as in `set_statistics`, and for numbers to be measured where nothing is trained.
    """
    if args.do_train:
        channels = getattr(config, "num_channels", 3)
        set_statistics(image_processor, data.statistics, parts.train, "image", channels, args)
    elif data.statistics != StatisticsSetting():
        raise ValueError(
            f"`image_statistics` is {data.image_statistics!r} and `nodata` is {data.nodata}, but without `do_train`"
            " images are scaled as the model was trained."
        )


def build_datasets(parts: LabelledData, args: ClassificationTrainingArguments, config, image_processor) -> dict:
    """Sets of decoded images, after a look for a readable one in each.

    Returns:
        `train`, augmented, where training is asked for; `bank`, the training images as for evaluation; `validation`
        and `test`. None for what there is not.

    Raises:
        `ValueError`: when there is not a single batch to train on.
    """
    evaluated = evaluation_transform(args, config, image_processor)
    for part in parts.parts():
        check_first_readable(part.records, "image", evaluated, part.argument)
        if not (args.do_train and part is parts.train):  # which `scale_images` has looked at
            check_values(part, "image", evaluated.channels, image_processor, args)

    def every_image(part: Part | None) -> EveryImage | None:
        if part is None:
            return None
        label_column = labels.LABEL if part.is_labelled else None
        return EveryImage(part.records, "image", evaluated, args.seed, label_column)

    train = None
    if args.do_train:
        size, channels, depth = evaluated.size, evaluated.channels, evaluated.depth
        transform = TrainTransform(size, channels, (args.min_crop_scale, 1.0), depth)
        records = parts.train.records
        if args.decode_once:
            with args.main_process_first(desc="decoding images"):
                records = decoded_once(records, "image", None if depth is None else channels)
        train = ImageDataset(records, "image", transform, args.seed, labels.LABEL)
        batch = args.train_batch_size * args.world_size
        if len(train) < batch:
            raise ValueError(
                f"`per_device_train_batch_size` is {args.per_device_train_batch_size}, which makes batches of {batch}"
                f" images over all processes, but there are {len(train)} training images."
            )
    everything = {"bank": parts.train, "validation": parts.validation, "test": parts.test}
    return {"train": train} | {name: every_image(part) for name, part in everything.items()}


def evaluation_transform(args: ClassificationTrainingArguments, config, image_processor) -> EvalTransform:
    """What images become for a model, but in training.

    Raises:
        `ValueError`: for models of other channels than their image processor serves.
    """
    size, channels = image_height_and_width(config, image_processor), getattr(config, "num_channels", 3)
    depth = depth_of(image_processor)
    if depth is None:
        check_channels(channels)
    return EvalTransform(size, channels, args.crop_pct, depth)


def main(argv: list[str] | None = None) -> None:
    """Runs fine-tuning, a probe, evaluation or prediction."""
    argv = sys.argv[1:] if argv is None else argv
    dataclass_types = (ModelArguments, DataArguments, ClassificationTrainingArguments)
    recipe = Recipe(recipe_defaults, auto, labelled=True)
    model_args, data_args, args = parse_arguments(dataclass_types, argv, recipe)
    check_work(model_args, args)
    args.set_up_logging()
    recipe.explain(model_args, data_args, args)
    with locked_output(args):
        if model_args.mode == "embed":
            embed(model_args, data_args, args)
        else:
            run(model_args, data_args, args, argv)


def run(
    model_args: ModelArguments, data_args: DataArguments, args: ClassificationTrainingArguments, argv: list[str]
) -> None:
    """Trains, evaluates, predicts and writes what came of it."""
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)

    parts = load_data(data_args, args)
    check_data(parts, args, model_args.mode)
    if parts.train is not None:
        parts.train.records = labels.stratified_subset(
            parts.train.records, data_args.max_train_samples, args.seed, "max_train_samples"
        )
    if parts.validation is not None:
        count = data_args.max_eval_samples
        parts.validation.records = labels.stratified_subset(
            parts.validation.records, count, args.seed, "max_eval_samples"
        )
    learns = args.do_train or model_args.mode == "knn"
    names = labels.label_names(parts.train.records) if learns else None
    # Training loads its checkpoint itself, with all that belongs to it.
    model, image_processor, origin = build_model(model_args, names, None if args.do_train else checkpoint)
    if checkpoint and args.do_train:
        # A run goes on with what it measured at its start.
        keep_statistics(checkpoint, image_processor)
    scale_images(parts, data_args, args, model.config, image_processor)
    image_processor = as_evaluated(image_processor, model.config, args.crop_pct)
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    parts.number_as(names, "`train_dir`" if learns else "the model")
    if model_args.mode == "linear" and args.do_train:
        freeze_encoder(model)
    if args.auto_batch_size and args.do_train:
        size = image_height_and_width(model.config, image_processor)
        # Mixing and batch norm need two images.
        least = 2 if args.mixup or args.cutmix or model_args.mode == "linear" else 1
        loss_of = loss_of_batch(model.config, size)
        fit_batch_size(args, model, loss_of, checkpoint, len(parts.train.records), least)
    images = build_datasets(parts, args, model.config, image_processor)

    trainer = ClassificationTrainer(
        model,
        args,
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        image_processor=image_processor,
        metrics=load_metrics(data_args.metrics, len(names)),
        class_weights=labels.class_weights(parts.train.records) if args.balance and args.do_train else None,
        facts=describe_run(
            "run_image_classification.py",
            argv,
            {"training": images["train"], "evaluation": images["validation"]},
            data_args.dataset_name,
            data_args.train_dir or data_args.validation_dir or data_args.test_dir,
            elpv_labels="A cell counts as defective when the probability of a defect is at least 0.5. ",
            arguments=(model_args, data_args),
            origin=origin,
        ),
    )
    if model_args.mode == "knn":
        use_neighbours(trainer, images["bank"], model_args.knn_k, model_args.knn_temperature)
    if args.do_train:
        train(trainer, checkpoint)
    elif checkpoint:
        trainer.load_state(checkpoint)
    if args.do_eval:
        evaluate(trainer)
    if args.do_predict:
        path = os.path.join(args.output_dir, "predictions.csv")
        trainer.save_predictions(trainer.predict(images["test"]), images["test"], path)
        logger.info(f"Predictions: {path}")
    if args.do_train:
        if trainer.ema is not None:
            trainer.save_averaged_model()
        if model_args.mode == "linear":
            fold_head(model)
        trainer.save_model()
    finish(trainer)


def embed(model_args: ModelArguments, data_args: DataArguments, args: ClassificationTrainingArguments) -> None:
    """Writes features of all images that are named, and a picture of neighbours."""
    set_seed(args.seed)
    parts = read_records(DataSource.of(data_args), labelled=True)
    columns = (data_args.image_column_name, data_args.label_column_name)
    model, image_processor, _ = build_model(model_args, None)
    image_processor = as_evaluated(image_processor, model.config, args.crop_pct)
    transform = evaluation_transform(args, model.config, image_processor)
    trainer = EmbeddingTrainer(model, args, image_processor=image_processor, stages=model_args.embed_stages or [])
    for name, part in parts.items():
        records = labels.prepare(part.records, part.argument, *columns, may_lack_labels=True)
        check_first_readable(records, "image", transform, part.argument)
        check_values(Part(records, part.argument), "image", transform.channels, image_processor, args)
        label = labels.LABEL if labels.LABEL in records.features else None
        images = EveryImage(records, "image", transform, args.seed, label)
        paths = save_embeddings(trainer, images, name)
        picture = os.path.join(args.output_dir, f"{name}_neighbours.png")
        if trainer.is_world_process_zero() and draw_neighbours(paths, images, picture, args.picture_channels):
            logger.info(f"Images and their neighbours: {picture}")


if __name__ == "__main__":
    run_script(main)
