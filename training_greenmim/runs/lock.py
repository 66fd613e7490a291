# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""One run at a time in an output folder."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from transformers import TrainingArguments
from transformers.utils import logging


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.get_logger(__name__)

# Uploads to the Hub leave out names that begin with an underscore.
LOCK_FILE = "_lock"


@contextlib.contextmanager
def locked_output(args: TrainingArguments) -> Iterator[None]:
    """Keeps other runs out of the output folder within the context; the folder is made if need be.

    The first process of a run holds a lock of the operating system (`lockf`), which ends with it, however it ends, and
    which data loaders' workers do not inherit. The file beside it tells others who holds it. When nothing was written,
    nothing is left behind.

    Raises:
        `ValueError`: naming the process, host and start of the run that has the folder, or why there can be no folder.
    """
    if fcntl is None or not args.should_save:
        yield
        return
    folder = Path(args.output_dir)
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`output_dir` is {args.output_dir!r}, which cannot be made a folder: {error.strerror}."
        ) from error
    file = _take(folder / LOCK_FILE, args.output_dir)
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        file.close()
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _take(path: Path, output_dir: str) -> TextIOWrapper:
    """Opens and locks the file, and writes who holds it."""
    while True:
        file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read()
            file.close()
            raise ValueError(
                f"`output_dir` is {output_dir!r}, in which another run is at work: {_described(holder)}. Wait for its"
                " end, stop it, or choose another folder."
            ) from None
        except OSError as error:
            logger.warning(f"{output_dir!r} is on a file system without locks ({error}): give it to one run only.")
            return file
        # A run that has just ended may have removed what was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()
    file.truncate(0)
    holder = {"process": os.getpid(), "host": socket.gethostname(), "start": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    file.write(json.dumps(holder))
    file.flush()
    return file


def _described(holder: str) -> str:
    try:
        values = json.loads(holder)
        return f"process {values['process']} on {values['host']}, started at {values['start']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not told its number yet"
