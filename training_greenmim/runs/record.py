# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What a run is made of, kept in its checkpoints, so that it is not resumed as another one."""

import hashlib
import json
from pathlib import Path

from transformers.utils import logging

from ..data.image_dataset import ImageDataset


logger = logging.get_logger(__name__)

RECORD = "run.json"
# Images that stand for all where data are compared.
SAMPLED_IMAGES = 64

# Arguments that may change freely: they decide what is written, shown, measured or evaluated, and how fast a run is.
# All others decide what is learned.
FREE_PREFIXES = ("activation_", "dataloader_", "do_", "eval_", "gradient_checkpointing", "hub_", "include_", "knn_")
FREE_PREFIXES += ("log_", "logging_", "save_", "track", "validation_")
FREE = {"allow_changes", "batch_eval_metrics", "bf16_full_eval", "country_iso_code", "crop_pct", "debug"}
FREE |= {"disable_tqdm", "enable_jit_checkpoint", "fp16_full_eval", "greater_is_better", "label_names"}
FREE |= {"load_best_model_at_end", "local_rank", "max_eval_samples", "metric_for_best_model", "metrics"}
FREE |= {
    "num_pictures",
    "output_dir",
    "picture_channels",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "probe_dir",
    "project",
}
FREE |= {"push_to_hub", "remove_unused_columns", "report_to", "resume_from_checkpoint", "run_name"}
FREE |= {"restore_callback_states_from_checkpoint", "skip_memory_metrics", "stop_on_nonfinite_loss", "test_dir"}
FREE |= {"torch_empty_cache_steps", "use_cache"}
# Paths and names of what is compared itself: the images, the configuration of the model.
FREE |= {"config_name", "config_overrides", "dataset_config_name", "dataset_name", "image_column_name"}
FREE |= {
    "annotation_column_name",
    "head",
    "ignore_mismatched_sizes",
    "label_column_name",
    "labels_file",
    "max_train_samples",
    "model_name_or_path",
    "recipe",
}
FREE |= {"objects_column_name", "train_annotations", "train_dir", "train_val_split"}
# What a run has become by default or in total counts, not how it was asked for.
FREE |= {"auto_batch_size", "base_learning_rate"}
NOT_FREE = {"dataloader_drop_last"}
# Same training on another machine: rounding differs, and so do masks where processes or micro-batches draw their own.
MACHINE_PREFIXES = ("ddp_", "fsdp")
MACHINE = {"accelerator_config", "attn_implementation", "deepspeed", "gradient_accumulation_steps"}
MACHINE |= {"parallelism_config", "per_device_train_batch_size", "processes", "use_cpu"}
# A run may be made longer.
LENGTHS = {"max_steps", "num_train_epochs"}
# Their values lie in the optimizer's state and come back with it.
OF_THE_OPTIMIZER = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
# What decides how that state is divided; not even `allow_changes` changes it.
GROUPS = "layer_decay"
# Parts of a configuration that do not make the model.
NOT_OF_THE_MODEL = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version"}


def record_of(trainer) -> dict:
    """Arguments, configuration of the model and training images of an `ImageTrainer`'s run, as JSON has them."""
    args, facts = trainer.args, trainer.facts
    arguments = {**(facts.arguments if facts else {}), **args.to_dict(), "processes": args.world_size}
    record = {
        "arguments": {**arguments, "total_batch_size": args.total_batch_size},
        "model": trainer.model.config.to_dict(),
        "images": _images(trainer.train_dataset, arguments),
    }
    return json.loads(json.dumps(record, default=str))


def _images(dataset, arguments: dict) -> dict:
    if isinstance(dataset, ImageDataset):
        return {"training images": len(dataset), "checksum of training images": _fingerprint(dataset)}
    # A stream tells its name only; its order depends on who reads it.
    names = ("dataset_name", "dataset_config_name", "max_train_samples", "dataloader_num_workers", "processes")
    return {f"{name} of a stream": arguments.get(name) for name in names}


def _fingerprint(dataset: ImageDataset) -> str:
    """Checksum of some images of a data set and their labels; of files their names, since folders may be moved."""
    step = max(1, len(dataset) // SAMPLED_IMAGES)
    checksum = hashlib.sha256()
    for index in range(0, len(dataset), step):
        record = dataset.records[index]
        source, label = record[dataset.column], record.get(dataset.label_column)
        values = source if isinstance(source, dict) else {"path": source}
        checksum.update(hashlib.sha256(_content(values)).digest())
        checksum.update(_content(label) if isinstance(label, dict) and "path" in label else str(label).encode())
    return checksum.hexdigest()[:16]


def _content(source: dict) -> bytes:
    """What tells an image or a mask from others: encoded bytes, or the name of its file without folders."""
    return source.get("bytes") or Path(str(source.get("path"))).name.encode()


def check_same_run(checkpoint: str, trainer) -> None:
    """Refuses to resume a run as another one, unless `allow_changes`; says what else differs.

    Raises:
        `ValueError`: naming what differs, before and now.
    """
    path = Path(checkpoint, RECORD)
    if not path.exists():
        logger.warning(f"{checkpoint} has no {RECORD}: whether this is the run that made it cannot be told.")
        return
    changed = _changes(json.loads(path.read_text()), record_of(trainer))
    longer = {name: pair for name, pair in changed.items() if name in LENGTHS and _is_longer(*pair)}
    machine = {name: pair for name, pair in changed.items() if _is_of_the_machine(name)}
    if longer:
        logger.warning(
            f"The run that is resumed is made longer, {_told(longer)}: from here on the learning rate follows the"
            " schedule of the longer run."
        )
    if machine:
        logger.warning(f"Resumed with {_told(machine)}: the same training, but not bit for bit.")
    others = {name: pair for name, pair in changed.items() if name not in longer and name not in machine}
    if not others:
        return
    if GROUPS in others:
        raise ValueError(
            f"`resume_from_checkpoint`: the run of {checkpoint} had {_told({GROUPS: others[GROUPS]})}, by which the"
            " optimizer's state in it is grouped. Give it what it had, or start a new run from its weights with"
            f" --model_name_or_path {checkpoint}."
        )
    if not trainer.args.allow_changes:
        raise ValueError(
            f"`resume_from_checkpoint`: the run of {checkpoint} had {_told(others)}. What goes on would not be the"
            " same run. Give it what it had; or go on regardless with --allow_changes; or start a new run from its"
            f" weights with --model_name_or_path {checkpoint}."
        )
    logger.warning(f"Resumed with changes: {_told(others)}.")
    if kept := sorted(OF_THE_OPTIMIZER & others.keys()):
        logger.warning(f"{', '.join(kept)}: the optimizer's state in the checkpoint keeps what it had.")


def check_same_model(checkpoint: str, trainer) -> None:
    """Refuses the weights of a model of another configuration.

    Raises:
        `ValueError`: naming what differs, before and now.
    """
    path = Path(checkpoint, RECORD)
    if path.exists():
        before, now = (_of_the_model(record) for record in (json.loads(path.read_text()), record_of(trainer)))
        if changed := _different(before, now):
            raise ValueError(f"`resume_from_checkpoint`: the model of {checkpoint} had {_told(changed)}.")


def _changes(before: dict, now: dict) -> dict[str, tuple]:
    """What differs and matters: name -> value before and now."""
    parts = [(_arguments(record), record["images"], _of_the_model(record)) for record in (before, now)]
    return {name: pair for old, new in zip(*parts) for name, pair in _different(old, new).items()}


def _arguments(record: dict) -> dict:
    arguments = record["arguments"]
    unused = {"num_train_epochs"} if arguments["max_steps"] > 0 else set()
    return {name: value for name, value in arguments.items() if name not in unused and not _is_free(name)}


def _of_the_model(record: dict) -> dict:
    return {f"{name} of the model": value for name, value in record["model"].items() if name not in NOT_OF_THE_MODEL}


def _different(before: dict, now: dict) -> dict[str, tuple]:
    # What one of them lacks is of another version of the software.
    names = [name for name in before if name in now]
    return {name: (before[name], now[name]) for name in names if before[name] != now[name]}


def _is_free(name: str) -> bool:
    return name not in NOT_FREE and (name in FREE or name.startswith(FREE_PREFIXES))


def _is_of_the_machine(name: str) -> bool:
    return name in MACHINE or name.startswith(MACHINE_PREFIXES)


def _is_longer(before: float, now: float) -> bool:
    return now > before > 0


def _told(changed: dict[str, tuple]) -> str:
    return ", ".join(f"{name} {before!r} (now {now!r})" for name, (before, now) in changed.items())
