"""Every block of code in README.md and docs/ runs, and what these pages name exists.

Blocks of a page run in order, in one working directory, where `photos`, `train`, `validation`, `outputs/photos`
(pre-trained), `outputs/classifier`, `scenes` (with class maps) and `objects` (with boxes and masks) are small made
ones, and any image that Python opens. Commands of the scripts run in this process, as typed but for a tiny model and
two steps (`TINY`); Python runs as it is. A name of the Hub is a local folder here. In a command, `...` stands for the
flags of the page's command before it. A block of YAML whose first line is `# name.yaml` is written to that file.
Commands that a test cannot run are those of `CHECKS`, where it says what is checked instead; any other command fails.
"""

import argparse
import configparser
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from transformers import Trainer

import run_image_classification
import run_mim
from modeling_greenmim import GreenMIMForImageClassification
from modeling_greenmim.conversion.__main__ import build_parser
from modeling_greenmim.image_processing_greenmim import build_image_processor
from tests.drawn_objects import write_objects
from tests.test_dense_segmentation import write_shapes
from tests.test_teacher import write_teacher
from tests.training_helpers import noise_image, tiny_config, write_class_folders, write_images, write_pretrained
from training_greenmim.pretraining.targets import TargetArguments
from training_greenmim.runs.arguments import ClassificationTrainingArguments, MIMTrainingArguments
from training_greenmim.runs.models import build_config


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Fences of these are code that runs; `text` is for drawings, `yaml` for files of arguments.
LANGUAGES = {"bash", "python", "text", "yaml"}

# Four stages, as the pages' own models have.
SIZES = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4}
TINY_MODEL = (
    "image_size=64,embed_dim=8,depths=[2,1,1,1],num_heads=[1,1,1,1],window_size=4,num_channels=3,"
    "decoder_hidden_size=16,decoder_num_attention_heads=2,decoder_intermediate_size=32"
)
TINY = (
    "--max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --dataloader_num_workers 0"
    " --disable_tqdm true --logging_steps 1"
).split()
# Flags that are left out here, and where they are tested.
ELSEWHERE = {"--torch_compile": "test_run_mim.py: a compiled run is the run as it is"}
DETECTION, SEGMENTATION = "examples/dense/run_object_detection", "examples/dense/run_semantic_segmentation"
SCRIPTS = {
    "run_mim": run_mim,
    "run_image_classification": run_image_classification,
    SEGMENTATION: SimpleNamespace(**runpy.run_path(str(ROOT / f"{SEGMENTATION}.py"))),
    DETECTION: SimpleNamespace(**runpy.run_path(str(ROOT / f"{DETECTION}.py"))),
}
# What else makes a run of a script small, where a head is new.
SMALLER = {DETECTION: ["--crop_size", "64"], SEGMENTATION: ["--crop_size", "64"]}
SMALL_HEADS = {
    DETECTION: {
        "detection": "num_queries=20,d_model=32,encoder_hidden_dim=32,encoder_ffn_dim=32,decoder_ffn_dim=32"
        ",decoder_layers=2",
        "instances": "hidden_dim=32,feature_size=32,mask_feature_size=32,encoder_layers=1,decoder_layers=3",
    }
}
# Where none of them is given, the photographs of solar cells are read.
SOURCES = ("train_dir", "validation_dir", "test_dir", "dataset_name")


@dataclass
class Block:
    """Code of a page, between fences."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    found, opening = [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if opening is None:
                opening, code = Block(page, number, line[3:].strip(), ""), []
            else:
                opening.code = "\n".join(code) + "\n"
                found.append(opening)
                opening = None
        elif opening is not None:
            code.append(line)
    assert opening is None, f"{opening} is not closed"
    return found


def commands_of(block: Block) -> list[list[str]]:
    """Words of each command, without comments; the environment's settings before it are words too."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# What cannot run here


def check_make(words: list[str]) -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert words[1:] and set(words[1:]) <= set(rules), f"the Makefile has {rules}"


def check_pip(words: list[str]) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert words[1] == "install"
    for before, word in pairwise(words):
        if before == "--constraint":
            assert (ROOT / word).is_file()
        for extra in re.findall(r"\.\[(.*)\]", word):
            assert set(extra.split(",")) <= set(config["options.extras_require"])


def check_sbatch(words: list[str]) -> None:
    """Flags of the scripts' commands: test_distributed.py."""
    (script,) = words[1:]
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,  # the rule exists
    "pip": check_pip,  # constraints and extras exist
    "sbatch": check_sbatch,  # the script exists and is one of bash
    "git": lambda words: None,
    "cd": lambda words: None,
    "hf": lambda words: None,  # needs the Hub
    "tensorboard": lambda words: None,  # a server
}


class Parsed(Exception):
    """The arguments of a benchmark are right."""


def check_benchmark(words: list[str], monkeypatch) -> None:
    """Its flags are understood; it does not run."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *args):
        parse(self, *args)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


# What runs


def write_model(folder: Path, classes: int = 0) -> None:
    """A tiny model as it is published, with its code; pre-trained, or a classifier of so many classes."""
    if not classes:
        write_pretrained(folder, **SIZES)
        return
    model = GreenMIMForImageClassification(tiny_config(**SIZES, num_labels=classes))
    model.save_pretrained(folder)
    build_image_processor(model.config).save_pretrained(folder)


def write_parquet(folder: Path, columns: tuple[str, str]) -> None:
    """A data set with labels, in two files for training and one for testing."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=["red", "blue"])}
    )
    for name, first in (("train-0", 0), ("train-1", 8), ("test-0", 16)):
        images = [noise_image(seed) for seed in range(first, first + 8)]
        records = datasets.Dataset.from_dict({columns[0]: images, columns[1]: [0, 1] * 4}, features)
        records.to_parquet(folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What the pages take for given."""
    folder = tmp_path_factory.mktemp("given")
    write_images(folder / "photos" / "2024", 12)
    write_images(folder / "photos" / "2025", 12, first_seed=100)
    write_class_folders(folder / "train", {"red": 12, "blue": 12})
    write_class_folders(folder / "validation", {"red": 4, "blue": 4}, first_seed=500)
    write_shapes(folder / "scenes" / "train", 12)
    write_shapes(folder / "scenes" / "validation", 4, seed=1)
    write_objects(folder / "objects" / "train", 12, size=64)
    write_objects(folder / "objects" / "validation", 4, seed=1, size=64)
    write_model(folder / "outputs" / "photos")
    write_model(folder / "outputs" / "classifier", classes=2)
    write_teacher(folder / "facebook" / "dinov2-small", "dinov2")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def value_of(argv: list[str], flag: str, default: str | None = None) -> str | None:
    """The last value of a flag."""
    places = [place for place, word in enumerate(argv) if word == flag]
    return argv[places[-1] + 1] if places else default


class Runner:
    """Runs the blocks of one page, one after the other."""

    def __init__(self, page: Path, monkeypatch):
        self.monkeypatch = monkeypatch
        self.resumes = any("--resume_from_checkpoint" in block.code for block in blocks_of(page))
        self.flags: list[str] = []  # of the command before
        self.names = {
            "image": noise_image(3, 80, 70),
            "pixel_values": torch.randn(2, 3, 64, 64),
            "labels": torch.randint(0, 3, (2, 64, 64)),
        }

    def run(self, block: Block) -> None:
        if block.language == "python":
            self.provide(block.code)
            exec(compile("\n" * block.line + block.code, str(block.page), "exec"), self.names)
        elif block.language == "yaml":
            name = re.match(r"# (\S+\.ya?ml)\n", block.code)
            yaml.safe_load(block.code)
            if name:
                Path(name[1]).write_text(block.code)
        elif block.language == "bash":
            for words in commands_of(block):
                self.command(words)

    def command(self, words: list[str]) -> None:
        while re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words[0] == "export":
            return
        if words[:2] == ["accelerate", "launch"]:  # one process, here
            used = launch_command_parser().parse_args(words[2:])
            if used.config_file:
                assert Path(used.config_file).is_file(), used.config_file
            words = ["python", used.training_script, *used.training_script_args]
        if words[0] in CHECKS:
            CHECKS[words[0]](words)
            return
        assert words[0] == "python", f"a command that no test knows: {shlex.join(words)}"
        module = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
        argv = words[3:] if words[1] == "-m" else words[2:]
        if module in SCRIPTS:
            self.script(module, argv)
        elif module == "modeling_greenmim.conversion":
            self.convert(argv)
        elif module.startswith("benchmarks/"):
            check_benchmark(words[1:], self.monkeypatch)
        else:
            raise AssertionError(f"a command that no test knows: {shlex.join(words)}")

    def script(self, name: str, argv: list[str]) -> None:
        if "..." in argv:
            place = argv.index("...")
            argv = argv[:place] + self.flags + argv[place + 1 :]
        self.flags = argv
        given = yaml.safe_load(Path(argv[0]).read_text()) if argv[0].endswith((".yaml", ".yml", ".json")) else {}
        given |= {word[2:]: value_of(argv, word) for word in argv if word.startswith("--") and word != argv[-1]}
        argv = [word for word in argv if word not in ELSEWHERE]

        model = given.get("model_name_or_path")
        if model:
            self.provide_model(model)
        elif name == "run_mim" or given.get("config_name"):
            if value_of(argv, "--config_overrides"):  # what the page says is a model, if a large one
                with torch.device("meta"):
                    build_config(given.get("config_name", "base"), value_of(argv, "--config_overrides"))
            argv = [*argv, "--config_overrides", TINY_MODEL]
            if value_of(argv, "--recipe") == "auto":  # which says itself what the model is, unless one is named
                argv += ["--config_name", "tiny"]
        if not any(given.get(source) for source in SOURCES):
            argv = [*argv, "--max_train_samples", "16", "--max_eval_samples", "8"]
        data = value_of(argv, "--dataset_name")
        if data and not Path(data).exists():
            columns = [value_of(argv, f"--{column}_column_name", column) for column in ("image", "label")]
            write_parquet(Path(data), columns)
        saving = ["--save_strategy", "steps", "--save_steps", "1"] if self.resumes else ["--save_strategy", "no"]
        argv = [*argv, *TINY, *saving, *SMALLER.get(name, [])]
        if name in SMALL_HEADS and "--do_train" in argv:
            argv += ["--head_overrides", SMALL_HEADS[name][value_of(argv, "--task", "detection")]]
        output = Path(given.get("output_dir", "trainer_output"))
        if value_of(argv, "--resume_from_checkpoint") == "true":
            self.interrupt(output)
        elif "--do_train" in argv and output.exists():
            shutil.rmtree(output)  # of what is given, or of another way to do the same

        pushed = []
        with self.monkeypatch.context() as patch:
            patch.setattr(Trainer, "init_hf_repo", lambda trainer, *args: None)
            patch.setattr(Trainer, "push_to_hub", lambda trainer, *args, **kwargs: pushed.append(trainer))
            try:
                SCRIPTS[name].main(argv)
            except SystemExit as exit:  # --help
                assert not exit.code
        assert bool(pushed) == ("--push_to_hub" in argv)

    @staticmethod
    def interrupt(output: Path) -> None:
        """Makes of a finished run one that was stopped before its last checkpoint."""
        checkpoints = sorted(output.glob("checkpoint-*"))
        assert len(checkpoints) > 1, f"{output} has no run to go on with"
        for path in output.iterdir():
            if path == checkpoints[-1]:
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()

    def convert(self, argv: list[str]) -> None:
        if argv[0] == "release":  # needs the Hub: test_releasing.py
            build_parser().parse_args(argv)
            return
        source = value_of(argv, "--checkpoint")
        if source and not Path(source).exists():
            self.conversion(["export", "--model", "outputs/photos", "--to", "original", "--output", source])
        if value_of(argv, "--model"):
            self.provide_model(value_of(argv, "--model"))
        if labels := value_of(argv, "--labels"):
            Path(labels).write_text("wall\nfloor\n")
        self.conversion(argv)

    def conversion(self, argv: list[str]) -> None:
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["conversion", *argv])
            patch.delitem(sys.modules, "modeling_greenmim.conversion.__main__", raising=False)
            try:
                runpy.run_module("modeling_greenmim.conversion", run_name="__main__", alter_sys=True)
            except SystemExit as exit:
                assert not exit.code

    def provide(self, code: str) -> None:
        """Makes the images and models that code opens."""
        for name in re.findall(r'"([\w/]+\.(?:png|jpg))"', code):
            if not Path(name).exists():
                noise_image(7, 80, 70).save(name)
        for name in re.findall(r'"([\w/]+\.npy)"', code):
            np.save(name, np.asarray(noise_image(7, 80, 70)))
        for line in code.splitlines():
            for name in re.findall(r'(?:from_pretrained\(|build_head\(|model=)"([^"]+)"', line):
                self.provide_model(name, classes=2 if "lassif" in line else 0)

    @staticmethod
    def provide_model(name: str, classes: int = 0) -> None:
        if not Path(name).exists():
            write_model(Path(name), classes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page, made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    runner = Runner(page, monkeypatch)
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block} is {block.language!r}; it must be one of {sorted(LANGUAGES)}"
        try:
            runner.run(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block}: {error}\n{block.code}") from error


# What pages name


def known_flags() -> set[str]:
    """Of the scripts, of the conversion, of what starts them, and of the benchmarks."""
    parts = [MIMTrainingArguments, ClassificationTrainingArguments]
    arguments = ("ModelArguments", "DataArguments", "TrainingArguments")
    parts += [kind for script in SCRIPTS.values() for name, kind in vars(script).items() if name.endswith(arguments)]
    parts.append(TargetArguments)
    known = {field.name for part in parts for field in fields(part)} | {"help", "debug"}
    sources = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "modeling_greenmim").rglob("*.py")]
    for source in [*sources, *(ROOT / "training_greenmim").rglob("*.py"), *ROOT.glob("run_*.py")]:
        known |= set(re.findall(r'"--([\w-]+)"', source.read_text()))
    launcher = {word[2:] for action in launch_command_parser()._actions for word in action.option_strings}
    return known | launcher | {"constraint", "editable", "upgrade", "index-url"}


# Where files lie that a page names without their folder.
HOMES = ("", "modeling_greenmim", "modeling_greenmim/conversion", "training_greenmim", "benchmarks")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_named_exists(page):
    text = page.read_text()
    where = page.relative_to(ROOT)
    unknown = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)) - known_flags()
    assert not unknown, f"{where} names flags that nothing has: {sorted(unknown)}"
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), f"{where} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{where} links to {link}{anchor}"
    for path in re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|sbatch))`", text):
        assert any((ROOT / home / path).exists() for home in HOMES), f"{where} names {path}"
    for name in re.findall(r"`make ([\w-]+)`", text):
        check_make(["make", name])


def test_pipelines_know_the_models():
    """In a fresh interpreter, which this one is not: nothing else registers GreenMIM with the Auto classes."""
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language == "python"]
    calling = [block for block in blocks if "pipeline(" in block.code]
    assert calling
    for block in calling:
        registers = re.search(r"^import modeling_greenmim\b", block.code, flags=re.MULTILINE)
        assert registers or "trust_remote_code=True" in block.code, f"{block} does not import modeling_greenmim"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_benchmarks_are_understood(page, monkeypatch):
    """Those in the text too; what stands in brackets may be left out."""
    for command in re.findall(r"`python\s+(benchmarks/[^`]+)`", page.read_text()):
        words = shlex.split(re.sub(r"[\[\]]", "", command))
        check_benchmark(words, monkeypatch)


def test_the_readme_is_short():
    """Three minutes of reading, at 200 words a minute, tables of numbers aside."""
    text = re.sub(r"^\|.*\n|```.*?```", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(re.sub(r"\]\([^)]*\)|[^\w\s]", " ", text).split()) <= 600
