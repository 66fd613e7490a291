"""Data sets deliver every readable image, in an order and with an augmentation that only seed and epoch decide."""

import os
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from tests.training_helpers import encoded, noise_image, write_broken, write_images, write_webdataset
from training_greenmim.data.image_dataset import EpochShuffle, EveryImage, ImageDataset, collate
from training_greenmim.data.images import UnreadableImageError
from training_greenmim.data.readers import (
    DataSource,
    check_first_readable,
    decoded_once,
    elpv,
    find_image_column,
    load_folder,
    read_records,
    undecoded,
)
from training_greenmim.data.streams import ImageStream
from training_greenmim.data.transforms import EvalTransform, TrainTransform


SIZE = (16, 16)
EVALUATION, TRAINING = EvalTransform(SIZE, 3), TrainTransform(SIZE, 3)


def numbered(number: int) -> bytes:
    """A PNG file whose grey value tells its number."""
    return encoded(Image.new("RGB", (20, 20), (number,) * 3))


def number_of(pixel_values: torch.Tensor) -> int:
    assert (pixel_values == pixel_values.flatten()[0]).all()
    return int(pixel_values.flatten()[0])


def records_of(contents: list[bytes]) -> datasets.Dataset:
    records = [{"path": f"image-{index}.png", "bytes": content} for index, content in enumerate(contents)]
    return datasets.Dataset.from_dict({"image": records}, datasets.Features({"image": ImageFeature(decode=False)}))


def image_dataset(contents: list[bytes], transform=EVALUATION, seed: int = 0) -> ImageDataset:
    return ImageDataset(records_of(contents), "image", transform, seed)


# ImageDataset


def test_images_decoded_once_give_the_same_samples_without_their_encoding():
    grey, colour = noise_image(0, height=40, width=64).convert("L"), noise_image(1, height=40, width=64)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    contents = [encoded(grey), encoded(colour), encoded(colour, exif=orientation), encoded(colour.convert("RGBA"))]
    contents.append(encoded(Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))))
    encoded_images = records_of([*contents, b"broken"])
    decoded = decoded_once(encoded_images, "image")
    assert [record["image"]["bytes"][:2] for record in decoded] == [b"P5", b"P6", b"P6", b"P6", b"P5", b"br"]
    for transform in (EVALUATION, TRAINING):
        expected, samples = (ImageDataset(records, "image", transform, 0) for records in (encoded_images, decoded))
        for index in range(len(contents) + 1):
            assert torch.equal(samples[3, 0, index]["pixel_values"], expected[3, 0, index]["pixel_values"])
            assert samples[3, 0, index]["unreadable"] == expected[3, 0, index]["unreadable"]


def test_dataset_delivers_each_image():
    dataset = image_dataset([numbered(number) for number in range(5)])
    assert len(dataset) == 5
    samples = list(dataset)
    assert [number_of(sample["pixel_values"]) for sample in samples] == [0, 1, 2, 3, 4]
    assert all(sample["unreadable"] == [] for sample in samples)
    assert samples[0]["pixel_values"].dtype == torch.uint8 and samples[0]["pixel_values"].shape == (3, *SIZE)
    with pytest.raises(IndexError):
        dataset[5]


def replacements(seed: int, epoch: int, broken: int = 13, readable: int = 40) -> list[int]:
    """What is seen in an epoch for a run of unreadable images."""
    contents = [numbered(number) for number in range(readable)]
    dataset = image_dataset([*contents[:20], *[b"broken"] * broken, *contents[20:]], seed=seed)
    samples = [dataset[epoch, position, index] for position, index in enumerate(range(20, 20 + broken))]
    assert [sample["unreadable"][0].split(" ")[0] for sample in samples] == [f"image-{20 + i}.png" for i in range(13)]
    assert [sample["sample_key"] for sample in samples] == [(epoch, position) for position in range(broken)]
    return [number_of(sample["pixel_values"]) for sample in samples]


def test_unreadable_images_are_replaced_by_ones_drawn_from_the_seed():
    drawn = replacements(seed=0, epoch=0)
    assert max(Counter(drawn).values()) <= 3 and len(set(drawn)) >= 9, "not one image for all"
    assert drawn == replacements(seed=0, epoch=0)
    assert drawn != replacements(seed=0, epoch=1) and drawn != replacements(seed=1, epoch=0)


def test_a_replacement_that_is_unreadable_too_is_reported_and_replaced():
    dataset = image_dataset([b"broken", b"", b"no image", numbered(3)])
    for index in range(3):
        sample = dataset[index]
        assert number_of(sample["pixel_values"]) == 3
        names = [message.split(" ")[0] for message in sample["unreadable"]]
        assert names[0] == f"image-{index}.png" and len(set(names)) == len(names) <= 3


def test_unreadable_images_without_a_name_are_told_apart():
    records = datasets.Dataset.from_dict(
        {"image": [{"path": None, "bytes": content} for content in (numbered(0), b"broken", b"broken", numbered(3))]},
        datasets.Features({"image": ImageFeature(decode=False)}),
    )
    dataset = ImageDataset(records, "image", EVALUATION, seed=0)
    assert {dataset[index]["unreadable"][0] for index in (1, 2)} == {
        f"image {index} (no image of a known format)" for index in (1, 2)
    }


@pytest.mark.parametrize("content", [b"broken", b"", encoded(noise_image(0))[:150]])
def test_message_on_an_unreadable_image_is_always_the_same(content):
    # Messages are counted once for each image, however often it comes by.
    dataset = image_dataset([content, numbered(1)])
    first, *others = [dataset[(epoch, 0, 0)]["unreadable"] for epoch in range(4)]
    assert len(first) == 1 and all(messages == first for messages in others)


def test_dataset_without_a_readable_image_is_an_error():
    with pytest.raises(UnreadableImageError, match=r"none of 2 images can be read.*image-"):
        image_dataset([b"broken", b"too"])[0]


def test_augmentation_is_derived_from_seed_epoch_and_image():
    contents = [encoded(noise_image(0))] * 2
    dataset = image_dataset(contents, TRAINING)

    def sample(dataset, epoch, index):
        return dataset[(epoch, 0, index)]["pixel_values"]

    first = sample(dataset, 0, 0)
    assert torch.equal(sample(dataset, 0, 0), first)
    assert torch.equal(sample(image_dataset(contents, TRAINING), 0, 0), first)
    others = [sample(dataset, 1, 0), sample(dataset, 0, 1), sample(image_dataset(contents, TRAINING, seed=1), 0, 0)]
    assert not any(torch.equal(other, first) for other in others)


# EpochShuffle and collate


def test_shuffle_is_a_new_permutation_in_each_epoch_and_depends_on_the_seed():
    sampler = EpochShuffle(50, seed=3)
    assert len(sampler) == 50
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert [key[:2] for key in keys] == [(epoch, position) for position in range(50)]
        orders.append([key[2] for key in keys])
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] and orders[0] == orders[2] and orders[0] != list(range(50))
    assert [index for _, _, index in EpochShuffle(50, seed=4)] != orders[0]


def test_collate_stacks_images_and_joins_messages():
    images = [torch.full((3, 2, 2), value, dtype=torch.uint8) for value in (1, 2, 3)]
    batch = collate(
        [{"pixel_values": image, "unreadable": names} for image, names in zip(images, (["a"], [], ["b", "c"]))]
    )
    assert torch.equal(batch["pixel_values"], torch.stack(images)) and batch["pixel_values"].dtype == torch.uint8
    assert batch["unreadable"] == ["a", "b", "c"]


def batches_of_epochs(dataset: ImageDataset, workers: int, epochs: int = 2) -> list[torch.Tensor]:
    sampler = EpochShuffle(len(dataset), seed=5)
    loader = DataLoader(
        dataset,
        batch_size=3,
        sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    batches = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches += [batch["pixel_values"] for batch in loader]
    return batches


def test_batches_do_not_depend_on_the_number_of_workers():
    contents = [encoded(noise_image(seed)) for seed in range(10)]
    dataset = image_dataset([*contents[:4], b"broken", *contents[4:]], TRAINING)
    expected = batches_of_epochs(dataset, workers=0)
    assert len(expected) == 8 and not torch.equal(expected[0], expected[4])
    for workers in (1, 2):
        actual = batches_of_epochs(dataset, workers)
        assert len(actual) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(actual, expected))


# ImageStream


@pytest.mark.slow
def test_spawned_workers_have_the_limit_of_pixels_of_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # which comes back afterwards
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    source = DataSource(train_dir=str(tmp_path), max_image_pixels=100)
    dataset = EveryImage(read_records(source)["train"].records, "image", EVALUATION, 0)
    loader = DataLoader(dataset, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    assert "exceeds limit of 200 pixels" in next(iter(loader))["unreadable"][0]


def write_parquet(folder: Path, contents: list[bytes], shards: int = 2) -> None:
    folder.mkdir(parents=True)
    features = datasets.Features({"photo": ImageFeature(), "label": datasets.Value("int64")})
    for shard in range(shards):
        part = contents[shard::shards]
        photos = [{"path": f"{shard}-{index}.png", "bytes": content} for index, content in enumerate(part)]
        data = datasets.Dataset.from_dict({"photo": photos, "label": [0] * len(part)}, features)
        data.to_parquet(str(folder / f"train-{shard:05}-of-{shards:05}.parquet"))


WRITERS = pytest.mark.parametrize(
    ("write", "column"), [(write_parquet, "photo"), (write_webdataset, "png")], ids=["parquet", "webdataset"]
)


def stream_of(folder: Path, transform=EVALUATION, shuffled: bool = False) -> ImageStream:
    records = datasets.load_dataset(str(folder), streaming=True)["train"]
    column = find_image_column(records, None)
    records = undecoded(records, column)
    if shuffled:
        records = records.shuffle(seed=1, buffer_size=100)
    return ImageStream(records, column, transform, seed=0)


def loader_of(stream: ImageStream, workers: int, **options) -> DataLoader:
    return DataLoader(stream, batch_size=2, collate_fn=collate, num_workers=workers, **options)


def numbers_of(batches) -> list[int]:
    return [number_of(image) for batch in batches for image in batch["pixel_values"]]


@WRITERS
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_delivers_each_image_once(tmp_path, write, column, workers):
    write(tmp_path / "data", [numbered(number) for number in range(12)])
    stream = stream_of(tmp_path / "data")
    assert stream.column == column
    assert sorted(numbers_of(loader_of(stream, workers))) == list(range(12))


@WRITERS
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_leaves_out_and_reports_unreadable_images(tmp_path, write, column, workers):
    contents = [numbered(number) for number in range(12)]
    contents[0] = contents[2] = contents[5] = b"broken"
    write(tmp_path / "data", contents)
    batches = list(loader_of(stream_of(tmp_path / "data"), workers))
    assert sorted(numbers_of(batches)) == [1, 3, 4, 6, 7, 8, 9, 10, 11]
    messages = sorted(message for batch in batches for message in batch["unreadable"])
    assert [message.split(" ")[0] for message in messages] == ["0-0.png", "0-1.png", "1-2.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_shuffled_anew_in_each_epoch(tmp_path, workers):
    write_webdataset(tmp_path / "data", [numbered(number) for number in range(24)])
    stream = stream_of(tmp_path / "data", shuffled=True)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append(numbers_of(loader_of(stream, workers)))
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1] and orders[0] == orders[2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_stream_augments_anew_in_each_epoch(tmp_path, workers, persistent):
    write_parquet(tmp_path / "data", [encoded(noise_image(seed)) for seed in range(4)])
    stream = stream_of(tmp_path / "data", TRAINING)
    # Workers that outlive the epoch are the default of the script.
    loader = loader_of(stream, workers, persistent_workers=persistent and workers > 0)
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(epochs[0], epochs[2])
    assert not any(torch.equal(*pair) for pair in zip(epochs[0], epochs[1]))


# The default data


def names_of(records: datasets.Dataset) -> list[str]:
    return [os.path.basename(record["path"]) for record in records["image"]]


def test_elpv_split_is_fixed_stratified_and_disjoint():
    train, test = elpv()
    assert (len(train), len(test)) == (1968, 656)
    train_names, test_names = names_of(train), names_of(test)
    assert not set(train_names) & set(test_names)
    assert set(train_names) | set(test_names) == {f"cell{number:04}.png" for number in range(1, 2625)}
    # Ever since the first version; a change would let tests see photographs of pre-training.
    assert train_names[:5] == ["cell0001.png", "cell0002.png", "cell0004.png", "cell0005.png", "cell0006.png"]
    assert test_names[:5] == ["cell0003.png", "cell0007.png", "cell0011.png", "cell0012.png", "cell0016.png"]
    assert test_names[-3:] == ["cell2619.png", "cell2620.png", "cell2624.png"]
    assert train.features["label"].names == ["functional", "defective"]
    assert (sum(train["label"]), sum(test["label"])) == (616, 205)


def test_elpv_labels_and_photographs_are_those_of_the_package():
    train, test = elpv()
    lines = (Path(train[0]["image"]["path"]).parent.parent / "labels.csv").read_text().splitlines()
    expected = {os.path.basename(line.split()[0]): float(line.split()[1]) >= 0.5 for line in lines}
    labels = dict(zip([*names_of(train), *names_of(test)], [*train["label"], *test["label"]]))
    assert labels == expected
    sample = ImageDataset(train, "image", EVALUATION, seed=0)[0]
    assert sample["unreadable"] == [] and sample["pixel_values"].float().std() > 5


# Folders


def test_folder_is_read_nested_without_labels_or_other_files(tmp_path):
    write_images(tmp_path / "b" / "deep" / "er", 2)
    write_images(tmp_path / "a", 1)
    noise_image(0).save(tmp_path / "top.JPG", "JPEG")
    noise_image(0).save(tmp_path / "a" / "scan.tif")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "a" / "metadata.csv").write_text("file_name,label\n000.png,1\n")
    (tmp_path / "empty").mkdir()
    records = load_folder(str(tmp_path), "train_dir")
    assert list(records.features) == ["image"]
    names = [os.path.relpath(record["path"], tmp_path) for record in records["image"]]
    assert names == ["a/000.png", "a/scan.tif", "b/deep/er/000.png", "b/deep/er/001.png", "top.JPG"]
    samples = list(ImageDataset(records, "image", EVALUATION, seed=0))
    assert len(samples) == 5 and not any(sample["unreadable"] for sample in samples)


def test_folder_follows_links(tmp_path):
    write_images(tmp_path / "disk", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "disk")
    assert len(load_folder(str(tmp_path / "data"), "train_dir")) == 2


def test_missing_folder_is_an_error_that_names_the_argument(tmp_path):
    with pytest.raises(ValueError, match=r"`validation_dir` is '.*nowhere', which is not a folder"):
        load_folder(str(tmp_path / "nowhere"), "validation_dir")


def test_folder_without_images_is_an_error_that_names_the_argument(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=f"`train_dir` is '{re.escape(str(tmp_path))}', which holds no image file"):
        load_folder(str(tmp_path), "train_dir")


# Columns


def table(**columns) -> datasets.Dataset:
    features = {name: ImageFeature() if name.startswith("photo") else datasets.Value("int64") for name in columns}
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def test_only_image_column_is_found():
    assert find_image_column(table(label=[1], photo=[numbered(0)]), None) == "photo"


def test_named_column_wins_among_several():
    records = table(photo_left=[numbered(0)], photo_right=[numbered(0)])
    assert find_image_column(records, "photo_right") == "photo_right"
    with pytest.raises(ValueError, match=r"`image_column_name` is not given.*\['photo_left', 'photo_right'\]"):
        find_image_column(records, None)


def test_unknown_column_is_an_error_that_lists_the_columns():
    with pytest.raises(ValueError, match=r"`image_column_name` is 'picture'.*\['label', 'photo'\]"):
        find_image_column(table(label=[1], photo=[numbered(0)]), "picture")


def test_data_without_images_is_an_error_that_lists_the_columns():
    with pytest.raises(ValueError, match=r"no image column among \['age', 'label'\]"):
        find_image_column(table(age=[1], label=[1]), None)


def test_column_of_a_stream_without_known_features_is_found():
    def records():
        yield {"jpg": numbered(0), "cls": 0}

    stream = datasets.IterableDataset.from_generator(records)
    assert stream.features is None
    assert find_image_column(stream, None) == "jpg"


def test_undecoded_keeps_only_the_encoded_image():
    content = numbered(7)
    records = undecoded(table(label=[1], photo=[{"path": None, "bytes": content}]), "photo")
    assert records[0] == {"photo": {"path": None, "bytes": content}}


# The first look


def test_one_readable_image_is_enough(tmp_path):
    write_broken(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    noise_image(0).save(tmp_path / "c.png")
    write_broken(tmp_path / "d.png")
    check_first_readable(load_folder(str(tmp_path), "train_dir"), "image", EvalTransform(SIZE, 3), "train_dir")


def test_data_without_a_readable_image_is_an_error_with_examples(tmp_path):
    for name in "abcd":
        write_broken(tmp_path / f"{name}.png")
    records = load_folder(str(tmp_path), "train_dir")
    with pytest.raises(ValueError, match=r"`train_dir` has no readable image among 4: .*a\.png.*b\.png.*c\.png"):
        check_first_readable(records, "image", EvalTransform(SIZE, 3), "train_dir")


def test_empty_data_is_an_error():
    with pytest.raises(ValueError, match=r"`dataset_name` has no readable image among 0: it is empty"):
        check_first_readable(records_of([]), "image", EvalTransform(SIZE, 3), "dataset_name")


def test_first_look_at_a_stream_gives_up_in_time():
    seen = []

    def records():
        for number in range(100_000):
            seen.append(number)
            yield {"image": {"path": f"{number}.png", "bytes": b"broken"}}

    stream = datasets.IterableDataset.from_generator(
        records, features=datasets.Features({"image": ImageFeature(decode=False)})
    )
    with pytest.raises(ValueError, match=r"no readable image among 1000: 0\.png"):
        check_first_readable(stream, "image", EvalTransform(SIZE, 3), "dataset_name")
    assert len(seen) < 2000


def test_first_look_draws_no_random_numbers():
    torch.manual_seed(0)
    np.random.seed(0)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())
    check_first_readable(records_of([numbered(1)]), "image", EvalTransform(SIZE, 3), "train_dir")
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
