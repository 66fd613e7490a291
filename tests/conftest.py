"""One thread per test process: `make test` runs as many processes as there are cores, and tiny models gain nothing."""

import os


# Read when torch is imported, by the processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
