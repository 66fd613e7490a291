# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What training uses of other libraries beyond their public interface, in one place.

Each entry has a canary in tests/test_compat.py that says what changed when a new version breaks it.
"""

import contextlib
import os
from collections.abc import Iterator

import datasets
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from modeling_greenmim.conversion.reading import without_load_report as without_load_report


# transformers


def make_next_training_create_a_scheduler(trainer: Trainer) -> None:
    """Tells a trainer that its schedule is of its own making, so that a second `train` begins with a new one."""
    trainer._created_lr_scheduler = True


class CheckpointTrainer(Trainer):
    """`Trainer` that leaves to a method of its own, `save_checkpoint`, where and when a checkpoint is written.

    Subclasses call its private methods through this class; `_internal_call` of `save_model` is Trainer's own word for
    a model that is part of a checkpoint.

    `Trainer._save_checkpoint` writes into the final folder, pushes it and deletes older ones, all in one method.
    """

    def save_checkpoint(self) -> None:
        """Saves a checkpoint of where the run stands; called in all processes."""
        raise NotImplementedError

    def _save_checkpoint(self, model, trial):
        self.save_checkpoint()

    def write_checkpoint(self, folder: str) -> None:
        """Writes all files of `Trainer`'s checkpoints into a folder; called in all processes."""
        self.store_flos()
        self.save_model(folder, _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
        if self.args.should_save:
            for part in [*self.callback_handler.callbacks, self.control]:
                if isinstance(part, ExportableState):
                    self._keep_state_of(part)
            self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def _keep_state_of(self, part: ExportableState) -> None:
        states, name = self.state.stateful_callbacks, type(part).__name__
        if isinstance(states[name], list):
            states[name].append(part.state())
        else:
            states[name] = part.state()

    def on_device(self, inputs: dict) -> dict:
        """A batch of the data loader on the device of the model, in its precision where DeepSpeed asks for that."""
        return self._prepare_inputs(inputs)

    def push_checkpoint(self, folder: str) -> None:
        """Sends a checkpoint to the Hub as `hub_strategy` says; called in all processes."""
        self._push_from_checkpoint(folder)


# accelerate


# datasets


def datasets_fingerprint(records: datasets.Dataset) -> str:
    """What `datasets` calls the state of a data set by in its cache: the same in each run that makes it alike."""
    return records._fingerprint


def datasets_cache_folder() -> str:
    """Folder of the files that `datasets` keeps; the environment's HF_DATASETS_CACHE sets it."""
    return str(datasets.config.HF_DATASETS_CACHE)


# evaluate


def evaluate_endpoint() -> str:
    """Address of the Hub that `evaluate` asks for metrics."""
    import evaluate  # here, for other runs do without

    return evaluate.config.HF_ENDPOINT


@contextlib.contextmanager
def evaluate_offline() -> Iterator[None]:
    """Makes `evaluate` look into its cache only."""
    import evaluate

    before = evaluate.config.HF_EVALUATE_OFFLINE
    evaluate.config.HF_EVALUATE_OFFLINE = True
    try:
        yield
    finally:
        evaluate.config.HF_EVALUATE_OFFLINE = before


# kornia
