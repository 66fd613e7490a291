#!/usr/bin/env python
# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains and evaluates a model that finds objects, as boxes or as masks, on a pre-trained encoder; predicts with it.

    python examples/dense/run_object_detection.py --model_name_or_path outputs/photos --train_dir train \\
        --validation_dir validation --output_dir outputs/detector --do_train --do_eval
    python examples/dense/run_object_detection.py --task instances ...       # masks of objects too
    python examples/dense/run_object_detection.py --model_name_or_path outputs/detector --test_dir images \\
        --output_dir outputs/found --do_predict
    accelerate launch examples/dense/run_object_detection.py ...             # any number of processes

Folders hold images and annotations.json in COCO's format. Arguments may stand in a .yaml or .json file, named first;
flags after it win.
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

from transformers import AutoModelForObjectDetection, AutoModelForUniversalSegmentation, set_seed

from training_greenmim.data.readers import Part, check_first_readable
from training_greenmim.data.statistics import check_values, depth_of, keep_statistics, set_statistics
from training_greenmim.dense.coco import Objects, check_classes, read_parts
from training_greenmim.dense.detection import DetectionTrainer
from training_greenmim.dense.detection_arguments import (
    DetectionDataArguments,
    DetectionModelArguments,
    DetectionTrainingArguments,
    recipe_defaults,
)
from training_greenmim.dense.models import freeze_stages, load_dense_model
from training_greenmim.dense.objects import EveryObjects, ObjectDataset, TrainObjects, WholeImage
from training_greenmim.dense.pairs import split, subset
from training_greenmim.dense.processors import as_others_use_it
from training_greenmim.runs.arguments import parse_arguments
from training_greenmim.runs.card import describe_run
from training_greenmim.runs.checkpoints import find_checkpoint
from training_greenmim.runs.extras import require
from training_greenmim.runs.lock import locked_output
from training_greenmim.runs.models import channels_of, read_config
from training_greenmim.runs.script import evaluate, finish, run_script, train


logger = logging.getLogger(__name__)

AUTO_CLASSES = {"detection": AutoModelForObjectDetection, "instances": AutoModelForUniversalSegmentation}


def load_data(data: DetectionDataArguments, args: DetectionTrainingArguments) -> dict[str, Objects]:
    """The parts that the run needs: `train`, `validation` and `test`.

    Raises:
        `ValueError`: for folders or data sets that do not fit, and parts that lack.
    """
    parts = read_parts(data)
    if "validation" not in parts and "train" in parts and (args.do_eval or args.do_predict):
        whole = parts["train"]
        records = split(whole.records, data.train_val_split, args.seed)
        parts["train"], parts["validation"] = (replace(whole, records=part) for part in records)
    if "test" not in parts and "validation" in parts:
        parts["test"] = replace(parts["validation"])
    needed = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    for name, purpose in (("train", "do_train"), ("validation", "do_eval"), ("test", "do_predict")):
        if getattr(args, purpose) and name not in parts:
            raise ValueError(f"`{purpose}` is set, but there are no images for it: give `{name}_dir`.")
    for name, count in (("train", data.max_train_samples), ("validation", data.max_eval_samples)):
        if name in parts:
            parts[name].records = subset(parts[name].records, count, args.seed)
    return {name: part for name, part in parts.items() if needed[name]}


def build_datasets(parts: dict[str, Objects], args, with_masks: bool, config, image_processor) -> dict:
    """Sets of decoded images for `train`, `validation` and `test`, after a look for a readable image in each.

    Raises:
        `ValueError`: when there is not a single batch to train on.
    """
    channels, depth, keeps_aspect = channels_of(config), depth_of(image_processor), args.size_divisor is not None
    whole, images = WholeImage(args.crop_size, channels, depth, keeps_aspect, with_masks), {}
    for name, part in parts.items():
        check_first_readable(part.records, "image", lambda source, generator: whole(source), part.argument)
        if name != "train":
            check_values(Part(part.records, part.argument), "image", channels, image_processor, args)
            images[name] = EveryObjects(part.records, whole, args.seed)
            continue
        transform = TrainObjects(args.crop_size, channels, depth, tuple(args.scale_range), keeps_aspect, with_masks)
        images[name] = ObjectDataset(part.records, transform, args.seed)
        batch = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and len(part.records) < batch:
            raise ValueError(
                f"`per_device_train_batch_size` is {args.per_device_train_batch_size}, which makes batches of {batch}"
                f" images over all processes, but there are {len(part.records)} training images."
            )
    return images


def main(argv: list[str] | None = None) -> None:
    """Runs training, evaluation or prediction."""
    argv = sys.argv[1:] if argv is None else argv
    dataclass_types = (DetectionModelArguments, DetectionDataArguments, DetectionTrainingArguments)
    model_args, data_args, args = parse_arguments(dataclass_types, argv, recipe_defaults)
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("Nothing to do: give `do_train`, `do_eval`, `do_predict` or some of them.")
    require("pycocotools", "detection")
    args.set_up_logging()
    with locked_output(args):
        run(model_args, data_args, args, argv)


def run(
    model_args: DetectionModelArguments,
    data_args: DetectionDataArguments,
    args: DetectionTrainingArguments,
    argv: list[str],
) -> None:
    """Trains, evaluates, predicts and writes what came of it."""
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    parts = load_data(data_args, args)
    names = None
    if args.do_train:
        names = parts["train"].names
        check_classes(parts["train"])
    elif checkpoint:
        read_config(checkpoint, "resume_from_checkpoint")  # checkpoints in parts have none
        # A checkpoint has its configuration.
        own = {"config_name": None, "config_overrides": None, "head_overrides": None}
        model_args = replace(model_args, model_name_or_path=checkpoint, **own)
    model, image_processor, origin = load_dense_model(model_args, (AUTO_CLASSES[model_args.task],), names)
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    for part in parts.values():
        part.number_as(names, "`train_dir`" if args.do_train else "the model")
    if args.do_train:
        if checkpoint:
            # A run goes on with what it measured at its start.
            keep_statistics(checkpoint, image_processor)
        part = Part(parts["train"].records, parts["train"].argument)
        set_statistics(image_processor, data_args.statistics, part, "image", channels_of(model.config), args)
        image_processor = as_others_use_it(image_processor, model_args.task, args.crop_size, args.size_divisor)
        freeze_stages(model, model_args.freeze_stages)
    with_masks = model_args.task == "instances"
    images = build_datasets(parts, args, with_masks, model.config, image_processor)
    trainer = DetectionTrainer(
        model,
        args,
        train_dataset=images.get("train"),
        eval_dataset=images.get("validation"),
        image_processor=image_processor,
        with_masks=with_masks,
        category_ids=next(iter(reversed(parts.values()))).category_ids,
        facts=describe_run(
            "examples/dense/run_object_detection.py",
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
