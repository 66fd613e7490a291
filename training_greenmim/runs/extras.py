# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Packages that only some runs need, which the extras of this package install."""

import importlib
import importlib.util
from types import ModuleType


class MissingPackageError(ImportError):
    """A package that this run needs is not installed; the message says how to install it."""


def require(package: str, extra: str) -> ModuleType:
    """Imports a package that an extra installs.

    Args:
        package: what is imported, such as "kornia" or "matplotlib.figure".
        extra: name of the extra, such as "augmentation".

    Raises:
        `MissingPackageError`: when it is not installed, with the command that installs it.
    """
    name = package.partition(".")[0]
    if not is_installed(name):
        raise MissingPackageError(
            f"This run needs {name}, which is not installed: pip install 'greenmim-transformers[{extra}]'"
        )
    return importlib.import_module(package)


def is_installed(package: str) -> bool:
    """Whether there is a package of this name."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was put into sys.modules by hand has no specification
        return True
