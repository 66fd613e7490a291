"""Probes: features of a stage, heads of linear probes, weighted neighbours against a loop in NumPy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from modeling_greenmim import GreenMIMForImageClassification
from tests.training_helpers import tiny_config
from training_greenmim.classification.probes import (
    NeighbourHead,
    check_neighbours,
    first_stages,
    fold_head,
    folded_head,
    freeze_encoder,
)


def classifier(**changes) -> GreenMIMForImageClassification:
    """A model of three stages of 8, 16 and 32 channels; its norms are not what they start as."""
    torch.manual_seed(0)
    values = {"depths": [2, 1, 1], "num_heads": [1, 2, 2], "num_labels": 3, "window_size": 2, **changes}
    model = GreenMIMForImageClassification(tiny_config(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# Features of a stage


def stage_outputs(model, pixel_values) -> list[torch.Tensor]:
    """What each stage of the whole model ends with, before it is merged."""
    outputs = []
    hooks = [
        stage.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        for stage in model.greenmim.encoder.layers
    ]
    model(pixel_values)
    for hook in hooks:
        hook.remove()
    return outputs


@torch.no_grad()
@pytest.mark.parametrize(("stage", "width"), [(1, 8), (2, 16)])
def test_features_of_an_early_stage_are_its_normalised_mean(stage, width):
    model = classifier()
    tokens = stage_outputs(model, images())[stage - 1]
    assert tokens.shape[2] == width
    deviation = (tokens.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    normalised = (tokens - tokens.mean(-1, keepdim=True)) / deviation
    shortened = first_stages(model, stage).eval()
    torch.testing.assert_close(shortened.greenmim(images()).pooler_output, normalised.mean(1), rtol=1e-4, atol=1e-5)
    assert shortened(images()).logits.shape == (5, 3)
    assert not any(tensor.is_meta for tensor in (*shortened.parameters(), *shortened.buffers()))


@torch.no_grad()
def test_features_of_the_last_stage_are_those_of_the_model():
    model = classifier()
    assert first_stages(model, 3) is model


@torch.no_grad()
def test_shortened_model_reloads(tmp_path):
    model = classifier(id2label={0: "a", 1: "b", 2: "c"})
    shortened = first_stages(model, 2).eval()
    shortened.save_pretrained(tmp_path)
    reloaded, loading = GreenMIMForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.equal(reloaded.eval()(images()).logits, shortened(images()).logits)
    assert reloaded.config.depths == [2, 1] and reloaded.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("stage", [-1, 0, 4])
def test_stages_that_there_are_not_are_refused(stage):
    with pytest.raises(ValueError, match=f"`feature_stage` is {stage}; the model has the stages 1 to 3"):
        first_stages(classifier(), stage)


# Heads of linear probes


def probe() -> GreenMIMForImageClassification:
    """A linear probe whose batch norm has seen a few batches and whose linear layer is not what it starts as."""
    model = classifier()
    freeze_encoder(model)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_()
        model.classifier.train()
        for seed in range(3):
            model.classifier(torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)) * 3 + 2)
    return model.eval()


def test_only_the_new_head_learns():
    model = classifier()
    before = copy.deepcopy(model.classifier)
    freeze_encoder(model)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"classifier.1.weight", "classifier.1.bias"}
    norm, linear = model.classifier
    assert not norm.affine and norm.num_features == 32 and norm.eps == 1e-6
    assert linear.weight.shape == before.weight.shape and not torch.equal(linear.weight, before.weight)
    assert 0.005 < linear.weight.std() < 0.02 and not linear.bias.any(), "MAE's initialisation"


@torch.no_grad()
def test_folded_head_computes_the_same():
    model = probe()
    norm, linear = model.classifier
    features = torch.randn(7, 32)
    by_hand = (features - norm.running_mean) / (norm.running_var + 1e-6).sqrt() @ linear.weight.T + linear.bias
    expected = model(images()).logits
    fold_head(model)
    assert type(model.classifier) is nn.Linear
    torch.testing.assert_close(model.classifier(features), by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(images()).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_head_is_folded_within_the_context_alone():
    model = probe()
    head, expected = model.classifier, model(images()).logits
    with pytest.raises(KeyError), folded_head(model):
        assert type(model.classifier) is nn.Linear
        torch.testing.assert_close(model(images()).logits, expected, rtol=1e-4, atol=1e-4)
        raise KeyError
    assert model.classifier is head
    plain = classifier()
    head = plain.classifier
    with folded_head(plain), folded_head(nn.ReLU()):
        assert plain.classifier is head


# Neighbours


def vote(bank, labels, query, num_labels: int, k: int, temperature: float) -> np.ndarray:
    """Share of the votes of each class for one image, as the paper's formula, one neighbour after the other."""
    similarities = [query @ item / np.linalg.norm(query) / np.linalg.norm(item) for item in bank]
    nearest = sorted(range(len(bank)), key=lambda index: -similarities[index])[:k]
    votes = np.zeros(num_labels)
    for index in nearest:
        votes[labels[index]] += np.exp(similarities[index] / temperature)
    return votes / votes.sum()


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (30, 0.2)])
def test_neighbours_vote_as_in_the_paper(k, temperature):
    random = np.random.default_rng(0)
    bank, queries, labels = random.normal(size=(30, 6)), random.normal(size=(11, 6)), random.integers(0, 4, 30)
    expected = np.stack([vote(bank, labels, query, 5, k, temperature) for query in queries])
    head = NeighbourHead(torch.tensor(bank).float(), torch.tensor(labels), 5, k, temperature)
    logits = head(torch.tensor(queries).float())
    np.testing.assert_allclose(logits.softmax(dim=1), expected, atol=2e-5)
    assert logits.isfinite().all() and not expected[:, 4].any(), "no vote for a class without images"
    np.testing.assert_array_equal(logits.argmax(dim=1), expected.argmax(axis=1))


def test_lengths_of_features_play_no_part():
    bank, queries = torch.randn(12, 4), torch.randn(3, 4)
    labels = torch.arange(12) % 3
    first = NeighbourHead(bank, labels, 3, 4, 0.07)(queries)
    lengths = torch.rand(12, 1) + 0.1
    torch.testing.assert_close(NeighbourHead(bank * lengths, labels, 3, 4, 0.07)(queries * 100), first)


@pytest.mark.parametrize(("k", "count"), [(0, 5), (-3, 5), (6, 5), (1, 0)])
def test_more_neighbours_than_images_are_refused(k, count):
    message = f"`knn_k` is {k}, but there are {count} training images"
    with pytest.raises(ValueError, match=message):
        check_neighbours(k, count)
    with pytest.raises(ValueError, match=message):
        NeighbourHead(torch.randn(count, 4), torch.zeros(count, dtype=torch.int64), 2, k, 0.07)
