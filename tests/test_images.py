"""Images become uint8 tensors rightly, whatever their mode, orientation, format and size."""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.training_helpers import encoded, noise_image, smooth_image
from training_greenmim.data.images import UnreadableImageError, load_image, open_image
from training_greenmim.data.transforms import (
    EvalTransform,
    Geometry,
    TrainTransform,
    apply_geometry,
    center_crop_box,
    random_crop_box,
    upright_size,
)
from training_greenmim.randomness import derived_generator


ORIENTATION = 0x0112


def generator(seed: int = 0) -> np.random.Generator:
    return derived_generator(seed)


def pixels(source, channels: int = 3) -> np.ndarray:
    """All pixels of an image in 8-bit grey or RGB, at their own size."""
    image = open_image(source)
    result = apply_geometry(image, Geometry((0, 0, *image.size), image.size[::-1]), channels)
    return result.permute(1, 2, 0).numpy().squeeze(2) if channels == 1 else result.permute(1, 2, 0).numpy()


def png(color_type: int, rows: list[list[tuple[int, ...]]], transparency: bytes | None = None) -> bytes:
    """A PNG file of 16 bits per value, which Pillow cannot write in colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    data = b"".join(b"\0" + b"".join(struct.pack(">H", value) for pixel in row for value in pixel) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 16, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    if transparency is not None:
        chunks.insert(1, (b"tRNS", transparency))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


# Modes


def test_grey_is_repeated_in_all_channels():
    grey = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    assert np.array_equal(pixels(encoded(Image.fromarray(grey))), np.stack([grey] * 3, axis=-1))


def test_rgb_is_untouched():
    image = noise_image(0)
    assert np.array_equal(pixels(encoded(image)), np.asarray(image))


def test_one_bit_becomes_black_and_white():
    image = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1", dither=Image.Dither.NONE)
    content = encoded(image)
    assert open_image(content).mode == "1"
    assert pixels(content)[..., 1].tolist() == [[0, 255], [255, 0]]


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    image.putdata([0, 1, 2])
    return image


def test_palette_becomes_its_colours():
    content = encoded(palette_image())
    assert open_image(content).mode == "P"
    assert pixels(content)[0].tolist() == [[255, 0, 0], [0, 255, 0], [10, 20, 30]]


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 1), ("GIF", 1), ("PNG", bytes([255, 0, 51]))])
@pytest.mark.filterwarnings("error")
def test_transparent_palette_entries_show_their_colours(kind, transparency):
    content = encoded(palette_image(), kind, transparency=transparency)
    assert pixels(content)[0].tolist() == [[255, 0, 0], [0, 255, 0], [10, 20, 30]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparent_parts_of_rgba_show_the_colours_beneath(kind):
    image = Image.fromarray(np.array([[[9, 8, 7, 255], [0, 0, 255, 0], [0, 100, 255, 51]]], dtype=np.uint8))
    assert pixels(encoded(image, kind))[0].tolist() == [[9, 8, 7], [0, 0, 255], [0, 100, 255]]


def test_transparent_parts_of_la_show_the_grey_beneath():
    image = Image.new("LA", (3, 1))
    image.putdata([(40, 255), (0, 0), (7, 51)])
    content = encoded(image)
    assert open_image(content).mode == "LA"
    assert pixels(content)[0].tolist() == [[40] * 3, [0] * 3, [7] * 3]


def test_values_declared_transparent_are_values_like_others():
    grey = Image.fromarray(np.array([[0, 100]], dtype=np.uint8))
    assert pixels(encoded(grey, transparency=0))[0].tolist() == [[0] * 3, [100] * 3]
    colour = Image.fromarray(np.array([[[1, 2, 3], [100, 0, 0]]], dtype=np.uint8))
    assert pixels(encoded(colour, transparency=(1, 2, 3)))[0].tolist() == [[1, 2, 3], [100, 0, 0]]


@pytest.mark.parametrize(
    ("cmyk", "rgb"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((255, 255, 0, 0), (0, 0, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 127), (128, 128, 128)),
    ],
)
def test_cmyk_jpeg_becomes_rgb(cmyk, rgb):
    content = encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95)
    assert open_image(content).mode == "CMYK"
    assert np.abs(pixels(content).astype(int) - rgb).max() <= 2


def test_16_bit_grey_png_keeps_the_upper_byte():
    values = np.array([[0, 255, 256, 0x1234, 0x80FF, 65535]], dtype=np.uint16)
    content = encoded(Image.fromarray(values))
    assert open_image(content).mode == "I;16"
    assert pixels(content)[0].tolist() == [[value] * 3 for value in (0, 0, 1, 0x12, 0x80, 255)]


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_grey_tiff_of_both_byte_orders_keeps_the_upper_byte(order):
    mode = {"<": "I;16", ">": "I;16B"}[order]
    values = np.array([[0, 0x1234, 65535]], dtype=f"{order}u2")
    image = Image.frombytes(mode, (3, 1), values.tobytes())
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 0x12, 255]


def test_32_bit_grey_is_read_as_16_bit_values():
    image = Image.fromarray(np.array([[-5, 0, 0x1234, 65535, 70000]], dtype=np.int32))
    content = encoded(image, "TIFF")
    assert open_image(content).dtype == np.int32
    assert pixels(content)[0, :, 0].tolist() == [0, 0, 0x12, 255, 255]


def test_16_bit_rgb_png_keeps_the_upper_byte():
    content = png(2, [[(0x1234, 0x80FF, 65535), (0, 256, 0x0FFF)]])
    assert pixels(content)[0].tolist() == [[0x12, 0x80, 255], [0, 1, 0x0F]]


def test_16_bit_transparent_png_keeps_the_upper_byte():
    content = png(6, [[(0x1234, 0x80FF, 65535, 65535), (0, 256, 0x0FFF, 0)]])
    assert pixels(content)[0].tolist() == [[0x12, 0x80, 255], [0, 1, 0x0F]]
    assert pixels(png(4, [[(0x1234, 65535), (0x80FF, 0)]]))[0].tolist() == [[0x12] * 3, [0x80] * 3]


def test_floating_point_tiff_is_refused_with_its_name():
    content = encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(UnreadableImageError, match=r"heat\.tiff.*floating-point"):
        load_image({"path": "heat.tiff", "bytes": content}, EvalTransform((32, 32), 3), None)


def test_grey_model_sees_luminance():
    image = Image.fromarray(np.array([[[255, 0, 0], [10, 10, 10], [255, 255, 255]]], dtype=np.uint8))
    assert pixels(encoded(image), channels=1)[0].tolist() == [76, 10, 255]
    for transform in (EvalTransform((16, 24), 1), TrainTransform((16, 24), 1)):
        tensor = transform(encoded(noise_image(0)), generator())
        assert tensor.shape == (1, 16, 24) and tensor.dtype == torch.uint8


# Sources


def test_every_kind_of_source_gives_the_same_tensor(tmp_path):
    image, path = noise_image(1), tmp_path / "image.png"
    image.save(path)
    transform = EvalTransform((32, 32), 3)
    expected = transform(image)
    assert expected.shape == (3, 32, 32) and expected.dtype == torch.uint8
    sources = [str(path), path.read_bytes(), {"path": str(path), "bytes": None}]
    sources.append({"path": "gone.png", "bytes": path.read_bytes()})
    for source in sources:
        assert torch.equal(transform(source), expected)


@pytest.mark.parametrize("content", [b"", b"no image at all", encoded(noise_image(0))[:150]])
def test_broken_files_are_unreadable_and_named(content):
    with pytest.raises(UnreadableImageError, match=r"holiday\.png"):
        load_image({"path": "holiday.png", "bytes": content}, EvalTransform((32, 32), 3), None)


@pytest.mark.parametrize("source", [{"path": "nowhere.png", "bytes": None}, "nowhere.png"])
def test_missing_file_is_unreadable_and_named(source):
    with pytest.raises(UnreadableImageError, match=r"^nowhere\.png"):
        load_image(source, EvalTransform((32, 32), 3), None)


# EXIF orientation


def with_orientation(image: Image.Image, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    return encoded(image, kind, exif=exif, **options)


def transposed(content: bytes) -> bytes:
    """The oracle: the upright image, without EXIF."""
    return encoded(ImageOps.exif_transpose(open_image(content)).convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind, orientation):
    content = with_orientation(noise_image(3, height=40, width=64), kind, orientation)
    upright = transposed(content)
    size = open_image(upright).size
    assert size == ((40, 64) if orientation >= 5 else (64, 40)), "the oracle turns the image"
    evaluation = EvalTransform((32, 24), 3)
    assert torch.equal(evaluation(content), evaluation(upright))
    training = TrainTransform((32, 24), 3)
    for seed in range(4):
        assert torch.equal(training(content, generator(seed)), training(upright, generator(seed)))


@pytest.mark.parametrize("orientation", [0, 9, 4000])
def test_undefined_exif_orientation_is_ignored(orientation):
    image = noise_image(3, height=40, width=64)
    transform = EvalTransform((32, 32), 3)
    assert torch.equal(transform(with_orientation(image, "PNG", orientation)), transform(encoded(image)))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_of_a_large_jpeg_decoded_at_reduced_size(orientation):
    content = with_orientation(smooth_image(480, 800), "JPEG", orientation)
    transform = EvalTransform((32, 32), 3)
    difference = transform(content).int() - transform(transposed(content)).int()
    assert difference.abs().max() <= 6 and difference.abs().float().mean() < 1.5


# Decoding JPEGs at reduced size


def decoded_size(width: int, height: int, box, size: tuple[int, int]) -> tuple[int, int]:
    """Size at which a JPEG of width x height is decoded for a crop."""
    image = open_image(encoded(Image.new("RGB", (width, height), "gray"), "JPEG"))
    apply_geometry(image, Geometry(box, size), 3)
    return image.size


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 1600, 1200), (400, 300)),  # a quarter holds 300 rows for 224
        ((0, 0, 448, 448), (800, 600)),  # half of the crop is exactly 224
        ((0, 0, 447, 447), (1600, 1200)),  # half of the crop is less
        ((0, 0, 1600, 447), (1600, 1200)),  # the shorter side decides
        ((100, 100, 1100, 1100), (400, 300)),
        ((0, 0, 100, 100), (1600, 1200)),  # enlarged
    ],
)
def test_draft_mode_is_used_as_far_as_the_crop_keeps_its_pixels(box, expected):
    assert decoded_size(1600, 1200, box, (224, 224)) == expected


@pytest.mark.parametrize("box", [(0, 0, 1601, 1201), (3, 5, 901, 1003), (10, 10, 466, 460), (7, 0, 1000, 470)])
@pytest.mark.parametrize("size", [(224, 224), (64, 128), (96, 32)])
def test_decoded_crop_never_has_fewer_pixels_than_the_result(box, size):
    width, height = decoded_size(1601, 1201, box, size)
    assert (box[2] - box[0]) * width / 1601 >= min(size[1], box[2] - box[0])
    assert (box[3] - box[1]) * height / 1201 >= min(size[0], box[3] - box[1])


def test_transforms_decode_a_large_jpeg_at_reduced_size():
    content = encoded(smooth_image(1200, 1600), "JPEG")
    for transform in (TrainTransform((64, 64), 3, scale=(0.9, 1.0)), EvalTransform((64, 64), 3)):
        image = open_image(content)
        transform(image, generator())
        assert image.size == (200, 150)


@pytest.mark.parametrize("size", [(1200, 1600), (1201, 1607), (777, 1001)])
def test_reduced_decoding_changes_the_result_little(size):
    jpeg = encoded(smooth_image(*size), "JPEG", quality=95)
    whole = encoded(open_image(jpeg))
    for seed in range(4):
        transform = TrainTransform((64, 64), 3)
        reduced, full = transform(jpeg, generator(seed)), transform(whole, generator(seed))
        difference = (reduced.int() - full.int()).abs()
        assert difference.max() <= 3 and difference.float().mean() < 0.6
    assert open_image(whole).format == "PNG"


# Crops

SIDES = st.integers(1, 5000)
ASPECTS = [1.0, 4 / 3, 3 / 4, 224 / 192, 192 / 224, 7 / 5, 2.0, 0.5]


def assert_inside(box, width: int, height: int) -> None:
    left, top, right, bottom = box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height, (box, width, height)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(width=SIDES, height=SIDES, aspect=st.sampled_from(ASPECTS), seed=st.integers(0, 100))
def test_random_crop_is_inside_the_image(width, height, aspect, seed):
    assert_inside(random_crop_box(width, height, aspect, generator(seed)), width, height)


@pytest.mark.parametrize("share", [1.0, 224 / 256])
def test_center_crop_is_inside_the_image(share):
    # Rounding errors of single sizes: all sides are tried, not a sample.
    for side in range(1, 2500):
        for aspect in ASPECTS:
            for width, height in ((side, 5000), (5000, side)):
                assert_inside(center_crop_box(width, height, aspect, share), width, height)


@pytest.mark.parametrize("shape", [(3000, 1999), (1999, 3000), (5000, 7), (7, 5000), (1, 1)])
@pytest.mark.parametrize("size", [(192, 224), (224, 192), (96, 128)])
def test_images_of_extreme_shapes_can_be_read(shape, size):
    content = encoded(Image.new("RGB", shape, (1, 2, 3)))
    transform = TrainTransform(size, 3, scale=(1.0, 1.0))
    for seed in range(3):
        tensor = load_image(content, transform, generator(seed))
        assert tensor.shape == (3, *size)
        assert (tensor == torch.tensor([1, 2, 3]).view(3, 1, 1)).all()


@pytest.mark.parametrize(("height", "width"), [(224, 224), (192, 256), (256, 128)])
def test_random_crop_keeps_to_scale_and_ratio_and_uses_their_range(height, width):
    aspect = width / height
    boxes = [random_crop_box(2000, 1600, aspect, generator(seed), scale=(0.2, 0.6)) for seed in range(400)]
    shares = np.array([(right - left) * (bottom - top) / (2000 * 1600) for left, top, right, bottom in boxes])
    ratios = np.array([(right - left) / (bottom - top) / aspect for left, top, right, bottom in boxes])
    assert shares.min() > 0.2 - 0.002 and shares.max() < 0.6 + 0.002
    assert ratios.min() > 3 / 4 - 0.005 and ratios.max() < 4 / 3 + 0.005
    assert shares.min() < 0.22 and shares.max() > 0.5
    assert ratios.min() < 0.8 and ratios.max() > 1.25
    assert len({box[0] for box in boxes}) > 100 and len({box[1] for box in boxes}) > 100


def test_crop_that_never_fits_is_the_largest_central_one():
    assert random_crop_box(10, 1000, 1.0, generator()) == (0, 495, 10, 505)
    assert random_crop_box(1000, 10, 2.0, generator()) == (490, 0, 510, 10)


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 500), (256, 256)])
def test_evaluation_equals_resizing_to_256_then_cropping_224(width, height):
    image = smooth_image(height, width)
    factor = 256 / min(width, height)
    resized = image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 224) / 2, (resized.height - 224) / 2
    expected = np.asarray(resized.crop((round(left), round(top), round(left) + 224, round(top) + 224)))
    actual = EvalTransform((224, 224), 3)(encoded(image)).permute(1, 2, 0).numpy()
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= 4 and difference.mean() < 1


@pytest.mark.parametrize("size", [(64, 128), (128, 64)])
def test_evaluation_does_not_distort_for_models_of_other_aspect(size):
    # A disc stays a disc: as wide as high, in pixels.
    rows, columns = np.mgrid[0:400, 0:400]
    disc = Image.fromarray((((rows - 199.5) ** 2 + (columns - 199.5) ** 2 < 60**2) * 255).astype(np.uint8))
    tensor = EvalTransform(size, 1)(encoded(disc))[0] > 127
    height, width = int(tensor.any(dim=1).sum()), int(tensor.any(dim=0).sum())
    assert abs(height - width) <= 1 and height > 20


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_resizing_by_torch_is_that_of_pillow(size):
    """Colour crops of whole pixels; at their edges Pillow sees no further either."""
    image = smooth_image(375, 500)
    for box in ((0, 0, 500, 375), (40, 30, 370, 320), (100, 50, 260, 180)):
        actual = apply_geometry(image, Geometry(box, size), 3).permute(1, 2, 0).numpy().astype(int)
        expected = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box)).astype(int)
        assert np.abs(actual - expected).max() <= 3 and (actual != expected).mean() < 0.05


def test_flip_mirrors_half_of_the_images():
    image = smooth_image(32, 32)
    upright = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    transform = TrainTransform((32, 32), 3, scale=(1.0, 1.0))
    # The whole image, or a slightly narrower crop of it, fits only undistorted.
    results = [transform(encoded(image), generator(seed)) for seed in range(60)]
    plain = sum(torch.equal(result, upright) for result in results)
    mirrored = sum(torch.equal(result, upright.flip(2)) for result in results)
    assert plain + mirrored == 60 and 15 <= plain <= 45


def test_geometry_is_a_value_that_tells_where_every_point_goes():
    """Drawn once, it may be applied to whatever lies on the image: here to a disc by its centre, and to a picture."""
    rows, columns = np.mgrid[0:80, 0:120]
    x, y = 70.5, 30.5
    disc = Image.fromarray(((((rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2) < 8**2) * 255).astype(np.uint8))
    transform = TrainTransform((48, 64), 1, scale=(0.8, 1.0))
    drawn = [transform.draw_geometry(120, 80, generator(seed)) for seed in range(12)]
    assert len(set(drawn)) == 12 and {geometry.flip for geometry in drawn} == {False, True}
    for seed, geometry in enumerate(drawn):
        assert geometry == transform.draw_geometry(120, 80, generator(seed)) and geometry.size == (48, 64)
        pixels = apply_geometry(disc.copy(), geometry, 1)
        assert torch.equal(pixels, transform(disc.copy(), generator(seed)))
        left, top, right, bottom = geometry.box
        expected = (x - left) * 64 / (right - left), (y - top) * 48 / (bottom - top)
        expected = (64 - expected[0], expected[1]) if geometry.flip else expected
        if left < x - 9 and right > x + 9 and top < y - 9 and bottom > y + 9:
            lit = (pixels[0] > 127).nonzero().float().mean(dim=0) + 0.5
            assert lit.flip(0).tolist() == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (64, 40)), (6, (40, 64))])
def test_upright_size(kind, orientation, size):
    image = open_image(with_orientation(noise_image(3, height=40, width=64), kind, orientation))
    assert upright_size(image) == upright_size(image) == size


def test_augmentation_depends_on_the_generator_alone():
    transform, content = TrainTransform((32, 32), 3), encoded(noise_image(0))
    first, again, other = (transform(content, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_evaluation_is_not_random():
    transform, content = EvalTransform((32, 32), 3), encoded(noise_image(0))
    assert torch.equal(transform(content, generator(1)), transform(content, generator(2)))
