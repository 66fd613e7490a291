# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Exponential moving average of a model's weights, beside them in every checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import DistributedType, extract_model_from_parallel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainingArguments

from ..runs.checkpoints import last_checkpoint
from ..runs.processes import on_main_process


EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Averages the weights over the optimizer's steps: `average = d * average + (1 - d) * weights`.

    The average starts at the weights that training starts from. With a plain 0.9999 it would still be near them after
    thousands of steps, so `d` is at most `(1 + t) / (10 + t)` in step `t` = 0, 1, ... (the ramp of TensorFlow's
    `ExponentialMovingAverage`).

    Trainable parameters and floating-point buffers, such as the statistics of batch norm, are averaged and other
    buffers copied. Frozen parameters are left out: they equal their average. Memory: one copy of what is averaged.

    The trainer must be an `EMATrainerMixin`, which keeps the average in checkpoints. Where it loads the best model at
    the end of training, the average becomes the one of that checkpoint.

    Args:
        decay: `d` of a long run, between 0 and 1.

    Raises:
        `ValueError`: naming `ema_decay`, for a decay outside its range; when training begins, for sharded training and
            for weights of half precision.
    """

    def __init__(self, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"`ema_decay` is {decay}; it must be between 0 and 1.")
        self.decay = decay
        self.num_updates = 0
        # The checkpoint that a resumed run loads.
        self.checkpoint: str | None = None
        self._averages: dict[str, torch.Tensor] = {}
        self._is_applied = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Starts at the model's weights, or at the average of the checkpoint that is resumed."""
        self._check_setting(args, model)
        self._averages = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in _averaged_tensors(model).items()
        }
        self.num_updates = 0
        if state.global_step > 0:
            self.load(self.checkpoint)

    def _check_setting(self, args: TrainingArguments, model: nn.Module) -> None:
        distributed_type = args.distributed_state.distributed_type
        if distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(
                f"`ema_decay` is {self.decay}, but {distributed_type.value} may shard the weights; averages need whole"
                " ones. Train without it, or without `ema_decay`."
            )
        for name, parameter in _averaged_tensors(model).items():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"`ema_decay` is {self.decay}, but {name} is {parameter.dtype}, too coarse for its small steps."
                    " Load the model with dtype=torch.float32 (bf16 or fp16 of the training arguments may stay on)."
                )

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Moves the average towards the weights that the optimizer has just changed."""
        tensors = _averaged_tensors(model)
        floats = [name for name, average in self._averages.items() if average.is_floating_point()]
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        update = get_ema_multi_avg_fn(decay)
        update([self._averages[name] for name in floats], [tensors[name] for name in floats], self.num_updates)
        # Averaging would round numbers such as indices down.
        for name in self._averages.keys() - floats:
            self._averages[name].copy_(tensors[name])
        self.num_updates += 1
        if args.world_size > 1:
            self._share_buffers(model)

    def _share_buffers(self, model: nn.Module) -> None:
        # Between two forward passes each process has the batch statistics of its own images.
        for name, buffer in _unwrapped(model).named_buffers():
            if buffer.is_floating_point():
                torch.distributed.broadcast(self._averages[name], src=0)

    def on_train_end(self, args, state, control, **kwargs):
        """Follows `Trainer` to the best checkpoint."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(state.best_model_checkpoint)

    def save(self, folder: str | Path) -> None:
        """Writes the average, under the names that the model has for it, and the number of updates.

        Raises:
            `RuntimeError`: while the average is applied.
        """
        self._check_not_applied()
        save_file(self._averages, Path(folder, EMA_FILE), metadata={"num_updates": str(self.num_updates)})

    def load(self, folder: str | Path | None) -> None:
        """Reads what `save` wrote, bit for bit.

        Raises:
            `ValueError`: when there is no average, or one of another model.
        """
        if folder is None or not Path(folder, EMA_FILE).is_file():
            raise ValueError(
                f"`ema_decay` is {self.decay}, but the checkpoint {str(folder)!r} has no {EMA_FILE}: its run did not"
                " average. Resume without `ema_decay`, or start anew."
            )
        with safe_open(Path(folder, EMA_FILE), "pt") as file:
            tensors = file.get_tensors()
            num_updates = int(file.metadata()["num_updates"])
        different = sorted(tensors.keys() ^ self._averages.keys())
        if different:
            raise ValueError(
                f"`ema_decay`: the {EMA_FILE} of {str(folder)!r} does not fit what this run averages: {different[0]}"
                f" is in only one of them (one of {len(different)})."
            )
        for name, tensor in tensors.items():
            self._averages[name].copy_(tensor)
        self.num_updates = num_updates

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Gives the model its average within the context, and its own weights back after it, without a copy.

        Raises:
            `RuntimeError`: before training has begun, and within itself.
        """
        if not self._averages:
            raise RuntimeError("There is no average of the weights yet: it starts when training begins.")
        self._check_not_applied()
        self._swap(model)
        self._is_applied = True
        try:
            yield model
        finally:
            self._swap(model)
            self._is_applied = False

    def _swap(self, model: nn.Module) -> None:
        tensors = _averaged_tensors(model)
        for name, average in self._averages.items():
            self._averages[name], tensors[name].data = tensors[name].data, average

    def _check_not_applied(self) -> None:
        if self._is_applied:
            raise RuntimeError("The average is applied to the model already; leave the context of `applied` first.")


class EMATrainerMixin:
    """Makes a `Trainer` keep the average of an `EMACallback` among its callbacks in its checkpoints.

    The average is written with the model, hence before the trainer's state, which makes a checkpoint whole: a run that
    is killed between them does not leave a whole checkpoint without an average. `on_save` would come too late, when
    older checkpoints are already deleted.
    """

    @property
    def ema(self) -> EMACallback | None:
        """The average, if there is one."""
        return next((item for item in self.callback_handler.callbacks if isinstance(item, EMACallback)), None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and its average with a checkpoint."""
        super().save_model(output_dir, _internal_call)
        is_checkpoint = _internal_call and output_dir is not None
        if self.ema is not None and is_checkpoint and self.args.should_save:
            self.ema.save(output_dir)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains; a resumed run goes on with the average of its checkpoint."""
        if resume_from_checkpoint is True:
            # The one that the weights come from: the newest may be damaged.
            resume_from_checkpoint = on_main_process(self.args, lambda: last_checkpoint(self.args.output_dir)) or True
        if self.ema is not None:
            self.ema.checkpoint = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def _unwrapped(model: nn.Module) -> nn.Module:
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _averaged_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    model = _unwrapped(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **dict(model.named_buffers())}
