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
        package: name that is imported, such as "kornia".
        extra: name of the extra, such as "augmentation".

    Raises:
        `MissingPackageError`: when it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise  # it is there, and something that it needs itself is not
        raise MissingPackageError(
            f"This run needs {error.name}, which is not installed: pip install 'greenmim-transformers[{extra}]'"
        ) from None


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was put into sys.modules by hand has no specification
        return True
