"""Where records come from: folders with links, files that are left out, archives, and decoded images on the disk."""

import errno
import logging
import os
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, features
from torch.utils.data import DataLoader

from tests.training_helpers import (
    encoded,
    messages,
    noise_image,
    write_class_folders,
    write_images,
    write_webdataset,
)
from training_greenmim.data import images, readers
from training_greenmim.data.folders import find_images, image_suffixes
from training_greenmim.data.image_dataset import ImageDataset, collate
from training_greenmim.data.labels import split, stratified_subset
from training_greenmim.data.readers import (
    READERS,
    DataSource,
    Part,
    Reader,
    decoded_once,
    elpv,
    find_image_column,
    load_class_folders,
    load_folder,
    read_records,
    undecoded,
)
from training_greenmim.data.transforms import EvalTransform


EVALUATION = EvalTransform((16, 16), 3)


def names_below(folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in find_images(str(folder), "train_dir")]


def log_of(caplog, folder: Path) -> str:
    """The one line of log about a folder."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        find_images(str(folder), "train_dir")
    (line,) = [record.getMessage() for record in caplog.records if "train_dir" in record.getMessage()]
    return line


# Links


def test_loops_of_links_end_and_multiply_nothing(tmp_path):
    data = tmp_path / "data"
    write_images(data / "a", 3)
    write_images(data / "b" / "deep", 2)
    (data / "b" / "deep" / "up").symlink_to(data)
    (data / "a" / "here").symlink_to(data / "a")
    (data / "a" / "there").symlink_to(data / "b")
    (data / "b" / "back").symlink_to(data / "a")
    (data / "itself").symlink_to(data / "itself")
    (data / "itself.png").symlink_to(data / "itself.png")
    assert names_below(data) == ["a/000.png", "a/001.png", "a/002.png", "b/deep/000.png", "b/deep/001.png"]


def test_each_real_file_comes_once_and_under_its_own_name(tmp_path, caplog):
    data = tmp_path / "data"
    write_images(data / "z", 3)
    write_images(tmp_path / "elsewhere", 2)
    (data / "a").symlink_to(data / "z")  # all of z again
    (data / "b.png").symlink_to(data / "z" / "000.png")
    (data / "c.png").hardlink_to(data / "z" / "001.png")
    (data / "d.png").symlink_to(tmp_path / "elsewhere" / "000.png")
    (data / "e.png").symlink_to(tmp_path / "elsewhere" / "000.png")
    (data / "more").symlink_to(tmp_path / "elsewhere")
    line = log_of(caplog, data)
    assert len(names_below(data)) == 5
    assert names_below(data) == ["c.png", "more/000.png", "more/001.png", "z/000.png", "z/002.png"]
    assert (
        "5 images found" in line and "4 files left out (other names of files that are there already): 4 .png" in line
    )


def test_links_to_content_that_is_kept_aside_are_images(tmp_path):
    """As in the Hub's cache, whose files are named by their content, and in git-annex, whose folder is hidden."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "blobs" / "0f3a").write_bytes(encoded(noise_image(0)))
    (tmp_path / ".git" / "kept.png").write_bytes(encoded(noise_image(1)))
    (tmp_path / "a.png").symlink_to(tmp_path / "blobs" / "0f3a")
    (tmp_path / "b.png").symlink_to(tmp_path / ".git" / "kept.png")
    assert names_below(tmp_path) == ["a.png", "b.png"]


def test_files_of_equal_inode_on_other_disks_are_other_files(tmp_path, monkeypatch):
    write_images(tmp_path, 3)
    scandir = os.scandir

    class Entry:
        def __init__(self, entry):
            self.name, self.path, self.is_symlink = entry.name, entry.path, entry.is_symlink
            self.is_dir, self.is_file = entry.is_dir, entry.is_file

        def inode(self):
            return 7  # as some file systems of the network say of all files

    class Entries(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def close(self):
            pass

    monkeypatch.setattr(os, "scandir", lambda folder: Entries(Entry(entry) for entry in scandir(folder)))
    assert len(names_below(tmp_path)) == 3


def test_no_file_is_on_both_sides_of_a_split(tmp_path):
    write_class_folders(tmp_path, {"a": 20, "b": 20})
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    for index in range(20):
        (tmp_path / "b" / f"copy-{index:03}.png").hardlink_to(tmp_path / "b" / f"{index:03}.png")
    for seed in range(3):
        parts = split(load_class_folders(str(tmp_path), "train_dir"), 0.5, seed)
        files = [{os.stat(image["path"]).st_ino for image in part["image"]} for part in parts]
        assert not files[0] & files[1] and len(files[0] | files[1]) == 40


# What is left out


def test_one_line_says_what_is_found_and_what_is_left_out_and_why(tmp_path, caplog):
    write_images(tmp_path, 4)
    for name in ("a.doc", "b.DOC", "c.csv", "README", ".hidden.png", "deep.mpg"):
        (tmp_path / name).write_bytes(b"x")
    write_images(tmp_path / ".ipynb_checkpoints", 1)
    write_images(tmp_path / "__MACOSX", 1)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    line = log_of(caplog, tmp_path)
    assert line.startswith(f"`train_dir` is {str(tmp_path)!r}: 4 images found; ")
    assert "5 files left out (no image format that is read here): 2 .doc, " in line
    assert all(part in line for part in ("1 .csv", "1 .mpg", "1 without suffix"))
    assert "3 files left out (hidden): 2 folder, 1 .png" in line
    assert "1 file left out (links that lead nowhere): 1 .png" in line
    assert not messages(caplog), "no warning"


def test_pipes_are_left_out_since_reading_them_would_never_end(tmp_path, caplog):
    write_images(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    line = log_of(caplog, tmp_path)
    assert line.endswith(": 1 image found; 2 files left out (pipes, sockets or devices): 2 .png.")


def test_suffixes_are_those_that_this_pillow_decodes(monkeypatch):
    assert {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif"} <= image_suffixes()
    assert not {".doc", ".txt", ".pdf", ".mpg", ".h5"} & image_suffixes()
    assert (".avif" in image_suffixes()) == features.check("avif")
    check = features.check
    monkeypatch.setattr(features, "check", lambda name: name != "avif" and check(name))
    assert ".avif" not in image_suffixes() and ".webp" in image_suffixes()


def refuse(monkeypatch, *refused: Path) -> None:
    """Makes folders unreadable, which a test cannot do by permissions if it runs as the administrator."""
    scandir = os.scandir

    def refusing(folder):
        if Path(folder) in refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)


def test_folders_that_cannot_be_read_are_named_in_a_warning(tmp_path, caplog, monkeypatch):
    write_images(tmp_path / "open", 2)
    write_images(tmp_path / "closed", 2)
    refuse(monkeypatch, tmp_path / "closed")
    assert "2 images found" in log_of(caplog, tmp_path)
    assert f"1 folder cannot be read: {tmp_path / 'closed'} (Permission denied)" in messages(caplog)


def test_a_folder_that_cannot_be_read_at_all_is_refused_as_such(tmp_path, monkeypatch):
    write_images(tmp_path, 2)
    refuse(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"`train_dir` is '.*', which cannot be read: Permission denied"):
        find_images(str(tmp_path), "train_dir")


def test_a_folder_of_other_files_is_refused_with_what_it_holds(tmp_path):
    for name in ("a.doc", "b.doc", "photos.zip"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no image file; 3 files left out \(no image.*\): 2 \.doc, 1 \.zip"):
        find_images(str(tmp_path), "train_dir")


def test_an_image_that_may_not_be_opened_says_so(tmp_path, monkeypatch):
    paths = write_images(tmp_path, 2)
    open_as_ever = Image.open

    def refusing(source, *args):
        if source == paths[0]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), source)
        return open_as_ever(source, *args)

    monkeypatch.setattr(Image, "open", refusing)
    sample = ImageDataset(load_folder(str(tmp_path), "train_dir"), "image", EVALUATION, seed=0)[0]
    assert sample["unreadable"] == [f"{paths[0]} ([Errno 13] Permission denied: '{paths[0]}')"]


# Archives


def write_zip(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(count):
            archive.writestr(f"photos/{index}.png", encoded(noise_image(index)))
    return path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["files", "folder"])
def test_images_in_zip_archives_are_read_as_they_lie_there(tmp_path, how, workers):
    archive = write_zip(tmp_path / "data" / "photos.zip", 10)
    if how == "files":
        found = datasets.load_dataset("imagefolder", data_files=str(archive), cache_dir=str(tmp_path / "cache"))
    else:
        found = datasets.load_dataset(str(archive.parent), cache_dir=str(tmp_path / "cache"))
    records = undecoded(found["train"], find_image_column(found["train"], None))
    paths = [record["image"]["path"] for record in records]
    assert all(path.startswith("zip://") for path in paths), "what `datasets` makes of archives"
    loader = DataLoader(
        ImageDataset(records, "image", EVALUATION, seed=0), batch_size=5, collate_fn=collate, num_workers=workers
    )
    batches = list(loader)
    assert not any(batch["unreadable"] for batch in batches)
    expected = [EVALUATION(noise_image(int(Path(path.partition("::")[0]).stem))) for path in paths]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), torch.stack(expected))


def test_archives_that_cannot_be_read_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "photos.zip", "w") as archive:
        for name in ("a", "b"):
            archive.writestr(f"photos/{name}/0.png", encoded(noise_image(0)))
    with pytest.raises(ValueError, match=r"Invalid string class label .* to be unpacked and given as `train_dir`"):
        read_records(DataSource(dataset_name=str(tmp_path / "data")), labelled=True)
    with pytest.raises(ValueError, match=r"`train_dir` is .*, which is not a folder but an archive; unpack it"):
        read_records(DataSource(train_dir=str(tmp_path / "data" / "photos.zip")))


def test_an_archive_is_opened_once(tmp_path, monkeypatch):
    archive, opened = write_zip(tmp_path / "photos.zip", 6), []
    filesystem = images.fsspec.filesystem
    monkeypatch.setattr(
        images.fsspec, "filesystem", lambda *args, **options: opened.append(1) or filesystem(*args, **options)
    )
    for index in range(6):
        EVALUATION(f"zip://photos/{index}.png::{archive}")
    assert len(opened) == 1


def test_other_addresses_are_read_and_what_lacks_in_an_archive_is_unreadable(tmp_path):
    (path,) = write_images(tmp_path, 1)
    assert torch.equal(EVALUATION(f"file://{path}"), EVALUATION(path))
    archive = write_zip(tmp_path / "photos.zip", 1)
    address = f"zip://gone.png::{archive}"
    with pytest.raises(images.UnreadableImageError, match=rf"^{address} \("):
        images.load_image({"path": address, "bytes": None}, EVALUATION, None)


# Decoded once


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch) -> list:
    """Names of the images that were decoded, in order."""
    names, decode = [], readers.decode

    def counting(source, channels=None):
        names.append(images.image_name(source))
        return decode(source, channels)

    monkeypatch.setattr(readers, "decode", counting)
    return names


def folder_records(folder: Path) -> datasets.Dataset:
    if not folder.exists():
        write_images(folder, 6)
    return load_folder(str(folder), "train_dir")


def elpv_records(folder: Path) -> datasets.Dataset:
    return stratified_subset(elpv()[0], 12, 0, "max_train_samples")


def webdataset_records(folder: Path) -> datasets.Dataset:
    if not folder.exists():
        write_webdataset(folder, [encoded(noise_image(seed)) for seed in range(6)])
    found = datasets.load_dataset(str(folder), cache_dir=f"{folder}-cache")["train"]
    return undecoded(found, "png").rename_column("png", "image")


@pytest.mark.parametrize("make_records", [folder_records, elpv_records, webdataset_records])
def test_decoded_images_lie_on_the_disk_and_are_decoded_once(tmp_path, cache, decoded, make_records):
    records = make_records(tmp_path / "data")
    first = decoded_once(records, "image")
    assert len(decoded) == len(records)
    for result in (first, decoded_once(make_records(tmp_path / "data"), "image")):
        (file,) = [Path(entry["filename"]) for entry in result.cache_files]
        assert file.is_relative_to(cache) and file.stat().st_size > sum(
            len(record["image"]["bytes"]) for record in result
        )
        assert isinstance(result.data, datasets.table.MemoryMappedTable), "mapped, not read"
        assert all(record["image"]["bytes"][:2] in (b"P5", b"P6") for record in result)
        assert result.features == records.features
    assert len(decoded) == len(records), "the second call decodes nothing"


@pytest.mark.parametrize("change", ["content", "time", "name", "one more"])
def test_changed_files_are_decoded_anew(tmp_path, cache, decoded, change):
    records = folder_records(tmp_path / "data")
    decoded_once(records, "image")
    file = tmp_path / "data" / "003.png"
    if change == "content":
        noise_image(50, 64, 64).save(file)
    elif change == "time":
        os.utime(file, ns=(0, 1))
    elif change == "name":
        file.rename(file.with_name("other.png"))
    else:
        noise_image(51).save(tmp_path / "data" / "more.png")
    decoded.clear()
    result = decoded_once(load_folder(str(tmp_path / "data"), "train_dir"), "image")
    assert len(decoded) == len(result) == (7 if change == "one more" else 6)


def test_images_of_a_changed_archive_are_decoded_anew(tmp_path, cache, decoded):
    archive = write_zip(tmp_path / "photos.zip", 2)
    paths = [{"path": f"zip://{name}.png::{archive}", "bytes": None} for name in ("photos/0", "photos/1")]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    numbers = []
    for nanoseconds in (1, 1, 2):
        os.utime(archive, ns=(0, nanoseconds))
        decoded_once(datasets.Dataset.from_dict({"image": paths}, features), "image")
        numbers.append(len(decoded))
    assert numbers == [2, 2, 4]


def test_only_a_few_decoded_images_are_in_memory_at_once(tmp_path, cache):
    """48 images of 0.75 MB, of which four at a time are held."""
    tmp_path.joinpath("data").mkdir()
    for index in range(48):
        Image.new("RGB", (500, 500), (index, 0, 0)).save(tmp_path / "data" / f"{index:02}.png")
    records = load_folder(str(tmp_path / "data"), "train_dir")
    tracemalloc.start()
    try:
        result = decoded_once(records, "image")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * 750_000 and result.cache_files
    assert sum(file.stat().st_size for file in cache.rglob("*.arrow")) > 48 * 750_000


# The registry


def part_names(**names) -> dict[str, tuple[int, str]]:
    labelled = names.pop("labelled", False)
    parts = read_records(DataSource(**names), labelled)
    return {name: (len(part.records), part.argument) for name, part in parts.items()}


def test_parts_of_folders(tmp_path):
    train, held_out = (write_class_folders(tmp_path / name, {"a": 2, "b": 1}) for name in ("train", "held-out"))
    write_images(tmp_path / "test", 4)
    names = {"train_dir": str(train), "validation_dir": str(held_out), "test_dir": str(tmp_path / "test")}
    expected = {"train": (3, "train_dir"), "validation": (3, "validation_dir"), "test": (4, "test_dir")}
    assert part_names(**names) == part_names(**names, labelled=True) == expected
    assert part_names(test_dir=names["test_dir"]) == {"test": (4, "test_dir")}
    parts = read_records(DataSource(**names), labelled=True)
    assert [part.is_labelled for part in parts.values()] == [True, True, False]
    assert not read_records(DataSource(**names))["train"].is_labelled


@pytest.mark.parametrize("tile", [None, 8])
def test_files_of_several_pages_are_told_of_once(tmp_path, caplog, tile):
    for name in ("train", "validation"):
        write_images(tmp_path / name, 3)
        (tmp_path / name / "0.tif").write_bytes(b"II*\0broken")
        tifffile.imwrite(tmp_path / name / "1.tif", np.zeros((20, 20), np.uint16))
        tifffile.imwrite(tmp_path / name / "2.tif", np.zeros((3, 20, 20), np.uint16), photometric="minisblack")
    folders = {f"{name}_dir": str(tmp_path / name) for name in ("train", "validation")}
    for _ in range(2):  # as `--recipe auto` reads them twice
        read_records(DataSource(**folders, tile=tile))
    text = f"`train_dir`: {tmp_path}/train/2.tif has 3 pages, of which the first is taken; --pages all or as_channels"
    assert messages(caplog).count("of which the first") == messages(caplog).count(text) == 1
    caplog.clear()
    read_records(DataSource(**folders, tile=tile, pages="all"))
    assert "--pages" not in messages(caplog)


def test_parts_of_data_sets(tmp_path):
    contents = [encoded(noise_image(seed)) for seed in range(4)]
    data = write_webdataset(tmp_path / "data", contents)
    write_webdataset(data, contents[:2], split="test")
    expected = {"train": (4, "dataset_name"), "validation": (2, "dataset_name")}
    assert part_names(dataset_name=str(data)) == expected, "the test part where no other is for evaluation"
    write_webdataset(data, contents[:3], split="validation")
    assert part_names(dataset_name=str(data)) == {
        **expected,
        "validation": (3, "dataset_name"),
        "test": expected["validation"],
    }
    write_images(tmp_path / "test", 1)
    names = {"dataset_name": str(data), "test_dir": str(tmp_path / "test")}
    assert part_names(**names)["test"] == (1, "test_dir")
    streams = read_records(DataSource(dataset_name=str(data), streaming=True))
    assert all(isinstance(part.records, datasets.IterableDataset) for part in streams.values())


def test_elpv_is_the_default():
    assert part_names() == {"train": (1968, "dataset_name"), "validation": (656, "dataset_name")}


def test_a_damaged_data_set_tells_the_cause(tmp_path):
    """The schema comes from the first file; the second fails while the data set is made."""
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"label": [0, 1]}).to_parquet(tmp_path / "data" / "train-0.parquet")
    (tmp_path / "data" / "train-1.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"`dataset_name` is '.*', which cannot be loaded: .+: Parquet magic bytes"):
        read_records(DataSource(dataset_name=str(tmp_path / "data")))


def test_a_part_to_train_on_may_be_needed(tmp_path):
    data = write_webdataset(tmp_path / "data", [encoded(noise_image(0))], split="test")
    source = DataSource(dataset_name=str(data))
    assert set(read_records(source)) == {"validation"}
    with pytest.raises(ValueError, match=r"`dataset_name` is '.*', which has no split train but \['test'\]"):
        read_records(source, needs_train=True)


def test_a_reader_is_one_class_and_one_line(tmp_path, monkeypatch):
    class ListReader(Reader):
        """Names of images, one a line."""

        def is_named_by(self, source):
            return str(source.dataset_name).endswith(".txt")

        def read(self, source, labelled):
            lines = [{"path": path, "bytes": None} for path in Path(source.dataset_name).read_text().split()]
            features = datasets.Features({"image": datasets.Image(decode=False)})
            return {"train": Part(datasets.Dataset.from_dict({"image": lines}, features), "dataset_name")}

    monkeypatch.setattr(readers, "READERS", [ListReader(), *READERS])
    (tmp_path / "list.txt").write_text("\n".join(write_images(tmp_path, 3)))
    assert part_names(dataset_name=str(tmp_path / "list.txt")) == {"train": (3, "dataset_name")}
    assert part_names(train_dir=str(tmp_path)) == {"train": (3, "train_dir")}
