"""One thread per test process: `make test` runs as many processes as there are cores, and tiny models gain nothing."""

import os
import sys

import pytest


# Read when torch is imported, by the processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test waits for the network; those of the Hub start a server of their own, and ask it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """`make test` leaves out the common tests of Transformers, which `make test-all` fetches."""
    return (config.option.markexpr == "not slow" and collection_path.name == "test_transformers_suite.py") or None


@pytest.fixture
def without(monkeypatch):
    """Makes packages look as if they were not installed."""

    def block(*packages: str):
        for package in packages:
            for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
                monkeypatch.delitem(sys.modules, name)
            monkeypatch.setitem(sys.modules, package, None)

    return block


@pytest.fixture
def hub():
    """A Hub on this machine, and what it was sent."""
    from tests.hub_server import serve

    state, server = serve()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
