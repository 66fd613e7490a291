#!/usr/bin/env python
# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pre-trains a GreenMIM model on images without labels.

    python run_mim.py --train_dir photos --output_dir outputs/photos --config_name tiny --do_train
    python run_mim.py examples/pretrain_elpv.yaml          # a .yaml or .json file, flags after it win
    accelerate launch run_mim.py ...                       # any number of processes

Without --train_dir and --dataset_name it trains on the ELPV photographs of solar cells.
"""

import gc


if __name__ == "__main__":
    gc.disable()  # for the imports: they leave no garbage, and looking for it takes a fifth of their time

import logging
import os
import sys
from dataclasses import dataclass, field

import torch
from datasets.distributed import split_dataset_by_node
from transformers import AutoImageProcessor, AutoModelForPreTraining, set_seed

from modeling_greenmim import GreenMIMConfig, GreenMIMForPreTraining
from modeling_greenmim.image_processing_greenmim import build_image_processor
from training_greenmim.data import labels
from training_greenmim.data.image_dataset import EveryImage, ImageDataset
from training_greenmim.data.readers import (
    DataSource,
    Part,
    check_first_readable,
    decoded_once,
    find_image_column,
    load_class_folders,
    read_records,
    undecoded,
)
from training_greenmim.data.statistics import check_values, depth_of, keep_statistics, set_statistics
from training_greenmim.data.streams import ImageStream
from training_greenmim.data.transforms import EvalTransform, TrainTransform
from training_greenmim.pretraining.recipes import RECIPES, auto, recipe_defaults
from training_greenmim.pretraining.targets import TargetArguments
from training_greenmim.pretraining.teacher import Teacher, load_teacher
from training_greenmim.pretraining.teacher_cache import CachedDataset, FixedViews, cached_features
from training_greenmim.pretraining.trainer import MIMTrainer, loss_of_batch
from training_greenmim.runs.arguments import (
    ImageDataArguments,
    MIMTrainingArguments,
    ModelSourceArguments,
    parse_arguments,
)
from training_greenmim.runs.auto import Recipe
from training_greenmim.runs.card import describe_run
from training_greenmim.runs.checkpoints import find_checkpoint
from training_greenmim.runs.lock import locked_output
from training_greenmim.runs.memory import fit_batch_size
from training_greenmim.runs.models import build_config, changed_config, from_pretrained, read_greenmim_config
from training_greenmim.runs.script import evaluate, finish, run_script, train
from training_greenmim.runs.starts import carry_channels, check_changes, image_processor_of, start_of


logger = logging.getLogger(__name__)

# Images that a stream shuffles among, encoded.
SHUFFLE_BUFFER = 1000


@dataclass
class ModelArguments(ModelSourceArguments):
    """What to train."""

    recipe: str | None = field(
        default=None,
        metadata={
            "help": f"Set of arguments: {' or '.join(RECIPES)}, as published; continue: gently on from a model; auto:"
            " what the images and the device ask for, told with reasons. Flags and files win over it."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model_name_or_path and self.config_name:
            raise ValueError(
                f"`model_name_or_path` is {self.model_name_or_path!r} and `config_name` is {self.config_name!r}; give"
                " one of them. `config_overrides` changes what a checkpoint leaves open."
            )


@dataclass
class DataArguments(ImageDataArguments):
    """What to train on."""

    streaming: bool = field(default=False, metadata={"help": "Read the data set as a stream; needs max_steps."})
    min_crop_scale: float = field(default=0.2, metadata={"help": "Smallest share of an image's area that is cropped."})
    probe_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with a sub-folder for each class: evaluations tell how well the features separate these"
            " classes; default: the evaluation images, where a data set has labels. Training sees no label."
        },
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels of a data set's evaluation images, for the same."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name and self.train_dir:
            raise ValueError(
                f"`dataset_name` is {self.dataset_name!r} and `train_dir` is {self.train_dir!r}; give one of them."
            )
        if self.validation_dir and not self.train_dir:
            raise ValueError(f"`validation_dir` is {self.validation_dir!r}, but there is no `train_dir`.")
        if self.streaming and not self.dataset_name:
            raise ValueError("`streaming` is for a `dataset_name`; folders of images are read as they are.")
        if self.label_column_name and (self.probe_dir or not self.dataset_name or self.streaming):
            raise ValueError(
                f"`label_column_name` is {self.label_column_name!r}, which is for a `dataset_name` that is no stream;"
                " folders have their labels in `probe_dir`."
            )
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"`min_crop_scale` is {self.min_crop_scale}; it must be in (0, 1].")


def load_data(data: DataArguments, args: MIMTrainingArguments):
    """Training and evaluation records, the name of the image column, and what the data is called in messages.

    Evaluation records of a data set keep their label column, if they have one.

    Raises:
        `ValueError`: when there is nothing to evaluate on but evaluation is asked for, or `max_steps` lacks.
    """
    parts = read_records(DataSource.of(data), needs_train=True)
    train, validation, argument = parts["train"].records, None, parts["train"].argument
    if "validation" in parts:
        validation = parts["validation"].records
    column = find_image_column(train, data.image_column_name)
    kept = label_columns(train if validation is None else validation, data)
    if validation is not None:
        validation = undecoded(validation, column, *kept)
    elif args.do_eval and data.streaming:
        raise ValueError("`do_eval` is set, but the stream has no split validation or test.")
    elif args.do_eval:
        train, validation = held_out(undecoded(train, column, *kept), data, args.seed, argument)
    train = undecoded(train, column)
    if data.streaming and args.decode_once:
        raise ValueError("`decode_once` is set, but a stream is not kept; give one of `decode_once` and `streaming`.")
    if data.streaming and args.do_train and args.max_steps <= 0:
        raise ValueError("`streaming` is set: a stream has no known length, so `max_steps` is needed.")
    train, validation = first_records(train, data.max_train_samples), first_records(validation, data.max_eval_samples)
    return train, validation, column, argument


def label_columns(records, data: DataArguments) -> list[str]:
    """The label column of evaluation records, where there is one; streams are read without.

    Raises:
        `ValueError`: when the column that was named does not exist.
    """
    if data.probe_dir or data.streaming:
        return []
    try:
        return [labels.find_label_column(records, data.label_column_name)]
    except ValueError:
        if data.label_column_name is not None:
            raise
        return []


def held_out(records, data: DataArguments, seed: int, argument: str) -> tuple:
    """Two parts of a data set, drawn by the seed, the second with `train_val_split` of the images.

    Raises:
        `ValueError`: when there are too few images for two parts.
    """
    try:
        parts = records.train_test_split(data.train_val_split, seed=seed)
    except ValueError as error:
        raise ValueError(
            f"`train_val_split` is {data.train_val_split}, but `{argument}` has {len(records)} image(s), too few to"
            " train on some and evaluate on others; give `validation_dir`, more images, or no `do_eval`."
        ) from error
    return parts["train"], parts["test"]


def first_records(records, count: int | None):
    """The first `count` records of a data set or stream."""
    if records is None or count is None:
        return records
    return records.take(count)


def build_datasets(
    data: DataArguments,
    target: TargetArguments,
    args: MIMTrainingArguments,
    config,
    image_processor,
    teacher: Teacher | None,
) -> tuple:
    """Training and evaluation sets of decoded images, after a look for a readable one in each.

    The image processor is given what images are scaled by.
    """
    train, validation, column, argument = load_data(data, args)
    size, channels = config.image_height_and_width, config.num_channels
    # A teacher sees the same crop, in a size of its own: images are cropped to the larger, and reduced on the device.
    size = size if teacher is None else max(size, teacher.size)
    depth = set_statistics(image_processor, data.statistics, Part(train, argument), column, channels, args)
    evaluated = EvalTransform(size, channels, depth=depth)
    check_first_readable(train, column, evaluated, argument)
    if args.decode_once:
        with args.main_process_first(desc="decoding images"):
            train = decoded_once(train, column, None if depth is None else channels)
    train_dataset = eval_dataset = None
    if args.do_train:
        scale = (data.min_crop_scale, 1.0)
        if data.streaming:
            transform = TrainTransform(size, channels, scale, depth)
            train = train.shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER)
            # By shards each process reads only what it uses.
            strategy = "shards" if train.num_shards >= args.world_size else "examples"
            train = split_dataset_by_node(train, args.process_index, args.world_size, strategy)
            train_dataset = ImageStream(train, column, transform, args.seed, args.process_index, repeat=True)
        elif target.cache_teacher:
            views = FixedViews(config.image_height_and_width, channels, target.teacher_crops, scale, args.seed, depth)
            with args.main_process_first(desc="features of the teacher"):
                features = cached_features(target.cache_teacher, train, column, teacher, views)
            train_dataset = CachedDataset(train, column, views, args.seed, features)
        else:
            train_dataset = ImageDataset(train, column, TrainTransform(size, channels, scale, depth), args.seed)
    if args.do_eval:
        evaluation_argument = "validation_dir" if data.validation_dir else argument
        check_first_readable(validation, column, evaluated, evaluation_argument)
        check_values(Part(validation, evaluation_argument), column, channels, image_processor, args)
        dataset_class = ImageStream if data.streaming else ImageDataset
        eval_dataset = dataset_class(validation, column, evaluated, args.seed)
    return train_dataset, eval_dataset


def build_probe(
    data: DataArguments, args: MIMTrainingArguments, config, image_processor, evaluation
) -> EveryImage | None:
    """Labelled images for the monitors: those of `probe_dir`, or the evaluation images of a data set with labels.

    Raises:
        `ValueError`: for a `probe_dir`, or a `label_column_name`, that does not tell classes apart.
    """
    if not args.do_eval:
        return None
    transform = EvalTransform(config.image_height_and_width, config.num_channels, depth=depth_of(image_processor))
    if data.probe_dir:
        records = load_class_folders(data.probe_dir, "probe_dir", DataSource.of(data))
        labels.check_classes(records, "probe_dir")
        check_first_readable(records, "image", transform, "probe_dir")
        check_values(Part(records, "probe_dir"), "image", config.num_channels, image_processor, args)
    else:
        records = labelled_records(evaluation, data)
    if records is None:
        return None
    return EveryImage(records, "image", transform, args.seed, labels.LABEL)


def labelled_records(evaluation, data: DataArguments):
    """The records of evaluation images with their classes; None where they have none, or too few to tell apart."""
    if data.streaming or len(evaluation.records.features) < 2:
        return None
    others = [name for name in evaluation.records.features if name != evaluation.column]
    try:
        records = labels.prepare(evaluation.records, "dataset_name", evaluation.column, *others)
        labels.check_classes(records, "dataset_name")
    except ValueError as error:
        if data.label_column_name is not None:
            raise
        logger.info(f"Evaluations go without k-NN and linear probe: {error}")
        return None
    return records


def build_model(
    model_args: ModelArguments, target: TargetArguments, args: MIMTrainingArguments, checkpoint: str | None = None
) -> tuple:
    """The model, from a checkpoint of the run or to go on from, or new; its image processor, teacher and origin.

    Raises:
        `ValueError`: for checkpoints of other models, configurations that there are not, and teachers that are none.
    """
    attention, name = model_args.attn_implementation, model_args.model_name_or_path
    # Checkpoints in parts have no configuration: theirs is that of the arguments.
    if checkpoint and os.path.isfile(os.path.join(checkpoint, "config.json")):
        config = GreenMIMConfig(**read_greenmim_config(checkpoint, "resume_from_checkpoint"))
        model, _ = from_pretrained(GreenMIMForPreTraining, checkpoint, config=config, attn_implementation=attention)
        return model, AutoImageProcessor.from_pretrained(checkpoint), build_teacher(target, config, args), None
    # The width of a teacher's features is known once it is loaded, for which the size of the images is needed.
    overrides = model_args.config_overrides
    if not name:
        config = build_config(model_args.config_name or "base", overrides, target.config_values())
        teacher = build_teacher(target, config, args)
        if teacher is not None:
            config.target_width = teacher.width
        model = AutoModelForPreTraining.from_config(config, attn_implementation=attention)
        return model, build_image_processor(config), teacher, None
    with start_of(name, "model_name_or_path") as start:
        values = target.config_values(start.config)
        config = changed_config(start.config, overrides, values, f"`model_name_or_path` is {name!r}")
        check_changes(start.config, config.to_dict(), name)
        teacher = build_teacher(target, config, args)
        if teacher is not None:
            config.target_width = teacher.width
        # Another target has another decoder; what else may differ was checked.
        may_differ = bool(target.target or overrides)
        model, _ = from_pretrained(
            GreenMIMForPreTraining,
            start.folder,
            called=name,
            config=config,
            ignore_mismatched_sizes=may_differ,
            attn_implementation=attention,
        )
        carry_channels(model, start, model_args.channel_weights)
        return model, image_processor_of(start, config), teacher, start.origin


def build_teacher(target: TargetArguments, config: GreenMIMConfig, args: MIMTrainingArguments) -> Teacher | None:
    """The frozen model whose features are predicted, if any; errors as in `load_teacher`."""
    if target.target != "teacher":
        return None
    return load_teacher(
        target.teacher,
        config.num_channels,
        config.image_height_and_width,
        target.teacher_image_size,
        target.teacher_revision,
        args.device,
        torch.bfloat16 if args.bf16 else torch.float32,
    )


ARGUMENTS = (ModelArguments, TargetArguments, DataArguments, MIMTrainingArguments)


def main(argv: list[str] | None = None) -> None:
    """Runs pre-training."""
    argv = sys.argv[1:] if argv is None else argv
    recipe = Recipe(recipe_defaults, auto, labelled=False)
    model_args, target_args, data_args, args = parse_arguments(ARGUMENTS, argv, recipe)
    if not (args.do_train or args.do_eval):
        raise ValueError("Nothing to do: give `do_train`, `do_eval` or both.")
    if data_args.probe_dir and not args.do_eval:
        raise ValueError(f"`probe_dir` is {data_args.probe_dir!r}, which evaluations look at: give `do_eval` too.")
    args.set_up_logging()
    recipe.explain(model_args, target_args, data_args, args)
    with locked_output(args):
        run(model_args, target_args, data_args, args, argv)


def run(
    model_args: ModelArguments,
    target_args: TargetArguments,
    data_args: DataArguments,
    args: MIMTrainingArguments,
    argv: list[str],
) -> None:
    """Trains, evaluates and writes what came of it."""
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    evaluated = None if args.do_train else checkpoint  # training loads its checkpoint itself
    model, image_processor, teacher, origin = build_model(model_args, target_args, args, evaluated)
    if checkpoint and not evaluated:
        # A run goes on with what it measured at its start.
        keep_statistics(checkpoint, image_processor)
    train_dataset, eval_dataset = build_datasets(data_args, target_args, args, model.config, image_processor, teacher)
    if args.auto_batch_size and args.do_train:
        takes_whole_batches = args.dataloader_drop_last or args.torch_compile
        images = len(train_dataset) if takes_whole_batches and not data_args.streaming else None
        fit_batch_size(args, model, loss_of_batch(model.config, args), checkpoint, images)
    trainer = MIMTrainer(
        model,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        probe_dataset=build_probe(data_args, args, model.config, image_processor, eval_dataset),
        image_processor=image_processor,
        teacher=teacher,
        facts=describe_run(
            "run_mim.py",
            argv,
            {"training": train_dataset, "evaluation": eval_dataset},
            data_args.dataset_name,
            data_args.train_dir,
            arguments=(model_args, target_args, data_args),
            origin=origin,
        ),
    )

    if evaluated:
        trainer.load_checkpoint(evaluated)
    if args.do_train:
        train(trainer, checkpoint)
        trainer.save_model()
    if args.do_eval:
        evaluate(trainer)
    finish(trainer)
    if trainer.last_picture:
        logger.info(f"Originals, masked inputs and reconstructions: {trainer.last_picture}")


if __name__ == "__main__":
    run_script(main)
