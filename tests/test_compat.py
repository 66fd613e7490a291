"""Canaries: each fails, saying what changed, when a new version of a library breaks what compat.py relies on."""

import inspect

import datasets
import numpy as np
from PIL import Image
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline
from transformers.image_utils import load_image

from training_greenmim.compat import datasets_cache_folder, datasets_fingerprint


# transformers


def test_pipelines_convert_images_to_rgb_before_the_image_processor():
    """Or else images of 16 bits need no `open_image` before a pipeline any more."""
    sixteen_bits = Image.fromarray(np.full((8, 8), 0x1234, dtype=np.uint16))
    assert np.asarray(load_image(sixteen_bits)).tolist() == np.full((8, 8, 3), 255).tolist(), "no longer turned white"
    for pipe in (ImageClassificationPipeline, ImageFeatureExtractionPipeline):
        assert "load_image(" in inspect.getsource(pipe.preprocess), f"{pipe.__name__} opens images in another way"


# accelerate


# datasets


def test_datasets_know_alike_data_sets_by_a_fingerprint():
    first, again, other = (datasets.Dataset.from_dict({"number": numbers}) for numbers in ([1, 2], [1, 2], [1, 3]))
    assert datasets_fingerprint(first) == datasets_fingerprint(again), "alike data sets have different fingerprints"
    assert datasets_fingerprint(first) != datasets_fingerprint(other), "different data sets have one fingerprint"
    assert datasets_fingerprint(first.select([0])) != datasets_fingerprint(first.select([1]))


def test_datasets_keep_their_files_where_their_configuration_says(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert datasets_cache_folder() == str(tmp_path)
    write_csv = tmp_path / "numbers.csv"
    write_csv.write_text("number\n1\n")
    records = datasets.load_dataset("csv", data_files=str(write_csv), split="train")
    file = records.cache_files[0]["filename"]
    assert file.startswith(str(tmp_path)), "HF_DATASETS_CACHE is not where files lie"


# evaluate


# kornia
