"""Canaries: each fails, saying what changed, when a new version of a library breaks what compat.py relies on."""

import dataclasses
import inspect
import logging

import datasets
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.image_utils import load_image
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import TransformersKwargs

from modeling_greenmim import GreenMIMConfig, GreenMIMModel
from tests.oracle import tiny_config
from tests.test_trainer import make_trainer
from training_greenmim.compat import (
    FakeTensorMode,
    TorchDispatchMode,
    datasets_cache_folder,
    datasets_fingerprint,
    evaluate_endpoint,
    evaluate_offline,
    make_next_training_create_a_scheduler,
    without_load_report,
)


# torch


def test_tensors_without_values_run_operators_that_a_mode_sees():
    seen = []

    class Sees(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.append((function.overloadpacket.__name__, result.untyped_storage().nbytes()))
            return result

    with FakeTensorMode(allow_non_fake_inputs=True), Sees():
        tensor = torch.zeros(2**40) + torch.ones(1)  # 4 TB
    message = "torch's FakeTensorMode or TorchDispatchMode do something else: training_greenmim/runs/memory.py"
    assert ("add", 2**42) in seen and tensor.untyped_storage().nbytes() == 2**42, message


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


def test_pipelines_convert_images_to_rgb_before_the_image_processor():
    """Or else images of 16 bits need no `open_image` before a pipeline any more."""
    sixteen_bits = Image.fromarray(np.full((8, 8), 0x1234, dtype=np.uint16))
    assert np.asarray(load_image(sixteen_bits)).tolist() == np.full((8, 8, 3), 255).tolist(), "no longer turned white"
    for pipe in (ImageClassificationPipeline, ImageFeatureExtractionPipeline):
        assert "load_image(" in inspect.getsource(pipe.preprocess), f"{pipe.__name__} opens images in another way"


def test_weights_are_loaded_by_one_function_that_takes_conversions():
    load = inspect.signature(PreTrainedModel._load_pretrained_model).parameters
    assert list(load) == ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"], (
        "transformers' PreTrainedModel._load_pretrained_model has other arguments: modeling_greenmim/compat.py"
    )
    fields = {field.name for field in dataclasses.fields(LoadStateDictConfig)}
    read = {"weight_mapping", "device_mesh", "ignore_mismatched_sizes", "pretrained_model_name_or_path"}
    assert read <= fields, f"transformers' LoadStateDictConfig lacks {read - fields}: modeling_greenmim/compat.py"


def test_a_conversion_is_called_for_each_weight_and_kept_for_saving(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    model = GreenMIMModel(tiny_config())
    model.save_pretrained(tmp_path)
    calls = []

    class Recorded(GreenMIMModel.load_conversion):
        def convert(self, input_dict, full_layer_name, config, **kwargs):
            calls.append((full_layer_name, list(input_dict), type(config)))
            return super().convert(input_dict, full_layer_name, config, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GreenMIMModel, "load_conversion", Recorded)
        loaded = GreenMIMModel.from_pretrained(tmp_path)
    names = {name for name in model.state_dict() if name.endswith("relative_position_bias_table")}
    assert {name for name, *_ in calls} == names, "transformers calls ConversionOps.convert with other names or not"
    assert calls[0][1:] == (["relative_position_bias_table"], GreenMIMConfig), "convert has other arguments"
    assert loaded._weight_conversions == [], "transformers keeps the conversions that saving reverts elsewhere"


def test_arguments_of_any_model_are_listed():
    assert {"num_items_in_batch", "output_attentions"} <= set(TransformersKwargs.__annotations__), (
        "transformers.utils.TransformersKwargs no longer lists what is passed to any model: modeling_greenmim.py"
    )


def test_trainer_still_has_what_ours_calls_by_name():
    assert hasattr(Trainer, "_prepare_inputs"), "Trainer moves batches by another method: CheckpointTrainer.on_device"
    assert hasattr(Trainer, "_push_from_checkpoint"), "Trainer pushes otherwise: CheckpointTrainer.push_checkpoint"
    parameters = inspect.signature(Trainer.save_model).parameters
    assert "_internal_call" in parameters, "Trainer.save_model tells checkpoints from models in another way"


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


def test_datasets_know_alike_data_sets_by_a_fingerprint():
    first, again, other = (datasets.Dataset.from_dict({"number": numbers}) for numbers in ([1, 2], [1, 2], [1, 3]))
    assert datasets_fingerprint(first) == datasets_fingerprint(again), "alike data sets have different fingerprints"
    assert datasets_fingerprint(first) != datasets_fingerprint(other), "different data sets have one fingerprint"
    assert datasets_fingerprint(first.select([0])) != datasets_fingerprint(first.select([1]))


def test_datasets_keep_their_files_where_their_configuration_says(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert datasets_cache_folder() == str(tmp_path)
    write_csv = tmp_path / "numbers.csv"
    write_csv.write_text("number\n1\n")
    records = datasets.load_dataset("csv", data_files=str(write_csv), split="train")
    file = records.cache_files[0]["filename"]
    assert file.startswith(str(tmp_path)), "HF_DATASETS_CACHE is not where files lie"


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
