"""Training, the image processor and both pipelines see the same pixels, whatever the mode of an image."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_greenmim import GreenMIMForImageClassification, GreenMIMModel
from modeling_greenmim.image_processing_greenmim import build_image_processor
from modeling_greenmim.pixels import to_8_bit
from tests.training_helpers import noise_image, smooth_image, tiny_config
from training_greenmim.data.images import UnreadableImageError, load_image
from training_greenmim.data.transforms import EvalTransform


SIZE = (32, 32)  # of the tiny model: nothing is resized, so that pixels must agree exactly


def with_alpha(mode: str) -> Image.Image:
    """Noise whose left half is transparent in part."""
    image = noise_image(0, *SIZE).convert(mode)
    image.putalpha(Image.fromarray(np.repeat([[0] * 8 + [51] * 8 + [255] * 16], 32, axis=0).astype(np.uint8)))
    return image


def palette(transparency) -> Image.Image:
    image = noise_image(0, *SIZE).convert("P")
    image.info["transparency"] = transparency
    return image


def sideways() -> Image.Image:
    image = noise_image(0, *SIZE)
    image.getexif()[0x0112] = 6
    return image


IMAGES = {
    "1": (lambda: noise_image(0, *SIZE).convert("1"), "png"),
    "L": (lambda: noise_image(0, *SIZE).convert("L"), "png"),
    "LA": (lambda: with_alpha("L"), "png"),
    "P with a transparent colour": (lambda: palette(3), "png"),
    "P with half-transparent colours": (lambda: palette(bytes(range(256))), "png"),
    "RGB": (lambda: noise_image(0, *SIZE), "png"),
    "RGB turned by EXIF": (sideways, "png"),
    "RGBA": (lambda: with_alpha("RGB"), "png"),
    "CMYK": (lambda: smooth_image(*SIZE).convert("CMYK"), "tif"),
    "CMYK JPEG": (lambda: smooth_image(*SIZE).convert("CMYK"), "jpg"),
    "YCbCr": (lambda: smooth_image(*SIZE).convert("YCbCr"), "tif"),
}
SIXTEEN_BITS = {
    "I;16": (lambda: Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(SIZE)), "png"),
    "I;16B": (
        lambda: Image.frombytes("I;16B", SIZE, np.arange(0, 65536, 64, dtype=np.uint16).astype(">u2").tobytes()),
        "tif",
    ),
    "I": (lambda: Image.fromarray(np.arange(0, 65536, 64, dtype=np.int32).reshape(SIZE)), "tif"),
}


@pytest.fixture(scope="module", params=[1, 3], ids=["grey model", "RGB model"])
def views(request):
    """The image processor and both pipelines of a model, and what training sees, normalised."""
    torch.manual_seed(0)
    config = tiny_config(num_channels=request.param)
    processor = build_image_processor(config)
    classify = pipeline(
        "image-classification", model=GreenMIMForImageClassification(config), image_processor=processor
    )
    extract = pipeline("image-feature-extraction", model=GreenMIMModel(config), image_processor=processor)
    transform = EvalTransform(SIZE, request.param, share=1.0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return processor, classify, extract, lambda path: (load_image(path, transform, None) / 255 - mean) / std


def written(folder, make_image, suffix: str) -> str:
    image, path = make_image(), str(folder / f"image.{suffix}")
    image.save(path, exif=image.getexif(), **({"quality": 95} if suffix == "jpg" else {}))
    return path


def assert_same_pixels(actual, expected) -> None:
    torch.testing.assert_close(actual.pixel_values[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", IMAGES)
def test_training_processor_and_pipelines_see_the_same(views, tmp_path, mode):
    processor, classify, extract, seen_in_training = views
    path = written(tmp_path, *IMAGES[mode])
    expected = seen_in_training(path)
    assert expected.std() > 0.3
    for source in (path, Image.open(path), processor.open_image(path)):
        assert_same_pixels(processor(source, return_tensors="pt"), expected)
        assert_same_pixels(classify.preprocess(source), expected)
        assert_same_pixels(extract.preprocess(source), expected)


@pytest.mark.parametrize("mode", SIXTEEN_BITS)
def test_images_of_16_bits_need_one_call_before_pipelines(views, tmp_path, mode):
    processor, classify, extract, seen_in_training = views
    path = written(tmp_path, *SIXTEEN_BITS[mode])
    expected = seen_in_training(path)
    assert len(expected.unique()) >= 256, "the upper bytes, not white"
    for source in (path, Image.open(path)):
        assert_same_pixels(processor(source, return_tensors="pt"), expected)
        for pipe in (classify, extract):
            assert_same_pixels(pipe.preprocess(pipe.image_processor.open_image(source)), expected)
    assert classify(processor.open_image(path)) and extract(processor.open_image(path), pool=True)


def test_floating_point_images_are_refused_by_name(views, tmp_path):
    processor, _, _, seen_in_training = views
    path = written(tmp_path, lambda: Image.fromarray(np.ones(SIZE, dtype=np.float32)), "tif")
    with pytest.raises(UnreadableImageError, match=r"image\.tif \(floating-point images have no defined range"):
        seen_in_training(path)
    for source in (path, Image.open(path)):
        for see in (processor, processor.open_image):
            with pytest.raises(ValueError, match="floating-point images have no defined range"):
                see(source)


@pytest.mark.parametrize("mode", IMAGES)
def test_conversion_is_that_of_pillow(mode):
    image = IMAGES[mode][0]()
    converted = to_8_bit(image)
    assert converted.mode in ("L", "RGB")
    assert np.array_equal(np.asarray(converted.convert("RGB")), np.asarray(image.convert("RGB")))
