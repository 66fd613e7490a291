# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Publishing a model on the Hub: checked before, and loaded back by name after."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor

from modeling_greenmim.configuration_greenmim import AUTO_MAP

from . import clean_load
from .checkpoint import CheckpointError
from .exporting import read_model
from .reading import clear_errors


REQUIRED = ("license", "library_name", "pipeline_tag")
# Fields of templates, and what our own cards ask of those who publish them.
UNFINISHED = re.compile(r"\{[a-z_]+\}|\[More Information Needed\]|\bTODO\b|before\s+publishing|who\s+publishes\s+them")
# How our cards tell the licence of what a model was made from: those of runs, and those of the released weights.
LICENCE_OF_ORIGIN = re.compile(r"licence: ([\w.-]+)\)|under their\s+licence, ([\w.-]+\w)")
# Licences that let one choose another for what is made of it.
PERMISSIVE = ("apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "mit")
PICTURE = re.compile(r"!\[[^]]*\]\((?!https?:)([^)\s]+)\)")
LOADED = re.compile(r'(?:from_pretrained\(|model=)"([^"]+)"')
# Of outputs, relative to the largest: rounding of other threads.
TOLERANCE = 1e-5


def release_model(folder: str, repo: str, tag: str = "v1.0", private: bool = False) -> float:
    """Pushes a model with its image processor, card and code in one commit, loads it back by name, and tags it.

    It is tagged last, so that a tag names what works; without one the same command may be run again.

    Args:
        folder: of a GreenMIM model, with its image processor and card (README.md).
        repo: OWNER/NAME on the Hub; made if it is not there. Code of the card that loads the model gets this name.
        tag: of the release.
        private: whether a new repository is private.

    Returns:
        Largest difference between the outputs of the model here and of that loaded back, relative to the largest.

    Raises:
        `CheckpointError`: for a folder or card that is not complete, without a token, for a tag that is there
        already, and when pushing or loading back fails.
    """
    _check_name(repo)
    if not Path(folder).is_dir():
        raise CheckpointError(f"`model` is {str(folder)!r}, where there is no folder.")
    model = read_model(folder).eval()
    with clear_errors(f"The image processor of `model` {str(folder)!r}"):
        processor = AutoImageProcessor.from_pretrained(folder)
    card = complete_card(Path(folder), repo)
    token = get_token()
    if token is None:
        raise CheckpointError("There is no token of the Hub: `hf auth login`, or set HF_TOKEN. It needs to write.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as parent:
        files = Path(parent, "files")
        model.save_pretrained(files)
        processor.save_pretrained(files)
        (files / "README.md").write_text(card, encoding="utf-8")
        for picture in PICTURE.findall(card):
            (files / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder, picture), files / picture)
        with _any_error(f"`repo` {repo!r} cannot be published"):
            api.whoami()
            _check_repository(api, repo, tag, private)
            ModelCard(card).validate()
            api.create_repo(repo, private=private or None, exist_ok=True)
            commit = api.upload_folder(repo_id=repo, folder_path=files, commit_message=f"Release {tag}")
        found = _loaded_back(repo, model, token, Path(parent))
    expected = clean_load.outputs_on_fixed_image(model, processor)
    difference = _difference(found, expected)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"`repo` {repo!r} was pushed, but not tagged: loaded back it computes something else, by"
            f" {difference:.1e} of the largest output."
        )
    with _any_error(f"`repo` {repo!r} was pushed and works, but cannot be tagged {tag!r}"):
        api.create_tag(repo, tag=tag, revision=commit.oid)
    return difference


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(f"`repo` is {repo!r}; OWNER/NAME is needed: {error}") from error
    if repo.count("/") != 1:
        raise CheckpointError(f"`repo` is {repo!r}; OWNER/NAME is needed.")


def complete_card(folder: Path, repo: str) -> str:
    """The card of a folder, whose code loads the model by its name on the Hub.

    Raises:
        `CheckpointError`: naming what is missing, unfinished or wrong.
    """
    what = f"The card {str(folder / 'README.md')!r}"
    if not (folder / "README.md").is_file():
        raise CheckpointError(f"{what} is missing; runs and imports write one.")
    with _any_error(f"{what} cannot be read"):
        card = ModelCard.load(folder / "README.md")
        values = card.data.to_dict()
    missing = [name for name in REQUIRED if not values.get(name)]
    if missing:
        hint = ""
        if "license" in missing:
            origins = licences_of_origin(card.text)
            hint = " Write `license: ...` there, one that its images allow"
            hint += f", and what the model was made from, which is under {', '.join(origins)}." if origins else "."
        raise CheckpointError(f"{what} has no {', '.join(missing)} in its metadata.{hint}")
    unfinished = dict.fromkeys(UNFINISHED.findall(card.content))
    if unfinished:
        raise CheckpointError(f"{what} is not finished: it has {', '.join(map(repr, unfinished))}.")
    for origin in licences_of_origin(card.text):
        if not _may_carry(values["license"], origin):
            raise CheckpointError(
                f"{what} has `license: {values['license']}`, but says that what the model was made from is under"
                f" {origin}, which holds for it too."
            )
    inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    absent = [name for name in PICTURE.findall(card.text) if Path(name).as_posix() not in inside]
    if absent:
        raise CheckpointError(f"{what} shows {', '.join(absent)}, which the folder lacks.")
    content = card.content
    for name in set(LOADED.findall(card.text)):
        content = re.sub(rf'("|--model_name_or_path ){re.escape(name)}(?=["`\s])', rf"\g<1>{repo}", content)
    return content


def licences_of_origin(text: str) -> list[str]:
    """The licences that a card of ours tells of what the model was made from; unknown ones are left out."""
    found = [(first or second).lower() for first, second in LICENCE_OF_ORIGIN.findall(text)]
    return [licence for licence in found if licence != "unknown"]


def _may_carry(licence: str, origin: str) -> bool:
    """Whether a model may have a licence: every term of its origin's (by, nc, sa, ...) is among its own."""
    return origin in PERMISSIVE or set(origin.split("-")) <= set(str(licence).split("-"))


def _check_repository(api: HfApi, repo: str, tag: str, private: bool) -> None:
    """Refuses a tag that is there, and to be private what is public."""
    try:
        is_private = api.model_info(repo).private
    except RepositoryNotFoundError:
        return
    if private and not is_private:
        raise CheckpointError(f"`private` is set, but `repo` {repo!r} is there already, and public.")
    tags = {found.name: found.target_commit for found in api.list_repo_refs(repo).tags}
    if tag in tags:
        raise CheckpointError(f"`tag` is {tag!r}, which `repo` {repo!r} has already, at {tags[tag]}; give another.")


def _loaded_back(repo: str, model: nn.Module, token: str, folder: Path) -> torch.Tensor:
    """What the published model computes, in an interpreter that lacks this project, from an empty cache."""
    auto_class = next(name for name, path in AUTO_MAP.items() if path.endswith(f".{type(model).__name__}"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_TOKEN": token, "HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "home" / "hub")}
    environment |= {"HF_MODULES_CACHE": str(folder / "home" / "modules")}
    output = folder / "outputs.safetensors"
    # -P: the folder of the file, which is a part of this project, is no place to import from.
    command = [sys.executable, "-P", clean_load.__file__, repo, auto_class, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise CheckpointError(f"`repo` {repo!r} was pushed, but not tagged: it does not load by name: {last[0]}")
    return load_file(output)["outputs"]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max()).item()


@contextmanager
def _any_error(what: str):
    """Whatever the network, the server, huggingface_hub or yaml raises becomes a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {error}") from error
