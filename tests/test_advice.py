"""Warnings of runs that will come to little: each in a run that deserves it, none in a good one of the same kind."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_trainer import image_dataset, make_trainer
from tests.training_helpers import messages, noise_image, run, write_images
from training_greenmim.data.transforms import EvalTransform
from training_greenmim.pretraining.advice import (
    constant_images,
    constant_units,
    flat_loss,
    growing_gradient,
    too_few_images,
    too_few_steps,
)
from training_greenmim.pretraining.trainer import MIMTrainer


OF_LENGTH = {"images", "steps"}


def trained(folder, learning_rate: float, **changes) -> MIMTrainer:
    """A run of 60 steps with an evaluation of 40 images every five."""
    options = {"max_steps": 60, "eval_strategy": "steps", "eval_steps": 5, "num_pictures": 0, **changes}
    trainer = make_trainer(folder, learning_rate=learning_rate, **options)
    trainer.feature_reader.dataset = image_dataset(40, EvalTransform((32, 32), 3))
    trainer.train()
    return trainer


def test_a_good_run_is_warned_of_its_length_alone(tmp_path, caplog):
    trainer = trained(tmp_path, 0.003)
    assert trainer.advice.said == OF_LENGTH
    text = messages(caplog)
    assert "There are 16 training images, under 200" in text and "--model_name_or_path" in text
    assert "The run has 60 steps for its 16 images, under 1000: raise --max_steps" in text


def test_a_learning_rate_that_is_too_high_is_told_by_gradient_features_and_loss(tmp_path, caplog):
    trainer = trained(tmp_path, 3.0, warmup_steps=0.9)
    assert trainer.advice.said == {*OF_LENGTH, "gradient", "collapse", "flat"}
    text = messages(caplog)
    for start in ("The gradient norm has grown to", "The features of different images", "The evaluation loss has not"):
        assert text.count(start) == 1, "once each"
    assert text.count("--learning_rate (now 3)") == 3 and "--max_grad_norm" in text and "--warmup_steps" in text


def test_a_run_that_does_not_learn_is_told_by_its_loss_alone(tmp_path, caplog):
    trainer = trained(tmp_path, 1e-12)
    assert trainer.advice.said == {*OF_LENGTH, "flat"}
    assert "has not fallen since 5 evaluations" in messages(caplog)


def test_too_few_images_and_steps():
    assert too_few_images(200) is None and "There are 199 training images" in too_few_images(199)
    args = SimpleNamespace(max_steps=-1, num_train_epochs=3.0, total_batch_size=64, per_device_train_batch_size=64)
    assert too_few_steps(1000, 400, args) is None
    message = too_few_steps(19, 400, args)
    assert "19 steps for its 400 images" in message and "--num_train_epochs 160 (now 3)" in message
    assert 160 * 400 / 64 == 1000


def log_of(losses: list[float], every: int, rate: float = 1.0) -> list[dict]:
    evaluations = [{"step": every * (number + 1), "eval_loss": loss} for number, loss in enumerate(losses)]
    return [*evaluations, {"step": 1, "learning_rate": rate}]


def test_loss_is_flat_only_where_it_should_fall():
    flat = [1.0, 0.5, *[0.4] * 6]
    assert "not fallen since 5 evaluations (0.4 before, 0.4 since)" in flat_loss(log_of(flat, 10), 200, 1.0)
    assert flat_loss(log_of(flat[:-1], 10), 200, 1.0) is None, "four evaluations after the least loss"
    assert flat_loss(log_of([0.5 - 0.01 * number for number in range(8)], 10), 200, 1.0) is None, "it falls"
    assert flat_loss(log_of(flat, 10, rate=0.05), 200, 1.0) is None, "the cosine ends"
    assert flat_loss(log_of(flat, 10), 1000, 1.0) is None, "in the first fifth of a run"
    # In long runs with many evaluations a fifth of the steps counts: here the loss falls by 0.02 % an evaluation.
    slow = [0.5 * 0.9998**number for number in range(400)]
    assert flat_loss(log_of(slow[:300], 10), 4000, 1.0) is None
    assert "since 80 evaluations" in flat_loss(log_of([*slow[:200], *[slow[200]] * 85], 10), 4000, 1.0)


def test_gradients_may_grow_while_the_loss_falls():
    def log(norms, losses):
        return [{"grad_norm": norm, "loss": loss} for norm, loss in zip(norms, losses)]

    usual = [0.1] * 6
    assert growing_gradient(log([*usual, 0.7, 0.8], [*[1.0] * 6, 0.9, 0.8]), 1.0) is None
    assert growing_gradient(log([*usual, 5, 0.1], [*[1.0] * 6, 2, 1.0]), 1.0) is None, "a single one"
    assert growing_gradient(log([*usual[:4], 5, 5], [*[1.0] * 4, 2, 2]), 1.0) is None, "too early to tell"
    message = growing_gradient(log([*usual, 0.7, 0.8], [*[1.0] * 6, 1.1, 1.2]), 1.5)
    assert "grown to 0.7" in message and "from 1 to 1.1" in message and "(now 1.5)" in message


# Images


def grey(value: int, spot: int = 0) -> Image.Image:
    """A grey image of one value with a noisy square of `spot` pixels a side in a corner."""
    pixels = np.full((32, 32, 3), value, dtype=np.uint8)
    pixels[:spot, :spot] = np.random.default_rng(value).integers(0, 256, (spot, spot, 3))
    return Image.fromarray(pixels)


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images])


def test_constant_images_and_units_are_counted():
    noise = [grey(seed, spot=32) for seed in range(8)]
    assert constant_images(as_tensor(noise)) is None and constant_units(as_tensor(noise), 8) is None
    assert "20% of the first 10 " in constant_images(as_tensor([*noise, grey(5), grey(200)]))
    assert constant_images(as_tensor([*noise, *noise, grey(5)])) is None, "one of 17"
    # 8x8 px of 32x32 are one unit of 16, 24x24 px nine.
    assert "94% of the mask units" in constant_units(as_tensor([grey(9, spot=8)]), 8)
    assert constant_units(as_tensor([grey(9, spot=24)]), 8) is None
    # A gradient of one grey level is constant, one channel that varies is not.
    faint = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    faint[..., ::2] += 1
    assert constant_images(faint) is not None
    faint[:, 1, ::2] += 20
    assert constant_images(faint) is None and constant_units(faint, 8) is None


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([grey(10 * index) for index in range(12)], "100% of the first 12 evaluated images are nearly constant"),
        ([grey(10 * index, spot=12) for index in range(12)], "% of the mask units of the first 12 evaluated images"),
        ([noise_image(index) for index in range(12)], None),
    ],
)
def test_a_run_looks_at_the_first_images(tmp_path, caplog, images, expected):
    write_images(tmp_path / "train", 12)
    (tmp_path / "held-out").mkdir()
    for index, image in enumerate(images):
        image.save(tmp_path / "held-out" / f"{index}.png")
    folders = ("--train_dir", tmp_path / "train", "--validation_dir", tmp_path / "held-out")
    batch = ("--per_device_eval_batch_size", 12)
    run(tmp_path / "out", *folders, *batch, "--do_train", "--do_eval", "--max_steps", 1)
    text = messages(caplog)
    assert text.count("nearly constant") == (expected is not None) and (expected or "") in text


def test_rankme_that_is_left_out_is_told_once(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    found = [trainer.evaluate(), trainer.evaluate()]
    assert all("eval_rankme" not in metrics and "eval_feature_std" in metrics for metrics in found)
    # 16 dimensions, 16 units an image, six images.
    assert (
        messages(caplog).count("`eval_rankme` is left out: it needs 10 features for each of their 16 dimensions") == 1
    )
    assert "the units of 10 images here" in messages(caplog)
