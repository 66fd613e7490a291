"""Saved models load in an interpreter that has Transformers but not this project."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from modeling_greenmim import (
    GreenMIMBackbone,
    GreenMIMConfig,
    GreenMIMForImageClassification,
    GreenMIMForPreTraining,
    GreenMIMModel,
)
from modeling_greenmim.configuration_greenmim import AUTO_MAP
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.oracle import tiny_config


CODE = [
    *(
        "array_image.py",
        "attention.py",
        "blocks.py",
        "compat.py",
        "configuration_greenmim.py",
        "decoder.py",
        "encoders.py",
    ),
    *("hog.py", "layout.py", "losses.py", "masking.py", "modeling_greenmim.py", "packing.py", "planning.py"),
    *("plans.py", "precision.py", "resizing.py", "swin.py", "targets.py", "twins.py"),
]
PROCESSOR_CODE = ["image_processing_greenmim.py", "pixels.py"]
# The project may be installed for development: its packages are hidden from this interpreter.
PREAMBLE = """
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_greenmim", "configuration_greenmim", "training_greenmim"):
            raise ImportError(name)


sys.meta_path.insert(0, Hidden())
import torch
from transformers import *

folder = sys.argv[1]
"""


def run_elsewhere(code: str, folder, tmp_path) -> str:
    """Output of code in another interpreter and folder, with a cache of its own."""
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", PREAMBLE + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save(kind, folder):
    model = kind(tiny_config())
    model.save_pretrained(folder)
    build_image_processor(model.config).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "kind", [GreenMIMModel, GreenMIMForPreTraining, GreenMIMForImageClassification, GreenMIMBackbone]
)
def test_every_model_takes_all_code_and_names_along(kind, tmp_path):
    save(kind, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == sorted([*CODE, *PROCESSOR_CODE])
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert GreenMIMConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not {"auto_map", "image_processor_type"} & set(processor)


@pytest.mark.slow
def test_loads_where_the_project_is_not_importable(tmp_path):
    model = save(GreenMIMForImageClassification, tmp_path / "model")
    code = """
for auto in (AutoModel, AutoModelForPreTraining, AutoModelForMaskedImageModeling, AutoModelForImageClassification):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    print(auto.__name__, type(model).__name__)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
print(type(AutoBackbone.from_config(config, trust_remote_code=True)).__name__)
print(type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)).__name__)
from PIL import Image
image = Image.new("RGB", (70, 80))
print(len(pipeline("image-classification", model=folder, trust_remote_code=True)(image)))
print(len(pipeline("image-feature-extraction", model=folder, trust_remote_code=True)(image)))
print(model.classifier.weight.double().sum().item())
model.save_pretrained(folder + "-again")
"""
    lines = run_elsewhere(code, tmp_path / "model", tmp_path).splitlines()
    assert lines[:6] == [
        "AutoModel GreenMIMModel",
        "AutoModelForPreTraining GreenMIMForPreTraining",
        "AutoModelForMaskedImageModeling GreenMIMForPreTraining",
        "AutoModelForImageClassification GreenMIMForImageClassification",
        "GreenMIMBackbone",
        "GreenMIMImageProcessorPil",
    ]
    assert lines[6:8] == ["2", "1"]
    assert float(lines[8]) == pytest.approx(model.classifier.weight.double().sum().item(), abs=1e-5)
    # What was loaded so can be saved and loaded so again.
    again = run_elsewhere(
        "print(type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__)",
        tmp_path / "model-again",
        tmp_path,
    )
    assert again.strip() == "GreenMIMModel"


@pytest.mark.slow
def test_installed_and_imported_needs_no_trust(tmp_path):
    save(GreenMIMForImageClassification, tmp_path / "model")
    code = f"""
import modeling_greenmim
from transformers import AutoModel, pipeline

print(type(AutoModel.from_pretrained({str(tmp_path / "model")!r})).__module__)
print(type(pipeline("image-classification", model={str(tmp_path / "model")!r}).model).__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["modeling_greenmim.modeling_greenmim"] * 2


# What the models import


def needed_by(names: list[str]) -> set[str]:
    """Names of the installed distributions that these require, and theirs, extras aside."""
    found, left = set(), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(canonicalize_name(requirement.name))
    return found


def test_models_import_nothing_beyond_torch_transformers_safetensors_and_numpy(tmp_path):
    """In an interpreter with these and what they themselves require: no Pillow, accelerate, datasets and so on."""
    allowed = needed_by(["torch", "transformers", "safetensors", "numpy"])
    site = tmp_path / "site"
    site.mkdir()
    for name in allowed:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    for package in ("modeling_greenmim", "configuration_greenmim.py"):
        (site / package).symlink_to(Path(__file__).parent.parent / package)
    code = f"""
import sys

sys.path.append({str(site)!r})
import torch
from modeling_greenmim import *

config = GreenMIMConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], mask_ratio=0.5)
for model_class in (GreenMIMModel, GreenMIMForPreTraining, GreenMIMForImageClassification, GreenMIMBackbone):
    model = model_class(config)
    model.save_pretrained({str(tmp_path / "model")!r})
    model_class.from_pretrained({str(tmp_path / "model")!r})(torch.rand(1, 3, 32, 32))
try:
    import PIL
except ImportError:
    print("no Pillow")
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no Pillow"
    assert "pillow" not in allowed and "accelerate" not in allowed
