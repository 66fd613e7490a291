# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image files below a folder: each real file once, and a word on everything that is left out."""

import os
import tarfile
import zipfile
from collections import Counter, defaultdict, deque
from pathlib import Path

from PIL import Image, features
from transformers.utils import logging

from .formats import missing_extra, readable_suffixes


logger = logging.get_logger(__name__)

# Formats that Pillow opens, but has no decoder for.
UNDECODABLE_FORMATS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")
# Formats that Pillow decodes only if it was built so, and what it calls that.
OPTIONAL_FORMATS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}

UNKNOWN, HIDDEN, AGAIN, BROKEN, SPECIAL = (
    "no image format that is read here",
    "hidden",
    "other names of files that are there already",
    "links that lead nowhere",
    "pipes, sockets or devices",
)


def find_images(folder: str, argument: str) -> list[str]:
    """Absolute names of all image files below a folder, nested or not, in order; logs how many, and what is left out.

    Links are followed, and each real file comes once, under its own name if that is below the folder too. Hidden files
    and folders, and folders such as __MACOSX, are left out, as `datasets` does.

    Raises:
        `ValueError`: when the folder does not exist, cannot be read or holds no image file.
    """
    try:
        os.scandir(folder).close()
    except (FileNotFoundError, NotADirectoryError):
        is_archive = os.path.isfile(folder) and (zipfile.is_zipfile(folder) or tarfile.is_tarfile(folder))
        rest = " but an archive; unpack it, or name the folder that it lies in as `dataset_name`" * is_archive
        raise ValueError(f"`{argument}` is {folder!r}, which is not a folder{rest}.") from None
    except OSError as error:
        raise ValueError(f"`{argument}` is {folder!r}, which cannot be read: {error.strerror}.") from error
    search = _Search(str(Path(folder).absolute()))  # unlike os.path's, it leaves ".." behind a link to the system
    rest = "".join(f"; {text}" for text in search.left_out_texts())
    if not search.paths:
        raise ValueError(f"`{argument}` is {folder!r}, which holds no image file{rest}.")
    log = logger.warning if search.unreadable_folders else logger.info
    log(f"`{argument}` is {folder!r}: {_counted(len(search.paths), 'image')} found{rest}.")
    return sorted(search.paths)


def image_suffixes() -> set[str]:
    """Suffixes of the files that Pillow and the other formats decode here, in lower case and with their dot."""
    return readable_suffixes() | {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN
        and name not in UNDECODABLE_FORMATS
        and (name not in OPTIONAL_FORMATS or features.check(OPTIONAL_FORMATS[name]))
    }


class _Search:
    """Walks through a folder: files and folders first, then links to folders, and links to files at last.

    So a link adds only what is not there anyway, and no loop of links is walked twice.
    """

    def __init__(self, folder: str):
        self.paths: list[str] = []
        self.left_out: dict[str, Counter] = defaultdict(Counter)  # reason -> suffix -> number of files
        self.unreadable_folders: list[str] = []
        self._suffixes = image_suffixes()
        self._real_folders: set[str] = set()
        self._path_of_inode: dict[int, str] = {}
        self._folders, self._folder_links, self._file_links = [folder], deque(), []
        while self._folders or self._folder_links:
            self._visit(self._folders.pop() if self._folders else self._folder_links.popleft())
        linked: set[str] = set()
        for path in self._file_links:
            self._add_link(path, os.path.realpath(path), linked)

    def left_out_texts(self) -> list[str]:
        """What is left out, and why."""
        texts = []
        for reason, suffixes in self.left_out.items():
            numbers = ", ".join(f"{number} {suffix}" for suffix, number in suffixes.most_common())
            texts.append(f"{_counted(suffixes.total(), 'file')} left out ({reason}): {numbers}")
        if self.unreadable_folders:
            number = _counted(len(self.unreadable_folders), "folder")
            texts.append(f"{number} cannot be read: {', '.join(self.unreadable_folders)}")
        return texts

    def _visit(self, folder: str) -> None:
        real = os.path.realpath(folder)
        if real in self._real_folders:
            return
        self._real_folders.add(real)
        try:
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.unreadable_folders.append(f"{folder} ({error.strerror})")
            return
        for entry in entries:
            # Unlike those of an entry, functions of os.path take a link that cannot be followed.
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            if entry.name.startswith("." if not is_folder else (".", "__")):
                self.left_out[HIDDEN]["folder" if is_folder else _suffix(entry.name)] += 1
            elif entry.is_symlink():
                (self._folder_links if is_folder else self._file_links).append(entry.path)
            elif is_folder:
                self._folders.append(entry.path)
            elif not entry.is_file():
                self.left_out[SPECIAL][_suffix(entry.name)] += 1  # opening a pipe would wait for ever
            else:
                self._add(entry.path, entry.inode())

    def _add(self, path: str, inode: int) -> None:
        """A file that is no link, unless it is another hard link to one."""
        suffix = _suffix(path)
        if suffix not in self._suffixes:
            self.left_out[_unknown(suffix)][suffix] += 1
        elif _is_same_file(self._path_of_inode.setdefault(inode, path), path):
            self.left_out[AGAIN][suffix] += 1
        else:
            self.paths.append(path)

    def _add_link(self, path: str, real: str, linked: set[str]) -> None:
        suffix = _suffix(path)
        parent, name = os.path.split(real)
        is_found = parent in self._real_folders and not name.startswith(".") and _suffix(name) in self._suffixes
        if suffix not in self._suffixes:
            self.left_out[_unknown(suffix)][suffix] += 1
        elif not os.path.isfile(real):
            self.left_out[SPECIAL if os.path.exists(real) else BROKEN][suffix] += 1
        elif is_found or real in linked:
            self.left_out[AGAIN][suffix] += 1
        else:
            linked.add(real)
            self._add(path, os.stat(real).st_ino)


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _unknown(suffix: str) -> str:
    """Why files of a suffix are left out."""
    extra = missing_extra(suffix)
    return UNKNOWN if extra is None else f"pip install 'greenmim-transformers[{extra}]' reads them"


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "without suffix"


def _is_same_file(first: str, second: str) -> bool:
    """Whether two names are hard links to one file; equal inodes alone tell it on one file system only."""
    if first is second:
        return False
    status, other = os.stat(first), os.stat(second)
    return os.path.samestat(status, other) and status.st_nlink > 1
