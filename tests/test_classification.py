"""`ClassificationTrainer`: loss, layers' learning rates, schedule, order, frozen layers, averages and predictions."""

import csv
import math
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn

from modeling_greenmim import GreenMIMForImageClassification
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.training_helpers import SHORT_RUN, coloured_image, encoded, messages, tiny_config
from training_greenmim.classification.metrics import load_metrics
from training_greenmim.classification.probes import freeze_encoder
from training_greenmim.classification.trainer import ClassificationTrainer
from training_greenmim.data.image_dataset import EveryImage, ImageDataset
from training_greenmim.data.transforms import EvalTransform, TrainTransform
from training_greenmim.optimization import layer_of_parameter
from training_greenmim.runs.arguments import ClassificationTrainingArguments
from training_greenmim.runs.trainer import NonFiniteLossError


NAMES = ["red", "green", "blue"]


def records(count: int, broken: tuple[int, ...] = ()) -> datasets.Dataset:
    """Images of three classes in turn."""
    contents = [b"broken" if index in broken else encoded(coloured_image(index, index % 3)) for index in range(count)]
    photos = [{"path": f"{index}.png", "bytes": content} for index, content in enumerate(contents)]
    features = datasets.Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": photos, "label": [index % 3 for index in range(count)]}, features)


def make_trainer(
    output_dir: Path, count: int = 16, linear=False, plain=True, drop_path_rate=0.0, class_weights=None, **changes
) -> ClassificationTrainer:
    """A trainer of a tiny model; `plain` images are not even cropped at random."""
    torch.manual_seed(0)
    config = tiny_config(id2label=dict(enumerate(NAMES)), drop_path_rate=drop_path_rate)
    model = GreenMIMForImageClassification(config)
    if linear:
        freeze_encoder(model)
    values = {**SHORT_RUN, "learning_rate": 0.01, "warmup_steps": 0, **changes}
    transform = EvalTransform((32, 32), 3) if plain else TrainTransform((32, 32), 3)
    return ClassificationTrainer(
        model,
        ClassificationTrainingArguments(output_dir=str(output_dir), **values),
        metrics=load_metrics(["accuracy"], 3),
        class_weights=class_weights,
        train_dataset=ImageDataset(records(count), "image", transform, 0, "label"),
        eval_dataset=EveryImage(records(7), "image", EvalTransform((32, 32), 3), 0, "label"),
        image_processor=build_image_processor(config),
    )


def logged(trainer: ClassificationTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def hand_written_loss(logits, targets, weights, smoothing: float) -> torch.Tensor:
    """Loss of each image: weighted cross-entropy of targets of which a share is spread over all classes."""
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    smooth = targets * (1 - smoothing) + smoothing / targets.shape[1]
    return -(torch.tensor(weights) * smooth * probabilities.log()).sum(dim=1)


# Loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 4.0]])
def test_loss_of_hard_labels(tmp_path, smoothing, weights):
    trainer = make_trainer(tmp_path, class_weights=weights, label_smoothing_factor=smoothing)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    images = trainer.normalize(batch["pixel_values"])
    torch.testing.assert_close(outputs.logits, trainer.model(images).logits)
    targets = nn.functional.one_hot(batch["labels"], 3)
    losses = hand_written_loss(outputs.logits, targets, weights or [1.0] * 3, smoothing)
    # As in torch, the mean over images that count as much as their class.
    expected = losses.sum() / torch.tensor(weights or [1.0] * 3)[batch["labels"]].sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 4.0]])
def test_loss_of_mixed_images(tmp_path, weights):
    trainer = make_trainer(tmp_path, class_weights=weights, label_smoothing_factor=0.1, mixup=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    # How much of its partner is in each image?
    images = trainer.normalize(batch["pixel_values"])
    difference = images.flip(0) - images
    share = (((seen[0] - images) * difference).sum() / difference.square().sum()).item()
    assert 0.01 < share < 0.99
    torch.testing.assert_close(seen[0], torch.lerp(images, images.flip(0), share), rtol=1e-3, atol=1e-4)
    hard = nn.functional.one_hot(batch["labels"], 3).float()
    targets = (1 - share) * hard + share * hard.flip(0)
    expected = hand_written_loss(outputs.logits, targets, weights or [1.0] * 3, 0.1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_augmentation_is_for_training_alone(tmp_path):
    trainer = make_trainer(tmp_path, rand_augment="m9-n2-mstd0.5-inc1", random_erasing=1.0, mixup=0.8, cutmix=1.0)
    batch = next(iter(trainer.get_eval_dataloader()))
    trainer.model.eval()
    _, (logits, readable), labels = trainer.prediction_step(trainer.model, batch, False)
    plain = (batch["pixel_values"] / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(logits, trainer.model(plain).logits.detach())
    assert labels.tolist() == [0, 1, 2, 0] and readable.all()
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    trainer.compute_loss(trainer.model, batch)
    assert not any(torch.equal(first, second) for first, second in zip(seen[0], plain))


def test_micro_batches_make_the_gradient_of_a_whole_batch(tmp_path):
    whole = make_trainer(tmp_path, per_device_train_batch_size=8, max_steps=1)
    parts = make_trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    for trainer in (whole, parts):
        trainer.train()
    assert logged(parts, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-4)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)


def test_training_stops_at_a_broken_loss(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.classifier.bias.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="not a finite number at step 1"):
        trainer.train()


# Learning rates


def test_each_layer_learns_at_its_own_rate(tmp_path):
    trainer = make_trainer(tmp_path, layer_decay=0.5, max_steps=1, max_grad_norm=0.0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    # The first step of Adam moves a weight that is not decayed by the learning rate.
    moved = dict.fromkeys(range(6), 0.0)
    for name, parameter in trainer.model.named_parameters():
        if parameter.ndim == 1:
            layer = layer_of_parameter(name, [2, 2])
            moved[layer] = max(moved[layer], (parameter - before[name]).abs().max().item())
    assert moved == pytest.approx({layer: 0.01 * 0.5 ** (5 - layer) for layer in range(6)}, rel=0.01)


def test_schedule_is_logged(tmp_path):
    trainer = make_trainer(
        tmp_path,
        *(16, False),
        max_steps=6,
        warmup_steps=2,
        learning_rate=None,
        base_learning_rate=1.28,  # for 512 images; there are 4 * 2
        min_learning_rate=0.128,
        warmup_learning_rate=0.256,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        lr_scheduler_type="cosine",
        layer_decay=0.5,
    )
    trainer.train()
    peak, lowest, first = 0.02, 0.002, 0.004
    cosine = [lowest + (peak - lowest) * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(4)]
    assert logged(trainer, "learning_rate") == pytest.approx([first, (first + peak) / 2, *cosine])


def rates_of(trainer, total_steps: int) -> list[float]:
    trainer.create_optimizer_and_scheduler(total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return rates


def test_other_schedules_are_transformers(tmp_path):
    linear = make_trainer(tmp_path, lr_scheduler_type="linear", warmup_steps=2)
    assert rates_of(linear, 6) == pytest.approx([0, 0.005, 0.01, 0.0075, 0.005, 0.0025])
    constant = make_trainer(tmp_path, lr_scheduler_type="constant")
    assert rates_of(constant, 6) == pytest.approx([0.01] * 6)
    options = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}
    lowest = make_trainer(tmp_path, **options, layer_decay=0.5)
    assert rates_of(lowest, 5)[-1] == pytest.approx(0.01 * (0.5 + 0.5 * (1 + math.cos(math.pi * 0.8)) / 2))


def test_a_second_training_has_a_schedule_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.train()
    trainer.train()
    rates = logged(trainer, "learning_rate")
    assert rates[:3] == rates[-3:] and rates[0] == 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_type": "linear", "min_learning_rate": 1e-5}, "`min_learning_rate` is 1e-05, but .*'linear'"),
        ({"lr_scheduler_type": "linear", "warmup_learning_rate": 1e-5}, "`warmup_learning_rate` is 1e-05"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.1}, r"`warmup_steps` is 0\.1, but .*'constant'"),
        (
            {"lr_scheduler_kwargs": {"num_cycles": 2}},
            "`lr_scheduler_kwargs` is .* but .*'cosine'",
        ),
    ],
)
def test_what_a_schedule_cannot_honour_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ClassificationTrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "warmup_steps": 0, **changes})


def test_optimizer_is_adamw_or_lars(tmp_path):
    adamw = make_trainer(tmp_path).create_optimizer()
    assert type(adamw).__name__ == "AdamW" and {group["betas"] for group in adamw.param_groups} == {(0.9, 0.999)}
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0, 0.05}
    lars = make_trainer(tmp_path, linear=True, lars=True).create_optimizer()
    assert type(lars).__name__ == "LARS"
    assert sum(len(group["params"]) for group in lars.param_groups) == 2, "the new head's"


# Order


def sampled(trainer, epoch: int) -> list[tuple[int, ...]]:
    sampler = trainer.build_sampler(len(trainer.train_dataset))
    sampler.set_epoch(epoch)
    assert len(sampler) == len(list(sampler))
    return list(sampler)


def test_epochs_have_whole_batches_of_different_images(tmp_path):
    trainer = make_trainer(tmp_path, count=19)
    first, second = sampled(trainer, 0), sampled(trainer, 1)
    assert len(set(first)) == len(first) == 16 and {epoch for epoch, _, _ in first} == {0}
    assert {index for _, _, index in first} != {index for _, _, index in second}, "others are left out"
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [4] * 4


def test_repeated_augmentation_draws_fewer_images_anew_each_time(tmp_path):
    trainer = make_trainer(tmp_path, count=19, plain=False, repeated_augmentation=4)
    keys = sampled(trainer, 2)
    assert len(keys) == 16 and Counter(index for _, _, index, _ in keys) == Counter(
        {keys[4 * i][2]: 4 for i in range(4)}
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["pixel_values"].flatten(1).unique(dim=0)) == 4, "four crops"
    assert len(set(batch["labels"].tolist())) == 1, "of one image"
    drawn = {index for epoch in range(60) for _, _, index, _ in sampled(trainer, epoch)}
    assert drawn == set(range(19))


def test_an_unreadable_image_is_replaced_together_with_its_label(tmp_path):
    trainer = make_trainer(tmp_path)
    data = ImageDataset(records(6, broken=(1, 2)), "image", EvalTransform((32, 32), 3), 0, "label")
    replaced, others = data[1], [data[index] for index in (0, 3, 4, 5)]
    [same] = [other for other in others if torch.equal(other["pixel_values"], replaced["pixel_values"])]
    assert same["labels"] == replaced["labels"]
    trainer.train_dataset = data
    trainer.train()
    assert len(trainer.unreadable) == 2


# Frozen layers


class Watcher(nn.Module):
    """A model with a frozen part, a learning part and a part without parameters."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.frozen = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.dropout = nn.Dropout(0.5)
        # As in LeViT's head.
        self.head = nn.Sequential(nn.BatchNorm1d(64).requires_grad_(False), nn.Linear(64, 3))
        self.frozen.requires_grad_(False)
        self.modes = []

    def forward(self, pixel_values):
        modules = (self.frozen[1], self.frozen[2], self.head[0], self.head, self.dropout)
        self.modes.append([module.training for module in modules])
        return type("Outputs", (), {"logits": self.head(self.dropout(self.frozen(pixel_values).flatten(1)))})()


def test_frozen_layers_drop_nothing_and_keep_their_statistics(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model = model = Watcher(trainer.model.config).train()
    trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    assert model.modes == [[False, False, False, True, True]], "but what has no parameters is not frozen"


def test_a_linear_probe_leaves_the_encoder_alone(tmp_path):
    trainer = make_trainer(tmp_path, linear=True, drop_path_rate=0.5, weight_decay=0.1, learning_rate=1.0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"classifier.{name}" for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked")
    } | {
        "classifier.1.weight",
        "classifier.1.bias",
    }


# Averages, evaluation, predictions


def test_the_average_is_evaluated_beside_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.9, learning_rate=0.05)
    assert not any(name.startswith("eval_ema") for name in trainer.evaluate()), "there is none before training"
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    metrics = trainer.evaluate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert metrics["eval_loss"] != metrics["eval_ema_loss"]
    trainer.save_averaged_model()
    averaged = GreenMIMForImageClassification.from_pretrained(tmp_path / "ema").eval()
    samples = [trainer.eval_dataset[index] for index in range(7)]
    images = trainer.normalize(torch.stack([sample["pixel_values"] for sample in samples]))
    labels = torch.tensor([sample["labels"] for sample in samples])
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(m.eval()(images).logits, labels) for m in (trainer.model, averaged)]
    assert [metrics["eval_loss"], metrics["eval_ema_loss"]] == pytest.approx([loss.item() for loss in losses])
    for name in ("eval", "eval_ema"):
        Image.open(tmp_path / f"{name}_confusion_matrix.png").load()


def test_unreadable_images_count_nowhere_however_they_are_batched(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    transform = EvalTransform((32, 32), 3)
    whole = EveryImage(records(9), "image", transform, 0, "label")
    # Batches of 4: one without any readable image, one with a single one.
    broken = EveryImage(records(9, broken=(0, 1, 2, 3, 4, 6, 7)), "image", transform, 0, "label")
    output = trainer.predict(whole)
    kept = [5, 8]
    logits = torch.from_numpy(output.predictions[0][kept])
    expected = nn.functional.cross_entropy(logits, torch.tensor([2, 2])).item()
    metrics = trainer.evaluate(broken)
    assert metrics["eval_loss"] == pytest.approx(expected) and metrics["eval_unreadable"] == 7
    assert metrics["eval_accuracy"] == (logits.argmax(dim=1) == 2).float().mean()
    assert messages(caplog).count("Skipped an unreadable image") == 7
    nothing = EveryImage(records(3, broken=(0, 1, 2)), "image", transform, 0, "label")
    assert not {"eval_loss", "eval_accuracy"} & set(trainer.evaluate(nothing))


def test_predictions_that_are_not_finite_are_no_unreadable_images(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    data = EveryImage(records(6, broken=(2,)), "image", EvalTransform((32, 32), 3), 0, "label")
    whole = trainer.predict(data)
    with torch.no_grad():  # one of the finite predictions' classes at a time
        trainer.model.classifier.bias[1] = math.nan
    metrics = trainer.evaluate(data)
    assert metrics["eval_unreadable"] == 1 and metrics["eval_non_finite"] == 5
    assert not {"eval_accuracy", "eval_loss"} & set(metrics) and "eval_accuracy" not in whole.metrics
    output = trainer.predict(data)
    assert output.predictions[1].tolist() == [True, True, False, True, True, True]
    trainer.save_predictions(output, data, str(tmp_path / "predictions.csv"))
    with open(tmp_path / "predictions.csv", newline="") as file:
        _, *lines = csv.reader(file)
    assert [line[2:] for line in lines] == [["", *["" if i == 2 else "nan"] * 3] for i in range(6)]
    assert "Predictions that are not finite numbers: 5" in messages(caplog)


def test_predictions_are_written_for_every_image(tmp_path):
    trainer = make_trainer(tmp_path)
    transform = EvalTransform((32, 32), 3)
    labelled = EveryImage(records(5, broken=(2,)), "image", transform, 0, "label")
    output = trainer.predict(labelled)
    path = tmp_path / "some, predictions.csv"
    trainer.save_predictions(output, labelled, str(path))
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["image", "label", "prediction", *NAMES]
    assert [line[:2] for line in lines] == [[f"{index}.png", NAMES[index % 3]] for index in range(5)]
    assert lines[2][2:] == ["", "", "", ""]
    for index in (0, 1, 3, 4):
        probabilities = np.exp(output.predictions[0][index]) / np.exp(output.predictions[0][index]).sum()
        np.testing.assert_allclose([float(value) for value in lines[index][3:]], probabilities, atol=1e-6)
        assert lines[index][2] == NAMES[probabilities.argmax()]

    nameless = labelled.records.map(lambda record: {"image": {"path": None, "bytes": record["image"]["bytes"]}})
    unlabelled = EveryImage(nameless.remove_columns(["label"]), "image", transform, 0)
    trainer.save_predictions(trainer.predict(unlabelled), unlabelled, str(path))
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["image", "prediction", *NAMES] and [line[0] for line in lines] == [
        f"image {i}" for i in range(5)
    ]
