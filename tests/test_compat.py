"""Canaries: each fails, saying what changed, when a new version of a library breaks what compat.py relies on."""

import dataclasses
import inspect

import pytest
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import TransformersKwargs

from modeling_greenmim import GreenMIMConfig, GreenMIMModel
from tests.oracle import tiny_config


# transformers


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


# accelerate


# datasets


# evaluate


# kornia
