# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What training uses of other libraries beyond their public interface, in one place.

Each entry has a canary in tests/test_compat.py that says what changed when a new version breaks it.
"""


# transformers


# accelerate


# datasets


# evaluate


# kornia
