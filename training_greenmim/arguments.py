# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training arguments of pre-training: Transformers' own, with the defaults of GreenMIM's recipe."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


def default_num_workers() -> int:
    """Workers of the data loader: this process's share of the usable cores, at most 8."""
    # Where the system knows no affinity, every core counts as usable.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@dataclass
class MIMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of GreenMIM's recipe, and what masked image modeling adds.

    Raises:
        `ValueError`: when both learning rates are given.
    """

    base_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate per 256 images of the total batch (default: 1.5e-4, as published)."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate as it is; default: base_learning_rate * total batch / 256."}
    )
    mask_per_sample: bool = field(
        default=False, metadata={"help": "Draw a mask for each image instead of one for each step and process."}
    )
    stop_on_nonfinite_loss: bool = field(
        default=True, metadata={"help": "Stop at the first loss that is not a finite number."}
    )
    num_pictures: int = field(default=4, metadata={"help": "Images in the picture that each evaluation makes."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay, but of 1-D parameters, bias tables and tokens."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Linear warm-up: steps, or a share of all steps if below 1."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Maximum gradient norm; 0 = no clipping."})
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Workers of the data loader; default: the process's share of cores, up to 8."}
    )
    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Pin batches in memory; default: where there is a CUDA device."}
    )
    dataloader_persistent_workers: bool = field(default=True, metadata={"help": "Keep workers between epochs."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without gradient; every step uses all of them."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Data sets here have no unused columns."})

    def __post_init__(self):
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_num_workers()
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = torch.cuda.is_available()
        if self.base_learning_rate is not None and self.learning_rate is not None:
            raise ValueError(
                f"`learning_rate` is {self.learning_rate} and `base_learning_rate` is {self.base_learning_rate};"
                " only one of them can be given."
            )
        given = self.learning_rate
        self.learning_rate = 0.0 if given is None else given  # the parent compares and needs a number
        super().__post_init__()
        if given is None:
            self.base_learning_rate = 1.5e-4 if self.base_learning_rate is None else self.base_learning_rate
            self.learning_rate = self.base_learning_rate * self.total_batch_size / 256

    @property
    def total_batch_size(self) -> int:
        """Images of one optimizer step, over all processes and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size
