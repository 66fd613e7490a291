"""Files of every format give the values that were written into them; of a part, only what it needs is decoded."""

import json
import sys
import zipfile
from io import BytesIO

import datasets
import numpy as np
import pillow_heif
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from modeling_greenmim.array_image import ArrayImage
from modeling_greenmim.pixels import to_8_bit
from tests.test_images import png
from tests.training_helpers import encoded, noise_image, smooth_image
from training_greenmim.data import formats, parts
from training_greenmim.data.folders import find_images, image_suffixes
from training_greenmim.data.formats import dicom, tiff
from training_greenmim.data.formats.values import Stacked, Upright
from training_greenmim.data.images import UnreadableImageError, load_image, open_image
from training_greenmim.data.tiles import count_pages, image_size, parts_of
from training_greenmim.data.transforms import Geometry, apply_geometry


SHAPE = (70, 90)
# Values of the tag Orientation -> what Pillow does to turn an image upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def numbers(channels: int | None = None, dtype=np.uint16, shape=SHAPE, seed: int = 0) -> np.ndarray:
    """Values over the whole range of a type, `(height, width)` or `(height, width, channels)`."""
    generator = np.random.default_rng(seed)
    size = shape if channels is None else (*shape, channels)
    if np.dtype(dtype).kind == "f":
        return (generator.standard_normal(size) * 1000).astype(dtype)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, size, dtype, endpoint=True)


def values_of(source) -> np.ndarray:
    """All values of an image that is opened as an array."""
    image = open_image(source)
    assert isinstance(image, ArrayImage)
    values = image.values[:, :]
    assert values.dtype == image.dtype and values.shape == image.values.shape and image.size == values.shape[1::-1]
    return values


def check(source, expected: np.ndarray) -> None:
    """All values, and those of parts, are the expected ones, of the same type."""
    found = values_of(source)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    values = open_image(source).values
    for top, bottom, left, right in ((0, 20, 0, 90), (20, 41, 13, 77), (41, 70, 89, 90), (69, 70, 0, 1)):
        assert np.array_equal(values[top:bottom, left:right], expected[top:bottom, left:right])


def cause(source, read=lambda image: np.asarray(image)) -> str:
    """What a user is told of an image that cannot be read: one line, the same each time."""
    with pytest.raises(UnreadableImageError) as error:
        load_image(source, lambda source, _: read(open_image(source)), None)
    text = str(error.value)
    assert "\n" not in text and " at 0x" not in text and len(text) < 500
    return text


def saved(write, *arguments, **options) -> bytes:
    file = BytesIO()
    write(file, *arguments, **options)
    return file.getvalue()


def archive_of(name: str, content: bytes) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


# TIFF


TYPES = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.float16, np.float32, np.float64]


@pytest.mark.parametrize(
    ("dtype", "channels"),
    # One channel of 8 bits is Pillow's.
    [(dtype, channels) for dtype in TYPES for channels in (None, 2, 4, 13) if dtype != np.uint8 or channels],
)
def test_tiff_of_any_type_and_number_of_channels(dtype, channels, tmp_path):
    values = numbers(channels, dtype)
    layouts = ({}, {"rowsperstrip": 9}, {"tile": (32, 48)}, {"tile": (16, 16), "compression": "zlib"})
    for layout in layouts:
        options = {"photometric": "minisblack", "planarconfig": None if channels is None else "contig", **layout}
        tifffile.imwrite(tmp_path / "image.tif", values, **options)
        check(str(tmp_path / "image.tif"), values)
        check((tmp_path / "image.tif").read_bytes(), values)


@pytest.mark.parametrize(
    "options",
    [
        {"byteorder": ">"},
        {"byteorder": ">", "compression": "lzw", "predictor": True, "rowsperstrip": 8},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "tile": (32, 32), "compression": "zlib"},
        {"bigtiff": True, "tile": (64, 64)},
        {"photometric": "rgb", "compression": "zlib"},
        {"compression": "zstd", "predictor": True},
    ],
    ids=str,
)
def test_tiff_of_every_layout(options, tmp_path):
    values = numbers(3)
    options = {"photometric": "minisblack", "planarconfig": "contig", **options}
    written = values.transpose(2, 0, 1) if options["planarconfig"] == "separate" else values
    tifffile.imwrite(tmp_path / "image.tif", written, **options)
    check(str(tmp_path / "image.tif"), values)
    check({"path": None, "bytes": (tmp_path / "image.tif").read_bytes()}, values)


def test_12_bits_packed_keep_their_values():
    values = numbers() >> 4
    content = saved(tifffile.imwrite, values, bitspersample=12)
    assert len(content) < values.nbytes, "packed"
    check(content, values)


def test_white_is_zero_is_inverted():
    values = numbers()
    check(saved(tifffile.imwrite, values, photometric="miniswhite"), 65535 - values)
    values = numbers(dtype=np.uint8)
    check(saved(tifffile.imwrite, values, photometric="miniswhite", tile=(16, 16)), 255 - values)
    content = saved(tifffile.imwrite, values, photometric="miniswhite")
    assert np.array_equal(np.asarray(open_image(content)), 255 - values), "as Pillow does it without tiles"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_arrays_are_upright(orientation):
    values = numbers(dtype=np.uint8)
    image = Image.fromarray(values)
    upright = np.asarray(image.transpose(TRANSPOSITIONS[orientation]) if orientation > 1 else image).astype(np.uint16)
    tag = (274, "H", 1, orientation, True)
    for layout in ({}, {"tile": (16, 32)}):
        check(saved(tifffile.imwrite, values.astype(np.uint16), extratags=[tag], **layout), upright)
    colours = np.stack([values] * 3, axis=-1)
    assert np.array_equal(Upright(colours, orientation)[5:40, 7:30], np.stack([upright] * 3, axis=-1)[5:40, 7:30])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_images_of_8_bits_are_those_of_pillow(mode, tmp_path):
    image = noise_image(0).convert(mode)
    for suffix in ("tif", "png", "jpg"):
        try:
            image.save(tmp_path / f"image.{suffix}")
        except OSError:  # no such mode in this format
            continue
        for source in (str(tmp_path / f"image.{suffix}"), (tmp_path / f"image.{suffix}").read_bytes()):
            found, expected = open_image(source), Image.open(tmp_path / f"image.{suffix}")
            assert type(found) is type(expected) and found.mode == expected.mode
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "jpeg"])
def test_8_bit_pages_without_tiles_are_those_of_pillow(compression):
    pages = [np.asarray(noise_image(seed)) for seed in range(3)]
    file = BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in pages:
            writer.write(page, photometric="rgb", compression=compression)
    for number in range(3):
        found, expected = open_part_of(file.getvalue(), number), Image.open(BytesIO(file.getvalue()))
        expected.seek(number)
        assert not isinstance(found, ArrayImage) and found.tobytes() == expected.tobytes()


def open_part_of(content: bytes, page: int) -> Image.Image:
    return formats.open_file(content, page)


def test_channels_that_pillow_drops_are_kept():
    values = numbers(4, np.uint8)
    check(saved(tifffile.imwrite, values, photometric="rgb", extrasamples=["unspecified"]), values)
    assert np.asarray(Image.open(BytesIO(saved(tifffile.imwrite, values, extrasamples=["unspecified"])))).shape[2] == 3


def test_declared_transparency_is_marked():
    values = numbers(4)
    image = open_image(saved(tifffile.imwrite, values, photometric="rgb", extrasamples=["unassalpha"]))
    assert image.info["alpha"] and np.array_equal(image.values[:, :], values)
    bands = open_image(saved(tifffile.imwrite, values, photometric="minisblack", planarconfig="contig"))
    assert "alpha" not in bands.info


class Counting(BytesIO):
    """A file that counts the bytes that are read of it."""

    total = 0

    def read(self, *arguments):
        content = super().read(*arguments)
        self.total += len(content)
        return content

    def readinto(self, buffer):
        number = super().readinto(buffer)
        self.total += number
        return number


def test_a_part_of_a_tiled_tiff_decodes_only_its_tiles():
    values = numbers(3, shape=(512, 512))
    options = {"tile": (64, 64), "compression": "zlib", "photometric": "rgb"}
    file = Counting(saved(tifffile.imwrite, values, **options))
    image, decoded = tiff.open(file), []
    image.values._decoded = lambda index, decode=image.values._decoded: decoded.append(index) or decode(index)
    header = file.total
    assert header < 10_000 and np.array_equal(image.read(100, 200, 130, 190), values[100:200, 130:190])
    assert decoded == [1 * 8 + 2, 2 * 8 + 2, 3 * 8 + 2]
    assert file.total - header < 1.1 * 3 * 64 * 64 * 3 * 2


def test_stripes_decode_no_tile_twice():
    values = numbers(shape=(256, 256))
    image, decoded = open_image(saved(tifffile.imwrite, values, tile=(64, 64), compression="zlib")), []
    image.values._decoded = lambda index, decode=image.values._decoded: decoded.append(index) or decode(index)
    stripes = [image.read(top, top + 50, 0, 256) for top in range(0, 250, 50)]
    assert np.array_equal(np.concatenate(stripes)[..., 0], values[:250])
    assert decoded == list(range(16))


def test_tiles_that_were_never_written_have_the_value_of_no_data(tmp_path):
    nodata = (42113, "s", 0, "-99", True)
    # A tile without content has no bytes in the file.
    tiles = (tile for tile in (np.full((16, 16), 7, np.int16), None, None, np.full((16, 16), 8, np.int16)))
    options = {"shape": (32, 32), "dtype": np.int16, "tile": (16, 16), "compression": "zlib", "extratags": [nodata]}
    tifffile.imwrite(tmp_path / "sparse.tif", tiles, **options)
    expected = np.full((32, 32), -99, np.int16)
    expected[:16, :16], expected[16:, 16:] = 7, 8
    assert np.array_equal(values_of(str(tmp_path / "sparse.tif")), expected)


def test_compressed_tiles_of_jpeg_are_colours():
    image = np.asarray(smooth_image(96, 96))
    content = saved(tifffile.imwrite, image, tile=(48, 48), compression="jpeg", photometric="ycbcr")
    expected = np.asarray(Image.open(BytesIO(content)).convert("RGB")).astype(int)
    assert np.abs(values_of(content) - expected).max() <= 4, "another decoder of JPEG"


def test_uncompressed_strips_are_mapped_into_memory(tmp_path):
    tifffile.imwrite(tmp_path / "image.tif", numbers(5), photometric="minisblack", planarconfig="contig")
    assert isinstance(open_image(str(tmp_path / "image.tif")).values._values, np.memmap)


# Arrays of NumPy


@pytest.mark.parametrize("channels", [None, 1, 13])
@pytest.mark.parametrize("dtype", [">u2", "<i4", "float32", "bool"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(channels, dtype, order, tmp_path):
    values = np.asarray(numbers(channels) % 2 if dtype == "bool" else numbers(channels), dtype, order=order)
    np.save(tmp_path / "image.npy", values)
    np.savez_compressed(tmp_path / "one.npz", bands=values)
    np.savez(tmp_path / "named.npz", mask=values[:3], image=values)
    for name in ("image.npy", "one.npz", "named.npz"):
        for source in (str(tmp_path / name), (tmp_path / name).read_bytes()):
            check(source, values.astype(values.dtype.newbyteorder("=")))
    assert isinstance(open_image(tmp_path / "image.npy").values._values, np.memmap)


class Dangerous:
    def __reduce__(self):
        return (sys.exit, ("unpickled",))


@pytest.mark.parametrize(
    "content, text",
    [
        (saved(np.save, np.array([[Dangerous()]]), allow_pickle=True), "Python's objects, which are not unpickled"),
        (saved(np.savez, np.array([[Dangerous()]])), "Python's objects, which are not unpickled"),
        (saved(np.save, np.ones((4, 4), complex)), "complex128; real numbers are needed"),
        (saved(np.save, np.array([["a", "b"]])), "real numbers are needed"),
        (saved(np.save, np.ones((2, 3, 4, 5))), r"(height, width) or (height, width, channels) is needed"),
        (saved(np.save, np.ones((0, 3))), "of the shape (0, 3)"),
        (saved(np.save, np.ones((9, 9)))[:-8], "truncated: 640 of 648 bytes"),
        (saved(np.savez, a=np.ones((4, 4)), b=np.ones((4, 4))), "the arrays ['a', 'b']; one is needed"),
        (archive_of("readme.txt", b""), "it holds no array"),
    ],
)
def test_arrays_that_are_no_images(content, text):
    assert text in cause(content)


def test_what_is_decoded_as_a_whole_is_limited(monkeypatch):
    huge = saved(np.savez_compressed, np.zeros((3000, 3000), np.uint8))
    many = saved(np.savez_compressed, np.zeros((100, 100, 1000), np.uint8))
    strip = saved(tifffile.imwrite, np.zeros((3000, 3000), np.uint16), compression="zlib", rowsperstrip=3000)
    scan = dicom_file(np.zeros((3000, 3000), np.uint16))
    assert open_image(huge).size == (3000, 3000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    for content in (huge, many, strip, scan):
        assert "exceeds the limit of 2000000 pixels" in cause(content, lambda image: None)
    tiles = saved(tifffile.imwrite, np.ones((3000, 3000), np.uint8), compression="zlib", tile=(256, 256))
    assert open_image(tiles).read(2990, 3000, 2990, 3000).all(), "only a part of it is decoded"


def test_a_header_that_tells_of_more_than_there_is_allocates_nothing():
    header = saved(
        np.lib.format.write_array_header_1_0, {"descr": "<u2", "fortran_order": False, "shape": (10**7,) * 2}
    )
    for content in (header, archive_of("image.npy", header + bytes(100))):
        assert "truncated" in cause(content, lambda image: None)


# DICOM


def dicom_file(values: np.ndarray, syntax=ExplicitVRLittleEndian, content: bytes | None = None, **elements) -> bytes:
    """A DICOM file of values `(height, width)`, `(frames, height, width)` or of RGB."""
    dataset, is_colour = Dataset(), values.shape[-1] == 3
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset.Rows, dataset.Columns = values.shape[-3:-1] if is_colour else values.shape[-2:]
    dataset.SamplesPerPixel = 3 if is_colour else 1
    dataset.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        dataset.PlanarConfiguration = 0
    elif values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.BitsAllocated = dataset.BitsStored = 8 * values.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(values.dtype.kind == "i")
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.PixelData = values.tobytes() if content is None else encapsulate([content])
    if content is not None:
        dataset["PixelData"].is_undefined_length = True
    return saved(lambda file: dataset.save_as(file, enforce_file_format=True))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
def test_dicom_keeps_the_stored_type(dtype, tmp_path):
    values = numbers(dtype=dtype)
    (tmp_path / "scan.dcm").write_bytes(dicom_file(values))
    check(str(tmp_path / "scan.dcm"), values)
    check(dicom_file(values, RescaleSlope=1, RescaleIntercept=0, WindowCenter=40, WindowWidth=400), values)
    inverted = (np.iinfo(dtype).max + np.iinfo(dtype).min - values.astype(int)).astype(dtype)
    check(dicom_file(values, PhotometricInterpretation="MONOCHROME1"), inverted)


def test_dicom_is_rescaled():
    values = numbers(dtype=np.int16)
    expected = (values.astype(np.float64) * 0.5 - 1024).astype(np.float32)
    check(dicom_file(values, RescaleSlope="0.5", RescaleIntercept="-1024"), expected)
    values = values.view(np.uint16) >> 4
    elements = {"RescaleSlope": 2, "RescaleIntercept": -7, "BitsStored": 12, "HighBit": 11}
    expected = 2 * (4095 - values.astype(np.float32)) - 7
    check(dicom_file(values, **elements, PhotometricInterpretation="MONOCHROME1"), expected)


def test_frames_of_enhanced_dicom_have_scales_of_their_own():
    frames = np.stack([numbers(dtype=np.uint16, seed=seed) for seed in range(2)])
    groups = []
    for slope in (1, 3):
        group, scale = Dataset(), Dataset()
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = slope, 0, "US"
        group.PixelValueTransformationSequence = [scale]
        groups.append(group)
    content = dicom_file(frames, PerFrameFunctionalGroupsSequence=groups)
    for number, expected in enumerate((frames[0], 3 * frames[1].astype(np.float32))):
        assert np.array_equal(open_part_of(content, number).values[:, :], expected)


def test_dicom_of_other_kinds():
    colours = numbers(3, np.uint8)
    check(dicom_file(colours), colours)
    values = numbers()
    compressed = pydicom.dcmread(BytesIO(dicom_file(values)))
    compressed.compress(RLELossless)
    check(saved(lambda file: compressed.save_as(file)), values)
    scan = Image.fromarray(numbers(dtype=np.uint8))
    jpeg2000 = encoded(scan, "JPEG2000", irreversible=False, no_jp2=True)
    check(dicom_file(np.asarray(scan), JPEG2000Lossless, jpeg2000), np.asarray(scan))


def test_a_palette_of_dicom_is_looked_up():
    indices, table = numbers(dtype=np.uint8), numbers(3, shape=(1, 256))[0]
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    elements = {f"{name}Descriptor": [256, 0, 16] for name in names}
    elements |= {f"{name}Data": table[:, channel].tobytes() for channel, name in enumerate(names)}
    check(dicom_file(indices, PhotometricInterpretation="PALETTE COLOR", **elements), table[indices])


def test_dicom_of_one_bit_is_black_and_white():
    bits = numbers(dtype=np.uint8, shape=(64, 64)) % 2
    elements = {"Rows": 64, "Columns": 64, "BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
    packed = np.packbits(bits, bitorder="little")[None]
    for interpretation, expected in (("MONOCHROME2", bits == 1), ("MONOCHROME1", bits == 0)):
        content = dicom_file(packed, **elements, PhotometricInterpretation=interpretation)
        assert np.array_equal(values_of(content), expected) and values_of(content).dtype == bool
        assert np.array_equal(np.asarray(to_8_bit(open_image(content)))[..., 0], 255 * expected)


@pytest.mark.parametrize(
    "elements, text",
    [
        ({"BitsAllocated": 12}, "its BitsAllocated is 12; it must be one of 1, 8, 16, 32, 64"),
        ({"PixelRepresentation": 7}, "its PixelRepresentation is 7; it must be one of None, 0, 1"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "its palette is missing"),
    ],
)
def test_headers_of_dicom_that_say_something_impossible_are_named(elements, text):
    assert text in cause(dicom_file(numbers(dtype=np.uint8), **elements))


def test_why_values_do_not_become_8_bits_does_not_depend_on_the_crop():
    geometries = [Geometry((0, 0, side, side), (16, 16)) for side in (20, 40)]
    image = ArrayImage(numbers(5))
    texts = {cause(image, lambda image, g=g: apply_geometry(image, g, 3)) for g in geometries}
    assert texts == {"an image without a name (5 channel(s) of uint16 are neither grey nor RGB of 8 bits)"}


def test_dicom_that_cannot_be_read():
    whole = dicom_file(numbers())
    assert "truncated" in cause(whole[:-10])
    assert "truncated, or no image (Secondary Capture Image Storage): it lacks Rows" in cause(whole[:420])
    missing = cause(dicom_file(numbers(), JPEGLossless, b"\xff\xd8\xff\xd9"))
    assert "JPEG Lossless" in missing and "pylibjpeg-libjpeg" in missing
    with pytest.raises(ValueError, match="the mark DICM is missing"):
        dicom.open(BytesIO(bytes(1000)))


# Broken TIFF


def test_tiff_that_cannot_be_read(tmp_path):
    values = numbers(shape=(300, 300))
    for options in ({}, {"tile": (64, 64)}, {"compression": "zlib", "rowsperstrip": 20}):
        content = saved(tifffile.imwrite, values, **options)
        (tmp_path / "cut.tif").write_bytes(content[:-1000])
        for source in (str(tmp_path / "cut.tif"), content[:-1000]):
            assert "truncated: its pixels end at byte" in cause(source)
        cause(content[:100])
    damaged = bytearray(saved(tifffile.imwrite, values, compression="zlib"))
    damaged[-5000:-4000] = bytes(1000)
    cause(bytes(damaged))
    assert "complex64; real numbers are needed" in cause(saved(tifffile.imwrite, values.astype(np.complex64)))
    assert "No such file" in cause(str(tmp_path / "none.tif"))
    (tmp_path / "text.tif").write_text("nothing")
    assert "no image of a known format" in cause(str(tmp_path / "text.tif"))
    smooth_image(48, 64).save(tmp_path / "really.tif", "JPEG")
    assert open_image(tmp_path / "really.tif").format == "JPEG"


# PNG, HEIC


@pytest.mark.parametrize("color_type, channels, kept", [(2, 3, 3), (6, 4, 3), (4, 2, 1)])
def test_png_of_16_bits_keeps_both_bytes_of_its_colours(color_type, channels, kept, tmp_path):
    values = numbers(channels)
    content = png(color_type, values.tolist())
    (tmp_path / "image.png").write_bytes(content)
    expected = values[..., 0] if kept == 1 else values[..., :kept]
    check(content, expected)
    check(str(tmp_path / "image.png"), expected)
    assert open_image(png(0, values[..., :1].tolist())).mode == "I;16", "what Pillow holds in full stays its own"
    assert "truncated" in cause(content[:-500])


def test_heic(tmp_path):
    image = smooth_image(48, 64)
    pillow_heif.from_pillow(image).save(tmp_path / "photo.heic", quality=90)
    expected = np.asarray(pillow_heif.open_heif(tmp_path / "photo.heic"))
    for source in (str(tmp_path / "photo.heic"), (tmp_path / "photo.heic").read_bytes()):
        assert np.array_equal(np.asarray(open_image(source)), expected)
    assert np.abs(expected.astype(int) - np.asarray(image)).mean() < 5


# Pages, boxes and tiles


def stack_of(folder, name: str, pages: list[np.ndarray], **options) -> str:
    with tifffile.TiffWriter(folder / name) as writer:
        for page in pages:
            writer.write(page, **{"photometric": "minisblack", **options})
    return str(folder / name)


def test_pages_of_tiff(tmp_path):
    pages = [numbers(seed=seed) for seed in range(3)]
    name = stack_of(tmp_path, "scan.tif", pages)
    assert count_pages(name) == 3
    check(name, pages[0])
    for number, page in enumerate(pages):
        check(f"{name}#page={number}", page)
    check(f"{name}#pages", np.stack(pages, axis=-1))
    assert np.array_equal(values_of(f"{name}#page=1&box=5,10,60,70"), pages[1][10:70, 5:60])
    assert np.array_equal(values_of(f"{name}#pages&box=5,10,60,70"), np.stack(pages, axis=-1)[10:70, 5:60])
    assert "there is no page 3: the last one is 2" in cause(f"{name}#page=3")
    assert parts_of(name) == [name]
    assert parts_of(name, "all") == [name, f"{name}#page=1", f"{name}#page=2"]
    assert parts_of(name, "as_channels") == [f"{name}#pages"]


def test_smaller_copies_and_masks_are_no_pages(tmp_path):
    values = numbers(shape=(128, 128))
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:
        writer.write(values, tile=(64, 64))
        writer.write(values[::2, ::2], tile=(64, 64), subfiletype=1)
        writer.write(values[:, ::-1], tile=(64, 64))
        writer.write(values > 0, subfiletype=4)
    name = str(tmp_path / "pyramid.tif")
    assert count_pages(name) == 2 and parts_of(name, "all") == [name, f"{name}#page=2"]
    check(f"{name}#pages", np.stack([values, values[:, ::-1]], axis=-1))


def test_pages_of_colours_join_their_channels(tmp_path):
    pages = [np.asarray(noise_image(seed)) for seed in range(2)]
    name = stack_of(tmp_path, "scan.tif", pages, photometric="rgb")
    assert np.array_equal(values_of(f"{name}#pages"), np.concatenate(pages, axis=2))
    assert open_image(name).mode == "RGB"


@pytest.mark.parametrize(
    "other, text", [((70, 80), "70x90 of uint16, page 2 70x80 of uint16"), (None, "70x90 of float32")]
)
def test_pages_that_differ_cannot_be_channels(other, text, tmp_path):
    last = numbers(shape=other) if other else numbers(dtype=np.float32)
    name = stack_of(tmp_path, "scan.tif", [numbers(), numbers(), last])
    assert text in cause(f"{name}#pages")
    assert len(parts_of(name, "all")) == 3
    with pytest.raises(ValueError, match="page 1"):
        Stacked([numbers(), numbers(2)])


def test_frames_of_dicom_are_pages(tmp_path):
    frames = np.stack([numbers(seed=seed) for seed in range(3)])
    name = str(tmp_path / "scan.dcm")
    (tmp_path / "scan.dcm").write_bytes(dicom_file(frames))
    assert count_pages(name) == 3 and image_size(name) == SHAPE[::-1]
    check(f"{name}#page=2", frames[2])
    check(f"{name}#pages", np.moveaxis(frames, 0, -1))
    assert "there is no page 3" in cause(f"{name}#page=3")


def test_boxes_of_images_of_pillow(tmp_path):
    image = noise_image(0)
    name = str(tmp_path / "photo.png")
    image.save(name)
    assert np.array_equal(np.asarray(open_image(f"{name}#box=3,4,20,31")), np.asarray(image)[4:31, 3:20])
    assert open_image({"path": f"{name}#box=3,4,20,31", "bytes": None}).size == (17, 27)
    width, height = image.size
    assert "is not within its" in cause(f"{name}#box=0,0,{width + 1},{height}")
    assert "left, top, right and lower edge are needed" in cause(f"{name}#box=1,2,3")
    assert "images of this format are of one" in cause(f"{name}#page=1")


@pytest.mark.parametrize("limit, opened", [(parts.KEPT_PIXELS, 1), (SHAPE[0] * SHAPE[1] - 1, 6)])
def test_tiles_of_a_file_decode_it_once_unless_it_is_large(limit, opened, tmp_path, monkeypatch):
    calls, open_file = [], parts.open_file
    monkeypatch.setattr(parts, "open_file", lambda *arguments: calls.append(arguments) or open_file(*arguments))
    monkeypatch.setattr(parts, "KEPT_PIXELS", limit)
    for name, pixels in (("a.png", numbers(3, np.uint8)), ("a.png", numbers(3, np.uint8, seed=1))):
        Image.fromarray(pixels).save(tmp_path / name)
        names = parts_of(str(tmp_path / name), tile=35)
        boxes = [tuple(map(int, tile.rpartition("=")[2].split(","))) for tile in names]
        for tile, (left, top, right, bottom) in zip(names, boxes, strict=True):
            assert np.array_equal(np.asarray(open_image(tile)), pixels[top:bottom, left:right])
        assert len(calls) == opened
        calls.clear()


def test_a_truncated_file_is_unreadable_in_each_of_its_tiles(tmp_path):
    content = encoded(noise_image(0, *SHAPE))
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    causes = {cause(f"{tmp_path / 'a.png'}#box={edge},0,90,70") for edge in (0, 10)}
    assert len(causes) == 2 and all("truncated" in text for text in causes)


def test_boxes_are_of_the_upright_image(tmp_path):
    image, exif = smooth_image(48, 64), Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "photo.jpg", exif=exif)
    name = str(tmp_path / "photo.jpg")
    upright = Image.open(name).transpose(Image.Transpose.ROTATE_270)
    assert image_size(name) == (48, 64) and image_size(f"{name}#box=0,0,10,20") == (10, 20)
    assert np.array_equal(np.asarray(open_image(f"{name}#box=5,30,48,64")), np.asarray(upright)[30:64, 5:48])
    Image.fromarray(np.asarray(image)).save(tmp_path / "photo.tif", tiffinfo={274: 6})
    assert image_size(str(tmp_path / "photo.tif")) == (48, 64)


def test_files_with_such_names_go_on_working(tmp_path):
    for name in ("a#1.png", "b#box=0,0,1,1", "c#page=0"):
        noise_image(0).save(tmp_path / name, "PNG")
        assert open_image(str(tmp_path / name)).size == noise_image(0).size
    name = str(tmp_path / "b#box=0,0,1,1")
    assert open_image(f"{name}#box=0,0,2,3").size == (2, 3)
    assert parts_of(name, tile=10**6) == [name]


def test_parts_of_archives(tmp_path):
    values = numbers(shape=(40, 50))
    (tmp_path / "scans.zip").write_bytes(archive_of("scan.tif", saved(tifffile.imwrite, values)))
    address = f"zip://scan.tif::{tmp_path / 'scans.zip'}"
    assert np.array_equal(values_of(address), values)
    assert np.array_equal(values_of(f"{address}#box=1,2,30,40"), values[2:40, 1:30])


@pytest.mark.parametrize(
    "size, tile, boxes",
    [
        ((40, 60), 64, [None]),
        ((64, 64), 64, [None]),
        ((130, 64), 64, [(0, 0, 64, 64), (64, 0, 128, 64), (66, 0, 130, 64)]),
        ((100, 40), 64, [(0, 0, 64, 40), (36, 0, 100, 40)]),
        ((70, 80), 64, [(0, 0, 64, 64), (6, 0, 70, 64), (0, 16, 64, 80), (6, 16, 70, 80)]),
    ],
)
def test_tiles_cover_an_image_and_have_one_size(size, tile, boxes, tmp_path):
    name = str(tmp_path / "scan.npy")
    np.save(name, numbers(shape=size[::-1]))
    names = parts_of(name, tile=tile)
    assert names == [name if box is None else f"{name}#box={','.join(map(str, box))}" for box in boxes]
    covered = np.zeros(size[::-1], bool)
    for left, top, right, bottom in (box or (0, 0, *size) for box in boxes):
        covered[top:bottom, left:right] = True
    assert covered.all() and all(open_image(part).width <= tile for part in names)


def test_tiles_of_pages(tmp_path):
    name = stack_of(tmp_path, "scan.tif", [numbers(), numbers(shape=(20, 20))])
    assert parts_of(name, "all", 64) == [
        *(f"{name}#box={box}" for box in ("0,0,64,64", "26,0,90,64", "0,6,64,70", "26,6,90,70")),
        f"{name}#page=1",
    ]
    assert parts_of(name, "first", 64) == parts_of(name, "all", 64)[:4]
    for arguments, text in ((("second",), "`pages` is 'second'"), (("first", 0), "`tile` is 0")):
        with pytest.raises(ValueError, match=text):
            parts_of(name, *arguments)


# What is not installed


def test_a_missing_reader_names_the_extra(without, tmp_path):
    bands, scan = (
        saved(tifffile.imwrite, numbers(5), photometric="minisblack", planarconfig="contig"),
        dicom_file(numbers()),
    )
    photo = saved(pillow_heif.from_pillow(smooth_image(48, 64)).save)
    without("tifffile", "pydicom", "pillow_heif")
    for content, extra in ((bands, "tiff"), (scan, "dicom"), (photo, "heic")):
        assert f"pip install 'greenmim-transformers[{extra}]'" in cause(content)


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
def test_without_a_reader_pillow_reads_the_tiff_that_it_holds_in_full(missing, without):
    grey, tiles, colours = numbers(), numbers(3, np.uint8), numbers(3)
    content = [saved(tifffile.imwrite, values, tile=(16, 16)) for values in (grey, tiles, colours)]
    without(missing)
    for file, values in zip(content[:2], (grey, tiles)):
        image = open_image(file)
        assert not isinstance(image, ArrayImage) and np.array_equal(np.asarray(image), values)
    if missing == "tifffile":
        assert "[tiff]" in cause(content[2])
    else:
        check(content[2], colours)


def test_folders_hold_what_is_read_and_say_what_would_be(tmp_path, without, caplog, monkeypatch):
    assert {".npy", ".npz", ".tif", ".dcm", ".heic"} <= image_suffixes()
    np.save(tmp_path / "a.npy", numbers())
    for name in ("b.dcm", "c.DCM", "d.heic", "e.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert len(find_images(str(tmp_path), "train_dir")) == 4
    without("pydicom", "pillow_heif")
    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)  # which it registered when another test used it
    with caplog.at_level("INFO", "training_greenmim"):
        assert find_images(str(tmp_path), "train_dir") == [str(tmp_path / "a.npy")]
    assert "2 files left out (pip install 'greenmim-transformers[dicom]' reads them): 2 .dcm" in caplog.text
    assert "1 file left out (pip install 'greenmim-transformers[heic]' reads them): 1 .heic" in caplog.text


# Data sets


def test_columns_hold_files_of_every_format(tmp_path):
    values = numbers(4)
    contents = [saved(np.save, values), saved(tifffile.imwrite, values, tile=(32, 32)), saved(np.savez, values)]
    datasets.Dataset.from_dict({"image": contents}).to_parquet(tmp_path / "images.parquet")
    records = datasets.load_dataset("parquet", data_files=str(tmp_path / "images.parquet"), cache_dir=str(tmp_path))
    for record in records["train"].cast_column("image", datasets.Image(decode=False)):
        assert np.array_equal(values_of(record["image"]), values)


def test_unknown_bytes_are_pillows():
    assert formats.format_of(b"") is None and formats.format_of(encoded(noise_image(0), "BMP")) is None
    assert formats.format_of("photo.jpg") is None and formats.format_of("without") is None
    assert "no image of a known format" in cause(json.dumps({}).encode())
