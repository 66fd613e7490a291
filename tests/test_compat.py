"""Canaries: each fails, saying what changed, when a new version of a library breaks what compat.py relies on."""

import logging

import evaluate
import pytest
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTModel

from training_greenmim.compat import (
    evaluate_endpoint,
    evaluate_offline,
    make_next_training_create_a_scheduler,
    without_load_report,
)


# transformers


def test_report_of_loading_is_still_logged_by_that_name(tmp_path, caplog):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(image_size=8, patch_size=8, **sizes)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        ViTForImageClassification.from_pretrained(tmp_path)
    message = "transformers no longer logs ' LOAD REPORT' from transformers.modeling_utils: see without_load_report"
    assert "transformers.modeling_utils" in {r.name for r in caplog.records if " LOAD REPORT" in r.message}, message
    caplog.clear()
    with caplog.at_level(logging.WARNING), without_load_report():
        ViTForImageClassification.from_pretrained(tmp_path)
    assert "LOAD REPORT" not in caplog.text, message


class Nothing(Dataset):
    def __len__(self):
        return 0


def test_trainer_still_asks_who_made_its_schedule(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=8, **sizes))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), train_dataset=Nothing())
    message = "Trainer no longer keeps `_created_lr_scheduler`: see make_next_training_create_a_scheduler"
    assert trainer._created_lr_scheduler is False, message
    trainer.create_optimizer_and_scheduler(3)
    assert trainer._created_lr_scheduler is True, message
    trainer._created_lr_scheduler = False
    make_next_training_create_a_scheduler(trainer)
    assert trainer._created_lr_scheduler is True, message


# accelerate


# datasets


# evaluate


def test_evaluate_is_still_told_by_its_config():
    message = "evaluate.config no longer has HF_ENDPOINT and HF_EVALUATE_OFFLINE: see evaluate_offline"
    assert evaluate_endpoint() == evaluate.config.HF_ENDPOINT, message
    before = evaluate.config.HF_EVALUATE_OFFLINE
    with pytest.raises(KeyError), evaluate_offline():
        assert evaluate.config.HF_EVALUATE_OFFLINE is True, message
        # Offline it knows the Hub's metrics from its cache only.
        with pytest.raises(FileNotFoundError):
            evaluate.load("nobody/no-such-metric", module_type="metric")
        raise KeyError
    assert evaluate.config.HF_EVALUATE_OFFLINE is before, message


# kornia
