# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Memory of a step by estimate, against what torch's profiler sees allocated; `--auto_batch_size` of both scripts."""

import gc
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageClassification, BeitConfig, ViTConfig

from modeling_greenmim import GreenMIMForImageClassification, GreenMIMForPreTraining
from tests.training_helpers import (
    assert_same_weights,
    classify,
    messages,
    run,
    state_of,
    tiny_config,
    write_class_folders,
    write_images,
)
from training_greenmim.classification import trainer as classification
from training_greenmim.dense.arguments import DenseTrainingArguments
from training_greenmim.pretraining import trainer as pretraining
from training_greenmim.runs import memory
from training_greenmim.runs.arguments import ClassificationTrainingArguments, MIMTrainingArguments
from training_greenmim.runs.memory import LiveStorages, StepMemory, fit_batch_size, free_memory, peak_of_step


CPU = torch.device("cpu")
SHAPE = {"image_size": 64, "embed_dim": 32}
TASKS = ["pretraining", "classification"]


def model_and_loss(task: str, **arguments) -> tuple:
    """A small model that trains, and its loss of a batch."""
    config = tiny_config(**SHAPE)
    if task == "pretraining":
        args = MIMTrainingArguments(output_dir="unused", use_cpu=True, **arguments)
        return GreenMIMForPreTraining(config).train(), pretraining.loss_of_batch(config, args)
    loss_of_batch = classification.loss_of_batch(config, config.image_height_and_width)
    return GreenMIMForImageClassification(config).train(), loss_of_batch


# The estimate


def test_storages_count_once_and_while_they_live():
    with LiveStorages() as storages:
        first = torch.zeros(10, 10)
        view = first.view(100)[:50]
        first.add_(1)
        assert storages.bytes == storages.peak == 400
        second = first + 1
        del first, second
        assert (storages.bytes, storages.peak) == (400, 800)  # the view keeps the first
        del view
        assert (storages.bytes, storages.peak) == (0, 800)


def allocated(work) -> int:
    """The most bytes that a call holds at a time beyond what was there, by the allocator's own record."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("dtype", "micro_batches", "checkpoints"),
    [
        (None, 2, False),
        pytest.param(None, 1, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 2, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 1, True, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_what_is_allocated(task, dtype, micro_batches, checkpoints):
    model, loss_of_batch = model_and_loss(task)
    if checkpoints:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss_of = loss_of_batch(32, CPU)

    def step():
        for _ in range(micro_batches):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = loss_of(model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    before = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *states])
    estimate = peak_of_step(model, loss_of_batch, 32, CPU, dtype, micro_batches)
    assert estimate == pytest.approx(before + allocated(step), rel=0.02)


def test_checkpointing_needs_less():
    model, loss_of_batch = model_and_loss("pretraining")
    kept = peak_of_step(model, loss_of_batch, 32, CPU)
    model.activation_checkpointing_enable()
    assert peak_of_step(model, loss_of_batch, 32, CPU) < 0.7 * kept


@pytest.mark.parametrize("task", TASKS)
def test_memory_grows_by_the_same_for_each_image(task):
    model, loss_of_batch = model_and_loss(task)
    needed = StepMemory.of(model, loss_of_batch, CPU)
    for batch in (20, 100):
        assert needed.peak(batch) == pytest.approx(peak_of_step(model, loss_of_batch, batch, CPU), rel=1e-3)
    most = needed.largest_batch(1e9)
    assert needed.peak(most) <= 1e9 < needed.peak(most + 1)
    assert needed.largest_batch(needed.fixed / 2) == 0


def test_frozen_weights_need_no_gradients():
    model, loss_of_batch = model_and_loss("classification")
    learning = StepMemory.of(model, loss_of_batch, CPU)
    model.greenmim.requires_grad_(False)
    frozen = StepMemory.of(model, loss_of_batch, CPU)
    assert frozen.per_image < 0.5 * learning.per_image
    of_encoder = sum(weight.nbytes for weight in model.greenmim.parameters())
    assert learning.fixed - frozen.fixed == pytest.approx(3 * of_encoder, rel=0.2)


@pytest.mark.parametrize("task", TASKS)
def test_an_estimate_changes_nothing(task):
    model, loss_of_batch = model_and_loss(task)
    before, random_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    peak_of_step(model, loss_of_batch, 4, CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    loss_of_batch(4, CPU)(model).backward()  # plans that are kept have their values


def test_a_mask_for_each_image_has_its_plans():
    needed = [StepMemory.of(*model_and_loss("pretraining", mask_per_sample=each), CPU) for each in (False, True)]
    assert needed[1].per_image > needed[0].per_image


# The flag


def arguments(**changes) -> MIMTrainingArguments:
    values = {"output_dir": "unused", "use_cpu": True, "per_device_train_batch_size": 8}
    return MIMTrainingArguments(**{**values, "gradient_accumulation_steps": 3, **changes})


@pytest.fixture
def memory_for(monkeypatch):
    """Makes steps need 1 GB and 1 more for each image, and a CPU have memory for so many images."""

    def pretend(batch: int):
        monkeypatch.setattr(StepMemory, "of", classmethod(lambda cls, *args: cls(1e9, 1e9)))
        monkeypatch.setattr(memory, "free_memory", lambda device: (batch + 1.5) * 1e9 / memory.SHARE_OF_CPU)

    return pretend


@pytest.mark.parametrize(("fits", "size"), [(100, 24), (24, 24), (23, 12), (7, 6), (5, 4), (1, 1)])
def test_the_largest_divisor_that_fits_is_taken_and_the_total_kept(memory_for, caplog, fits, size):
    memory_for(fits)
    args = arguments()
    rate = args.learning_rate
    with caplog.at_level(logging.INFO):
        fit_batch_size(args, *model_and_loss("pretraining"), checkpoint=None)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (size, 24 // size)
    assert (args.total_batch_size, args.learning_rate) == (24, rate)
    chosen = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {24 // size} (about {size + 1}.00 GB"
    assert chosen in messages(caplog, logging.INFO)


def test_processes_choose_what_fits_into_the_least(memory_for, monkeypatch):
    """Their gradients travel in buckets, which take as much again; a CPU has a number there."""
    memory_for(7)
    monkeypatch.setattr(memory, "gather_object", lambda found: [*found, 4.9e9 / memory.SHARE_OF_CPU])
    monkeypatch.setattr(memory, "on_main_process", lambda args, look: look())
    model, loss_of_batch = model_and_loss("pretraining")
    args = SimpleNamespace(**vars(arguments()), device=torch.device("cpu:0"), world_size=2)
    fit_batch_size(args, model, loss_of_batch, checkpoint=None)
    assert args.per_device_train_batch_size == 3
    monkeypatch.setattr(memory, "learning_bytes", lambda model: 1e9)
    args = SimpleNamespace(**vars(arguments()), device=torch.device("cpu:0"), world_size=2)
    fit_batch_size(args, model, loss_of_batch, checkpoint=None)
    assert args.per_device_train_batch_size == 2


def test_a_numbered_cpu_is_a_cpu(monkeypatch):
    args = SimpleNamespace(**vars(arguments()), device=torch.device("cpu:0"), world_size=1)
    monkeypatch.setattr(memory, "on_main_process", lambda args, look: look())
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e9)
    fit_batch_size(args, *model_and_loss("pretraining"), checkpoint=None)
    assert args.per_device_train_batch_size == 24


def test_fewer_images_than_a_step_has_are_refused(memory_for):
    """Smaller micro-batches would make steps of fewer images, at the learning rate of all."""
    memory_for(5)
    message = r"a step is of 24 images \(`per_device_train_batch_size` 8, `gradient_accumulation_steps` 3\), and there"
    with pytest.raises(ValueError, match=message + " are 23 training images"):
        fit_batch_size(arguments(), *model_and_loss("pretraining"), checkpoint=None, images=23)
    args = arguments()
    fit_batch_size(args, *model_and_loss("pretraining"), checkpoint=None, images=24)
    assert args.per_device_train_batch_size == 4


def test_a_step_of_fewer_images_than_a_micro_batch_needs_is_refused(memory_for):
    memory_for(100)
    args = arguments(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="`per_device_train_batch_size` is 1; micro-batches of 2 or more are needed"):
        fit_batch_size(args, *model_and_loss("pretraining"), checkpoint=None, least=2)


def test_averaged_weights_need_memory_too(monkeypatch):
    model, loss_of_batch = model_and_loss("classification")
    plain = StepMemory.of(model, loss_of_batch, CPU)
    # For 12 images without an average.
    monkeypatch.setattr(memory, "free_memory", lambda device: (plain.peak(12) + 10) / memory.SHARE_OF_CPU)
    sizes = []
    for decay in (None, 0.9):
        args = ClassificationTrainingArguments(
            output_dir="unused", use_cpu=True, per_device_train_batch_size=12, ema_decay=decay
        )
        fit_batch_size(args, model, loss_of_batch, checkpoint=None)
        sizes.append(args.per_device_train_batch_size)
    assert sizes == [12, 6]


def test_what_does_not_fit_is_refused(memory_for):
    memory_for(1)
    message = "`auto_batch_size` is True, but no micro-batch of 2 or more images that divides the 24 of a step fits: 2"
    with pytest.raises(ValueError, match=message + r" take about 3.00 GB, and of 3.33 GB that are free 2.50 may be"):
        fit_batch_size(arguments(), *model_and_loss("pretraining"), checkpoint=None, least=2)


def test_a_model_that_looks_at_values_is_refused():
    class Looks(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) if inputs.sum().item() else inputs

    with pytest.raises(ValueError, match="`auto_batch_size` is True, but the memory of a Looks cannot be told"):
        fit_batch_size(arguments(), Looks(4, 1), lambda batch, device: lambda model: model(torch.rand(batch, 4)), None)


@pytest.mark.parametrize(
    ("config_class", "changes"), [(ViTConfig, {}), (BeitConfig, {"use_relative_position_bias": True})]
)
def test_any_classifier_can_be_told(config_class, changes):
    """BEiT's class keeps the index of its biases, which must have values afterwards."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = config_class(image_size=32, patch_size=8, num_labels=3, **sizes, **changes)
    loss_of_batch = classification.loss_of_batch(config, (32, 32))
    model = AutoModelForImageClassification.from_config(config).train()
    assert StepMemory.of(model, loss_of_batch, CPU).per_image > 0
    assert model.training and loss_of_batch(2, CPU)(model).item() > 0


def test_memory_of_a_cpu_is_shared_by_its_processes(monkeypatch):
    alone = free_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == pytest.approx(alone / 4, rel=0.2)
    with pytest.raises(ValueError, match="`auto_batch_size` is True, but a device of type 'mps' does not tell its"):
        free_memory(torch.device("mps"))


@pytest.mark.parametrize(
    "divided", [{"fsdp": "full_shard"}, {"env": "ACCELERATE_USE_FSDP"}, {"env": "ACCELERATE_USE_DEEPSPEED"}]
)
def test_divided_models_are_refused(divided, monkeypatch):
    if "env" in divided:
        monkeypatch.setenv(divided.pop("env"), "true")
    with pytest.raises(ValueError, match="`auto_batch_size` is True, but FSDP and DeepSpeed divide a model"):
        arguments(auto_batch_size=True, **divided)


def test_dense_tasks_refuse_it():
    with pytest.raises(ValueError, match="`auto_batch_size` is True, but the memory of dense heads is not estimated"):
        DenseTrainingArguments(output_dir="unused", use_cpu=True, auto_batch_size=True)


# Runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder, 40)
    return folder


def pretrain(output, photos, *more):
    return run(output, "--train_dir", photos, "--do_train", "--max_steps", 4, "--save_strategy", "steps", *more)


def arguments_of(output) -> dict:
    (checkpoint, *_) = sorted(output.glob("checkpoint-*"))
    return json.loads((checkpoint / "run.json").read_text())["arguments"]


def test_a_run_is_that_of_the_micro_batch_it_chose(memory_for, photos, tmp_path):
    memory_for(5)
    batch = ("--per_device_train_batch_size", 16, "--save_steps", 4)
    chosen = pretrain(tmp_path / "chosen", photos, *batch, "--auto_batch_size")
    assert (state_of(chosen)["train_batch_size"], arguments_of(chosen)["total_batch_size"]) == (4, 16)
    given = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4, "--save_steps", 4)
    assert_same_weights(chosen, pretrain(tmp_path / "given", photos, *given))


def test_a_run_that_goes_on_keeps_its_micro_batch(memory_for, photos, tmp_path, caplog):
    memory_for(5)
    batch = ("--per_device_train_batch_size", 16, "--save_steps", 2, "--auto_batch_size")
    whole = pretrain(tmp_path / "whole", photos, *batch)
    memory_for(100)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        parts = pretrain(tmp_path / "parts", photos, *batch, "--resume_from_checkpoint", whole / "checkpoint-2")
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 (as the run had it)" in messages(
        caplog, logging.INFO
    )
    assert "not bit for bit" not in messages(caplog)
    assert_same_weights(whole, parts)
    # It may also be told what it had.
    given = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4, "--save_steps", 2)
    told = pretrain(tmp_path / "told", photos, *given, "--resume_from_checkpoint", whole / "checkpoint-2")
    assert_same_weights(whole, told)


def test_a_run_that_had_not_chosen_chooses(memory_for, photos, tmp_path, caplog):
    """As after an end for want of memory."""
    memory_for(5)
    batch = ("--per_device_train_batch_size", 16, "--save_steps", 2)
    whole = pretrain(tmp_path / "whole", photos, *batch)
    with caplog.at_level(logging.INFO):
        pretrain(
            tmp_path / "on", photos, *batch, "--auto_batch_size", "--resume_from_checkpoint", whole / "checkpoint-2"
        )
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 (about 5.00 GB" in messages(
        caplog, logging.INFO
    )
    assert "not bit for bit" in messages(caplog)


def test_another_total_is_another_run(memory_for, photos, tmp_path):
    memory_for(5)
    batch = ("--per_device_train_batch_size", 16, "--save_steps", 2, "--auto_batch_size")
    whole = pretrain(tmp_path / "whole", photos, *batch)
    with pytest.raises(ValueError, match=r"total_batch_size 16 \(now 8\)"):
        pretrain(
            *(tmp_path / "other", photos, *batch, "--per_device_train_batch_size", 8),
            *("--resume_from_checkpoint", whole / "checkpoint-2"),
        )


def test_classification_chooses_too(memory_for, tmp_path):
    memory_for(100)
    folder = write_class_folders(tmp_path / "train", {"red": 7, "green": 7})
    shape = "image_size=32,embed_dim=8,depths=[2,2],num_heads=[1,2],window_size=4"
    common = ("--config_name", "tiny", "--config_overrides", shape, "--train_dir", folder, "--do_train")
    common += ("--max_steps", 2, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    chosen = classify(tmp_path / "chosen", *common, "--auto_batch_size")
    assert state_of(chosen)["train_batch_size"] == 8
    memory_for(1)
    with pytest.raises(ValueError, match="no micro-batch of 2 or more images"):
        classify(tmp_path / "mixed", *common, "--auto_batch_size", "--mixup", 0.8)
