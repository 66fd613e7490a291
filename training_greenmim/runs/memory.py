# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Memory of a training step before there is one: an estimate, and the micro-batch that fits (`--auto_batch_size`).

A step runs on tensors that have shapes and no values, and the storages that live at a time are added up: weights,
gradients, what backward needs, and what comes and goes in between. So little is allocated and little computed.
"""

import json
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils._pytree import tree_leaves

from ..compat import FakeTensorMode, TorchDispatchMode
from .processes import on_main_process
from .record import RECORD


logger = logging.getLogger(__name__)

# Share of the free memory that a step may take. What allocators keep in pieces that are too small for others, and what
# libraries want beside tensors, is no part of the estimate; glibc's allocator was seen to keep 29 % more.
SHARE, SHARE_OF_CPU = 0.9, 0.75
# Batches that are looked at. From there on every image takes the same.
TRACED = (16, 32)

# What gives, for a batch size and a device, the loss of a model on images that it makes itself: the first call may
# compute, the second runs on tensors without values.
LossOfBatch = Callable[[int, torch.device], Callable[[nn.Module], torch.Tensor]]


class LiveStorages(TorchDispatchMode):
    """Adds up the storages of what operators return inside it, for as long as they live.

    Attributes:
        bytes: of those that live.
        peak: the most that there were.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._living: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Runs an operator and holds what it returns."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._hold(leaf.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._living:
            return
        self._living.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._living.remove(key)
        self.bytes -= size


class _Backward(nn.Module):
    """Forward and backward in one call, so that weights that stand in for a model's own do so in both."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, loss_of: Callable, device_type: str, dtype: torch.dtype | None) -> None:
        with torch.autocast(device_type, dtype, enabled=dtype is not None):
            loss = loss_of(self.model)
        loss.backward()


def peak_of_step(
    model: nn.Module,
    loss_of_batch: LossOfBatch,
    batch: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    micro_batches: int = 2,
) -> int:
    """Estimate of the most memory that a training step with AdamW takes at a time, in bytes.

    Args:
        model: in the mode, and with the gradient checkpointing, that it trains with; it stays as it is.
        loss_of_batch: see `LossOfBatch`.
        batch: images of a micro-batch.
        device: of the step; nothing is allocated there.
        dtype: of autocast; None = without.
        micro_batches: 1 or 2. From the second one on the gradients of those before are there all the time.
    """
    _fill_caches(model, loss_of_batch)
    loss_of, step = loss_of_batch(batch, device), _Backward(model)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveStorages() as storages:
        weights = {
            name: torch.empty_like(weight, device=device).requires_grad_(weight.requires_grad)
            for name, weight in step.named_parameters()
        }
        weights |= {name: torch.empty_like(buffer, device=device) for name, buffer in step.named_buffers()}
        for _ in range(micro_batches):
            torch.func.functional_call(step, weights, (loss_of, device.type, dtype))
    return storages.peak + 2 * learning_bytes(model)  # AdamW's moments


def _fill_caches(model: nn.Module, loss_of_batch: LossOfBatch) -> None:
    """Runs a model once on the CPU where it is: what classes of others keep for good must have values."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        loss_of_batch(1, torch.device("cpu"))(model.eval())
    for module, mode in modes.items():
        module.training = mode


def learning_bytes(model: nn.Module) -> int:
    """Memory of the parameters that learn: that of their gradients, and of each of AdamW's moments."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)


class StepMemory(NamedTuple):
    """Memory of training steps in bytes, `fixed + per_image * batch`; batches below 16 may take a little more."""

    fixed: float
    per_image: float

    @classmethod
    def of(cls, model: nn.Module, loss_of_batch: LossOfBatch, device: torch.device, dtype: torch.dtype | None = None):
        """Estimate for steps of several micro-batches; arguments as those of `peak_of_step`."""
        small, large = (peak_of_step(model, loss_of_batch, batch, device, dtype) for batch in TRACED)
        per_image = (large - small) / (TRACED[1] - TRACED[0])
        return cls(small - per_image * TRACED[0], per_image)

    def peak(self, batch: int) -> float:
        """Memory of a step with micro-batches of so many images."""
        return self.fixed + self.per_image * batch

    def largest_batch(self, memory: float) -> int:
        """Images of the largest micro-batch whose step takes no more than `memory`; 0 where none does."""
        return max(0, int((memory - self.fixed) / self.per_image))


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes; of a CPU this process's share of what is available.

    Raises:
        `ValueError`: naming `auto_batch_size`, for devices that do not tell.
    """
    if device.type == "cpu":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    if tell is None:
        raise ValueError(
            f"`auto_batch_size` is True, but a device of type {device.type!r} does not tell its free memory; give"
            " `per_device_train_batch_size` and `gradient_accumulation_steps` instead."
        )
    return tell(device)[0]


def fit_batch_size(
    args,
    model: nn.Module,
    loss_of_batch: LossOfBatch,
    checkpoint: str | None,
    images: int | None = None,
    least: int = 1,
) -> None:
    """Sets the arguments' micro-batch to the largest that fits into memory, and their accumulation to keep the total.

    The total is `per_device_train_batch_size * gradient_accumulation_steps`, which the micro-batch divides. A run that
    goes on keeps the micro-batch that it had, of which its random draws depend. The same in all processes.

    Args:
        args: `ImageTrainingArguments` of the run, whose device has nothing of the model yet.
        model: that will train, put into training mode here.
        loss_of_batch: see `LossOfBatch`.
        checkpoint: that the run goes on from, if any.
        images: number of training images where only whole micro-batches are trained on; None = others are too.
        least: smallest micro-batch.

    Raises:
        `ValueError`: naming `auto_batch_size`, where no micro-batch fits, for fewer images than those of a step, for
            models that cannot run without values, and as `free_memory` does.
    """
    total = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if images is not None and images < total * args.world_size:
        raise ValueError(
            f"`auto_batch_size` is True, but a step is of {total * args.world_size} images"
            f" (`per_device_train_batch_size` {args.per_device_train_batch_size}, `gradient_accumulation_steps`"
            f" {args.gradient_accumulation_steps}), and there are {images} training images, of which only whole"
            " batches are trained on."
        )
    if total < least:
        raise ValueError(
            f"`auto_batch_size` is True, but `per_device_train_batch_size` is {args.per_device_train_batch_size};"
            f" micro-batches of {least} or more are needed."
        )
    kept = on_main_process(args, lambda: _of_the_run(checkpoint, total))
    if kept is not None:
        _set(args, kept, total, "as the run had it")
        return
    # One of several processes on a CPU calls it cpu:0, which none of its tensors says.
    device = torch.device("cpu") if args.device.type == "cpu" else args.device
    needed, free = _memory_of_steps(args, model, loss_of_batch, device), free_memory(device)
    if args.world_size > 1:
        needed = needed._replace(fixed=needed.fixed + learning_bytes(model))  # buckets in which gradients travel
        free = min(gather_object([free]))
    usable = (SHARE_OF_CPU if device.type == "cpu" else SHARE) * free
    most = min(needed.largest_batch(usable), total)
    fitting = [size for size in range(least, most + 1) if total % size == 0]
    if not fitting:
        raise ValueError(
            f"`auto_batch_size` is True, but no micro-batch of {least} or more images that divides the"
            f" {total} of a step fits: {least} take about {needed.peak(least) / 1e9:.2f} GB, and of"
            f" {free / 1e9:.2f} GB that are free {usable / 1e9:.2f} may be used. --gradient_checkpointing true, a"
            " smaller model or smaller images need less."
        )
    size = fitting[-1]
    reason = f"about {needed.peak(size) / 1e9:.2f} GB by estimate, {free / 1e9:.2f} GB are free"
    _set(args, size, total, reason)


def _set(args, size: int, total: int, reason: str) -> None:
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, total // size
    logger.info(
        f"--auto_batch_size: --per_device_train_batch_size {size} --gradient_accumulation_steps {total // size}"
        f" ({reason})"
    )


def _of_the_run(checkpoint: str | None, total: int) -> int | None:
    """Micro-batch that the run of a checkpoint chose, where it divided the same total."""
    path = Path(checkpoint or "", RECORD)
    if checkpoint is None or not path.exists():
        return None
    before = json.loads(path.read_text())["arguments"]
    size = before["per_device_train_batch_size"]
    is_same = before.get("auto_batch_size") and size * before["gradient_accumulation_steps"] == total
    return size if is_same else None


def _memory_of_steps(args, model: nn.Module, loss_of_batch: LossOfBatch, device: torch.device) -> StepMemory:
    model.train()
    if args.activation_checkpointing:
        options = {"every_n_layers": 1, **(args.activation_checkpointing_kwargs or {})}
        every, _ = options.pop("every_n_layers"), options.pop("offload", None)
        model.activation_checkpointing_enable(options or None, every_n_layers=every)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    try:
        needed = StepMemory.of(model, loss_of_batch, device, dtype)
    except Exception as error:  # whatever a model of others does with values
        raise ValueError(
            f"`auto_batch_size` is True, but the memory of a {type(model).__name__} cannot be told without running it"
            f" ({type(error).__name__}: {str(error).splitlines()[0]}); give `per_device_train_batch_size` and"
            " `gradient_accumulation_steps` instead."
        ) from error
    if getattr(args, "ema_decay", None) is not None:
        needed = needed._replace(fixed=needed.fixed + learning_bytes(model))
    return needed
