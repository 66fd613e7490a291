"""Fetches the common tests of the installed Transformers from its source distribution, for test_transformers_suite.py.

They become the package `transformers_tests` in the environment's folder `transformers-tests`. Three modules that they
import but that the distribution lacks are given empty.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


TARGET = Path(sys.prefix) / "transformers-tests"
MISSING = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def main() -> None:
    """Downloads, and writes the package when everything is there."""
    wanted = f"transformers=={version('transformers')}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", folder, wanted], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            sources = {
                Path(member.name).name: archive.extractfile(member).read()
                for member in archive.getmembers()
                if Path(member.name).match("*/tests/test_*.py")
            }
    package = TARGET / "transformers_tests"
    for name, source in MISSING.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
        (package / name).with_name("__init__.py").touch()
    for name, source in sources.items():
        (package / name).write_bytes(source)
    (package / "__init__.py").touch()
    TARGET.touch()  # newer than what it was made for: make goes by that


if __name__ == "__main__":
    main()
