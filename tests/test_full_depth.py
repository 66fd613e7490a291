"""Images of any number of channels and any range of values: pixels, statistics, loss, and both scripts."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import onnxruntime
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from skimage.measure import block_reduce
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from transformers.image_utils import load_image as load_for_pipelines

import run_image_classification
import run_mim
from modeling_greenmim import (
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMImageProcessorPil,
    GreenMIMModel,
    array_image,
)
from modeling_greenmim.array_image import ArrayImage, FullDepth, at_full_depth, crop_and_resize
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.test_formats import dicom_file, saved
from tests.training_helpers import (
    OVERRIDES,
    classification_flags,
    classify,
    messages,
    noise_image,
    predictions_of,
    results_of,
    run,
    run_in_processes,
    smooth_image,
    tiny_config,
)
from training_greenmim.classification.augmentation import RGB_ONLY, BatchAugmentation
from training_greenmim.classification.models import as_evaluated
from training_greenmim.data.images import UnreadableImageError, load_image, open_image
from training_greenmim.data.readers import Part
from training_greenmim.data.scaling import scaling_of
from training_greenmim.data.statistics import StatisticsSetting, check_values, depth_of, set_statistics
from training_greenmim.data.transforms import EvalTransform, Geometry, TrainTransform, apply_geometry
from training_greenmim.pretraining.pictures import picture_grid, reconstruct
from training_greenmim.randomness import derived_generator
from training_greenmim.runs.arguments import MIMTrainingArguments, parse_arguments


def values_of(channels: int, height: int = 40, width: int = 48, seed: int = 0, dtype=np.uint16) -> np.ndarray:
    """Values of 12 bits; each channel has a range of its own."""
    draws = np.random.default_rng(seed).integers(0, 1000, (height, width, channels))
    return (draws * np.linspace(1, 4, channels)).astype(dtype)


def processor_of(channels: int, size=(32, 32), **changes) -> GreenMIMImageProcessorPil:
    numbers = np.linspace(0.3, 0.6, channels).tolist()
    return GreenMIMImageProcessorPil(
        size={"height": size[0], "width": size[1]},
        resample=3,
        image_mean=numbers,
        image_std=[number / 2 for number in numbers],
        image_range=[[10, 900 + 300 * channel] for channel in range(channels)],
        **changes,
    )


REQUIRED = ["--output_dir", "unused", "--report_to", "none"]


class Recording:
    """Values that tell which parts of them were read."""

    def __init__(self, values: np.ndarray):
        self.values, self.shape, self.dtype, self.read = values, values.shape, values.dtype, []

    def __getitem__(self, key):
        self.read.append(tuple((part.start, part.stop) for part in key))
        return self.values[key]


# Images


def test_pipelines_take_an_image_of_arrays_as_it_is():
    image = ArrayImage(values_of(5))
    assert image.size == (48, 40) and load_for_pipelines(image) is image
    assert (np.asarray(image) == values_of(5)).all()


@pytest.mark.parametrize(
    "values", [np.zeros((4, 4, 2, 2)), np.zeros((0, 4)), np.zeros((4, 4), complex), np.array([["a"]])]
)
def test_what_is_no_image_is_refused(values):
    with pytest.raises(ValueError, match="an image has"):
        ArrayImage(values)


@pytest.mark.parametrize("box", [(0, 0, 48, 40), (3.25, 5.5, 40.75, 31.0), (10, 10, 20, 20)])
def test_values_are_cropped_and_resized_as_pillow_does_it_channel_by_channel(box):
    values = values_of(4)
    found = crop_and_resize(ArrayImage(values), box, (16, 24))
    left, top, right, bottom = int(box[0]), int(box[1]), int(np.ceil(box[2])), int(np.ceil(box[3]))
    assert found.shape == (4, 16, 24) and found.dtype == np.float32
    for channel in range(4):
        part = Image.fromarray(values[top:bottom, left:right, channel].astype(np.float32))
        inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        expected = part.resize((24, 16), Image.Resampling.BICUBIC, box=inner, reducing_gap=2.0)
        assert np.allclose(found[channel], np.asarray(expected), rtol=1e-5, atol=1e-3)


def test_whole_images_of_the_right_size_keep_their_values():
    values = values_of(3, 32, 32)
    assert (crop_and_resize(ArrayImage(values), (0, 0, 32, 32), (32, 32)) == values.transpose(2, 0, 1)).all()


def test_a_large_crop_is_averaged_in_stripes_and_only_its_part_is_read(monkeypatch):
    values = Recording(values_of(2, 700, 640))
    monkeypatch.setattr(array_image, "READ_AT_ONCE", 40_000)
    found = crop_and_resize(ArrayImage(values), (16, 32, 16 + 512, 32 + 640), (32, 32))
    blocks = block_reduce(values.values[32:672, 16:528].astype(np.float64), (8, 8, 1), np.mean)
    for channel in range(2):
        means = Image.fromarray(blocks[..., channel].astype(np.float32))
        expected = np.asarray(means.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.allclose(found[channel], expected, rtol=1e-4)
    assert len(values.read) > 10 and all((stop - start) * 512 * 2 <= 40_000 for (start, stop), _ in values.read)
    assert values.read[0][0][0] == 32 and values.read[-1][0][1] == 672
    assert {columns for _, columns in values.read} == {(16, 528)}


@pytest.mark.parametrize("depth", [None, FullDepth(((0, 255),) * 3), FullDepth(((0, 4095),) * 3)])
def test_transparency_is_dropped_and_8_bits_are_made_of_the_parts_that_are_read(depth, monkeypatch):
    monkeypatch.setattr(array_image, "READ_AT_ONCE", 40_000)
    is_8_bit = depth is not None and depth.image_range[0][1] == 255
    values = Recording(values_of(4, 700, 640) // 16 if is_8_bit else values_of(4, 700, 640))
    values.values = values.values.astype(np.uint8 if is_8_bit else np.uint16)
    values.dtype = values.values.dtype
    image = ArrayImage(values)
    image.info["alpha"] = True
    geometry = Geometry((16, 32, 16 + 512, 32 + 640), (32, 32))
    found = apply_geometry(image, geometry, 3, depth).float()
    colours = values.values[..., :3] if depth else values.values[..., :3] >> 8
    expected = apply_geometry(ArrayImage(colours if depth else colours.astype(np.uint8)), geometry, 3, depth)
    assert torch.equal(found, expected.float()) and len(found.unique()) > 2
    assert len(values.read) > 10 and {columns for _, columns in values.read} == {(16, 528)}


@pytest.mark.parametrize(
    ("mode", "channels", "bands"),
    [("L", 1, 1), ("RGB", 1, 1), ("RGB", 3, 3), ("L", 3, 3), ("RGBA", 4, 4), ("P", 3, 3)],
)
def test_images_of_8_bits_get_the_channels_of_the_model(mode, channels, bands):
    image = at_full_depth(noise_image(0).convert(mode), channels)
    assert image.channels == bands and image.dtype == np.uint8


def test_16_bits_of_one_channel_serve_three_and_other_channels_are_refused():
    depth = FullDepth(((0, 4095),) * 3)
    found = depth.crop(ArrayImage(values_of(1)[..., 0]), (0, 0, 48, 40), (40, 48))
    assert (found == found[:1]).all() and found.shape == (3, 40, 48)
    with pytest.raises(ValueError, match=r"it has 4 channel\(s\), but the model takes 3"):
        depth.crop(ArrayImage(values_of(4)), (0, 0, 48, 40), (40, 48))


def test_no_data_is_nan_and_spreads_only_as_far_as_the_filter_reaches():
    values = values_of(2, 64, 64, dtype=np.float32)
    values[8, 8, 0], values[50, 50, 1] = -9999, np.inf
    found = FullDepth(((0, 4095),) * 2, -9999).crop(ArrayImage(values), (0, 0, 64, 64), (32, 32))
    for channel, place in ((0, 4), (1, 25)):
        rows, columns = np.nonzero(np.isnan(found[channel]))
        assert place in rows and place in columns and max(abs(rows - place).max(), abs(columns - place).max()) <= 2
    with pytest.raises(UnreadableImageError, match="no value of it, or of the crop, is data"):
        transform = EvalTransform((32, 32), 1, depth=FullDepth(((0, 1),)))
        load_image(ArrayImage(np.full((40, 40), np.nan)), transform, None)


# Training, the image processor and pipelines


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_training_processor_and_pipelines_see_the_same_values(channels, size, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(num_channels=channels, image_size=list(size), num_labels=2)
    processor = as_evaluated(processor_of(channels, size, nodata=7.0), config, share=0.9)
    processor.save_pretrained(tmp_path)
    processor = GreenMIMImageProcessorPil.from_pretrained(tmp_path)
    scaling = scaling_of(processor, channels)
    image = ArrayImage(values_of(channels, 75, 83))
    transform = EvalTransform(size, channels, 0.9, depth_of(processor))
    expected = scaling(scaling.unit(load_image(image, transform, None)))
    assert expected.shape == (channels, *size) and expected.isfinite().all() and expected.std() > 0.3
    classify = pipeline(
        "image-classification", model=GreenMIMForImageClassification(config), image_processor=processor
    )
    extract = pipeline("image-feature-extraction", model=GreenMIMModel(config), image_processor=processor)
    for source in (image, values_of(channels, 75, 83), torch.from_numpy(values_of(channels, 75, 83).astype(int))):
        assert (processor(source, return_tensors="pt").pixel_values[0] == expected).all()
    for pipe in (classify, extract):
        opened = pipe.image_processor.open_image(values_of(channels, 75, 83))
        assert (pipe.preprocess(opened)["pixel_values"][0] == expected).all()
    assert len(classify(processor.open_image(values_of(channels, 75, 83)))) == 2


def test_carriers_of_the_same_values_make_the_same_tensors(tmp_path):
    values = values_of(1, 75, 83)[..., 0]
    Image.fromarray(values).save(tmp_path / "values.png")
    np.save(tmp_path / "values.npy", values)
    tifffile.imwrite(tmp_path / "values.tif", values)
    tifffile.imwrite(tmp_path / "packed.tif", values, tile=(32, 32), compression="zlib")
    tifffile.imwrite(tmp_path / "float.tif", values.astype(np.float32))
    write_dicom(tmp_path / "values.dcm", values)
    depth = FullDepth(((10.0, 900.0),))
    transforms = [EvalTransform((32, 32), 1, depth=depth), TrainTransform((32, 32), 1, (0.2, 1.0), depth)]
    for transform in transforms:
        found = [transform(str(path), derived_generator(0, 1)) for path in sorted(tmp_path.iterdir())]
        assert len(found) == 6 and all((tensor == found[0]).all() for tensor in found) and found[0].std() > 0.1


def write_dicom(path: Path, values: np.ndarray, **elements) -> None:
    """A grey image of 12 bits, not compressed."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = values.astype("<u2").tobytes()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)


def test_the_order_of_channels_is_kept():
    values, processor = values_of(5), processor_of(5)
    processor.image_range, processor.image_mean, processor.image_std = [[0, 4095]] * 5, [0.4] * 5, [0.2] * 5
    straight, turned = (processor(part, return_tensors="pt").pixel_values for part in (values, values[..., ::-1]))
    assert (straight == turned.flip(1)).all() and not (straight == turned).all()


def test_files_that_pillow_does_not_know_are_to_be_arrays(tmp_path):
    write_dicom(tmp_path / "scan.dcm", values_of(1, 75, 83)[..., 0])
    with pytest.raises(
        ValueError, match=r"scan\.dcm' is no file that Pillow or NumPy reads: give its values as an ar"
    ):
        processor_of(1).open_image(str(tmp_path / "scan.dcm"))
    opened = open_image(str(tmp_path / "scan.dcm"))  # by the reader of training
    expected = processor_of(1)(values_of(1, 75, 83), return_tensors="pt").pixel_values
    assert (processor_of(1)(processor_of(1).open_image(opened), return_tensors="pt").pixel_values == expected).all()


def test_images_that_were_cut_to_8_bits_are_refused():
    with pytest.raises(ValueError, match=r"it has 8 bits, but `image_range` goes up to 900"):
        processor_of(1)(Image.new("L", (40, 40)), return_tensors="pt")


# Statistics


def measured(images: list, channels: int, text: str = "auto", nodata: float | None = None, processor=None):
    """The image processor after a look at images, and the depth."""
    records = datasets.Dataset.from_dict({"number": list(range(len(images)))})
    records = WithImages(records, images)
    processor = processor or build_image_processor(tiny_config(num_channels=channels))
    setting = StatisticsSetting.of(text, nodata)
    args = MIMTrainingArguments(output_dir="unused", report_to="none")
    return processor, set_statistics(processor, setting, Part(records, "train_dir"), "image", channels, args)


class WithImages:
    """Records whose images are in memory."""

    def __init__(self, records, images):
        self.records, self.images = records, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index]}


def test_statistics_are_those_of_all_values():
    images = [ArrayImage(values_of(3, seed=seed)) for seed in range(20)]
    processor, depth = measured(images, 3)
    values = np.concatenate([image.values.reshape(-1, 3) for image in images]).astype(float)
    low, high = np.percentile(values, (0.1, 99.9), axis=0)
    scaled = ((values - low) / (high - low)).clip(0, 1)
    assert np.allclose(processor.image_range, np.stack([low, high], axis=1), atol=6)
    assert np.allclose(processor.image_mean, scaled.mean(axis=0), atol=0.01)
    assert np.allclose(processor.image_std, scaled.std(axis=0), rtol=0.02)
    assert depth == depth_of(processor) and len(depth.image_range) == 3


def test_no_data_has_no_part_in_statistics():
    images = [ArrayImage(values_of(2, seed=seed, dtype=np.float32)) for seed in range(8)]
    expected, _ = measured(images, 2, "range=[0,4000]")
    for image in images:
        image.values = image.values.copy()
        image.values[::3, :, 0], image.values[:, ::3, 1] = -9999, np.nan
    found, depth = measured(images, 2, "range=[0,4000]", nodata=-9999)
    assert np.allclose(found.image_mean, expected.image_mean, atol=0.01) and depth.nodata == -9999
    assert np.allclose(found.image_std, expected.image_std, rtol=0.03)


def test_numbers_that_are_given_are_not_measured():
    processor, depth = measured([ArrayImage(values_of(2))], 2, "range=[[0,1000],[0,4000]],mean=[0.1,0.2],std=[0.5]")
    assert depth.image_range == ((0, 1000), (0, 4000))
    assert list(processor.image_mean) == [0.1, 0.2] and list(processor.image_std) == [0.5, 0.5]


def test_images_of_8_bits_keep_the_numbers_of_imagenet_unless_told():
    images = [noise_image(seed) for seed in range(4)]
    processor, depth = measured(images, 3)
    assert depth is None and processor.image_range is None
    processor, depth = measured(images, 3, "measure")
    assert 0 <= depth.image_range[0][0] < depth.image_range[0][1] <= 255
    assert measured([ArrayImage(values_of(1))], 1, "imagenet")[1] is None


def test_a_checkpoint_keeps_what_its_images_were_scaled_by():
    processor, depth = measured([ArrayImage(values_of(2))], 2, processor=processor_of(2))
    assert depth.image_range == ((10, 900), (10, 1200)) and processor.image_mean == processor_of(2).image_mean


@pytest.mark.parametrize(
    ("images", "channels", "text", "error"),
    [
        ([np.full((40, 40), 5, np.uint16)], 1, "auto", "channel 1 has the value 5 everywhere"),
        (
            [values_of(1), values_of(1, dtype=np.int32)],
            1,
            "auto",
            "different types, 1 of uint16 such as 'image 0', 1 of int32 such as 'image 1'",
        ),
        ([np.full((40, 40), np.nan)], 1, "auto", "channel 1 has no finite value in any image"),
        (
            [values_of(4)],
            3,
            "auto",
            r"no image that could be measured: image 0 \(it has 4 channel\(s\), but the model",
        ),
        ([values_of(4)], 4, "imagenet", "which is for 1 or 3 channels, not 4"),
        ([values_of(4)], 4, "mean=[0.1,0.2]", r"gives 2 values for mean, but the model takes 4 channel\(s\)"),
        ([values_of(1)], 1, "range=[8000,9000]", "channel 1 has no values within its range"),
    ],
)
def test_images_that_cannot_be_scaled_are_refused(images, channels, text, error):
    with pytest.raises(ValueError, match=error):
        measured([ArrayImage(values) for values in images], channels, text)


@pytest.mark.parametrize("text", ["", "nonsense", "range=[5,5]", "std=[0]", "scale=[1]", "range=[1,2,3]", "mean=[x]"])
def test_settings_that_say_nothing_are_refused(text):
    with pytest.raises(ValueError, match=r"`image_statistics` is .*; it must be auto, imagenet, measure, or some of"):
        StatisticsSetting.of(text, None)


def test_the_no_data_value_of_single_precision_is_found():
    lowest = float(np.finfo(np.float32).min)
    images = [ArrayImage(values_of(1, seed=seed, dtype=np.float32)) for seed in range(4)]
    expected, _ = measured(images, 1)
    for image in images:
        image.values = image.values.copy()
        image.values[::2] = lowest
    found, _ = measured(images, 1, nodata=lowest)
    assert np.allclose(found.image_range, expected.image_range, atol=10)
    parsed = parse_arguments((run_mim.DataArguments, MIMTrainingArguments), ["--nodata", str(lowest), *REQUIRED])
    assert parsed[0].nodata == lowest


def test_a_value_for_no_data_that_files_name_is_taken(tmp_path):
    values = values_of(1, dtype=np.float32)[..., 0]
    values[:10] = -9999
    tifffile.imwrite(tmp_path / "scene.tif", values, extratags=[(42113, "s", 0, "-9999", True)])
    processor, depth = measured([str(tmp_path / "scene.tif")], 1)
    assert depth.nodata == -9999 and processor.image_range[0][0] >= 0


def test_no_data_of_ones_own_joins_what_a_checkpoint_says():
    _, depth = measured([ArrayImage(values_of(2))], 2, nodata=-5, processor=processor_of(2))
    assert depth.nodata == -5
    with pytest.raises(ValueError, match=r"`nodata` is -5, but the model was trained with 7\.0 for it"):
        measured([ArrayImage(values_of(2))], 2, nodata=-5, processor=processor_of(2, nodata=7.0))


def test_values_of_another_scale_are_refused_and_a_cut_to_8_bits_is_told(caplog):
    images = [ArrayImage(values_of(2).astype(np.float32) / 4096)]
    with pytest.raises(ValueError, match=r"`train_dir` has values of another scale .*: 100% of them lie outside"):
        measured(images, 2, processor=processor_of(2))
    part = Part(WithImages(None, [ArrayImage(values_of(1))]), "validation_dir")
    args = MIMTrainingArguments(output_dir="unused", report_to="none")
    check_values(part, "image", 1, build_image_processor(tiny_config(num_channels=1)), args)
    assert "`validation_dir` has images of more than 8 bits, of which this model sees the upper byte" in messages(
        caplog
    )


class Unseen(WithImages):
    """Records that nobody is to look at."""

    def __getitem__(self, index):
        raise AssertionError("looked at")


@pytest.mark.parametrize("processor", [processor_of(1), build_image_processor(tiny_config(num_channels=1))])
def test_one_process_looks_for_all(processor):
    part, second = Part(Unseen(None, [None]), "train_dir"), SimpleNamespace(process_index=1, world_size=1)
    check_values(part, "image", 1, processor, second)
    set_statistics(processor, StatisticsSetting(), part, "image", 1, second)
    second.process_index = 0
    with pytest.raises(AssertionError, match="looked at"):
        check_values(part, "image", 1, processor, second)


def test_of_a_stream_few_images_tell_that_it_is_deep():
    fetched = []

    def images():
        for number in range(100):
            fetched.append(number)
            yield {"image": noise_image(number)}

    part = Part(datasets.IterableDataset.from_generator(images), "dataset_name")
    args = MIMTrainingArguments(output_dir="unused", report_to="none")
    assert set_statistics(build_image_processor(tiny_config()), StatisticsSetting(), part, "image", 3, args) is None
    assert len(fetched) <= 10


def test_dicom_of_which_only_some_is_rescaled_is_refused_unless_all_numbers_are_given(tmp_path):
    """The same values of 12 bits, as they are and with an intercept; float32 holds both exactly."""
    values = values_of(1)[..., 0]
    write_dicom(tmp_path / "plain.dcm", values)
    write_dicom(tmp_path / "rescaled.dcm", values + 1024, RescaleSlope=1, RescaleIntercept=-1024)
    images = [str(tmp_path / name) for name in ("plain.dcm", "rescaled.dcm")]
    with pytest.raises(ValueError, match=r"1 of uint16 such as .*plain\.dcm', 1 of float32 such as .*rescaled\.dcm'"):
        measured(images, 1)
    _, depth = measured(images, 1, "range=[0,4095],mean=[0.3],std=[0.2]")
    plain, rescaled = (EvalTransform((32, 32), 1, depth=depth)(image) for image in images)
    assert torch.equal(plain, rescaled) and len(plain.unique()) > 100


# Loss


def test_gaps_do_not_make_gradients_explode():
    scaling = scaling_of(processor_of(1), 1)
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    gaps = images.clone()
    gaps[:, :, :16] = torch.nan
    norms = []
    for values in (images, gaps):
        torch.manual_seed(0)
        model = GreenMIMForPreTraining(tiny_config(num_channels=1)).eval()
        noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(1))
        model(scaling(scaling.unit(values)), noise=noise, valid_pixels=~values.isnan()).loss.backward()
        gradients = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        norms.append(torch.stack(gradients).norm())
    assert norms[1] < 10 * norms[0]


def test_values_that_are_no_data_count_neither_in_targets_nor_in_the_loss():
    torch.manual_seed(0)
    config = tiny_config(num_channels=2)
    model = GreenMIMForPreTraining(config).eval()
    pixel_values, noise = torch.randn(2, 2, 32, 32), torch.rand(1, 16)
    valid = torch.rand(2, 2, 32, 32) > 0.3
    valid[0, :, :8, :8] = False  # a unit without any
    outputs = model(pixel_values, noise=noise, valid_pixels=valid)
    errors = []
    for image in range(2):
        for unit in outputs.mask[0].nonzero()[:, 0].tolist():
            row, column = 8 * (unit // 4), 8 * (unit % 4)
            part = (image, slice(None), slice(row, row + 8), slice(column, column + 8))
            # Values of a unit come in the order (row, column, channel).
            values, counts = (tensor[part].permute(1, 2, 0).flatten() for tensor in (pixel_values, valid))
            if counts.any():
                chosen = values[counts].double()
                target = (chosen - chosen.mean()) / (chosen.var() + 1e-6).sqrt()
                errors.append((outputs.logits[image, unit][counts].double() - target).square().mean())
    assert torch.allclose(outputs.loss.double(), torch.stack(errors).mean(), rtol=1e-5)


def test_all_values_valid_is_the_usual_loss():
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(tiny_config(num_channels=2)).eval()
    pixel_values, noise = torch.randn(2, 2, 32, 32), torch.rand(1, 16)
    everything = torch.ones_like(pixel_values, dtype=torch.bool)
    expected, found = (model(pixel_values, noise=noise, valid_pixels=valid).loss for valid in (None, everything))
    assert torch.allclose(expected, found, rtol=1e-5)


def test_no_data_is_for_pixels_only():
    model = GreenMIMForPreTraining(tiny_config(reconstruction_target="hog"))
    with pytest.raises(ValueError, match="`valid_pixels` is given, which is for targets that are the pixels"):
        model(torch.randn(1, 3, 32, 32), valid_pixels=torch.ones(1, 3, 32, 32, dtype=torch.bool))
    model = GreenMIMForPreTraining(tiny_config())
    with pytest.raises(ValueError, match="booleans of the shape"):
        model(torch.randn(1, 3, 32, 32), valid_pixels=torch.ones(1, 1, 32, 32, dtype=torch.bool))


# Augmentation and pictures


def test_augmentation_of_many_channels_knows_no_order_of_them():
    scaling = scaling_of(processor_of(5), 5)
    scaling = scaling._replace(mean=torch.full((5, 1, 1), 0.4), std=torch.full((5, 1, 1), 0.2))
    augmentation = BatchAugmentation("m9-n3-mstd0.5-p1.0-inc1", 0.0, 0.0, scaling)
    images, order = torch.rand(16, 5, 32, 32), torch.tensor([3, 1, 4, 0, 2])
    torch.manual_seed(1)
    straight = augmentation(images)
    torch.manual_seed(1)
    turned = augmentation(images[:, order])
    assert torch.allclose(straight[:, order], turned, atol=1e-4) and not torch.allclose(straight, scaling(images))
    assert "color" in RGB_ONLY
    with pytest.raises(ValueError, match="saturation is for RGB, but images have 5 channels"):
        BatchAugmentation(None, 0.4, 0.0, scaling)


@pytest.mark.parametrize(
    ("channels", "chosen", "drawn"),
    [(5, None, [0, 1, 2]), (2, None, [0]), (5, [4, 3, 2], [3, 2, 1]), (5, [5], [4]), (3, None, [0, 1, 2])],
)
def test_pictures_show_chosen_channels(channels, chosen, drawn):
    images = torch.arange(channels).float()[None, :, None, None].expand(1, channels, 4, 4) / 10
    picture = np.asarray(picture_grid([images], [0.0] * channels, [1.0] * channels, chosen))
    expected = [round(255 * number / 10) for number in drawn]
    assert (picture.reshape(16, -1) == expected).all()


@pytest.mark.parametrize("chosen", [[1, 2], [0], [6]])
def test_channels_that_there_are_not_cannot_be_drawn(chosen):
    with pytest.raises(ValueError, match=r"`picture_channels` is .*; one channel or three are needed, of 1 to 5"):
        picture_grid([torch.zeros(1, 5, 4, 4)], [0.0] * 5, [1.0] * 5, chosen)


# Both scripts


def write_arrays(folder: Path, channels: int, count: int = 8) -> Path:
    """Two classes; channels are functions of the photographs, and tell the classes apart."""
    for number in range(count):
        name = ("a", "b")[number % 2]
        values = np.asarray(noise_image(number)).astype(np.float32)
        bands = [values[..., channel % 3] * (channel + 1) + 500 * (number % 2) for channel in range(channels)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / name / f"{number}.npy", np.stack(bands, axis=-1).astype(np.uint16))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 13])
def test_many_channels_from_pre_training_to_a_classifier_in_pipelines_and_onnx(channels, tmp_path):
    folder = write_arrays(tmp_path / "images", channels)
    output, classifier = tmp_path / "pre", tmp_path / "classifier"
    both = ["--train_dir", folder, "--validation_dir", folder, "--do_train", "--do_eval"]
    more = ["--config_name", "tiny", "--max_steps", 4, "--probe_dir", folder, "--picture_channels", 4, 3, 2]
    run(output, *both, *more, overrides=f"{OVERRIDES},num_channels={channels}")
    processor = AutoImageProcessor.from_pretrained(output)
    assert len(processor.image_range) == channels and processor.image_range[0][1] < processor.image_range[3][1]
    assert f"| values | {channels} channel(s) in full depth: " in (output / "README.md").read_text()
    assert "`open_image(file_or_array)`" in (output / "README.md").read_text()
    picture = np.asarray(Image.open(next((output / "reconstructions").glob("*.png"))))
    assert picture.ndim == 3 and picture.std() > 10
    classify(classifier, *both, "--model_name_or_path", output, "--num_train_epochs", 2)
    tuned = AutoImageProcessor.from_pretrained(classifier)
    assert tuned.image_range == processor.image_range and tuned.crop_pct is not None
    path = folder / "a" / "0.npy"
    model = AutoModelForImageClassification.from_pretrained(classifier).eval()
    scaling = scaling_of(tuned, channels)
    transform = EvalTransform((32, 32), channels, tuned.crop_pct, depth_of(tuned))
    pixel_values = scaling(scaling.unit(load_image(str(path), transform, None)))[None]
    expected = model(pixel_values).logits.softmax(-1)[0]
    pipe = pipeline("image-classification", model=str(classifier), image_processor=tuned)
    found = {one["label"]: one["score"] for one in pipe(open_image(str(path)))}
    assert np.allclose([found["a"], found["b"]], expected.tolist(), atol=1e-6)
    program = torch.onnx.export(model, (pixel_values,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    given = tuned(np.load(path), return_tensors="np")["pixel_values"]
    assert (given == pixel_values.numpy()).all()
    logits = session.run(None, {session.get_inputs()[0].name: given})[0]
    assert np.allclose(logits, model(pixel_values).logits.detach(), atol=1e-5)


@pytest.mark.slow
def test_files_that_are_not_like_the_others_are_named_and_counted(tmp_path, caplog):
    """Whatever is wrong with them, a run goes on without them and tells of each."""
    folder = tmp_path / "images"
    folder.mkdir()
    values = [values_of(1, seed=seed)[..., 0] for seed in range(6)]
    for number, one in enumerate(values):
        np.save(folder / f"{number}.npy", one)
    tiff, scan = saved(tifffile.imwrite, values[0]), dicom_file(values[0])
    wrong = {
        "bands.npy": (saved(np.save, values_of(4)), "it has 4 channel(s), but the model takes 1"),
        "cut.tif": (tiff[:-500], "truncated: its pixels end at byte"),
        "cut.dcm": (scan[:-500], "truncated"),
        "lossless.dcm": (dicom_file(values[0], pydicom.uid.JPEGLossless, b"\xff\xd8\xff\xd9"), "JPEG Lossless"),
    }
    for name, (content, _) in wrong.items():
        (folder / name).write_bytes(content)
    more = ["--config_name", "tiny", "--num_train_epochs", 1]
    output = run(tmp_path / "run", "--train_dir", folder, "--do_train", *more, overrides=f"{OVERRIDES},num_channels=1")
    log = messages(caplog)
    for name, (_, cause) in wrong.items():
        assert any(name in line and cause in line for line in log.splitlines()), (name, log)
    assert f"{len(wrong)} of them could not be read" in (output / "README.md").read_text()


def write_waves(folder: Path, channels: int, count: int = 24) -> Path:
    """Smooth photographs; each channel is another function of red, green and blue, in a range of its own."""
    folder.mkdir(parents=True)
    for number in range(count):
        colours = np.asarray(smooth_image(64, 64 + 16 * number)).astype(np.float32)[:, 8 * number :][:, :64]
        bands = [colours[..., band % 3] ** (1 + band % 2) * (band + 1) for band in range(channels)]
        bands = [1000 * (band + 1) - values if band % 4 == 3 else values for band, values in enumerate(bands)]
        np.save(folder / f"{number:02}.npy", np.stack(bands, axis=-1).astype(np.float32))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 13])
def test_each_channel_is_reconstructed_and_in_its_place(channels, tmp_path):
    folder = write_waves(tmp_path / "images", channels)
    more = ["--config_name", "tiny", "--max_steps", 250, "--min_crop_scale", 1]
    more += ["--per_device_train_batch_size", 8, "--logging_steps", 50]
    changes = f"{OVERRIDES},num_channels={channels},norm_pix_loss=false,mask_ratio=0.5"
    output = run(tmp_path / "pre", "--train_dir", folder, "--do_train", *more, overrides=changes)
    model, processor = (
        GreenMIMForPreTraining.from_pretrained(output).eval(),
        AutoImageProcessor.from_pretrained(output),
    )
    images = torch.cat([processor(np.load(path), return_tensors="pt").pixel_values for path in folder.iterdir()])
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))

    def errors(order: list[int]) -> torch.Tensor:
        """Of each channel as the model has them, in hidden units, relative to its variance there."""
        given = images[:, order]
        with torch.no_grad():
            outputs = model(given, noise=noise)
        _, found = reconstruct(model, given, outputs.logits, outputs.mask)
        hidden = (found != given).any(dim=1, keepdim=True).expand_as(given)
        parts = [(found[:, c][hidden[:, c]], given[:, c][hidden[:, c]]) for c in range(channels)]
        return torch.stack([(one - other).square().mean() / other.var() for one, other in parts])

    straight = errors(list(range(channels)))
    assert straight.max() < 0.8 and straight.mean() < 0.4, "1 is what the mean of each channel would come to"
    assert errors([*range(1, channels), 0]).mean() > 2 * straight.mean()


@pytest.mark.slow
def test_a_resumed_run_keeps_what_it_measured(tmp_path, caplog):
    folder, output = write_arrays(tmp_path / "images", 2), tmp_path / "run"
    caplog.set_level("INFO")
    more = ["--config_name", "tiny", "--train_dir", folder, "--do_train", "--max_steps", 4]
    more += ["--save_strategy", "steps", "--save_steps", 2]
    changes = f"{OVERRIDES},num_channels=2"
    run(output, *more, overrides=changes)
    saved = json.loads((output / "preprocessor_config.json").read_text())["image_range"]
    assert "8 images of uint16 measured in" in messages(caplog, level=0)
    caplog.clear()
    run(output, *more, "--resume_from_checkpoint", output / "checkpoint-2", overrides=changes)
    assert "measured in" not in messages(caplog, level=0)
    assert json.loads((output / "preprocessor_config.json").read_text())["image_range"] == saved
    assert AutoModel.from_pretrained(output).config.num_channels == 2


@pytest.mark.slow
def test_tiles_and_pages_are_images_in_both_scripts(tmp_path):
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        pages = rng.integers(0, 4096, (2, 64, 96)).astype(np.uint16)
        tifffile.imwrite(folder / name / "scan.tif", pages, photometric="minisblack")
    both = ["--train_dir", folder, "--validation_dir", folder, "--do_train", "--pages", "all", "--tile", 32]
    changes = f"{OVERRIDES},num_channels=1"
    run(tmp_path / "pre", *both, "--config_name", "tiny", "--max_steps", 2, overrides=changes)
    more = ["--model_name_or_path", tmp_path / "pre", "--num_train_epochs", 1, "--do_predict"]
    lines = (classify(tmp_path / "classifier", *both, *more) / "predictions.csv").read_text().splitlines()[1:]
    names = [line.split(",")[0].strip('"') for line in lines]
    assert len(names) == 2 * 2 * 6 and str(folder / "a" / "scan.tif#box=0,0,32,32").startswith(names[0])


@pytest.mark.slow
def test_two_processes_see_each_tile_and_page_once(tmp_path):
    """Of 2 files with 3 pages of 2 tiles and one of a single tile, 13 in all, which no batch of theirs divides."""
    rng = np.random.default_rng(0)
    for name, pages in (("a", 3), ("b", 3), ("c", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        values = rng.integers(0, 4096, (pages, 32, 64 if pages > 1 else 32)).astype(np.uint16)
        tifffile.imwrite(tmp_path / "images" / name / "scan.tif", values, photometric="minisblack")
    data = [
        "--train_dir",
        tmp_path / "images",
        "--validation_dir",
        tmp_path / "images",
        "--pages",
        "all",
        "--tile",
        32,
    ]
    run(tmp_path / "pre", *data, "--do_train", "--max_steps", 1, overrides=f"{OVERRIDES},num_channels=1")
    flags = [
        *data,
        "--model_name_or_path",
        tmp_path / "pre",
        "--mode",
        "knn",
        "--knn_k",
        3,
        "--do_eval",
        "--do_predict",
    ]
    expected = predictions_of(classify(tmp_path / "one", *flags))
    script = Path(run_image_classification.__file__)
    run_in_processes(script, classification_flags(tmp_path / "two", *flags))
    found = predictions_of(tmp_path / "two")
    assert [line["image"] for line in found] == [line["image"] for line in expected]
    assert len({line["image"] for line in found}) == len(found) == 13
    for one, two in zip(expected, found, strict=True):
        numbers = [[float(line[name]) for name in "abc"] for line in (one, two)]
        assert np.allclose(*numbers, atol=1e-5)
    assert results_of(tmp_path / "one")["eval_accuracy"] == results_of(tmp_path / "two")["eval_accuracy"]


@pytest.mark.slow
def test_columns_of_arrays_are_images_in_both_scripts(tmp_path):
    values = [values_of(4, 40, 48, seed=seed) for seed in range(8)]
    features = {"bands": datasets.Array3D((40, 48, 4), "uint16"), "label": datasets.ClassLabel(names=["a", "b"])}
    table = {"bands": values, "label": [number % 2 for number in range(8)]}
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        made = datasets.Dataset.from_dict(table, features=datasets.Features(features))
        made.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    both = ["--dataset_name", tmp_path / "data", "--do_train", "--do_eval", "--decode_once", "true"]
    changes = f"{OVERRIDES},num_channels=4"
    output = run(tmp_path / "pre", *both, "--config_name", "tiny", "--max_steps", 2, overrides=changes)
    ranges = AutoImageProcessor.from_pretrained(output).image_range
    everything = np.stack(values).reshape(-1, 4)
    assert np.allclose(ranges, np.percentile(everything, (0.1, 99.9), axis=0).T, rtol=0.05, atol=5)
    more = ["--model_name_or_path", output, "--num_train_epochs", 1, "--do_predict"]
    lines = (classify(tmp_path / "classifier", *both, *more) / "predictions.csv").read_text().splitlines()
    assert len(lines) == 9
    more = ["--dataset_name", tmp_path / "data", "--mode", "embed", "--do_predict", "--model_name_or_path", output]
    found = datasets.Dataset.from_parquet(str(classify(tmp_path / "features", *more) / "embeddings" / "*.parquet"))
    assert len(found) == 16 and found[0]["image"] == "image 0"
