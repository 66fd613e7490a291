# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The registry of formats. A format is a module, one file here, with

- `NAME`: what `--to` and a `Checkpoint` call it, `TITLE`: what model cards call it,
- `BACKBONE_TYPES`: the values of `backbone_type` that it can express,
- `OUTPUT`: what `write` makes, "file" or "folder"; None if it is only read,
- `matches(source)`: whether a `Source` is of this format,
- `read(source)`: the `Checkpoint` of a `Source` that matches,
- `write(model, output)`, unless `OUTPUT` is None: writes one of our models to a path. Returns a function of an image
  that gives the encoder's last tokens as the format's own code computes them, `(1, num_units, hidden_size)`.
"""

from . import microsoft, original, simmim, timm, transformers_swin, twins


# The first that matches reads a source, so those that have marks of their own come first.
FORMATS = {module.NAME: module for module in (original, simmim, twins, timm, microsoft, transformers_swin)}
WRITABLE = tuple(name for name, module in FORMATS.items() if module.OUTPUT)
