# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Official files by the names of released models, from a server on loopback."""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from modeling_greenmim import GreenMIMForPreTraining
from modeling_greenmim.conversion import CheckpointError, released
from modeling_greenmim.conversion.__main__ import main
from modeling_greenmim.conversion.released import released_file
from tests.test_conversion import TINY, official_shapes, random_weights, write_official


class Server(ThreadingHTTPServer):
    """Serves one file, in ranges too, and ends the next answers after so many bytes each."""

    def __init__(self, content: bytes):
        self.content, self.cuts, self.ranges = content, [], []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        content, found = self.server.content, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(found[1]) if found else 0
        self.server.ranges.append(first)
        self.send_response(206 if found else 200)
        self.send_header("Content-Disposition", 'attachment; filename="checkpoint.pth"')
        if found:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        last = first + self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[first:last])


@pytest.fixture
def server(tmp_path, monkeypatch):
    path = write_official(tmp_path / "official.pth", random_weights(official_shapes(**TINY)), more=torch.zeros(10**6))
    server = Server(path.read_bytes())
    monkeypatch.setattr(released, "ADDRESS", f"http://127.0.0.1:{server.server_port}/{{}}")
    monkeypatch.setattr(released, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(released, "RETRIES", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_one_command_fetches_and_converts(server, tmp_path, capsys):
    flags = ["import", "--checkpoint", "swin-base", "--output", str(tmp_path / "model"), "--image_size", "32"]
    main(flags)
    assert "GreenMIMForPreTraining" in capsys.readouterr().out
    assert GreenMIMForPreTraining.from_pretrained(tmp_path / "model").config.image_size == 32
    path = tmp_path / "home" / "greenmim" / "swin-base.pth"
    assert path.read_bytes() == server.content
    main(flags)  # from the file
    assert server.ranges == [0]


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.cuts = [len(server.content) // 2]
    with pytest.raises(CheckpointError, match=r"(?s)`checkpoint` 'swin-base' cannot be fetched .*Started again it"):
        released_file("swin-base", tmp_path / "files")
    assert not (tmp_path / "files" / "swin-base.pth").exists()
    path = released_file("swin-base", tmp_path / "files")
    assert path.read_bytes() == server.content
    assert server.ranges[0] == 0 and server.ranges[-1] > 0


def test_a_file_that_changed_is_refused(server, tmp_path):
    path = released_file("swin-base-win14", tmp_path / "files")
    facts = json.loads((tmp_path / "files" / "swin-base-win14.json").read_text())
    assert facts["size"] == len(server.content) and len(facts["sha256"]) == 64
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="which is no longer the file that was first fetched"):
        released_file("swin-base-win14", tmp_path / "files")


def test_without_gdown_and_without_a_server(server, tmp_path, monkeypatch, capsys):
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match=r"cannot be fetched from http://127.0.0.1"):
        released_file("swin-large-win14", tmp_path / "files")
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(SystemExit):
        main(["import", "--checkpoint", "swin-base", "--output", str(tmp_path / "model")])
    assert "pip install 'greenmim-transformers[released]'" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_folder_of_that_name_is_taken_as_it_is(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("swin-base").mkdir()
    with pytest.raises(SystemExit):
        main(["import", "--checkpoint", "swin-base", "--output", "model"])
    assert "a folder without config.json" in capsys.readouterr().err and not server.ranges
