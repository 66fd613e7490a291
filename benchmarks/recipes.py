"""What `--recipe auto` goes by, measured on ELPV, the photographs of solar cells.

    python benchmarks/recipes.py pretraining    # crops, mask ratio, learning rate, width
    python benchmarks/recipes.py finetuning     # epochs, crops, learning rate, drop path
    python benchmarks/recipes.py auto           # 200, 500 and 1,968 images: against training from scratch for as long

All is in bf16 on one thread. Finished runs are kept under --output_dir and not repeated: a study may be interrupted.
Its table goes to docs/results/recipes-<study>.md.
"""

import argparse
import json
from pathlib import Path

from elpv import GENTLE_TRAINING, TRAINING, classify, in_few_words
from targets import BF16, SEEDS, comparison, elpv, fine_tuned, judged, linear, write_page

import run_mim
from training_greenmim.data import labels
from training_greenmim.data.images import open_image
from training_greenmim.data.readers import DataSource, read_records


# The first row of each table is what `auto` takes.
PRETRAINING = {
    "crops from 0.5, ratio 0.75, rate 2e-3": [],
    "crops from 0.2": ["--min_crop_scale", "0.2"],
    "crops from 0.9": ["--min_crop_scale", "0.9"],
    "ratio 0.6": ["--mask_ratio", "0.6"],
    "ratio 0.9": ["--mask_ratio", "0.9"],
    "rate 1e-3": ["--learning_rate", "1e-3"],
    "rate 4e-3": ["--learning_rate", "4e-3"],
}
FINETUNING = {
    "20 epochs, whole images, rate 3e-3 and decay 0.65, drop path 0.1": [],
    "40 epochs": ["--num_train_epochs", "40"],
    "10 epochs": ["--num_train_epochs", "10"],
    "crops from 0.8": ["--min_crop_scale", "0.8"],
    "rate 1e-3 for all layers": ["--learning_rate", "1e-3", "--layer_decay", "1"],
    "rate 6e-3 and decay 0.65": ["--learning_rate", "6e-3"],
    "no drop path": ["--drop_path_rate", "0"],
}
SIZES = (200, 500, 1968)


def study_of_pretraining(args) -> list[str]:
    """Pre-training on 1,968 photographs: one argument changed at a time, the same time for each."""
    return comparison(args, elpv(), PRETRAINING, [(fine_tuned, "few"), (linear, "few")])


def study_of_finetuning(args) -> list[str]:
    """Fine-tuning on 197 labels what was pre-trained: one argument changed at a time."""
    start = next(args.output_dir.glob("pretraining-crops-from-0.5*"), None)
    if start is None:
        raise SystemExit("There is no pre-trained model yet: `python benchmarks/recipes.py pretraining` first.")
    lines = ["| | ROC AUC, 10 % of the labels |", "| --- | --- |"]
    for number, (name, changes) in enumerate(FINETUNING.items()):
        flags = [*GENTLE_TRAINING, "--model_name_or_path", start]
        values = [
            # Later flags win.
            judged(args, elpv(), f"finetuning-{number}", flags, "few", seed, changes=changes)
            for seed in SEEDS
        ]
        lines.append(f"| {name} | {in_few_words(values)} |")
        print(lines[-1], flush=True)
    return lines


def folders_of(args, size: int) -> list[str]:
    """Flags of `size` photographs for training, each class with its share, and all for testing, as folders."""
    parts = read_records(DataSource(), labelled=True)
    columns = (None, None)
    train = labels.prepare(parts["train"].records, "train", *columns)
    test = labels.prepare(parts["validation"].records, "validation", *columns)
    named = {f"train-{size}": labels.stratified_subset(train, size, 0, "max_train_samples"), "test": test}
    for name, records in named.items():
        for index, record in enumerate(records):
            image = args.output_dir / "images" / name / f"class-{record[labels.LABEL]}" / f"{index:04}.png"
            if not image.exists():
                image.parent.mkdir(parents=True, exist_ok=True)
                open_image(record["image"]).save(image)
    images = args.output_dir / "images"
    return ["--train_dir", str(images / f"train-{size}"), "--validation_dir", str(images / "test")]


def study_of_auto(args) -> list[str]:
    """Pre-trained and fine-tuned by `--recipe auto`, against training from scratch for the same time in total."""
    lines = ["| photographs, all labelled | by auto | from scratch, as long | epochs of each |", "| --- " * 4 + "|"]
    for size in SIZES:
        data = folders_of(args, size)
        start = args.output_dir / f"auto-{size}"
        common = ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--recipe", "auto"]
        if not (start / "all_results.json").exists():
            flags = ["--output_dir", str(start), "--do_train", "--dataloader_num_workers", "0"]
            run_mim.main([*data, *common, *flags, *BF16])
        pretraining = json.loads((start / "all_results.json").read_text())
        flags = [*data, *BF16, "--recipe", "auto", "--model_name_or_path", start, "--do_train", "--crop_pct", "1"]
        tuned = [classify(args.output_dir / f"auto-{size}-seed{seed}", *flags, "--seed", seed) for seed in SEEDS]
        seconds = pretraining["train_runtime"] + tuned[0]["train_runtime"]
        epochs = round(tuned[0]["epoch"] * seconds / tuned[0]["train_runtime"])
        flags = [*data, *BF16, *TRAINING, "--config_name", start, "--num_train_epochs", epochs]
        # As long as all of the other, which takes its time.
        seeds = range(args.scratch_seeds)
        scratch = [classify(args.output_dir / f"scratch-{size}-seed{seed}", *flags, "--seed", seed) for seed in seeds]
        cells = [in_few_words([one["eval_roc_auc"] for one in results]) for results in (tuned, scratch)]
        lengths = f"{pretraining['epoch']:.0f} + {tuned[0]['epoch']:.0f} against {epochs}"
        lines.append(f"| {size:,} | {cells[0]} | {cells[1]} | {lengths} |")
        print(lines[-1], flush=True)
    return lines


STUDIES = {"pretraining": study_of_pretraining, "finetuning": study_of_finetuning, "auto": study_of_auto}


def main() -> None:
    """Runs a study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--minutes", type=float, default=4, help="of pre-training in the study of that name")
    parser.add_argument(
        "--scratch_seeds", type=int, default=3, help="runs from scratch of each size in the study auto"
    )
    parser.add_argument("--first", type=int, help="compare only so many rows of the study pretraining")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/recipe-studies"))
    args = parser.parse_args()
    args.teacher = None
    minutes = f" --minutes {args.minutes:g}" if args.study == "pretraining" else ""
    minutes += f" --first {args.first}" if args.first else ""
    runs = {
        "pretraining": "one pre-training each",
        "finetuning": "all of one pre-training",
        "auto": "one pre-training each, or one run where there is no deviation",
    }
    text = (
        f"ROC AUC in %, mean and standard deviation over the seeds {list(SEEDS)} of fine-tuning, {runs[args.study]};"
        f" one thread of a processor with bf16 units. Made by `python benchmarks/recipes.py {args.study}{minutes}`."
    )
    write_page(args, STUDIES[args.study], f"recipes-{args.study}", text)


if __name__ == "__main__":
    main()
