# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The official files of the released models, from the addresses that the published README gives."""

import hashlib
import json
import os
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from .checkpoint import CheckpointError


# Files of Google Drive (https://github.com/LayneH/GreenMIM, README).
ADDRESS = "https://drive.google.com/uc?id={}"
FILES = {
    "swin-base": "1vCt7QN3rNC7hmWlWYomqfhjUqN-PvR7a",
    "swin-base-win14": "1P1dAdcZtSEGWFQy5GeeJdfGTqesSAES9",
    "swin-large-win14": "1Tw1KeGviVWxbVt3h1TT7BxTX1aLeT-Nm",
}
# Seconds without a byte, and attempts after the first.
TIMEOUT, RETRIES = 60, 3


def released_file(name: str, folder: str | Path | None = None) -> Path:
    """The official file of a released model, downloaded unless it is there; an interrupted download goes on.

    Its size and SHA-256, which nobody has published, are kept when it first arrives, and compared from then on.

    Args:
        name: of `FILES`.
        folder: where files are kept; default: `greenmim` in the folder of Hugging Face's caches.

    Raises:
        `CheckpointError`: without gdown, for a download that fails, and for a file that is not what it was.
    """
    try:
        import gdown
    except ImportError:
        raise CheckpointError(
            f"`checkpoint` {name!r} is fetched by gdown, which is not installed: pip install"
            " 'greenmim-transformers[released]'"
        ) from None
    folder = Path(folder or os.path.join(HF_HOME, "greenmim"))
    folder.mkdir(parents=True, exist_ok=True)
    path, record = folder / f"{name}.pth", folder / f"{name}.json"
    if not path.exists():
        address = ADDRESS.format(FILES[name])
        try:
            gdown.download(address, str(path), resume=True, timeout=TIMEOUT, retries=RETRIES, use_cookies=False)
        except Exception as error:  # whatever the network, the server or gdown raises
            raise CheckpointError(
                f"`checkpoint` {name!r} cannot be fetched from {address}: {error} Started again it goes on; or"
                " download the file by hand and give its path."
            ) from error
    facts = {"size": path.stat().st_size, "sha256": _sha256(path)}
    if not record.exists():
        record.write_text(json.dumps(facts))
    elif json.loads(record.read_text()) != facts:
        raise CheckpointError(
            f"`checkpoint` {name!r} is {str(path)!r}, which is no longer the file that was first fetched: size or"
            f" SHA-256 differ from {str(record)!r}. Remove both to fetch it anew."
        )
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
