# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What training uses of other libraries beyond their public interface, in one place.

Each entry has a canary in tests/test_compat.py that says what changed when a new version breaks it.
"""

import os

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState


# transformers


class CheckpointTrainer(Trainer):
    """`Trainer` that leaves to a method of its own, `save_checkpoint`, where and when a checkpoint is written.

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

    def push_checkpoint(self, folder: str) -> None:
        """Sends a checkpoint to the Hub as `hub_strategy` says; called in all processes."""
        self._push_from_checkpoint(folder)


# accelerate


# datasets


# evaluate


# kornia
