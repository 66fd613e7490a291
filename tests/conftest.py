"""One thread per test process: `make test` runs as many processes as there are cores, and tiny models gain nothing."""

import os


# Read when torch is imported, by the processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test waits for the network; those of the Hub start a server of their own, and ask it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """`make test` leaves out the common tests of Transformers, which `make test-all` fetches."""
    return (config.option.markexpr == "not slow" and collection_path.name == "test_transformers_suite.py") or None
