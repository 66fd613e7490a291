# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Features of images as Parquet files: what `--mode embed` writes."""

import hashlib
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch
from torch import nn
from torch.utils.data import Subset
from transformers.utils import logging

from modeling_greenmim import GreenMIMForImageClassification

from ..data.image_dataset import EveryImage
from ..data.images import image_name
from ..data.readers import ARRAYS, LABEL, fingerprint_of_files
from ..data.scaling import PixelScaling
from ..pretraining.pictures import drawn_channels, picture_grid
from ..runs.models import weights_checksum
from ..runs.processes import on_main_process
from .probes import head_name
from .trainer import ClassificationTrainer


logger = logging.get_logger(__name__)

FOLDER = "embeddings"
# Images of a file; a run that was interrupted goes on with the first file that lacks.
ROWS = 8192
# The picture: images that are looked for, their neighbours, and among how many.
QUERIES, NEIGHBOURS, SEARCHED = 6, 5, 100_000


class EmbeddingTrainer(ClassificationTrainer):
    """Predicts features instead of classes.

    Args:
        model: a classifier, whose head is taken off.
        stages: stages of a GreenMIM model, from 1, whose maps are predicted too.
        args, kwargs: those of `ClassificationTrainer`.

    Raises:
        `ValueError`: for stages that the model does not have.
    """

    def __init__(self, model, *args, stages: list[int], **kwargs):
        if stages and not isinstance(model, GreenMIMForImageClassification):
            raise ValueError(
                f"`embed_stages` is {stages}, which needs a GreenMIM model, but the model is a {type(model).__name__}."
            )
        if stages and not all(1 <= stage <= len(model.config.depths) for stage in stages):
            raise ValueError(f"`embed_stages` is {stages}; the model has the stages 1 to {len(model.config.depths)}.")
        super().__init__(model, *args, metrics=[], **kwargs)
        drawn_channels(self.args.picture_channels, getattr(model.config, "num_channels", 3))
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

    def sees(self) -> str:
        """Tells what makes features of images: weights, configuration, and what is done to pixels."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name != "_name_or_path"}
        scaling = [part.tolist() for part in (self.scaling.mean, self.scaling.std)]
        what = [weights_checksum(self.model), config, scaling, self.args.mixed_precision]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save_embeddings(trainer: EmbeddingTrainer, dataset: EveryImage, part: str, rows: int = ROWS) -> list[Path]:
    """Writes the features of all images into Parquet files, and goes on where an earlier run was interrupted.

    Columns: `index` of the image among those of the part; `image`, its name; `label`, where classes are known;
    `embedding`, pooled features in single precision; `stage3` and so on, maps `(channels, height, width)` in half
    precision. Unreadable images have no row.

    Args:
        part: `train`, `validation` or `test`, which begins the names of the files.
        rows: images of a file.

    Returns:
        The files.

    Raises:
        `ValueError`: when the folder holds features by another model or of other images.
    """
    folder = Path(trainer.args.output_dir, FOLDER)
    count = -(-len(dataset) // rows)
    paths = [folder / f"{part}-{number:05}-of-{count:05}.parquet" for number in range(count)]
    on_main_process(trainer.args, lambda: _check_record(trainer, dataset, rows, folder / f"{part}.json"))
    missing = on_main_process(trainer.args, lambda: [number for number in range(count) if not paths[number].exists()])
    for number in missing:
        indices = range(number * rows, min(len(dataset), (number + 1) * rows))
        output = trainer.predict(Subset(dataset, indices))
        if trainer.is_world_process_zero():
            _write(trainer, dataset, indices, output, paths[number])
            logger.info(f"{paths[number]}: {indices[-1] + 1} of {len(dataset)} images")
    return paths


def _check_record(trainer: EmbeddingTrainer, dataset: EveryImage, rows: int, path: Path) -> None:
    """Compares what features are of with the record of an earlier run, if that has left any, and keeps it."""
    crop = [*dataset.transform.size, trainer.args.crop_pct]
    images = [fingerprint_of_files(dataset.records, dataset.column), crop]
    record = {"model": trainer.sees(), "images": images, "stages": trainer.stages, "rows": rows}
    has_files = any(path.parent.glob(f"{path.stem}-*.parquet"))
    if has_files:
        try:
            earlier = json.loads(path.read_text())
        except (OSError, ValueError):
            earlier = {}
        changed = [name for name, value in record.items() if earlier.get(name) != value]
        if changed:
            raise ValueError(
                f"`output_dir` is {trainer.args.output_dir!r}, whose folder {FOLDER} was made with other"
                f" {' and '.join(changed)}; give another folder, or remove that one."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2))


def _write(trainer: EmbeddingTrainer, dataset: EveryImage, indices: range, output, path: Path) -> None:
    features, *maps, readable = output.predictions
    kept = [indices[row] for row in np.flatnonzero(readable)]
    columns = {"index": kept, "image": _names(dataset, kept), "embedding": features[readable]}
    width = features.shape[1]
    types = {"index": datasets.Value("int64"), "image": datasets.Value("string")}
    types["embedding"] = datasets.List(datasets.Value("float32"), length=width)
    if dataset.label_column is not None:
        columns["label"], types["label"] = dataset.records.select(kept)[LABEL][:], dataset.records.features[LABEL]
    for stage, values in zip(trainer.stages, maps, strict=True):
        columns[f"stage{stage}"] = values[readable]
        types[f"stage{stage}"] = datasets.Array3D(values.shape[1:], "float16")
    aside = path.with_suffix(".writing")
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).to_parquet(str(aside))
    os.replace(aside, path)


def _names(dataset: EveryImage, indices: list[int]) -> list[str]:
    if isinstance(dataset.records.features[dataset.column], ARRAYS):
        return [f"image {index}" for index in indices]
    # The names alone: encoded images beside them are not read.
    column = f"{dataset.column}.path"
    paths = dataset.records.select_columns([dataset.column]).flatten().select_columns([column]).select(indices)[column]
    return [image_name(path, f"image {index}") for index, path in zip(indices, paths, strict=True)]


def draw_neighbours(
    paths: list[Path], dataset: EveryImage, picture: str, picture_channels: list[int] | None = None
) -> bool:
    """Draws some images, each with its nearest others by cosine similarity of embeddings: a row for each.

    Args:
        paths: files of `save_embeddings`.
        dataset: the same images.
        picture: the file to write.
        picture_channels: as in `picture_grid`.

    Returns:
        Whether there is a picture: a single image has no neighbours.
    """
    indices, embeddings = _read(paths)
    if len(indices) < 2:
        return False
    embeddings = nn.functional.normalize(embeddings, dim=1)
    queries = torch.linspace(0, len(indices) - 1, min(QUERIES, len(indices))).long()
    similarity = embeddings[queries] @ embeddings.T
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    nearest = similarity.topk(min(NEIGHBOURS, len(indices) - 1)).indices
    chosen = torch.cat([queries[:, None], nearest], dim=1)
    columns = [
        torch.stack([PixelScaling.unit(dataset[indices[row]]["pixel_values"]) for row in column])
        for column in chosen.T
    ]
    channels = columns[0].shape[1]
    picture_grid(columns, [0.0] * channels, [1.0] * channels, picture_channels).save(picture)
    return True


def _read(paths: list[Path]) -> tuple[list[int], torch.Tensor]:
    """Indices and pooled features of at most `SEARCHED` images."""
    indices, embeddings = [], []
    for path in paths:
        table = pyarrow.parquet.read_table(path, columns=["index", "embedding"])
        flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if len(table):
            indices += table["index"].to_pylist()
            embeddings.append(torch.from_numpy(flat.copy()).view(len(table), -1))
        if len(indices) >= SEARCHED:
            break
    return indices[:SEARCHED], torch.cat(embeddings)[:SEARCHED] if embeddings else torch.empty(0, 0)
