#!/usr/bin/env python
# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains and evaluates a model of semantic segmentation on a pre-trained encoder, and predicts with it.

    python examples/dense/run_semantic_segmentation.py --model_name_or_path outputs/photos --train_dir train \\
        --validation_dir validation --output_dir outputs/segmenter --do_train --do_eval
    python examples/dense/run_semantic_segmentation.py --model_name_or_path outputs/segmenter --test_dir images \\
        --output_dir outputs/masks --do_predict
    accelerate launch examples/dense/run_semantic_segmentation.py ...        # any number of processes

Folders hold images/ and masks/, whose files have the same names; a mask has the class number of each pixel. Arguments
may stand in a .yaml or .json file, named first; flags after it win.
"""

import gc


if __name__ == "__main__":
    gc.disable()  # for the imports: they leave no garbage, and looking for it takes a fifth of their time

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path


# In a clone the packages lie beside the folder of examples.
sys.path.append(str(Path(__file__).parents[2]))

from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation, set_seed

from training_greenmim.data.readers import Part, check_first_readable
from training_greenmim.data.statistics import check_values, depth_of, keep_statistics, set_statistics
from training_greenmim.dense.arguments import (
    SegmentationDataArguments,
    SegmentationModelArguments,
    SegmentationTrainingArguments,
)
from training_greenmim.dense.models import freeze_stages, is_finished, load_dense_model, trained_names
from training_greenmim.dense.pairs import (
    IMAGE,
    ClassMaps,
    CropTransform,
    EveryPair,
    PairDataset,
    WholeTransform,
    check_masks,
    find_label_names,
    read_pairs,
    split,
    subset,
)
from training_greenmim.dense.recipes import recipe_defaults
from training_greenmim.dense.segmentation import SegmentationTrainer
from training_greenmim.runs.arguments import parse_arguments
from training_greenmim.runs.card import describe_run
from training_greenmim.runs.checkpoints import find_checkpoint
from training_greenmim.runs.lock import locked_output
from training_greenmim.runs.models import channels_of, read_config
from training_greenmim.runs.script import evaluate, finish, run_script, train


logger = logging.getLogger(__name__)

# What loads finished models: UperNet and Mask2Former.
MODEL_CLASSES = (AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation)


def load_data(data: SegmentationDataArguments, args: SegmentationTrainingArguments) -> dict[str, Part]:
    """The parts that the run needs: `train`, `validation` and `test`.

    Raises:
        `ValueError`: for folders or data sets that do not fit, and parts that lack.
    """
    parts = read_pairs(data)
    if "validation" not in parts and "train" in parts and (args.do_train or args.do_eval or args.do_predict):
        whole = parts["train"]
        records = split(whole.records, data.train_val_split, args.seed)
        parts["train"], parts["validation"] = (Part(part, whole.argument) for part in records)
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts["validation"]
    for name, wanted, argument in (
        ("train", args.do_train, "train_dir"),
        ("validation", args.do_eval, "validation_dir"),
        ("test", args.do_predict, "test_dir"),
    ):
        if wanted and name not in parts:
            raise ValueError(f"There are no images for `do_{_PURPOSES[name]}`: give `{argument}` or `dataset_name`.")
    if "train" in parts:
        parts["train"].records = subset(parts["train"].records, data.max_train_samples, args.seed)
    if "validation" in parts:
        parts["validation"].records = subset(parts["validation"].records, data.max_eval_samples, args.seed)
    wanted = {"train": args.do_train, "validation": args.do_train or args.do_eval, "test": args.do_predict}
    return {name: part for name, part in parts.items() if wanted[name]}


_PURPOSES = {"train": "train", "validation": "eval", "test": "predict"}


def build_datasets(parts: dict[str, Part], args, data, model, image_processor) -> dict:
    """Sets of decoded pairs for `train`, `validation` and `test`, after a look for a readable image in each.

    Raises:
        `ValueError`: when there is not a single batch to train on.
    """
    channels, depth = channels_of(model.config), depth_of(image_processor)
    maps = ClassMaps(model.config.num_labels, data.ignore_index)
    whole, images = WholeTransform(channels, depth), {}
    for name, part in parts.items():
        check_first_readable(part.records, IMAGE, lambda source, generator: whole(source), part.argument)
        if name != "train":  # whose values statistics have looked at
            check_values(part, IMAGE, channels, image_processor, args)
            images[name] = EveryPair(part.records, whole, args.seed, maps)
            continue
        crop = (args.crop_size, args.crop_size)
        transform = CropTransform(
            crop, channels, tuple(args.scale_range), data.ignore_index, args.max_class_share, depth
        )
        images[name] = PairDataset(part.records, transform, args.seed, maps)
        batch = args.train_batch_size * args.world_size
        if len(part.records) < batch:
            raise ValueError(
                f"`per_device_train_batch_size` is {args.per_device_train_batch_size}, which makes batches of {batch}"
                f" images over all processes, but there are {len(part.records)} training images."
            )
    return images


def main(argv: list[str] | None = None) -> None:
    """Runs training, evaluation or prediction."""
    argv = sys.argv[1:] if argv is None else argv
    dataclass_types = (SegmentationModelArguments, SegmentationDataArguments, SegmentationTrainingArguments)
    model_args, data_args, args = parse_arguments(dataclass_types, argv, recipe_defaults)
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("Nothing to do: give `do_train`, `do_eval`, `do_predict` or some of them.")
    args.set_up_logging()
    with locked_output(args):
        run(model_args, data_args, args, argv)


def run(
    model_args: SegmentationModelArguments,
    data_args: SegmentationDataArguments,
    args: SegmentationTrainingArguments,
    argv: list[str],
) -> None:
    """Trains, evaluates, predicts and writes what came of it."""
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    parts = load_data(data_args, args)
    names = None
    if args.do_train:
        start, names = model_args.model_name_or_path, find_label_names(data_args)
        if names is None and start and is_finished(start):
            names = trained_names(start)
        names = check_masks(parts["train"], names, data_args.ignore_index)
    elif checkpoint:
        read_config(checkpoint, "resume_from_checkpoint")  # checkpoints in parts have none
        # A checkpoint has its configuration.
        own = {"config_name": None, "config_overrides": None, "head_overrides": None}
        model_args = replace(model_args, model_name_or_path=checkpoint, **own)
    model, image_processor, origin = load_dense_model(model_args, MODEL_CLASSES, names)
    model.config.loss_ignore_index = data_args.ignore_index
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    if "validation" in parts:
        check_masks(parts["validation"], names, data_args.ignore_index)
    if args.do_train:
        if checkpoint:
            # A run goes on with what it measured at its start.
            keep_statistics(checkpoint, image_processor)
        channels = channels_of(model.config)
        set_statistics(image_processor, data_args.statistics, parts["train"], IMAGE, channels, args)
        # Images keep their size; a finished folder is evaluated in the same windows, usually as large as the crops.
        image_processor.do_resize = False
        image_processor.size = {"height": args.crop_size, "width": args.crop_size}
        image_processor.eval_window = None if args.eval_window == args.crop_size else args.eval_window
        freeze_stages(model, model_args.freeze_stages)
    images = build_datasets(parts, args, data_args, model, image_processor)
    trainer = SegmentationTrainer(
        model,
        args,
        train_dataset=images.get("train"),
        eval_dataset=images.get("validation"),
        image_processor=image_processor,
        ignore_index=data_args.ignore_index,
        facts=describe_run(
            "examples/dense/run_semantic_segmentation.py",
            argv,
            {"training": images.get("train"), "evaluation": images.get("validation")},
            data_args.dataset_name,
            data_args.train_dir or data_args.validation_dir or data_args.test_dir,
            arguments=(model_args, data_args),
            origin=origin,
        ),
    )
    if args.do_train:
        train(trainer, checkpoint)
    elif checkpoint:
        trainer.load_state(checkpoint)
    if args.do_eval:
        evaluate(trainer)
    if args.do_predict:
        folder = os.path.join(args.output_dir, "predictions")
        trainer.save_predictions(images["test"], folder)
        logger.info(f"Predictions: {folder}")
    if args.do_train:
        trainer.save_model()
    finish(trainer)


if __name__ == "__main__":
    run_script(main)
