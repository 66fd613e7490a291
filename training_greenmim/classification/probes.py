# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Probes of a frozen encoder: linear classification and weighted k-nearest neighbours, on features of any stage."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, Trainer

from modeling_greenmim import GreenMIMConfig, GreenMIMForImageClassification


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
    shortened = GreenMIMForImageClassification._from_config(
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


def linear_head(model) -> nn.Linear:
    """The linear layer that a classifier of Transformers ends with.

    Raises:
        `ValueError`: when it ends otherwise.
    """
    head = getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"`mode` needs a classifier that ends with a linear layer `classifier`; {type(model).__name__} does not."
        )
    return head


def freeze_encoder(model) -> None:
    """Leaves only a new head to train: batch norm without learned weights, then a linear layer.

    As MAE's linear probe (https://huggingface.co/papers/2111.06377, appendix A.1); `fold_head` makes it one layer.
    """
    head = linear_head(model)
    model.requires_grad_(False)
    new_head = nn.Linear(head.in_features, head.out_features)
    nn.init.normal_(new_head.weight, std=0.01)
    nn.init.zeros_(new_head.bias)
    model.classifier = nn.Sequential(nn.BatchNorm1d(head.in_features, affine=False, eps=1e-6), new_head)


@torch.no_grad()
def fold_head(model) -> None:
    """Makes the head of a linear probe one linear layer that computes the same in evaluation."""
    norm, linear = model.classifier
    scale = (norm.running_var + norm.eps).rsqrt()
    folded = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device)
    folded.weight.copy_(linear.weight * scale)
    folded.bias.copy_(linear.bias - folded.weight @ norm.running_mean)
    model.classifier = folded


@contextmanager
def folded_head(model) -> Iterator[None]:
    """Within the context a linear probe has its folded head; other models are left alone."""
    head = getattr(model, "classifier", None)
    if not (isinstance(head, nn.Sequential) and isinstance(head[0], nn.BatchNorm1d)):
        yield
        return
    fold_head(model)
    try:
        yield
    finally:
        model.classifier = head


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
        self.register_buffer("bank", nn.functional.normalize(bank, dim=1))
        self.register_buffer("labels", labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, width)` features -> logarithm of each class's share of the votes, `(batch, num_labels)`."""
        similarity, nearest = (nn.functional.normalize(features.float(), dim=1) @ self.bank.T).topk(self.k)
        shares = torch.zeros(len(features), self.num_labels, device=features.device)
        shares.scatter_add_(1, self.labels[nearest], (similarity / self.temperature).softmax(dim=1))
        return shares.clamp(min=1e-6).log()  # finite for classes without votes


def check_neighbours(k: int, num_images: int) -> None:
    """Refuses more neighbours than there are.

    Raises:
        `ValueError`: naming both numbers.
    """
    if not 1 <= k <= num_images:
        raise ValueError(f"`knn_k` is {k}, but there are {num_images} training images to find neighbours among.")


def use_neighbours(trainer: Trainer, bank: Dataset, k: int, temperature: float) -> None:
    """Makes the trainer's model classify by the neighbours of an image among those of a labelled data set."""
    model, measure = trainer.model, trainer.compute_metrics
    check_neighbours(k, len(bank))  # before the work
    linear_head(model)
    model.classifier, trainer.compute_metrics = nn.Identity(), None
    output = trainer.predict(bank)
    features, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
    readable = features.isfinite().all(dim=1)
    head = NeighbourHead(features[readable], labels[readable], model.config.num_labels, k, temperature)
    model.classifier, trainer.compute_metrics = head.to(trainer.args.device), measure
