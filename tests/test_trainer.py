"""The pieces of `MIMTrainer`: optimiser, masks, gradients, the halt at broken losses, pictures and logs."""

import copy
import math
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback

from modeling_greenmim import GreenMIMForPreTraining
from modeling_greenmim.image_processing_greenmim import build_image_processor
from modeling_greenmim.targets import PixelTarget, normalize_units
from tests.training_helpers import SHORT_RUN, encoded, messages, noise_image, tiny_config
from training_greenmim.data.image_dataset import ImageDataset
from training_greenmim.data.transforms import EvalTransform, TrainTransform
from training_greenmim.optimization import no_decay_parameters
from training_greenmim.pretraining.pictures import GAP, picture_grid, reconstruct
from training_greenmim.pretraining.trainer import MIMTrainer
from training_greenmim.runs.arguments import MIMTrainingArguments, default_num_workers
from training_greenmim.runs.checkpoints import last_checkpoint
from training_greenmim.runs.curves import loss_curve
from training_greenmim.runs.trainer import NonFiniteLossError, keep_single_precision


# Layers of `tiny_config`, by what names of their parameters begin with.
LAYERS = {
    "greenmim.embeddings.": 0,
    "greenmim.encoder.layers.0.blocks.0.": 1,
    "greenmim.encoder.layers.0.blocks.1.": 2,
    "greenmim.encoder.layers.0.downsample.": 2,
    "greenmim.encoder.layers.1.blocks.0.": 3,
    "greenmim.encoder.layers.1.blocks.1.": 4,
    "greenmim.layernorm.": 5,
    "decoder.": 5,
}


def image_dataset(count: int, transform, first_seed: int = 0, seed: int = 0) -> ImageDataset:
    contents = [{"path": f"{index}.png", "bytes": encoded(noise_image(first_seed + index))} for index in range(count)]
    records = datasets.Dataset.from_dict({"image": contents}, datasets.Features({"image": ImageFeature(decode=False)}))
    return ImageDataset(records, "image", transform, seed)


def arguments(output_dir: Path, **changes) -> MIMTrainingArguments:
    return MIMTrainingArguments(output_dir=str(output_dir), **{**SHORT_RUN, **changes})


def make_trainer(output_dir: Path, count: int = 16, config=None, transforms=None, **changes) -> MIMTrainer:
    torch.manual_seed(0)
    config = config or tiny_config()
    size, channels = config.image_height_and_width, config.num_channels
    train, evaluation = transforms or (TrainTransform(size, channels), EvalTransform(size, channels))
    return MIMTrainer(
        GreenMIMForPreTraining(config),
        arguments(output_dir, **changes),
        train_dataset=image_dataset(count, train),
        eval_dataset=image_dataset(6, evaluation, first_seed=50),
        image_processor=build_image_processor(config),
    )


class Recorder(TrainerCallback):
    """Keeps inputs and masks of each forward pass in training and in evaluation, and each step's gradients."""

    def __init__(self, trainer: MIMTrainer):
        self.masks, self.inputs, self.eval_masks, self.gradients = [], [], [], []
        self.steps: list[int] = []
        self.trainer = trainer
        trainer.model.register_forward_hook(self.after_forward, with_kwargs=True)
        trainer.add_callback(self)

    def after_forward(self, model, args, kwargs, outputs):
        if model.training:
            self.masks.append(outputs.mask.clone())
            self.inputs.append(kwargs["pixel_values"].clone())
            self.steps.append(self.trainer.state.global_step)
        else:
            self.eval_masks.append(outputs.mask.clone())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


# Optimiser


def test_weight_decay_spares_vectors_bias_tables_and_tokens_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(decays) == sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    spared = {name for name, decay in decays.items() if decay == 0}
    assert all(decay == 0.05 for name, decay in decays.items() if name not in spared)
    shapes = {name: parameter.ndim for name, parameter in trainer.model.named_parameters()}
    by_hand = {
        name
        for name in decays
        if shapes[name] == 1 or name.endswith("relative_position_bias_table") or name == "decoder.mask_token"
    }
    assert spared == by_hand
    tables = [name for name in spared if name.endswith("relative_position_bias_table")]
    assert len(tables) == 4 and all(shapes[name] == 2 for name in tables) and "decoder.mask_token" in spared
    assert "greenmim.embeddings.patch_embeddings.projection.weight" not in spared
    assert no_decay_parameters(trainer.model) == spared


def test_optimizer_is_adamw_with_the_published_betas(tmp_path):
    optimizer = make_trainer(tmp_path).create_optimizer()
    assert type(optimizer).__name__ == "AdamW"
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.5e-4 * 32 / 256),
        ({"base_learning_rate": 1e-3}, 1e-3 * 32 / 256),
        ({"learning_rate": 7e-4}, 7e-4),
        ({"learning_rate": 0.0}, 0.0),
    ],
)
def test_learning_rate_scales_with_the_total_batch(tmp_path, changes, expected):
    args = arguments(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=4, **changes)
    assert args.total_batch_size == 32
    assert args.learning_rate == pytest.approx(expected, rel=1e-12)


def test_learning_rate_warms_up_then_follows_a_cosine(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8, warmup_steps=0.25, base_learning_rate=6.4)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    peak = 6.4 * 4 / 256
    factors = [0, 0.5] + [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    # The rate after a step may be logged instead of the rate of that step.
    assert any(
        rates == pytest.approx([peak * factor for factor in wanted], abs=1e-9)
        for wanted in (factors, [*factors[1:], 0.0])
    )


def test_each_layer_learns_at_its_own_rate(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, warmup_steps=0, learning_rate=0.01, layer_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    # The first step of Adam moves a weight that is not decayed by the learning rate.
    moved = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.ndim == 1:
            part = next(part for part in LAYERS if name.startswith(part))
            moved[part] = max(moved.get(part, 0), (parameter - before[name]).abs().max().item())
    assert moved == pytest.approx({part: 0.01 * 0.5 ** (5 - layer) for part, layer in LAYERS.items()}, rel=0.01)


def test_without_layer_decay_the_optimizer_is_trainers(tmp_path):
    trainer = make_trainer(tmp_path)
    groups, expected = trainer.create_optimizer().param_groups, Trainer.create_optimizer(make_trainer(tmp_path))
    assert len(groups) == 2 and trainer.args.layer_decay == 1
    for found, wanted in zip(groups, expected.param_groups, strict=True):
        assert {key: found[key] for key in found if key != "params"} == {
            key: wanted[key] for key in wanted if key != "params"
        }
        assert all(torch.equal(a, b) for a, b in zip(found["params"], wanted["params"], strict=True))


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, math.nan])
def test_layer_decays_that_make_no_sense_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=rf"`layer_decay` is {value}; it must be in \(0, 1\]"):
        arguments(tmp_path, layer_decay=value)


def test_both_learning_rates_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`learning_rate` is 0\.001 and `base_learning_rate` is 0\.0001"):
        arguments(tmp_path, learning_rate=1e-3, base_learning_rate=1e-4)


def test_defaults_are_those_of_the_recipe(tmp_path):
    args = MIMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.95, 0.05)
    assert args.lr_scheduler_type == "cosine" and args.warmup_steps == 0.05 and args.max_grad_norm == 0
    assert args.mask_per_sample is False and args.stop_on_nonfinite_loss is True
    assert args.base_learning_rate == 1.5e-4
    assert args.dataloader_num_workers == default_num_workers() and args.dataloader_persistent_workers


def test_workers_share_the_cores_among_the_processes_of_a_machine(monkeypatch):
    alone = default_num_workers()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert 1 <= alone <= 8 and default_num_workers() == 1


# Masks


def test_one_mask_serves_a_step_and_each_step_has_its_own(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6)
    recorder = Recorder(trainer)
    trainer.train()
    assert len(recorder.masks) == 6
    for mask in recorder.masks:
        assert mask.shape == (4, 16) and mask[0].sum() == 12
        assert (mask == mask[0]).all()
    assert len({tuple(mask[0].tolist()) for mask in recorder.masks}) >= 5


def test_micro_batches_of_a_step_have_masks_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    recorder = Recorder(trainer)
    trainer.train()
    assert recorder.steps == [0, 0, 1, 1, 2, 2]
    assert len({tuple(mask[0].tolist()) for mask in recorder.masks}) >= 5


def test_mask_per_sample_draws_a_mask_for_each_image(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, mask_per_sample=True)
    recorder = Recorder(trainer)
    trainer.train()
    rows = torch.cat(recorder.masks)
    assert len(rows) == 8 and (rows.sum(dim=1) == 12).all()
    assert len({tuple(row.tolist()) for row in rows}) >= 7


def test_masks_and_images_are_derived_from_the_seed(tmp_path):
    runs = []
    for name, seed, disturb in (("a", 42, 0), ("b", 42, 1), ("c", 43, 0)):
        trainer = make_trainer(tmp_path / name, max_steps=3, seed=seed)
        recorder = Recorder(trainer)
        torch.rand(disturb)  # what else draws from the global generator plays no part
        trainer.train()
        runs.append(recorder)
    assert all(torch.equal(*pair) for pair in zip(runs[0].masks, runs[1].masks))
    assert all(torch.equal(*pair) for pair in zip(runs[0].inputs, runs[1].inputs))
    assert not all(torch.equal(*pair) for pair in zip(runs[0].masks, runs[2].masks))
    assert not all(torch.equal(*pair) for pair in zip(runs[0].inputs, runs[2].inputs))


def test_evaluation_uses_one_mask_forever(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, mask_per_sample=True)
    recorder = Recorder(trainer)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before
    trainer.train()
    rows = torch.cat(recorder.eval_masks)
    # Four evaluations of six images, each with a picture of four.
    assert len(rows) == 40 and (rows == rows[0]).all() and rows[0].sum() == 12


def test_evaluation_loss_is_the_mean_over_images(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.eval()
    losses = []
    with torch.no_grad():
        for sample in trainer.eval_dataset:
            pixel_values = trainer.normalize(sample["pixel_values"][None])
            losses.append(trainer.model(pixel_values, plan=trainer.evaluation_plan).loss.item())
    # Batches of 4 and 2.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


# Pixels and gradients


@pytest.mark.parametrize("channels", [3, 1])
def test_images_are_normalised_with_the_image_processors_numbers(tmp_path, channels):
    trainer = make_trainer(
        tmp_path, config=tiny_config(num_channels=channels), max_steps=1, per_device_train_batch_size=16
    )
    recorder = Recorder(trainer)
    trainer.train()
    processor = trainer.processing_class
    assert len(processor.image_mean) == len(processor.image_std) == channels
    if channels == 3:
        assert list(processor.image_mean) == [0.485, 0.456, 0.406]
        assert list(processor.image_std) == [0.229, 0.224, 0.225]
    expected = [sample["pixel_values"] for sample in trainer.train_dataset]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
    expected = torch.stack([(image.float() / 255 - mean) / std for image in expected])
    actual = recorder.inputs[0]
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    # The batch is shuffled.
    distances = (actual[:, None] - expected[None]).abs().amax(dim=(2, 3, 4))
    assert (distances.min(dim=1).values < 1e-5).all() and distances.argmin(dim=1).unique().numel() == 16


def test_gradient_of_a_step_is_the_mean_over_its_micro_batches(tmp_path):
    # 10 images: 5 micro-batches, so that the third step of the epoch has one only.
    trainer = make_trainer(
        tmp_path,
        count=10,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        weight_decay=0.0,
    )
    model = copy.deepcopy(trainer.model).train()
    recorder = Recorder(trainer)
    trainer.train()
    assert recorder.steps == [0, 0, 1, 1, 2] and len(recorder.gradients) == 3
    for step in range(3):
        model.zero_grad()
        parts = [index for index, at in enumerate(recorder.steps) if at == step]
        losses = [model(recorder.inputs[index], bool_masked_pos=recorder.masks[index]).loss for index in parts]
        (sum(losses) / len(losses)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(recorder.gradients[step][name], parameter.grad, rtol=1e-4, atol=1e-6)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] == pytest.approx(losses_of_step(model, recorder, 2), abs=1e-3)
    assert losses[0] == pytest.approx(losses_of_step(model, recorder, 0), abs=1e-3)


def losses_of_step(model, recorder: Recorder, step: int) -> float:
    parts = [index for index, at in enumerate(recorder.steps) if at == step]
    with torch.no_grad():
        return np.mean(
            [model(recorder.inputs[index], bool_masked_pos=recorder.masks[index]).loss.item() for index in parts]
        )


def test_every_epoch_shows_every_image_in_a_new_order_and_crop(tmp_path):
    trainer = make_trainer(tmp_path, count=8, max_steps=-1, num_train_epochs=2)
    recorder = Recorder(trainer)
    trainer.train()
    assert len(recorder.inputs) == 4
    orders = []
    for epoch in range(2):
        shown = torch.cat(recorder.inputs[2 * epoch : 2 * epoch + 2])
        expected = torch.stack([trainer.train_dataset[(epoch, 0, index)]["pixel_values"] for index in range(8)])
        distances = (shown[:, None] - trainer.normalize(expected)[None]).abs().amax(dim=(2, 3, 4))
        assert (distances.min(dim=1).values < 1e-5).all()
        orders.append(distances.argmin(dim=1).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8)) and orders[0] != orders[1]


def test_several_gpus_need_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(MIMTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"`n_gpu` is 2.*accelerate launch"):
        make_trainer(tmp_path)


# Losses that are not finite


class Break(TrainerCallback):
    """Sets a weight to infinity after a step and keeps all weights as they then are."""

    def __init__(self, step: int):
        self.step, self.weights = step, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.decoder.decoder_pred.weight[0, 0] = torch.inf
            self.weights = copy.deepcopy(model.state_dict())


def test_nonfinite_loss_stops_at_its_step_and_touches_nothing(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8, save_strategy="steps", save_steps=2)
    callback = Break(3)
    trainer.add_callback(callback)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "at step 4." in message and str(tmp_path / "checkpoint-2") in message
    assert "stop_on_nonfinite_loss" in message and "base_learning_rate" in message
    assert trainer.state.global_step == 3
    assert all(torch.equal(value, callback.weights[name]) for name, value in trainer.model.state_dict().items())


def test_last_good_checkpoint_is_one_with_good_weights(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8, save_strategy="steps", save_steps=1)
    trainer.add_callback(Break(3))
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    # The weights broke in the step that would have been saved, before a loss could tell.
    assert "The weights are not finite numbers after step 3." in str(caught.value)
    assert not (tmp_path / "checkpoint-3").exists()
    named = [folder for folder in tmp_path.glob("checkpoint-*") if str(folder) + "." in str(caught.value)]
    assert len(named) == 1
    assert all(value.isfinite().all() for value in load_file(named[0] / "model.safetensors").values())


def test_where_looking_would_wait_a_broken_loss_is_found_before_the_next_log_or_checkpoint(tmp_path):
    for name, intervals in (("log", {"logging_steps": 5}), ("save", {"logging_steps": 50, "save_steps": 5})):
        trainer = make_trainer(tmp_path / name, max_steps=8, save_strategy="steps", **{"save_steps": 2, **intervals})
        trainer.waits_to_check = True  # as on a GPU
        trainer.add_callback(Break(3))
        with pytest.raises(NonFiniteLossError, match=r"not a finite number at step 4\."):
            trainer.train()
        saved = {path.name for path in (tmp_path / name).glob("checkpoint-*")}
        assert saved <= {"checkpoint-2"}, "nothing is saved after it"


def test_looking_for_a_broken_loss_waits_for_no_device(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.waits_to_check = True
    trainer.check_finite(torch.empty((), device="meta"))  # whose value cannot be read
    with pytest.raises(RuntimeError, match="meta"):
        trainer.stop_if_broken()


def test_nonfinite_loss_without_a_checkpoint_says_so(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(Break(1))
    with pytest.raises(NonFiniteLossError, match=r"at step 2\. Last good checkpoint: none was saved yet"):
        trainer.train()


def test_absurd_learning_rate_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=50, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(NonFiniteLossError, match=r"The loss is not a finite number at step \d+\."):
        trainer.train()
    assert trainer.state.global_step < 50


def test_nonfinite_loss_in_a_later_micro_batch_stops_before_the_step(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8, gradient_accumulation_steps=2, per_device_train_batch_size=2)

    def spoil(model, args, kwargs):
        calls.append(len(calls))
        if len(calls) == 4:  # the second micro-batch of the second step
            kwargs["pixel_values"] = kwargs["pixel_values"] * torch.nan
        if len(calls) == 3:
            weights.update(copy.deepcopy(model.state_dict()))
        return args, kwargs

    calls, weights = [], {}
    trainer.model.register_forward_pre_hook(spoil, with_kwargs=True)
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        trainer.train()
    assert len(calls) == 4
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


def test_run_goes_on_regardless_when_told_to(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, stop_on_nonfinite_loss=False)
    trainer.add_callback(Break(2))
    trainer.train()
    assert trainer.state.global_step == 6


# Checkpoints


def make_checkpoint(folder: Path, whole: bool = True) -> str:
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    if whole:
        (folder / "trainer_state.json").write_text("{}")
    return str(folder)


def test_last_checkpoint_is_the_newest_whole_one(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-9")
    expected = make_checkpoint(tmp_path / "checkpoint-10")
    make_checkpoint(tmp_path / "checkpoint-30", whole=False)
    make_checkpoint(tmp_path / "checkpoint-best")
    make_checkpoint(tmp_path / "other-99")
    (tmp_path / "checkpoint-40").write_text("a file")
    assert last_checkpoint(str(tmp_path)) == expected


def test_last_checkpoint_has_readable_weights(tmp_path):
    expected = make_checkpoint(tmp_path / "checkpoint-9")
    truncated = Path(make_checkpoint(tmp_path / "checkpoint-10"), "model.safetensors")
    truncated.write_bytes(truncated.read_bytes()[:20])
    assert last_checkpoint(str(tmp_path)) == expected


def test_no_whole_checkpoint_is_none(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-30", whole=False)
    assert last_checkpoint(str(tmp_path)) is None
    assert last_checkpoint(str(tmp_path / "nowhere")) is None


# Pictures


def random_case(config):
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(config)
    pixel_values = torch.randn(2, config.num_channels, *config.image_height_and_width) * 3 + 1
    mask = torch.zeros(2, config.unit_grid[0] * config.unit_grid[1])
    mask[0, :12] = mask[1, 4:] = 1
    return model, pixel_values, mask


@pytest.mark.parametrize("changes", [{}, {"num_channels": 1}, {"image_size": [32, 48]}])
def test_perfect_prediction_gives_back_the_image(changes):
    model, pixel_values, mask = random_case(tiny_config(**changes))
    perfect = normalize_units(model.patchify(pixel_values))
    _, reconstruction = reconstruct(model, pixel_values, perfect, mask)
    torch.testing.assert_close(reconstruction, pixel_values, rtol=1e-4, atol=1e-4)


def test_visible_units_are_pasted_exactly_and_hidden_ones_use_their_own_statistics():
    model, pixel_values, mask = random_case(tiny_config())
    logits = torch.randn(2, 16, 8 * 8 * 3)
    masked, reconstruction = reconstruct(model, pixel_values, logits, mask)
    assert masked.shape == reconstruction.shape == pixel_values.shape
    for image in range(2):
        for unit in range(16):
            row, column = unit // 4 * 8, unit % 4 * 8
            place = (image, slice(None), slice(row, row + 8), slice(column, column + 8))
            original = pixel_values[place]
            if mask[image, unit]:
                assert (masked[place] == 0).all()
                predicted = logits[image, unit].view(8, 8, 3).permute(2, 0, 1)
                expected = predicted * (original.var() + 1e-6).sqrt() + original.mean()
                torch.testing.assert_close(reconstruction[place], expected)
            else:
                assert torch.equal(masked[place], original) and torch.equal(reconstruction[place], original)


def test_plain_pixel_targets_are_not_scaled():
    model, pixel_values, mask = random_case(tiny_config(norm_pix_loss=False))
    _, reconstruction = reconstruct(model, pixel_values, model.patchify(pixel_values), mask)
    assert torch.equal(reconstruction, pixel_values)


def test_picture_grid_has_a_row_per_image_and_a_column_per_kind():
    mean, std = [0.5, 0.25, 0.0], [0.5, 0.25, 1.0]

    def plain(*colours):
        rows = [(torch.tensor(colour) / 255 - torch.tensor(mean)) / torch.tensor(std) for colour in colours]
        return torch.stack(rows)[:, :, None, None].expand(-1, -1, 6, 8)

    columns = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (1, 2, 3)], [(9, 8, 7), (300, -20, 128)]]
    grid = picture_grid([plain(*colours) for colours in columns], mean, std)
    assert grid.mode == "RGB" and grid.size == (3 * 8 + 2 * GAP, 2 * 6 + GAP)
    pixels = np.array(grid)
    covered = np.zeros(pixels.shape[:2], dtype=bool)
    for column, colours in enumerate(columns):
        for row, colour in enumerate(colours):
            place = (slice(row * (6 + GAP), row * (6 + GAP) + 6), slice(column * (8 + GAP), column * (8 + GAP) + 8))
            assert (pixels[place] == np.clip(colour, 0, 255)).all()
            covered[place] = True
    assert (pixels[~covered] == 255).all()


def test_picture_grid_of_grey_images_is_grey():
    grid = picture_grid([torch.zeros(1, 1, 4, 4)] * 3, [0.5], [0.5])
    assert grid.mode == "L" and grid.size == (3 * 4 + 2 * GAP, 4) and grid.getpixel((0, 0)) == 128


def test_evaluation_draws_the_first_images(tmp_path):
    trainer = make_trainer(tmp_path, num_pictures=3)
    trainer.evaluate()
    path = tmp_path / "reconstructions" / "step-000000.png"
    assert trainer.last_picture == str(path)
    pixels = np.array(Image.open(path))
    assert pixels.shape == (3 * 32 + 2 * GAP, 3 * 32 + 2 * GAP, 3)
    hidden = np.setdiff1d(np.arange(16), trainer.evaluation_plan.visible_units[0])
    for row in range(3):
        top = row * (32 + GAP)
        original, masked, reconstruction = (
            pixels[top : top + 32, left : left + 32] for left in (0, 32 + GAP, 2 * (32 + GAP))
        )
        expected = trainer.eval_dataset[row]["pixel_values"].permute(1, 2, 0).numpy()
        assert np.array_equal(original, expected)
        is_hidden = np.zeros((4, 4), dtype=bool)
        is_hidden.flat[hidden] = True
        is_hidden = is_hidden.repeat(8, axis=0).repeat(8, axis=1)
        assert np.array_equal(masked[~is_hidden], expected[~is_hidden])
        assert np.array_equal(reconstruction[~is_hidden], expected[~is_hidden])
        assert (masked[is_hidden] == [124, 116, 104]).all(), "hidden units have the mean colour"
        assert not np.array_equal(reconstruction[is_hidden], expected[is_hidden])


def test_no_pictures_when_none_are_wanted(tmp_path):
    trainer = make_trainer(tmp_path, num_pictures=0)
    trainer.evaluate()
    assert trainer.last_picture is None and not (tmp_path / "reconstructions").exists()


def test_targets_without_pixels_have_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(PixelTarget, "to_pixels", None)
    trainer = make_trainer(tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.last_picture is None and not (tmp_path / "reconstructions").exists()


def test_tensorboard_receives_losses_and_pictures(tmp_path):
    trainer = make_trainer(tmp_path, report_to=["tensorboard"], max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer.train()
    events = list(tmp_path.rglob("events.out.tfevents.*"))
    assert events
    accumulator = EventAccumulator(str(events[0].parent), size_guidance={"images": 0})
    accumulator.Reload()
    assert accumulator.Tags()["images"] == ["reconstructions"]
    pictures = accumulator.Images("reconstructions")
    assert [picture.step for picture in pictures] == [2, 4]
    for picture in pictures:
        from_file = Image.open(tmp_path / "reconstructions" / f"step-{picture.step:06}.png")
        (tmp_path / "event.png").write_bytes(picture.encoded_image_string)
        assert np.array_equal(np.array(Image.open(tmp_path / "event.png").convert("RGB")), np.array(from_file))
    scalars = accumulator.Tags()["scalars"]
    assert {"train/loss", "train/learning_rate", "train/images_per_second", "eval/loss"} <= set(scalars)


def test_loss_curve_shows_training_and_evaluation():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}, {"train_runtime": 1}]
    (axes,) = loss_curve(history).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert sorted(lines.values()) == [[[1.0, 3.0], [2.0, 2.0]], [[2.0, 2.5]]]


# Logs


class Slow:
    """A transform that takes its time."""

    def __init__(self, transform, seconds: float):
        self.transform, self.seconds = transform, seconds

    def __call__(self, source, generator=None):
        time.sleep(self.seconds)
        return self.transform(source, generator)


class Clock(TrainerCallback):
    """Keeps when each step ended."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def rates_of(trainer: MIMTrainer) -> list[float]:
    return [entry["images_per_second"] for entry in trainer.state.log_history if "images_per_second" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_images_per_second_are_measured_between_steps(tmp_path, accumulation):
    transforms = (Slow(TrainTransform((32, 32), 3), 0.01), EvalTransform((32, 32), 3))
    options = {"max_steps": 6, "logging_steps": 6, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, count=48, transforms=transforms, **options)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    expected = 5 * 4 * accumulation / (clock.times[-1] - clock.times[0])
    assert rates_of(trainer) == [pytest.approx(expected, rel=0.1)]


def test_images_per_second_leave_out_evaluation(tmp_path):
    transforms = (TrainTransform((32, 32), 3), Slow(EvalTransform((32, 32), 3), 0.2))
    options = {"max_steps": 8, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "num_pictures": 0}
    trainer = make_trainer(tmp_path, count=32, transforms=transforms, **options)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    assert clock.times[4] - clock.times[3] > 1.2, "the fifth step comes after an evaluation"
    expected = [3 * 4 / (clock.times[last] - clock.times[first]) for first, last in ((0, 3), (4, 7))]
    assert rates_of(trainer) == pytest.approx(expected, rel=0.1)


def test_unreadable_images_are_counted_once_and_named_in_the_log(tmp_path, caplog):
    trainer = make_trainer(tmp_path, count=8, max_steps=6)
    contents = list(trainer.train_dataset.records["image"])
    contents[3] = {"path": "broken-three.png", "bytes": b"broken"}
    trainer.train_dataset.records = datasets.Dataset.from_dict(
        {"image": contents}, datasets.Features({"image": ImageFeature(decode=False)})
    )
    trainer.train()
    assert trainer.state.log_history[-1]["unreadable_images"] == 1
    assert messages(caplog).count("broken-three.png") == 1


def test_the_first_version_of_fsdp_is_refused():
    with pytest.raises(ValueError, match=r"`fsdp_version` is 1; it must be 2, as in examples/accelerate/fsdp\.yaml"):
        keep_single_precision(FullyShardedDataParallelPlugin(fsdp_version=1))
