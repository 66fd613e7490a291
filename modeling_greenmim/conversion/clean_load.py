# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Loads a published model as those do who lack this project, and writes what it computes on a fixed image.

`releasing` runs this file in an interpreter of its own: `clean_load.py OWNER/NAME AUTO_CLASS OUTPUT.safetensors`.
Nothing of the project may be imported here.
"""

import sys

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file


class HiddenProject:
    """Makes the project impossible to import, should it be installed."""

    def find_spec(self, name, path=None, target=None):
        """Refuses our packages, and leaves others to the next finder."""
        if name.partition(".")[0] in ("modeling_greenmim", "configuration_greenmim", "training_greenmim"):
            raise ModuleNotFoundError(f"{name} is hidden: published code must not import the project", name=name)


def outputs_on_fixed_image(model, processor) -> torch.Tensor:
    """Logits, or last tokens of an encoder, of an image of three gradients; masks of pre-training are fixed too."""
    gradient = Image.linear_gradient("L")
    image = Image.merge("RGB", (gradient, gradient.rotate(90), Image.radial_gradient("L")))
    pixel_values = processor(image, return_tensors="pt").pixel_values.to(model.dtype)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        outputs = model.eval()(pixel_values)
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def main(repo: str, auto_class: str, output: str) -> None:
    """Loads model and image processor by name."""
    sys.meta_path.insert(0, HiddenProject())
    processor = transformers.AutoImageProcessor.from_pretrained(repo, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(repo, trust_remote_code=True)
    save_file({"outputs": outputs_on_fixed_image(model, processor)}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
