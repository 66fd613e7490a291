# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Probes of a frozen encoder: linear classification and weighted k-nearest neighbours, on features of any stage."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from modeling_greenmim import GreenMIMConfig, GreenMIMForImageClassification


if TYPE_CHECKING:
    from .trainer import ClassificationTrainer

logger = logging.get_logger(__name__)


def first_stages(model: GreenMIMForImageClassification, num_stages: int) -> GreenMIMForImageClassification:
    """A classifier with the first stages of another one, copied, and a new head.

    Features of the last stage have the encoder's own final norm, those of an earlier one a new norm without learned
    weights.

    Raises:
        `ValueError`: when there are not so many stages.
    """
    config = model.config
    available = len(config.depths)
    if not 1 <= num_stages <= available:
        raise ValueError(f"`feature_stage` is {num_stages}; the model has the stages 1 to {available}.")
    if num_stages == available:
        return model
    values = {**config.to_dict(), "depths": config.depths[:num_stages], "num_heads": config.num_heads[:num_stages]}
    for name in ("out_features", "out_indices", "stage_names"):
        values.pop(name, None)
    # A new model, not the old one's modules: its mask unit is smaller, and so the order of its tokens is another.
    shortened = AutoModelForImageClassification.from_config(
        GreenMIMConfig(**values), attn_implementation=config._attn_implementation
    )
    own = shortened.state_dict()
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in own and name.startswith(("greenmim.embeddings.", "greenmim.encoder."))
    }
    shortened.load_state_dict({**own, **kept})
    return shortened


def head_name(model) -> str:
    """Name of the linear layer that a classifier of Transformers ends with, such as `classifier` or `classifier.1`.

    It is the only linear layer of a part of the model, and has an output for each class.

    Raises:
        `ValueError`: when the model ends otherwise, or with several such layers.
    """
    names = []
    for child_name, child in model.named_children():
        modules = child.named_modules(prefix=child_name)
        linears = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
        if len(linears) == 1 and linears[0][1].out_features == model.config.num_labels:
            names.append(linears[0][0])
    if len(names) != 1:
        raise ValueError(
            f"`model_name_or_path` is a {type(model).__name__}, which ends with"
            f" {' and '.join(names) or 'other layers'}; a classifier that ends with one linear layer is needed."
        )
    return names[0]


def freeze_encoder(model) -> None:
    """Leaves only a new head to train: batch norm without learned weights, then a linear layer.

    As MAE's linear probe (https://huggingface.co/papers/2111.06377, appendix A.1); `fold_head` makes it one layer.
    """
    name = head_name(model)
    head = model.get_submodule(name)
    model.requires_grad_(False)
    model.set_submodule(name, ProbeHead(head.in_features, head.out_features))


class ProbeHead(nn.Sequential):
    """Head of a linear probe: batch norm without learned weights, then a linear layer."""

    def __init__(self, in_features: int, out_features: int):
        linear = nn.Linear(in_features, out_features)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(in_features, affine=False, eps=1e-6), linear)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """One linear layer that computes the same in evaluation."""
        norm, linear = self
        folded = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device)
        folded.weight.copy_(linear.weight * (norm.running_var + norm.eps).rsqrt())
        folded.bias.copy_(linear.bias - folded.weight @ norm.running_mean)
        return folded


def fold_head(model) -> None:
    """Makes the head of a linear probe one linear layer that computes the same in evaluation."""
    for name, head in _probe_heads(model):
        model.set_submodule(name, head.folded())


@contextmanager
def folded_head(model) -> Iterator[None]:
    """Within the context a linear probe has its folded head; other models are left alone."""
    heads = _probe_heads(model)
    fold_head(model)
    try:
        yield
    finally:
        for name, head in heads:
            model.set_submodule(name, head)


def _probe_heads(model) -> list[tuple[str, ProbeHead]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ProbeHead)]


def load_probe(checkpoint: str, attn_implementation: str | None) -> PreTrainedModel:
    """The classifier of a checkpoint that a linear probe wrote while it trained, its head folded.

    Raises:
        `ValueError`: when the checkpoint is of no linear probe.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    model = AutoModelForImageClassification.from_config(config, attn_implementation=attn_implementation)
    freeze_encoder(model)
    try:
        load_model(model, os.path.join(checkpoint, "model.safetensors"))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"`resume_from_checkpoint` is {checkpoint!r}, which holds no linear probe (`mode` linear): {error}"
        ) from error
    fold_head(model)
    return model


class NeighbourHead(nn.Module):
    """Weighted k-nearest-neighbour classifier (https://huggingface.co/papers/1805.01978, section 3.4).

    The `k` nearest of a bank of images, by cosine similarity of features, vote for their class with weight
    `exp(similarity / temperature)`.

    Args:
        bank: `(num_images, width)` features of images whose classes are known.
        labels: `(num_images,)` their class numbers.
        num_labels: number of classes.
        k: neighbours that vote.
        temperature: of the votes' weights.

    Raises:
        `ValueError`: when the bank holds fewer than `k` images.
    """

    def __init__(self, bank: torch.Tensor, labels: torch.Tensor, num_labels: int, k: int, temperature: float):
        super().__init__()
        check_neighbours(k, len(bank))
        self.num_labels, self.k, self.temperature = num_labels, k, temperature
        # Not buffers: a model that is evaluated in half precision casts those.
        self.bank, self.labels = nn.functional.normalize(bank.float(), dim=1), labels

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, width)` features -> logarithm of each class's share of the votes, `(batch, num_labels)`.

        In single precision, whatever that of the model: in half of it many neighbours would be equally near.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self.vote(self.similarity(features))

    def similarity(self, features: torch.Tensor) -> torch.Tensor:
        """Cosine similarity of `(batch, width)` features and the bank, `(batch, num_images)`."""
        return nn.functional.normalize(features.float(), dim=1) @ self.bank.T

    def vote(self, similarity: torch.Tensor) -> torch.Tensor:
        """`(batch, num_images)` similarities to the bank -> logarithm of each class's share of the votes."""
        similarity, nearest = similarity.topk(self.k)
        shares = torch.zeros(len(similarity), self.num_labels, device=similarity.device)
        shares.scatter_add_(1, self.labels[nearest], (similarity / self.temperature).softmax(dim=1))
        return shares.clamp(min=1e-6).log()  # finite for classes without votes


def check_neighbours(k: int, num_images: int) -> None:
    """Refuses more neighbours than there are.

    Raises:
        `ValueError`: naming both numbers.
    """
    if not 1 <= k <= num_images:
        raise ValueError(f"`knn_k` is {k}, but there are {num_images} training images to find neighbours among.")


def use_neighbours(trainer: "ClassificationTrainer", bank: Dataset, k: int, temperature: float) -> None:
    """Makes the trainer's model classify by the neighbours of an image among those of a labelled data set."""
    model, measure = trainer.model, trainer.compute_metrics
    check_neighbours(k, len(bank))  # before the work
    name = head_name(model)
    model.set_submodule(name, nn.Identity())
    trainer.compute_metrics = None
    output = trainer.predict(bank)
    features, readable = (torch.from_numpy(values) for values in output.predictions)
    usable = readable & features.isfinite().all(dim=1)
    if not usable[readable].all():
        logger.warning(f"{int((readable & ~usable).sum())} training images have features that are not finite.")
    labels = torch.from_numpy(output.label_ids)
    device = trainer.args.device
    head = NeighbourHead(
        features[usable].to(device), labels[usable].to(device), model.config.num_labels, k, temperature
    )
    model.set_submodule(name, head)
    trainer.compute_metrics = measure
