"""The common tests of Transformers' own models, from its source distribution, on all classes of ours."""

import os
import sys
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers.models.auto import modeling_auto

from modeling_greenmim import (
    GreenMIMBackbone,
    GreenMIMConfig,
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMModel,
)


SUITE = Path(os.environ.get("TRANSFORMERS_TESTS", Path(sys.prefix) / "transformers-tests"))
if not (SUITE / "transformers_tests").is_dir():
    message = f"no tests of Transformers in {SUITE}; `python tests/download_transformers_tests.py` fetches them"
    if os.environ.get("CI"):
        raise RuntimeError(message)
    pytest.skip(message, allow_module_level=True)
sys.path.append(str(SUITE))

from transformers_tests.test_backbone_common import BackboneTesterMixin  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402


pytestmark = pytest.mark.slow

# What Transformers lists of its own models, which the tests go by.
NAMES = {
    "MODEL_MAPPING_NAMES": "GreenMIMModel",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": "GreenMIMBackbone",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "GreenMIMForImageClassification",
}
# Tests that cannot apply, and why. Everything else is run as it is.
NOT_APPLICABLE = {
    "test_retain_grad_hidden_states_attentions": "hidden states and attention weights are handed out in raster order:"
    " copies of what the encoder works on",
    "test_model_get_set_embeddings": "patches are embedded by a linear layer, not looked up",
}


def not_applicable(reason: str):
    def test(self):
        self.skipTest(reason)

    return test


class GreenMIMModelTester:
    """Small configurations and inputs, as each model of Transformers has them."""

    batch_size, image_size, patch_size, num_channels, is_training = 3, 32, 4, 3, True
    embed_dim, depths, num_heads, window_size, num_labels = 8, [2, 1], [1, 2], 3, 3
    num_hidden_layers, seq_length, num_masks = 2, 16, 8  # of the last stage: 4x4 units, half of them masked

    def __init__(self, attn_implementation: str = "sdpa", backbone_type: str = "swin"):
        self.attn_implementation, self.backbone_type = attn_implementation, backbone_type

    def get_config(self) -> GreenMIMConfig:
        names = ("image_size", "patch_size", "num_channels", "embed_dim", "depths", "num_heads", "window_size")
        names += ("backbone_type",)
        return GreenMIMConfig(
            **{name: getattr(self, name) for name in names},
            num_labels=self.num_labels,
            mask_ratio=0.5,
            decoder_hidden_size=16,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            out_features=["stage1", "stage2"],
            attn_implementation=self.attn_implementation,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": torch.rand(shape)}


class GreenMIMModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (GreenMIMModel, GreenMIMForPreTraining, GreenMIMForImageClassification, GreenMIMBackbone)
    test_resize_embeddings = False
    backbone_type = "swin"
    for name, reason in NOT_APPLICABLE.items():
        locals()[name] = not_applicable(reason)

    def setUp(self):
        self.model_tester = GreenMIMModelTester(backbone_type=self.backbone_type)
        values = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
        self.config_tester = ConfigTester(self, config_class=GreenMIMConfig, has_text_modality=False, **values)
        for mapping, name in NAMES.items():
            listed = mock.patch.dict(getattr(modeling_auto, mapping), greenmim=name)
            listed.start()
            self.addCleanup(listed.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "bool_masked_pos" in inputs:
            inputs.pop("noise", None)  # either of them says what is masked
        elif model_class is GreenMIMForPreTraining:
            inputs["noise"] = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))  # else drawn anew
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_outputs_equivalence(self):
        self.model_tester = GreenMIMModelTester("eager", self.backbone_type)  # which keeps attention weights
        super().test_model_outputs_equivalence()

    def test_hidden_states_output(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        shapes = [(64, 8), (16, 16), (16, 16)]
        for model_class in self.all_model_classes:
            for by_config in (False, True):
                config.output_hidden_states = by_config
                model = model_class(config).eval()
                given = {} if by_config else {"output_hidden_states": True}
                with torch.no_grad():
                    states = model(**self._prepare_for_class(inputs, model_class), **given).hidden_states
                visible = 2 if model_class is GreenMIMForPreTraining else 1
                expected = [(3, tokens // visible, width) for tokens, width in shapes]
                if model_class is GreenMIMBackbone:
                    expected = [(3, 8, 8, 8), (3, 8, 8, 8), (3, 16, 4, 4)]
                self.assertEqual([tuple(state.shape) for state in states], expected)

    def test_attention_outputs(self):
        self.model_tester = GreenMIMModelTester("eager", self.backbone_type)
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            for by_config in (False, True):
                config.output_attentions = by_config
                model = model_class(config).eval()
                given = {} if by_config else {"output_attentions": True}
                with torch.no_grad():
                    weights = model(**self._prepare_for_class(inputs, model_class), **given).attentions
                visible = 2 if model_class is GreenMIMForPreTraining else 1
                # The first stage of Twins ends with attention to units.
                keys = {"swin": (64, 16), "twins": (16, 16)}[self.backbone_type]
                expected = [
                    (3, heads, tokens // visible, count // visible)
                    for heads, tokens, count in zip(config.num_heads, (64, 16), keys)
                ]
                self.assertEqual([tuple(part.shape) for part in weights], expected)
                for part in weights:
                    torch.testing.assert_close(part.sum(dim=-1), torch.ones(part.shape[:-1]))


class GreenMIMTwinsModelTest(GreenMIMModelTest):
    backbone_type = "twins"


class GreenMIMBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (GreenMIMBackbone,)
    config_class = GreenMIMConfig
    backbone_type = "swin"

    def setUp(self):
        self.model_tester = GreenMIMModelTester("eager", self.backbone_type)  # which keeps attention weights


class GreenMIMTwinsBackboneTest(GreenMIMBackboneTest):
    backbone_type = "twins"
