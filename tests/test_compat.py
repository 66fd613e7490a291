"""Canaries: each fails, saying what changed, when a new version of a library breaks what compat.py relies on."""

from transformers import Trainer

from tests.test_trainer import make_trainer


# transformers


def test_trainers_checkpoints_hold_the_files_that_ours_do(tmp_path):
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(tmp_path / "run", **changes)
    trainer.train()
    trainer.write_checkpoint(str(tmp_path / "ours"))
    trainer.state.global_step = 2
    Trainer._save_checkpoint(trainer, trainer.model, None)
    ours, theirs = (
        {path.name for path in folder.rglob("*")} for folder in (tmp_path / "ours", tmp_path / "run" / "checkpoint-2")
    )
    assert ours == theirs, (
        "Trainer._save_checkpoint writes other files: follow it in CheckpointTrainer.write_checkpoint"
    )
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {"checkpoint-2"}, (
        "Trainer._save_checkpoint deletes older checkpoints no longer: is ours still needed?"
    )


# accelerate


# datasets


# evaluate


# kornia
