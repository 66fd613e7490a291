"""A new encoder and a new target are a class and a line each: dummies are registered and trained."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from modeling_greenmim import GreenMIMBackbone, GreenMIMForImageClassification, GreenMIMForPreTraining, plan_mask
from modeling_greenmim.blocks import GreenMIMEncoder
from modeling_greenmim.encoders import ENCODERS, named_sizes
from modeling_greenmim.targets import TARGETS
from tests.oracle import random_images, random_masks, tiny_config
from training_greenmim.optimization import parameter_groups


# What a file of an encoder holds.


class PoolingStage(nn.Module):
    """Blocks that add the mean of the tokens and a learned scale, and a linear layer that joins runs of four."""

    def __init__(self, config, stage, window_size, drop_path_rates):
        super().__init__()
        width = config.stage_widths[stage]
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in drop_path_rates)
        self.scale = nn.Parameter(torch.zeros(width))
        is_last = stage == len(config.depths) - 1
        self.downsample = None if is_last else PoolingMerging(width)

    def draw_weights(self):
        nn.init.constant_(self.scale, 0.5)

    def forward(self, hidden_states, plan):
        assert plan.raster_index is not None and plan.groups[0] is plan.groups[1]
        for block in self.blocks:
            hidden_states = hidden_states + block(self.scale * hidden_states.mean(dim=1, keepdim=True))
        return hidden_states if plan.inside is None else hidden_states * plan.inside, None


class PoolingMerging(nn.Linear):
    def __init__(self, width):
        super().__init__(4 * width, 2 * width)

    def forward(self, hidden_states):
        return super().forward(hidden_states.reshape(len(hidden_states), -1, self.in_features))


class PoolingEncoder(GreenMIMEncoder):
    stage_class = PoolingStage
    needs_raster_index = True
    sizes = {"pooling-nano": {"embed_dim": 8, "num_heads": [1, 1, 1, 1]}}


# What a file of a target holds.


class MeanTarget:
    """The mean colour of a unit."""

    def __init__(self, config):
        self.unit, self.width = config.encoder_stride, config.num_channels
        self.description = "mean colours"

    def targets(self, pixel_values):
        return nn.functional.avg_pool2d(pixel_values.float(), self.unit).flatten(2).transpose(1, 2)

    def to_pixels(self, predictions, pixel_values):
        return predictions.float().repeat(1, 1, self.unit**2)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(ENCODERS, "pooling", PoolingEncoder)
    monkeypatch.setitem(TARGETS, "mean", MeanTarget)


def test_registries_are_asked_by_name(registered):
    assert named_sizes()["pooling-nano"]["backbone_type"] == "pooling"
    with pytest.raises(StrictDataclassError, match='must be one of "swin", "twins", "pooling"'):
        tiny_config(backbone_type="resnet")
    with pytest.raises(StrictDataclassError, match='must be one of "pixels", "hog", "features", "mean"'):
        tiny_config(reconstruction_target="edges")


def test_a_registered_encoder_and_target_are_trained(registered, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(backbone_type="pooling", reconstruction_target="mean")
    model = GreenMIMForPreTraining(config)
    assert model.decoder.decoder_pred.out_features == 3
    assert (model.greenmim.encoder.layers[0].scale == 0.5).all()
    pixel_values, mask = random_images(2, 96, 96, dtype=torch.float32), random_masks(1, 36, 9)
    outputs = model(pixel_values, plan=plan_mask(config, (~mask).nonzero()[:, 1].view(1, -1)))
    expected = (outputs.logits - MeanTarget(config).targets(pixel_values)).square().mean(dim=-1)[mask.expand(2, -1)]
    torch.testing.assert_close(outputs.loss, expected.mean())
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    picture = model.unpatchify(model.target.to_pixels(outputs.logits, pixel_values))
    assert picture.shape == pixel_values.shape

    model.save_pretrained(tmp_path)
    classifier = GreenMIMForImageClassification.from_pretrained(tmp_path, num_labels=3)
    classifier(pixel_values, labels=torch.tensor([0, 2])).loss.backward()
    groups = parameter_groups(classifier, learning_rate=1.0, weight_decay=0.05, layer_decay=0.5)
    assert {group["lr"] for group in groups} == {0.5**layer for layer in range(8)}
    assert GreenMIMBackbone(config)(pixel_values[:, :, :90, :70]).feature_maps[0].shape == (2, 32, 6, 5)
