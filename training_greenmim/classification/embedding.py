# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Features of images as Parquet files: what `--mode embed` writes."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset
from transformers.utils import logging

from modeling_greenmim import GreenMIMForImageClassification

from ..data.images import image_name
from ..pretraining.pictures import picture_grid
from ..runs.models import weights_checksum
from ..runs.processes import on_main_process
from .probes import head_name
from .trainer import ClassificationTrainer


logger = logging.get_logger(__name__)

FOLDER, RECORD, PICTURE = "embeddings", "embeddings.json", "neighbours.png"
# Images of a file; a run that was interrupted goes on with the first file that lacks.
ROWS = 8192
# The picture: images that are looked for, their neighbours, and among how many.
QUERIES, NEIGHBOURS, SEARCHED = 6, 5, 100_000


class EmbeddingTrainer(ClassificationTrainer):
    """Predicts features instead of classes.

    Args:
        model: a classifier, whose head is taken off.
        stages: stages of a GreenMIM model, from 1, whose maps are predicted too.
        kwargs: those of `ClassificationTrainer`.

    Raises:
        `ValueError`: for stages that the model does not have.
    """

    def __init__(self, model, *args, stages: list[int], **kwargs):
        if stages and not isinstance(model, GreenMIMForImageClassification):
            raise ValueError(
                f"`embed_stages` is {stages}, which needs a GreenMIM model, but the model is a {type(model).__name__}."
            )
        if not all(1 <= stage <= len(model.config.depths) for stage in stages):
            raise ValueError(f"`embed_stages` is {stages}; the model has the stages 1 to {len(model.config.depths)}.")
        super().__init__(model, *args, **kwargs)
        self.stages, self.compute_metrics = stages, None
        model.set_submodule(head_name(model), nn.Identity())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """No loss; pooled features, maps in half precision, which images were readable; labels."""
        inputs = self.on_device(inputs)
        self.report_unreadable(inputs["unreadable"])
        options = {"output_hidden_states": True} if self.stages else {}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(pixel_values=self.normalize(inputs["pixel_values"]), **options)
        maps = [outputs.reshaped_hidden_states[stage].half() for stage in self.stages]
        return None, (outputs.logits.float(), *maps, inputs["readable"]), inputs.get("labels")


def save_embeddings(trainer: EmbeddingTrainer, dataset, rows: int = ROWS) -> Path:
    """Writes the features of all images into Parquet files, and goes on where an earlier run was interrupted.

    Columns: `image`, its name; `label`, where classes are known; `embedding`, pooled features in single precision;
    `stage3` and so on, maps `(channels, height, width)` in half precision. Unreadable images have no row.

    Args:
        dataset: `EveryImage`.
        rows: images of a file.

    Returns:
        The folder.

    Raises:
        `ValueError`: when the folder holds features of another model or of other images.
    """
    folder = Path(trainer.args.output_dir, FOLDER)
    count = -(-len(dataset) // rows)
    paths = [folder / f"part-{number:05}-of-{count:05}.parquet" for number in range(count)]
    on_main_process(trainer.args, lambda: _check_record(trainer, dataset, rows, folder))
    missing = on_main_process(trainer.args, lambda: [number for number in range(count) if not paths[number].exists()])
    for number in missing:
        part = range(number * rows, min(len(dataset), (number + 1) * rows))
        output = trainer.predict(Subset(dataset, part))
        if trainer.is_world_process_zero():
            _write(trainer, dataset, part, output, paths[number])
            logger.info(f"{paths[number]}: {part[-1] + 1} of {len(dataset)} images")
    return folder


def _check_record(trainer: EmbeddingTrainer, dataset, rows: int, folder: Path) -> None:
    names = [_name(dataset, index) for index in range(len(dataset))]
    record = {
        "weights": weights_checksum(trainer.model),
        "images": datasets.fingerprint.Hasher.hash(names),
        "height, width, crop": [*dataset.transform.size, trainer.args.crop_pct],
        "stages": trainer.stages,
        "precision": trainer.args.mixed_precision,
        "batch": trainer.args.eval_batch_size,
        "rows": rows,
    }
    path = folder / RECORD
    if path.exists():
        changed = [name for name, value in json.loads(path.read_text()).items() if value != record[name]]
        if changed:
            raise ValueError(
                f"`output_dir` is {trainer.args.output_dir!r}, whose folder {FOLDER} was made of other"
                f" {' and '.join(changed)}; give another folder, or remove it."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2))


def _name(dataset, index: int) -> str:
    return image_name(dataset.records[index][dataset.column], f"image {index}")


def _write(trainer: EmbeddingTrainer, dataset, part: range, output, path: Path) -> None:
    features, *maps, readable = output.predictions
    kept = np.flatnonzero(readable)
    columns = {"image": [_name(dataset, part[index]) for index in kept]}
    types = {"image": datasets.Value("string")}
    if output.label_ids is not None:
        columns["label"] = [trainer.label_names_in_order[label] for label in output.label_ids[kept]]
        types["label"] = datasets.Value("string")
    columns["embedding"] = features[kept]
    types["embedding"] = datasets.List(datasets.Value("float32"), length=features.shape[1])
    for stage, values in zip(trainer.stages, maps, strict=True):
        columns[f"stage{stage}"] = values[kept]
        types[f"stage{stage}"] = datasets.Array3D(values.shape[1:], "float16")
    aside = path.with_suffix(".writing")
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).to_parquet(str(aside))
    os.replace(aside, path)


def draw_neighbours(folder: Path, dataset, output_dir: str) -> Path | None:
    """Draws some images, each with its nearest others by cosine similarity of embeddings; None of a single image.

    Args:
        folder: of `save_embeddings`.
        dataset: `EveryImage` of the same images.

    Returns:
        The picture: a row for each image, which comes first.
    """
    files = sorted(str(path) for path in folder.glob("*.parquet"))
    table = datasets.Dataset.from_parquet(files, keep_in_memory=True).select_columns(["image", "embedding"])
    table = table.select(range(min(len(table), SEARCHED))).with_format("torch")
    if len(table) < 2:
        return None
    embeddings = nn.functional.normalize(table["embedding"][:].float(), dim=1)
    queries = torch.linspace(0, len(table) - 1, min(QUERIES, len(table))).long()
    similarity = embeddings[queries] @ embeddings.T
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    nearest = similarity.topk(min(NEIGHBOURS, len(table) - 1)).indices
    index_of = {_name(dataset, index): index for index in range(len(dataset))}
    chosen = torch.cat([queries[:, None], nearest], dim=1)
    names = table["image"][:]
    columns = [
        torch.stack([dataset[index_of[names[int(row)]]]["pixel_values"] / 255 for row in column])
        for column in chosen.T
    ]
    channels = columns[0].shape[1]
    path = Path(output_dir, PICTURE)
    picture_grid(columns, [0.0] * channels, [1.0] * channels).save(path)
    return path
