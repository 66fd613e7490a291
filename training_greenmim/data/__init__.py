# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""From files, `datasets` and streams to batches of uint8 images."""
