"""Publishing and loading over real HTTP, against a small server that speaks the Hub's API."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load

from modeling_greenmim import GreenMIMForImageClassification
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.hub_server import TOKEN
from tests.oracle import tiny_config
from tests.test_remote_code import CODE, PREAMBLE, PROCESSOR_CODE


# Each starts processes that import everything anew.
pytestmark = pytest.mark.slow

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REPO = "greenmim/swin-test"
PUSH = """
import sys
from modeling_greenmim import *
from modeling_greenmim.image_processing_greenmim import GreenMIMImageProcessorPil

model = GreenMIMForImageClassification.from_pretrained(sys.argv[1])
model.push_to_hub(sys.argv[2])
GreenMIMImageProcessorPil.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2])
"""


@pytest.fixture
def folder(tmp_path):
    model = GreenMIMForImageClassification(tiny_config())
    model.save_pretrained(tmp_path / "model")
    build_image_processor(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def execute(hub, tmp_path, command: list[str], token: str | None = TOKEN, name: str = "home") -> tuple[int, str]:
    """Exit status and output of a Python command whose Hub is the server."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / name),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
        **({"HF_TOKEN": token} if token else {}),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def push(hub, tmp_path, folder, **changes) -> tuple[int, str]:
    return execute(hub, tmp_path, ["-c", PUSH, folder, REPO], **changes)


def test_push_and_load_by_name(hub, folder, tmp_path):
    status, output = push(hub, tmp_path, folder)
    assert status == 0, output
    published = hub.files(REPO)
    names = {*CODE, *PROCESSOR_CODE, "config.json", "preprocessor_config.json", "model.safetensors"}
    assert names <= set(published)
    for name in (*CODE, *PROCESSOR_CODE):
        with open(os.path.join(ROOT, "modeling_greenmim", name), "rb") as file:
            assert published[name] == file.read(), "the package's own files"
    weights = GreenMIMForImageClassification.from_pretrained(folder).state_dict()
    found = load(published["model.safetensors"])
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)

    first = hub.branches[REPO]["main"]
    hub.commit(
        REPO, {"config.json": published["config.json"].replace(b'"mask_ratio": 0.75', b'"mask_ratio": 0.5')}, {}
    )
    code = """
first = sys.argv[2]
for auto in (AutoModel, AutoModelForPreTraining, AutoModelForMaskedImageModeling, AutoModelForImageClassification):
    print(auto.from_pretrained(folder, trust_remote_code=True, revision=first).__class__.__name__)
print(AutoBackbone.from_pretrained(folder, trust_remote_code=True, revision=first).__class__.__name__)
print(AutoConfig.from_pretrained(folder, trust_remote_code=True, revision=first).mask_ratio)
print(AutoConfig.from_pretrained(folder, trust_remote_code=True).mask_ratio)
from PIL import Image
classify = pipeline("image-classification", model=folder, trust_remote_code=True, revision=first)
print(len(classify(Image.new("RGB", (70, 80)))))
"""
    status, output = execute(hub, tmp_path, ["-I", "-c", PREAMBLE + code, REPO, first], token=None, name="elsewhere")
    assert status == 0, output
    expected = ["GreenMIMModel", "GreenMIMForPreTraining", "GreenMIMForPreTraining", "GreenMIMForImageClassification"]
    expected += ["GreenMIMBackbone", "0.75", "0.5", "2"]
    lines = iter(output.splitlines())
    assert all(any(line.strip() == wanted for line in lines) for wanted in expected), output


def test_a_wrong_token_is_refused(hub, folder, tmp_path):
    status, output = push(hub, tmp_path, folder, token="hf_wrong")
    assert status != 0 and "401" in output
    assert not hub.commits


def test_a_cut_upload_is_repeated(hub, folder, tmp_path):
    hub.cuts = 1
    status, output = push(hub, tmp_path, folder)
    assert status == 0, output
    assert len(hub.uploads) == 2 and hub.uploads[0] < hub.uploads[1]
    assert len(hub.files(REPO)["model.safetensors"]) == hub.uploads[1]


def test_nothing_is_half_published(hub, folder, tmp_path):
    hub.cuts = 1000
    status, _ = push(hub, tmp_path, folder)
    assert status != 0
    assert list(hub.files(REPO)) == [".gitattributes"], "a repository without any of the files"
    hub.cuts = 0
    status, output = push(hub, tmp_path, folder)
    assert status == 0, output
    assert {"model.safetensors", "config.json", "modeling_greenmim.py"} <= set(hub.files(REPO))


def test_pre_training_publishes_what_it_made(hub, tmp_path):
    overrides = "image_size=64,patch_size=8,embed_dim=8,depths=[1,1],num_heads=[1,2],num_channels=1"
    overrides += ",decoder_hidden_size=16,decoder_num_attention_heads=2,decoder_intermediate_size=32"
    command = ["run_mim.py", "--config_name", "tiny", "--config_overrides", overrides, "--do_train"]
    command += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--max_train_samples", 8, "--report_to", "none"]
    command += ["--output_dir", tmp_path / "out", "--push_to_hub", "true", "--hub_model_id", "greenmim/mine"]
    status, output = execute(hub, tmp_path, command)
    assert status == 0, output
    published = hub.files("greenmim/mine")
    assert {*CODE, "config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= set(published)
    assert b'from_pretrained("greenmim/mine"' in published["README.md"]
