# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of weighted nearest neighbours among the monitored images, each left out of its own vote."""

import torch

from ...classification.probes import NeighbourHead
from .features import Features


METRICS = ("knn_accuracy", "knn_200_accuracy")
NEEDS_LABELS = True
# Neighbours that vote, and the temperature of their weights, as usual for such a look (papers 1805.01978, 2104.14294).
NEIGHBOURS, TEMPERATURE = (20, 200), 0.07


def measure(features: Features) -> dict[str, float]:
    """Shares of images whose neighbours vote for the right class; with fewer images, all others vote."""
    others = len(features.pooled) - 1
    if others < 1:
        return {}
    num_labels = int(features.labels.max()) + 1
    found = {}
    for name, k in zip(METRICS, NEIGHBOURS):
        head = NeighbourHead(features.pooled, features.labels, num_labels, min(k, others), TEMPERATURE)
        votes = head.vote(head.similarity(features.pooled).fill_diagonal_(-torch.inf))
        found[name] = (votes.argmax(dim=1) == features.labels).float().mean().item()
    return found
