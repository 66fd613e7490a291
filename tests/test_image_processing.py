"""The image processor: grey and RGB images for models of one and of three channels."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessorPil

from modeling_greenmim import GreenMIMImageProcessorPil
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.training_helpers import noise_image, tiny_config


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_mode_fit_the_model(tmp_path, channels, mode):
    processor = build_image_processor(tiny_config(num_channels=channels))
    processor.save_pretrained(tmp_path)
    tiny_config(num_channels=channels).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is GreenMIMImageProcessorPil
    image = noise_image(0, 32, 32)
    pixel_values = loaded(image.convert(mode), return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, channels, 32, 32)
    # By hand: at its own size an image is only scaled and normalised.
    expected = np.asarray(image.convert(mode).convert("L" if channels == 1 else "RGB"), dtype=np.float32)
    expected = np.moveaxis(expected.reshape(32, 32, channels), -1, 0) / 255
    expected = (expected - np.reshape(loaded.image_mean, (-1, 1, 1))) / np.reshape(loaded.image_std, (-1, 1, 1))
    torch.testing.assert_close(pixel_values[0], torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


def test_rgb_images_are_processed_as_by_vit():
    image = noise_image(1)
    settings = {"size": {"height": 64, "width": 96}, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}
    ours, theirs = (
        kind(**settings)(image, return_tensors="pt").pixel_values
        for kind in (GreenMIMImageProcessorPil, ViTImageProcessorPil)
    )
    assert torch.equal(ours, theirs)


def test_arrays_are_taken_as_they_are():
    processor = build_image_processor(tiny_config(num_channels=1))
    array = np.full((1, 32, 32), 255, dtype=np.uint8)
    assert processor(array, return_tensors="pt").pixel_values.shape == (1, 1, 32, 32)


def test_16_bit_images_keep_their_range():
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    processor = build_image_processor(tiny_config(num_channels=1, image_size=32))
    pixels = processor(Image.fromarray(ramp), return_tensors="np")["pixel_values"]
    expected = processor(Image.fromarray((ramp >> 8).astype(np.uint8)), return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels, expected) and len(np.unique(pixels)) > 200
