# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`--mode embed`: features as Parquet files, written in parts, by one process or several, interrupted or not."""

import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

import run_image_classification
from modeling_greenmim import GreenMIMForImageClassification, GreenMIMModel
from tests.training_helpers import (
    classification_flags,
    classify,
    encoded,
    noise_image,
    run_in_processes,
    write_broken,
    write_class_folders,
    write_images,
    write_pretrained,
)
from training_greenmim.classification import embedding
from training_greenmim.data.transforms import EvalTransform


EMBED = ("--mode", "embed", "--do_predict", "--crop_pct", 1)


@pytest.fixture
def model(tmp_path) -> Path:
    return write_pretrained(tmp_path / "model")


def embed(output: Path, model: Path, images: Path, *more, argument: str = "--test_dir") -> datasets.Dataset:
    classify(output, *EMBED, "--model_name_or_path", model, argument, images, *more)
    return read(output)


def read(output: Path) -> datasets.Dataset:
    files = sorted(str(path) for path in (output / "embeddings").glob("*.parquet"))
    assert files
    return datasets.Dataset.from_parquet(files, keep_in_memory=True).with_format("numpy")


def pixels(folder: Path, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) -> torch.Tensor:
    """What evaluation sees of the images of a folder, in order of their names."""
    transform = EvalTransform((32, 32), 3, 1.0)
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))])
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_features_are_those_of_the_encoder(tmp_path, model):
    write_images(tmp_path / "images", 5)
    table = embed(tmp_path / "out", model, tmp_path / "images", "--embed_stages", 1, 2)
    encoder = GreenMIMModel.from_pretrained(model).eval()
    with torch.no_grad():
        expected = encoder(pixels(tmp_path / "images"), output_hidden_states=True)
    np.testing.assert_allclose(table["embedding"][:], expected.pooler_output.numpy(), atol=1e-5)
    for stage in (1, 2):
        maps = expected.reshaped_hidden_states[stage]
        np.testing.assert_allclose(table[f"stage{stage}"][:], maps.numpy(), rtol=2e-3, atol=2e-3)
        assert table.features[f"stage{stage}"] == datasets.Array3D(tuple(maps.shape[1:]), "float16")
    assert list(table["image"]) == sorted(str(path) for path in (tmp_path / "images").glob("*.png"))
    assert table.column_names == ["index", "image", "embedding", "stage1", "stage2"]


def test_any_classifier_gives_the_features_before_its_head(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    resnet = ResNetForImageClassification(config).eval()
    resnet.save_pretrained(tmp_path / "resnet")
    half = [0.5, 0.5, 0.5]
    size = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=size, image_mean=half, image_std=half).save_pretrained(tmp_path / "resnet")
    write_images(tmp_path / "images", 3)
    table = embed(tmp_path / "out", tmp_path / "resnet", tmp_path / "images")
    with torch.no_grad():
        expected = resnet.resnet(pixels(tmp_path / "images", half, half)).pooler_output.flatten(1)
    np.testing.assert_allclose(table["embedding"][:], expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match=r"`embed_stages` is \[1\], which needs a GreenMIM model, but .* ResNet"):
        embed(tmp_path / "maps", tmp_path / "resnet", tmp_path / "images", "--embed_stages", 1)


def test_an_earlier_stage_and_a_trained_classifier(tmp_path, model):
    write_images(tmp_path / "images", 3)
    assert embed(tmp_path / "stage", model, tmp_path / "images", "--feature_stage", 1)["embedding"][:].shape == (3, 8)
    GreenMIMForImageClassification.from_pretrained(model, num_labels=7).save_pretrained(tmp_path / "classifier")
    shutil.copy(model / "preprocessor_config.json", tmp_path / "classifier")
    found = embed(tmp_path / "classified", tmp_path / "classifier", tmp_path / "images")["embedding"][:]
    expected = embed(tmp_path / "expected", model, tmp_path / "images")["embedding"][:]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("argument", ["--train_dir", "--validation_dir"])
def test_all_images_are_embedded_with_labels_but_unreadable_ones(tmp_path, model, argument):
    images = write_class_folders(tmp_path / "images", {"red": 2, "green": 3})
    write_broken(images / "green" / "001.png")
    table = embed(tmp_path / "out", model, images, argument=argument)
    assert table.features["label"].int2str(table["label"][:].tolist()) == ["green", "green", "red", "red"]
    assert [os.path.basename(name) for name in table["image"]] == ["000.png", "002.png", "000.png", "001.png"]
    assert list(table["index"]) == [0, 2, 3, 4]


def test_data_sets_have_their_splits_and_need_no_names_or_labels(tmp_path, model):
    """Images as bytes, all of one name; the files are read back by split."""
    for split, count in (("train", 4), ("test", 3)):
        images = [encoded(noise_image(index)) for index in range(count)]
        records = [{"image": {"bytes": image, "path": "same.png"}} for image in images]
        features = datasets.Features({"image": datasets.Image(decode=False)})
        (tmp_path / "data").mkdir(exist_ok=True)
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(records, features=features).to_parquet(str(path))
    embed(tmp_path / "out", model, tmp_path / "data", argument="--dataset_name")
    found = datasets.load_dataset(str(tmp_path / "out" / "embeddings"))
    assert {split: len(part) for split, part in found.items()} == {"train": 4, "validation": 3}
    first = np.asarray(found["train"]["embedding"][:3])
    np.testing.assert_array_equal(first, np.asarray(found["validation"]["embedding"]))
    assert len({tuple(row) for row in first}) == 3
    assert Image.open(tmp_path / "out" / "train_neighbours.png").size == (4 * 36 - 4, 4 * 36 - 4)


def test_an_interrupted_run_goes_on_to_identical_rows(tmp_path, model, monkeypatch):
    """Parts that are whole stay untouched; the rows are those of one run, bit for bit."""
    write_images(tmp_path / "images", 10)
    monkeypatch.setattr(embedding.save_embeddings, "__defaults__", (4,))
    expected = embed(tmp_path / "whole", model, tmp_path / "images")
    parts = sorted(path.name for path in (tmp_path / "whole" / "embeddings").glob("*.parquet"))
    assert parts == [f"test-{number:05}-of-00003.parquet" for number in range(3)]

    write, written = embedding._write, []

    def interrupted(*arguments):
        if len(written) == 1:
            arguments[-1].with_suffix(".writing").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(arguments[-1])
        write(*arguments)

    monkeypatch.setattr(embedding, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path / "half", model, tmp_path / "images")
    before = written[0].stat().st_mtime_ns
    monkeypatch.setattr(embedding, "_write", write)
    found = embed(tmp_path / "half", model, tmp_path / "images")
    assert written[0].stat().st_mtime_ns == before
    assert found.to_pandas().equals(expected.to_pandas())
    assert not list((tmp_path / "half").rglob("*.writing"))


def test_a_relative_name_of_the_folder_goes_on_from_an_absolute_one(tmp_path, model, monkeypatch):
    write_images(tmp_path / "images", 3)
    monkeypatch.chdir(tmp_path)
    expected = embed(tmp_path / "out", model, tmp_path / "images")
    assert embed(tmp_path / "out", model, "./images/").to_pandas().equals(expected.to_pandas())  # is not refused
    found = embed(tmp_path / "other", model, "images")
    assert found.to_pandas().equals(expected.to_pandas())


def test_features_of_others_are_not_mixed(tmp_path, model):
    images = tmp_path / "images"
    write_images(images, 3)
    embed(tmp_path / "out", model, images)
    with pytest.raises(ValueError, match=r"`output_dir` is '.*out', whose folder embeddings was made .* stages"):
        embed(tmp_path / "out", model, images, "--embed_stages", 1)
    processor = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps({**processor, "image_std": [0.5, 0.5, 0.5]}))
    for changed in (model, write_pretrained(tmp_path / "other", embed_dim=16)):
        with pytest.raises(ValueError, match="made with other model; give another folder"):
            embed(tmp_path / "out", changed, images)
    (model / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="made with other model"):
        embed(tmp_path / "out", model, images, "--config_overrides", "layer_norm_eps=0.1")
    noise_image(9).save(images / "001.png")  # of the same name
    with pytest.raises(ValueError, match="made with other images"):
        embed(tmp_path / "out", model, images)
    (tmp_path / "out" / "embeddings" / "test.json").write_text("{")
    with pytest.raises(ValueError, match="made with other model and images and stages and rows"):
        embed(tmp_path / "out", model, images)


def test_what_left_no_file_can_be_changed(tmp_path, model, monkeypatch):
    """As after a run that had too little memory."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    write_images(tmp_path / "images", 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding, "_write", interrupted)
        embed(tmp_path / "out", model, tmp_path / "images")
    flags = ("--per_device_eval_batch_size", 1, "--embed_stages", 1)
    assert len(embed(tmp_path / "out", model, tmp_path / "images", *flags)) == 3


def test_neighbours_are_drawn(tmp_path, model):
    """Of each pair of equal images, the other one comes first."""
    for index in range(6):
        for copy in "ab":
            path = tmp_path / "images" / f"{index}{copy}.png"
            path.parent.mkdir(exist_ok=True)
            noise_image(index).save(path)
    embed(tmp_path / "out", model, tmp_path / "images")
    picture = np.asarray(Image.open(tmp_path / "out" / "test_neighbours.png"))
    assert picture.shape == (6 * 36 - 4, 6 * 36 - 4, 3)
    for row in range(0, 6 * 36, 36):
        first, second, third = (picture[row : row + 32, column : column + 32] for column in (0, 36, 72))
        assert (first == second).all() and not (first == third).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mode", "embed", "--do_eval"), "`mode` is 'embed', which writes features and nothing else"),
        (("--mode", "embed", "--do_predict", "--do_train"), "`mode` is 'embed', which writes features"),
        (("--mode", "knn", "--do_predict", "--embed_stages", 1), r"`embed_stages` is \[1\], but `mode` is 'knn'"),
        ((*EMBED, "--config_name", "tiny"), "`model_name_or_path` is .* and `config_name` is 'tiny'"),
        ((*EMBED, "--embed_stages", 3), r"`embed_stages` is \[3\]; the model has the stages 1 to 2"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, model, flags, message):
    write_images(tmp_path / "images", 2)
    argv = classification_flags(tmp_path / "out", "--model_name_or_path", model, "--test_dir", tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        run_image_classification.main([*argv, *map(str, flags)])


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path, model):
    write_images(tmp_path / "images", 7)
    one = embed(tmp_path / "one", model, tmp_path / "images")
    flags = (*EMBED, "--model_name_or_path", model, "--test_dir", tmp_path / "images")
    script = Path(run_image_classification.__file__)
    run_in_processes(script, classification_flags(tmp_path / "two", *flags))
    two = read(tmp_path / "two")
    assert list(one["image"]) == list(two["image"])
    np.testing.assert_allclose(one["embedding"][:], two["embedding"][:], atol=1e-6)
