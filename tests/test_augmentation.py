# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Augmentation of batches, against Pillow, closed-form distributions and counted pixels."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from training_greenmim.classification.augmentation import (
    OPERATIONS,
    BatchAugmentation,
    Mixing,
    PixelErasing,
    RandAugment,
    RandAugmentSettings,
    cutmix,
    parse_rand_augment,
)
from training_greenmim.data.scaling import PixelScaling


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def scaling(mean, std) -> PixelScaling:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return PixelScaling(mean, std, list(range(len(mean))))


SCALING = scaling(MEAN, STD)
RECIPE = "m9-n2-mstd0.5-inc1"
# Sides differ, so that a confusion of rows and columns shows.
WIDTH, HEIGHT = 120, 90
FILL = (124, 116, 104)


def photograph(mode="RGB") -> Image.Image:
    """Smooth random image with every kind of value; interpolations of smooth images agree closely."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).convert(mode)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).view(HEIGHT, WIDTH, -1).permute(2, 0, 1)[None] / 255


def augment(image: Image.Image, operation: str, level: float) -> np.ndarray:
    """Values 0 to 255, (height, width, channels), of one operation at a signed share of the largest magnitude."""
    fill = torch.tensor(FILL[: len(image.getbands())]) / 255
    params = {"operations": torch.tensor([[OPERATIONS.index(operation)]]), "levels": torch.tensor([[level]])}
    return RandAugment(RandAugmentSettings(), fill)(to_tensor(image), params=params)[0].permute(1, 2, 0).numpy() * 255


def enhanced(enhancer):
    return lambda image, level: enhancer(image).enhance(max(0.1, 1 + 0.9 * level))


def solarize_add(image, level):
    table = [min(255, value + int(110 * abs(level))) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def affine(coefficients):
    """Pillow's transformation; coefficients map output pixels to input pixels."""

    def transform(image, level):
        fill = FILL if image.mode == "RGB" else FILL[0]
        return image.transform(
            image.size, Image.Transform.AFFINE, coefficients(level), Image.Resampling.BICUBIC, fillcolor=fill
        )

    return transform


def rotate(image, level):
    fill = FILL if image.mode == "RGB" else FILL[0]
    return image.rotate(30 * level, Image.Resampling.BICUBIC, fillcolor=fill)


# What each operation is, in Pillow, at a level from -1 to 1.
PILLOW = {
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "invert": lambda image, level: ImageOps.invert(image),
    "posterize": lambda image, level: ImageOps.posterize(image, max(1, 4 - int(4 * abs(level)))),
    "solarize": lambda image, level: ImageOps.solarize(image, 256 - int(256 * abs(level))),
    "solarize_add": solarize_add,
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "rotate": rotate,
    "shear_x": affine(lambda level: (1, 0.3 * level, 0, 0, 1, 0)),
    "shear_y": affine(lambda level: (1, 0, 0, 0.3 * level, 1, 0)),
    "translate_x": affine(lambda level: (1, 0, 0.45 * level * WIDTH, 0, 1, 0)),
    "translate_y": affine(lambda level: (1, 0, 0, 0, 1, 0.45 * level * HEIGHT)),
}
LUT_OPERATIONS = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("level", [-0.9, -0.2, 0.0, 0.5, 0.99])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_is_pillows(operation, level, mode):
    # Less contrast than there is room for, so that stretching contrast does something.
    image = photograph(mode).point(lambda value: 20 + value * 0.7)
    expected = np.asarray(PILLOW[operation](image, level), dtype=float).reshape(HEIGHT, WIDTH, -1)
    difference = np.abs(augment(image, operation, level) - expected)
    # Pillow truncates to whole values, and its bicubic kernel is another; a wrong kind of operation is off by far.
    assert difference.max() < (1.001 if operation in LUT_OPERATIONS else 3)
    assert difference.mean() < 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_largest_magnitude_stays_within_range(operation):
    for level in (-1.0, 1.0):
        values = augment(photograph(), operation, level)
        assert values.min() >= 0 and values.max() <= 255 and values.max() > values.min()


def test_posterizing_and_solarizing_are_exact_for_every_value():
    ramp = Image.fromarray(np.resize(np.arange(256, dtype=np.uint8), (HEIGHT, WIDTH)))
    for operation in ("posterize", "solarize", "solarize_add", "equalize"):
        for level in (0.1, 0.3, 0.7, 0.9):
            expected = np.asarray(PILLOW[operation](ramp, level))
            np.testing.assert_allclose(augment(ramp, operation, level)[..., 0], expected, atol=1e-3)


def test_channel_of_one_value_keeps_it():
    flat = Image.new("RGB", (WIDTH, HEIGHT), (0, 90, 255))
    for operation in ("auto_contrast", "equalize"):
        np.testing.assert_allclose(augment(flat, operation, 0.9), np.asarray(flat), atol=1e-3)


def test_each_row_of_a_batch_gets_its_own_operation():
    images = to_tensor(photograph()).expand(len(OPERATIONS) + 1, -1, -1, -1)
    fill = torch.tensor(FILL) / 255
    params = {
        "operations": torch.arange(-1, len(OPERATIONS)).view(1, -1),
        "levels": torch.linspace(-0.9, 0.9, len(images)).view(1, -1),
    }
    together = RandAugment(RandAugmentSettings(), fill)(images, params=params)
    torch.testing.assert_close(together[0], images[0], rtol=0, atol=0)  # -1 is none
    for row, operation in enumerate(OPERATIONS, start=1):
        alone = augment(photograph(), operation, params["levels"][0, row].item())
        np.testing.assert_allclose(together[row].permute(1, 2, 0).numpy() * 255, alone, atol=1e-3)


def test_layers_apply_in_turn():
    params = {"operations": torch.tensor([[OPERATIONS.index("invert")], [OPERATIONS.index("posterize")]])}
    params["levels"] = torch.tensor([[0.9], [0.5]])
    result = RandAugment(RandAugmentSettings(), torch.zeros(3))(to_tensor(photograph()), params=params)
    # Exact only if no value falls below its step by the rounding of 1 - x.
    expected = ImageOps.posterize(ImageOps.invert(photograph()), 2)
    np.testing.assert_allclose(result[0].permute(1, 2, 0).numpy() * 255, np.asarray(expected), atol=1e-3)


def draws(settings: RandAugmentSettings, batch: int) -> dict:
    torch.manual_seed(0)
    return RandAugment(settings, torch.zeros(3)).forward_parameters((batch, 3, 8, 8))


def test_magnitudes_are_normal_and_clipped():
    levels = draws(RandAugmentSettings(9, 2, 0.5, 1.0), 20_000)["levels"]
    magnitudes = levels.abs().flatten().numpy() * 10
    below = magnitudes[magnitudes < 9.99]  # the clipped share is counted apart
    assert magnitudes.max() == pytest.approx(10)
    assert 1 - len(below) / len(magnitudes) == pytest.approx(stats.norm.sf(9.99, 9, 0.5), abs=0.003)
    expected = stats.truncnorm(-18, (9.99 - 9) / 0.5, 9, 0.5)
    assert stats.kstest(below, expected.cdf).pvalue > 0.01
    assert (levels > 0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    # Drawn for each operation and image anew.
    first, second = levels.abs()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert first.unique().numel() > 15_000


def test_magnitudes_without_noise_are_constant():
    levels = draws(RandAugmentSettings(7, 3, 0.0, 1.0), 100)["levels"]
    assert levels.shape == (3, 100)
    torch.testing.assert_close(levels.abs(), torch.full((3, 100), 0.7))


def test_operations_are_uniform_independent_and_applied_with_their_probability():
    operations = draws(RandAugmentSettings(9, 2, 0.5, 0.5), 30_000)["operations"]
    assert (operations >= 0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    counts = torch.bincount(operations[operations >= 0], minlength=len(OPERATIONS)).numpy()
    assert len(counts) == len(OPERATIONS) == 15
    assert stats.chisquare(counts).pvalue > 0.01
    # With replacement: the same operation twice as often as any other pair.
    both = operations[:, (operations >= 0).all(0)]
    assert (both[0] == both[1]).double().mean().item() == pytest.approx(1 / 15, abs=0.01)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("m9-n2-mstd0.5-inc1", (9, 2, 0.5, 0.5)),
        ("rand-m9-mstd0.5-inc1", (9, 2, 0.5, 0.5)),
        ("inc1-n3-m7-p0.25", (7, 3, 0, 0.25)),
        ("inc1", (10, 2, 0, 0.5)),
    ],
)
def test_parse_rand_augment(text, expected):
    assert parse_rand_augment(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "rand", "m9", "m9-n2-inc0", "m9-inc1-x3", "m9-m8-inc1", "m11-inc1", "m9-n0-inc1", "m9-n1.5-inc1"),
        *("m9-mstd101-inc1", "m9-p2-inc1", "m-9-inc1", "m9--inc1", "original-mstd0.5", "M9-inc1", "m9-inc1 "),
    ],
)
def test_other_texts_are_refused_by_name(text):
    with pytest.raises(ValueError, match=r"`rand_augment` is '" + text):
        parse_rand_augment(text)


def erased(batch=4000, size=(60, 40), probability=1.0, channels=1):
    """(mask of erased pixels, erased images): the images hold a value that noise does not hit."""
    torch.manual_seed(1)
    images = PixelErasing(probability)(torch.full((batch, channels, *size), 100.0))
    return (images[:, 0] != 100).numpy(), images


def test_erased_pixels_are_one_rectangle_of_the_right_size():
    masks, _ = erased()
    height, width = masks.shape[1:]
    rows, columns = masks.any(2).sum(1), masks.any(1).sum(1)
    assert (masks.sum((1, 2)) == rows * columns).all()
    for sides in (masks.any(2), masks.any(1)):  # without gaps
        assert (np.abs(np.diff(sides.astype(int), axis=1, prepend=0, append=0)).sum(1) == 2).all()
    # Rectangles that reach across the image are clipped; the others keep the area and aspect that were drawn.
    whole = (rows < height) & (columns < width)
    assert whole.mean() > 0.8
    area, aspect = (rows * columns / (height * width))[whole], (rows / columns)[whole]
    assert area.min() > 0.015 and area.max() < 1 / 3 + 0.02
    assert aspect.min() > 0.25 and aspect.max() < 4
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)
    # No rectangle below a fifth of the area reaches across: there, the aspect ratio is uniform on either side of 1.
    aspect = (rows / columns)[rows * columns < 0.2 * height * width]
    assert (aspect > 1).mean() == pytest.approx(0.5, abs=0.05)
    assert aspect[aspect < 1].mean() == pytest.approx((0.3 + 1) / 2, abs=0.03)
    assert aspect[aspect > 1].mean() == pytest.approx((1 + 1 / 0.3) / 2, abs=0.1)
    # Every pixel can be hit, the corners less often than the centre.
    shares = masks.mean(0)
    assert shares.min() > 0 and shares[height // 2, width // 2] > 3 * shares[0, 0]


def test_erased_pixels_are_standard_normal_noise_of_each_pixel_and_channel():
    masks, images = erased(batch=50, channels=3)
    noise = images.permute(0, 2, 3, 1)[torch.from_numpy(masks)]
    assert stats.kstest(noise[:, 0].numpy(), stats.norm.cdf).pvalue > 0.01
    assert np.abs(np.corrcoef(noise.numpy(), rowvar=False) - np.eye(3)).max() < 0.03  # channels
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.03  # neighbours
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_erasing_hits_a_quarter_of_the_images_and_leaves_the_rest_alone():
    masks, images = erased(probability=0.25)
    hit = masks.any((1, 2))
    assert hit.mean() == pytest.approx(0.25, abs=0.03)
    assert (images[torch.from_numpy(~hit)] == 100).all()
    assert BatchAugmentation(None, 0, 0.25, SCALING).erase.p == 0.25


def random_images(batch=8, channels=3, size=(32, 24)) -> torch.Tensor:
    return torch.randint(0, 256, (batch, channels, *size), dtype=torch.uint8, generator=torch.manual_seed(5))


@pytest.mark.parametrize("channels", [1, 3])
def test_with_everything_off_images_are_only_normalised(channels):
    images = random_images(channels=channels)
    mean, std = MEAN[:channels], STD[:channels]
    expected = (images.numpy() / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    for given in (images, images / 255):
        result = BatchAugmentation(None, 0.0, 0.0, scaling(mean, std))(given)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_color_jitter_plays_no_part_beside_rand_augment():
    images = random_images()
    results = []
    for jitter in (0.0, 0.4):
        torch.manual_seed(3)
        results.append(BatchAugmentation(RECIPE, jitter, 0.25, SCALING)(images))
    assert torch.equal(*results)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_is_pillows(channels):
    images = random_images(batch=4, channels=channels)
    augmentation = BatchAugmentation(None, 0.4, 0.0, scaling([0.0] * channels, [1.0] * channels))
    torch.manual_seed(0)
    result = augmentation(images)
    params = augmentation.distort._params
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, lambda image: None)
    names = ("brightness_factor", "contrast_factor", "saturation_factor")
    for row, pixels in enumerate(images.permute(0, 2, 3, 1).squeeze(-1).numpy()):
        image = Image.fromarray(pixels)
        for number in params["order"].tolist():
            if number < 3:
                factor = params[names[number]][row].item()
                assert 0.6 <= factor <= 1.4
                image = enhancers[number](image).enhance(factor)
        difference = result[row].permute(1, 2, 0).squeeze(-1).numpy() * 255 - np.asarray(image, dtype=float)
        assert np.abs(difference).max() < 4  # Pillow truncates to whole values three times
    assert params["brightness_factor"].unique().numel() == 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rand_augment, jitter", [(RECIPE, 0.4), (None, 0.4)])
def test_seed_repeats_a_call_and_images_draw_for_themselves(rand_augment, jitter, channels):
    images = random_images(batch=1, channels=channels).expand(24, -1, -1, -1)
    before = images.clone()
    augmentation = BatchAugmentation(rand_augment, jitter, 0.25, scaling(MEAN[:channels], STD[:channels]))
    torch.manual_seed(11)
    first, other = augmentation(images), augmentation(images)
    torch.manual_seed(11)
    assert torch.equal(augmentation(images), first)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    assert first.shape == images.shape and first.dtype == torch.float32 and first.isfinite().all()
    # A quarter of the images may stay as they are (no operation drawn, twice); the others differ from one another.
    assert len(first.flatten(1).unique(dim=0)) >= 12


def test_grey_and_rgb_images_of_the_same_grey_are_augmented_alike():
    grey = random_images(channels=1)
    results = []
    for images in (grey, grey.expand(-1, 3, -1, -1)):
        torch.manual_seed(2)
        channels = images.shape[1]
        given = scaling([0.5] * channels, [0.25] * channels)
        results.append(BatchAugmentation("m9-n2-mstd0.5-p1-inc1", 0.0, 0.0, given)(images))
    torch.testing.assert_close(results[0].expand(-1, 3, -1, -1), results[1], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"color_jitter": -0.1}, r"`color_jitter` is -0\.1"),
        ({"random_erasing": 1.5}, r"`random_erasing` is 1\.5"),
        ({"rand_augment": "m9"}, "`rand_augment` is 'm9'"),
        (
            {"color_jitter": 0.4, "scaling": scaling([0.5] * 4, [0.5] * 4)},
            r"`color_jitter` is 0\.4, whose saturation is for RGB, but images have 4",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BatchAugmentation(
            **{"rand_augment": None, "color_jitter": 0, "random_erasing": 0, "scaling": SCALING, **kwargs}
        )


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 1, 8, 8), r"`images` has shape \(2, 1, 8, 8\); it must be \(batch, 3, height, width\)"),
        (torch.zeros(3, 8, 8), r"`images` has shape \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), r"`images` is of type torch\.int64"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        BatchAugmentation(None, 0, 0, SCALING)(images)


def mixing_batch(batch=6, channels=3, size=(20, 30)):
    """Images whose value is their number, and labels that all differ."""
    images = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, channels, *size)
    return images, torch.arange(batch).roll(1)


@pytest.mark.parametrize("batch", [2, 5, 6])
def test_mixup_is_the_linear_formula(batch):
    images, labels = torch.randn(batch, 3, 8, 8, generator=torch.manual_seed(0)), torch.arange(batch)
    torch.manual_seed(4)
    mixed, targets = Mixing(batch, 0.8, 0.0)(images, labels)
    share = targets[0, batch - 1]  # of the partner
    assert 0 < share < 1
    expected = (1 - share) * images + share * torch.stack([images[batch - 1 - row] for row in range(batch)])
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(targets, (1 - share) * torch.eye(batch) + share * torch.eye(batch).flip(0))


@pytest.mark.parametrize("batch", [5, 6])
def test_cutmix_targets_are_counted_pixels(batch):
    images, labels = mixing_batch(batch)
    mixing = Mixing(batch, 0.0, 1.0)
    torch.manual_seed(0)
    for _ in range(50):
        mixed, targets = mixing(images, labels)
        assert mixed.dtype == targets.dtype == torch.float32
        for row in range(batch):
            counted = torch.zeros(batch)
            for source in (row, batch - 1 - row):
                counted[labels[source]] = (mixed[row] == source).double().mean()
            torch.testing.assert_close(targets[row], counted)
            assert targets[row].sum().item() == pytest.approx(1)


def test_cutmix_box_is_a_clipped_rectangle_at_the_same_place_in_every_image():
    images, _ = mixing_batch(batch=4)
    height, width = images.shape[2:]
    torch.manual_seed(0)
    clipped = 0
    for share in np.linspace(0.05, 0.95, 100):
        mixed, taken = cutmix(images, share)
        boxes = mixed != images
        assert (boxes == boxes[:1, :1]).all()
        box = boxes[0, 0].numpy()
        rows, columns = box.any(1).sum(), box.any(0).sum()
        assert box.sum() == rows * columns == pytest.approx(taken * height * width)
        full = [2 * (int(side * math.sqrt(share)) // 2) for side in (height, width)]
        assert rows <= full[0] and columns <= full[1]
        clipped += (rows, columns) != tuple(full)
    assert 20 < clipped < 100
    assert torch.equal(images, mixing_batch(batch=4)[0])


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0])
def test_shares_of_mixup_are_beta_distributed(alpha):
    images, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    mixing = Mixing(2, alpha, 0.0)
    torch.manual_seed(0)
    shares = [mixing(images, labels)[1][0, 1].item() for _ in range(500)]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_boxes_of_cutmix_follow_their_beta_distribution():
    images, labels = torch.zeros(2, 1, 400, 400), torch.tensor([0, 1])
    images[1] = 1
    mixing = Mixing(2, 0.0, 1.0)
    torch.manual_seed(0)
    shares = [mixing(images, labels)[1][0, 1].item() for _ in range(500)]
    # A side of r keeps r - r**2 / 4 on average when clipped at a uniform centre; r**2 is uniform for alpha = 1.
    # E[(r - r**2 / 4)**2] = E[r**2] - E[r**3] / 2 + E[r**4] / 16 = 1/2 - 1/5 + 1/48
    assert np.mean(shares) == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.02)


@pytest.mark.parametrize(
    "alphas, probability, expected", [((0.8, 1.0), 0.3, 0.3), ((0.8, 0), 0.5, 0), ((0, 1), 0.5, 1)]
)
def test_share_of_batches_that_are_cut(alphas, probability, expected):
    images, labels = mixing_batch(batch=2, channels=1, size=(8, 8))
    images = images * 1.0
    mixing = Mixing(2, *alphas, probability)
    torch.manual_seed(0)
    cut = [bool(((mixed == 0) | (mixed == 1)).all()) for mixed, _ in (mixing(images, labels) for _ in range(600))]
    assert np.mean(cut) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_seed_repeats_mixing(alphas):
    images, labels = mixing_batch()
    mixing = Mixing(6, *alphas)
    torch.manual_seed(6)
    first, other = mixing(images, labels), mixing(images, labels)
    torch.manual_seed(6)
    for again, result in zip(mixing(images, labels), first):
        assert torch.equal(again, result)
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_batch_of_one_cannot_be_mixed(alphas):
    with pytest.raises(ValueError, match="mixup and cutmix need at least 2 images"):
        Mixing(3, *alphas)(torch.zeros(1, 3, 8, 8), torch.tensor([0]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.0, 0.0), r"`mixup_alpha` is 0\.0 and `cutmix_alpha` is 0\.0"),
        ((-1.0, 1.0), r"`mixup_alpha` is -1\.0"),
        ((0.8, -2.0), r"`cutmix_alpha` is -2\.0"),
        ((0.8, 1.0, 1.1), r"`switch_probability` is 1\.1"),
    ],
)
def test_bad_mixing_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixing(3, *arguments)
