"""Releases over real HTTP, against the small server that speaks the Hub's API."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load, save

from modeling_greenmim import GreenMIMForImageClassification, GreenMIMForPreTraining
from modeling_greenmim.conversion import CheckpointError, import_checkpoint, release_model
from modeling_greenmim.conversion.releasing import complete_card
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.hub_server import TOKEN
from tests.oracle import tiny_config
from tests.test_conversion import HEADS, ROW, TINY, official_shapes, random_weights, write_official
from tests.test_hub import execute
from tests.test_remote_code import CODE, PROCESSOR_CODE
from training_greenmim.runs.starts import start_of


REPO = "greenmim/swin-test"
CARDS = Path(__file__).parent.parent / "model_cards"
CARD = """---
license: cc-by-nc-4.0
library_name: transformers
pipeline_tag: image-feature-extraction
---

# mine

![Loss](pictures/loss.png)

```python
model = AutoModel.from_pretrained("outputs/mine", trust_remote_code=True)
```
"""
# Each command in turn, in one process: what it prints, and its exit code.
COMMANDS = """
import shlex, sys
from modeling_greenmim.conversion.__main__ import main

for command in sys.argv[1:]:
    try:
        main(shlex.split(command))
        print("exit 0", flush=True)
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""


def write_folder(folder, kind=GreenMIMForPreTraining, card: str = CARD):
    model = kind(tiny_config())
    model.save_pretrained(folder)
    build_image_processor(model.config).save_pretrained(folder)
    (folder / "README.md").write_text(card)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "loss.png").write_bytes(b"picture")
    (folder / "optimizer.pt").write_bytes(b"what is not to be published")
    return folder


def release(hub, tmp_path, *flags: str, token: str | None = TOKEN) -> str:
    """What one `release` after the other prints, each ended by its exit code."""
    commands = [f"release {words}" for words in flags]
    status, output = execute(hub, tmp_path, ["-c", COMMANDS, *commands], token=token)
    assert status == 0, output
    return output


@pytest.mark.slow
def test_an_imported_model_is_released_and_its_tag_stays(hub, tmp_path):
    path = write_official(tmp_path / "official.pth", random_weights(official_shapes(**TINY)), model=ROW)
    folder = tmp_path / "mine"
    model = import_checkpoint(path, folder, **HEADS)
    refused = release(hub, tmp_path, f"--model {folder} --repo {REPO}")
    assert "has no license in its metadata" in refused and "exit 2" in refused and not hub.commits
    text = (folder / "README.md").read_text()
    text = re.sub(r" The licence of that file holds.*?publishing\.", "", text, flags=re.DOTALL)
    (folder / "README.md").write_text(text.replace("---\n", "---\nlicense: cc-by-nc-4.0\n", 1))

    other = f"--model {folder} --repo {REPO} --tag v1.1"
    output = release(hub, tmp_path, f"--model {folder} --repo {REPO}", f"--model {folder} --repo {REPO}", other)
    assert re.findall(r"exit (\d)", output) == ["0", "2", "0"], output
    found = re.findall(rf"{REPO}, tag (\S+): loaded back by name; relative difference of outputs: (\S+)", output)
    assert [tag for tag, _ in found] == ["v1.0", "v1.1"] and max(float(number) for _, number in found) < 1e-6
    assert f"`tag` is 'v1.0', which `repo` '{REPO}' has already" in output
    published = hub.files(REPO, "v1.0")
    names = {*CODE, *PROCESSOR_CODE, "config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert set(published) == {*names, ".gitattributes"}
    weights = load(published["model.safetensors"])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    card = ModelCard(published["README.md"].decode())
    assert card.data.license == "cc-by-nc-4.0" and card.text.count(f'from_pretrained("{REPO}"') == 2
    assert hub.tags[REPO]["v1.1"] == hub.branches[REPO]["main"]


@pytest.mark.slow
def test_a_classifier_is_released_in_private(hub, tmp_path):
    folder = write_folder(tmp_path / "mine", GreenMIMForImageClassification)
    # A repository that is public cannot be made private by a release.
    hub.create("greenmim/public")
    flags = f"--model {folder} --private"
    output = release(hub, tmp_path, f"{flags} --repo {REPO}", f"{flags} --repo greenmim/public")
    assert re.findall(r"exit (\d)", output) == ["0", "2"], output
    assert "`repo` 'greenmim/public' is there already, and public" in output
    assert hub.private == {REPO} and list(hub.tags[REPO]) == ["v1.0"]
    published = hub.files(REPO)
    assert published["pictures/loss.png"] == b"picture" and "optimizer.pt" not in published
    status, output = execute(
        hub, tmp_path, ["-c", f"from huggingface_hub import *; model_info('{REPO}')"], token=None, name="elsewhere"
    )
    assert status and "401" in output, "the server shows it to nobody else"


@pytest.mark.slow
def test_what_does_not_work_when_loaded_back_gets_no_tag(hub, tmp_path):
    folder = write_folder(tmp_path / "mine")
    hub.replaced = {"swin.py": b"import modeling_greenmim.swin\n"}
    output = release(hub, tmp_path, f"--model {folder} --repo {REPO}")
    assert "was pushed, but not tagged: it does not load by name: " in output and "exit 2" in output
    assert "must not import the project" in output and hub.tags[REPO] == {}
    weights = load((folder / "model.safetensors").read_bytes())
    weights["decoder.decoder_pred.bias"] += 0.1
    hub.replaced = {"model.safetensors": save(weights, metadata={"format": "pt"})}
    output = release(hub, tmp_path, f"--model {folder} --repo {REPO}")
    assert "was pushed, but not tagged: loaded back it computes something else" in output and "exit 2" in output
    assert hub.tags[REPO] == {}
    hub.replaced = {}
    assert "exit 0" in release(hub, tmp_path, f"--model {folder} --repo {REPO}")
    assert list(hub.tags[REPO]) == ["v1.0"]


@pytest.mark.slow
def test_wrong_tokens_and_licences_are_refused_before_anything_is_made(hub, tmp_path):
    folder = write_folder(tmp_path / "mine")
    output = release(hub, tmp_path, f"--model {folder} --repo {REPO}", token="hf_wrong")
    assert f"`repo` '{REPO}' cannot be published: " in output and "exit 2" in output
    (folder / "README.md").write_text(CARD.replace("cc-by-nc-4.0", "cc-by-nc"))
    output = release(hub, tmp_path, f"--model {folder} --repo {REPO}")
    assert "must be one of" in output and "exit 2" in output, "the Hub's own rules"
    assert not hub.commits


# Before the network


def test_folders_names_and_tokens(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"`model` is '.*nowhere', where there is no folder"):
        release_model(str(tmp_path / "nowhere"), REPO)
    folder = write_folder(tmp_path / "mine")
    for repo in ("swin-base", "a/b/c", "greenmim/swin base"):
        with pytest.raises(CheckpointError, match=rf"`repo` is '{repo}'; OWNER/NAME is needed"):
            release_model(str(folder), repo)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(CheckpointError, match="There is no token of the Hub: `hf auth login`, or set HF_TOKEN"):
        release_model(str(folder), REPO)
    (folder / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"The card '.*README\.md' is missing"):
        release_model(str(folder), REPO)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="The image processor of `model`"):
        release_model(str(folder), REPO)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "license: cc-by-nc-4.0\n",
            "",
            r"has no license in its metadata\. Write `license: ...` there, .* images allow\.$",
        ),
        ("library_name: transformers\n", "", "has no library_name in its metadata"),
        ("license: cc-by-nc-4.0\nlibrary", "license: null\nlibrary", "has no license in its metadata"),
        ("license: cc-by-nc-4.0", "license: [", "README.md' cannot be read"),
        (CARD, "# mine", "has no license, library_name, pipeline_tag in its metadata"),
        ("# mine", "# {title}", r"is not finished: it has '\{title\}'"),
        ("# mine", "[More Information Needed]", r"is not finished: it has '\[More"),
        ("pictures/loss.png", "../mine/pictures/loss.png", r"shows \.\./mine/.*, which the folder lacks"),
        ("loss.png", "curve.png", r"shows pictures/curve\.png, which the folder lacks"),
    ],
)
def test_cards_that_are_not_complete_are_refused(old, new, message, tmp_path):
    folder = write_folder(tmp_path / "mine", card=CARD.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        complete_card(folder, REPO)


@pytest.mark.parametrize("name", ["swin-base", "swin-base-win14", "swin-large-win14"])
def test_cards_of_released_models_keep_their_licence(name, tmp_path):
    text = (CARDS / f"{name}.md").read_text()
    (tmp_path / "README.md").write_text(text)
    card, given = ModelCard(complete_card(tmp_path, f"greenmim/{name}")), ModelCard(text)
    assert card.text == given.text and card.data.to_dict() == given.data.to_dict()
    elsewhere = ModelCard(complete_card(tmp_path, "you/mine")).text
    assert elsewhere.count("you/mine") == text.count(f"greenmim/{name}") and f"greenmim/{name}" not in elsewhere
    (tmp_path / "README.md").write_text(text.replace("license: cc-by-nc-4.0", "license: apache-2.0"))
    with pytest.raises(CheckpointError, match=r"has `license: apache-2\.0`, but .* under cc-by-nc-4\.0"):
        complete_card(tmp_path, REPO)


def test_cards_that_wait_for_their_publisher_are_refused(tmp_path):
    (tmp_path / "README.md").write_text((CARDS / "swin-tiny.md").read_text())
    with pytest.raises(CheckpointError, match=r"is not finished: it has 'who publishes"):
        complete_card(tmp_path, REPO)
    text = (CARDS / "converted.md").read_text().replace("{task}", "image-feature-extraction")
    (tmp_path / "README.md").write_text(text.replace("---\n", "---\nlicense: mit\n", 1))
    with pytest.raises(CheckpointError, match=r"is not finished: it has .*'before publishing'"):
        complete_card(tmp_path, REPO)


@pytest.mark.parametrize(
    ("origin", "own", "is_right"),
    [
        ("cc-by-nc-4.0", "cc-by-nc-4.0", True),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", True),  # of photographs that ask for more
        ("cc-by-nc-4.0", "mit", False),
        ("gpl-3.0", "apache-2.0", False),
        ("apache-2.0", "cc-by-nc-sa-4.0", True),
        (None, "mit", True),
    ],
)
def test_what_a_run_started_from_binds_its_licence(origin, own, is_right, tmp_path):
    """As the card of a run names it."""
    start = write_folder(tmp_path / "start", card=CARD.replace("cc-by-nc-4.0", origin) if origin else "# none\n")
    with start_of(str(start), "model_name_or_path") as found:
        row = f"| starts from | {found.origin} |"
    folder = write_folder(tmp_path / "mine", card=CARD.replace("cc-by-nc-4.0", own) + row)
    if is_right:
        assert ModelCard(complete_card(folder, REPO)).data.license == own
    else:
        with pytest.raises(CheckpointError, match=f"has `license: {own}`, but says .* is under {origin}"):
            complete_card(folder, REPO)
    if origin == "gpl-3.0":
        (folder / "README.md").write_text(CARD.replace("license: cc-by-nc-4.0\n", "") + row)
        with pytest.raises(CheckpointError, match=r"has no license .* made from, which is under gpl-3\.0"):
            complete_card(folder, REPO)
