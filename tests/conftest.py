"""One thread per test process: `make test` runs as many processes as there are cores."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
