"""What a model should predict: pixels, HOG or features of a teacher, each pre-trained for the same time.

    python benchmarks/efficientnet_lite.py         # the teacher, in outputs/efficientnet-lite0
    python benchmarks/targets.py elpv-targets      # photographs of solar cells, grey, two classes
    python benchmarks/targets.py elpv-targets-all-labels    # of the models of the study before
    python benchmarks/targets.py photographs-targets --photographs clothing-dataset-small    # coloured, ten classes
    python benchmarks/targets.py photographs-ablations --photographs clothing-dataset-small
    python benchmarks/targets.py monitors          # which monitor tells the best of all these models

`--photographs` is a copy of https://github.com/alexeygrigorev/clothing-dataset-small (CC0). Pre-training has so many
minutes of one thread: short runs of each method take turns, and each then trains for as many steps as fit, the
features of a teacher included. All is in bf16. Each run is one of run_mim.py or run_image_classification.py with the
arguments that are printed. Finished runs are kept under --output_dir and not repeated: a study may be interrupted.
Its table goes to docs/results/<study>.md.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from elpv import EPOCHS, GENTLE_TRAINING, PRETRAINING, ROOT, TRAINING, WHOLE_IMAGES, classify, in_few_words
from scipy.stats import spearmanr

import run_mim


# A process has the teacher's classes once, under this name, whatever else imports them.
sys.path.insert(0, str(ROOT))
import benchmarks.efficientnet_lite  # noqa: F401 (registers the teacher)


# Steps of the short runs that tell the time of one, and how many there are of each method.
TIMED_STEPS, ROUNDS = 30, 2
SEEDS = range(3)
# Of each photograph of clothes, beside the whole: with its mirror images eight views.
CROPS = ["--teacher_crops", "3", "--min_crop_scale", "0.3"]
BF16 = ["--bf16", "true"]
TEACHER = ["--target", "teacher", "--learning_rate", "1.5e-3", "--max_grad_norm", "3"]
PREDICT = [*TEACHER, "--teacher_mode", "predict"]
METHODS = {
    "pixels": [],
    "hog": ["--target", "hog"],
    "align": TEACHER,
    "predict, masked": PREDICT,
    "predict, all": [*PREDICT, "--loss_on", "all"],
    "dense distillation": [*TEACHER, "--mask_ratio", "0"],
}
ABLATIONS = {
    "align, 0.5": TEACHER,
    "align, 0.75": [*TEACHER, "--mask_ratio", "0.75"],
    "align, 0.9": [*TEACHER, "--mask_ratio", "0.9"],
    "align, nothing hidden": [*TEACHER, "--mask_ratio", "0"],
    "align, 0.5, smooth_l1": [*TEACHER, "--teacher_loss", "smooth_l1"],
    "align, 0.5, attentive": [*TEACHER, "--mask_strategy", "attentive"],
    "predict masked, 0.75": PREDICT,
    "predict all, 0.75": [*PREDICT, "--loss_on", "all"],
    "align, 0.5, block": [*TEACHER, "--mask_strategy", "block"],
    "align, 0.5, grid": [*TEACHER, "--mask_strategy", "grid"],
    "predict masked, 0.75, prompting": [*PREDICT, "--config_overrides", "decoder_type=prompting"],
}


# Students of the coloured photographs, and their steps.
STUDENTS = {
    "align, 4,000 steps": (TEACHER, 4000),
    "align, 3,000 steps, constant rate": ([*TEACHER, "--lr_scheduler_type", "constant_with_warmup"], 3000),
}


@dataclass
class Data:
    """What a study trains and is judged on.

    Args:
        name: part of the names of folders.
        pretraining: flags of run_mim.py: data and model.
        labelled: flags of run_image_classification.py: its data.
        few: 10 % of the images for training.
        epochs: of fine-tuning and probes, of all labels and of few.
        metric, title: what is reported.
        teacher_size: shorter side in pixels of what the teacher sees.
        overrides: of the model's configuration; studies add to them.
        views: flags of the views whose features are kept.
        evaluation: flags of run_mim.py for what is measured at the end.
        studies: patterns of the folders of pre-trained models.
    """

    name: str
    pretraining: list[str]
    labelled: list[str]
    few: int
    epochs: dict[str, int]
    metric: str
    title: str
    teacher_size: int
    overrides: str = ""
    views: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)
    studies: tuple[str, ...] = ()


def elpv() -> Data:
    """The photographs that `make pretrain` takes, and its model."""
    epochs = {"all": EPOCHS["all labels"], "few": EPOCHS["10 % of the labels"]}
    return Data(
        name="elpv",
        pretraining=[PRETRAINING],
        labelled=[],
        few=197,
        epochs=epochs,
        metric="eval_roc_auc",
        title="ROC AUC",
        teacher_size=128,
        studies=("elpv-*", "pretraining-*"),  # the second of recipes.py
    )


def photographs(args) -> Data:
    """Photographs of clothes; judged on its parts for validation and for test together."""
    judged = args.output_dir / "photographs-judged"
    for image in (path for part in ("validation", "test") for path in args.photographs.glob(f"{part}/*/*")):
        link = judged / image.parent.name / f"{image.parent.parent.name}-{image.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(image.resolve())
    folders = ["--train_dir", str(args.photographs / "train"), "--validation_dir", str(judged)]
    pretraining = [*folders, "--config_name", "tiny", "--do_train"]
    pretraining += ["--per_device_train_batch_size", "64", "--learning_rate", "2e-3"]
    shape = "image_size=128,patch_size=8,embed_dim=96,depths=[2,6],num_heads=[3,6],window_size=8"
    shape += ",decoder_hidden_size=128,decoder_num_hidden_layers=2,decoder_num_attention_heads=4"
    shape += ",decoder_intermediate_size=512"
    return Data(
        name="photographs",
        pretraining=pretraining,
        labelled=folders,
        few=307,
        epochs={"few": 30},
        metric="eval_accuracy",
        title="accuracy",
        teacher_size=256,
        overrides=shape,
        views=CROPS,
        evaluation=["--do_eval", "--probe_dir", str(judged)],
        studies=("photographs-*",),
    )


def folder_of(args, study: str, method: str) -> Path:
    """Where a method of a study is pre-trained."""
    return args.output_dir / "-".join([study, *method.replace(",", "").split()])


def pretrain(args, data: Data, flags: list[str], folder: Path, steps: int, evaluates: bool = True) -> dict:
    """Results of a run of run_mim.py, made unless the folder holds them."""
    results = folder / "all_results.json"
    if not results.exists() or (evaluates and "eval_loss" not in json.loads(results.read_text())):
        shutil.rmtree(folder, ignore_errors=True)
        argv = [*data.pretraining, "--output_dir", str(folder), "--max_steps", str(steps), *BF16, *flags]
        if "teacher" in flags:
            argv += ["--teacher", str(args.teacher), "--teacher_image_size", str(data.teacher_size)]
            argv += ["--cache_teacher", str(args.output_dir / f"features-{data.name}"), *data.views]
        argv += data.evaluation if evaluates else ["--do_eval", "false"]
        if data.overrides:
            given = argv.index("--config_overrides") if "--config_overrides" in argv else None
            changes = f",{argv.pop(given + 1)}" if given else ""
            argv = [value for value in argv if value != "--config_overrides"]
            argv += ["--config_overrides", data.overrides + changes]
        argv += ["--report_to", "none", "--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true"]
        argv += ["--dataloader_num_workers", "0", "--decode_once", "true"]
        print("python run_mim.py", *argv, flush=True)
        run_mim.main(argv)
    return json.loads(results.read_text())


def steps_in(args, data: Data, methods: dict[str, list[str]]) -> dict[str, int]:
    """Steps of each method that take `--minutes`, by short runs that take turns; written down for a later start."""
    planned = args.output_dir / f"{args.study}-steps.json"
    if not planned.exists():
        short = args.output_dir / "short"
        cached = args.output_dir / f"{data.name}-caching.json"
        if not cached.exists() and any("teacher" in flags for flags in methods.values()):
            shutil.rmtree(args.output_dir / f"features-{data.name}", ignore_errors=True)
            start = time.perf_counter()
            pretrain(args, data, TEACHER, short, 1, evaluates=False)
            cached.write_text(json.dumps(time.perf_counter() - start))
        seconds = {method: [] for method in methods}
        for _ in range(ROUNDS):
            for method, flags in methods.items():
                shutil.rmtree(short, ignore_errors=True)
                results = pretrain(args, data, flags, short, TIMED_STEPS, evaluates=False)
                seconds[method].append(results["train_runtime"] / TIMED_STEPS)
        shutil.rmtree(short)
        # Where all methods have the same teacher, its features are no difference.
        taught = ["teacher" in flags for flags in methods.values()]
        caching = json.loads(cached.read_text()) if any(taught) and not all(taught) else 0
        budgets = {
            method: 60 * args.minutes - (caching if "teacher" in flags else 0) for method, flags in methods.items()
        }
        steps = {method: round(budgets[method] / statistics.median(seconds[method])) for method in methods}
        planned.write_text(json.dumps(steps, indent=2))
    return json.loads(planned.read_text())


def name_of(args, data: Data, folder: Path) -> str:
    """What runs that judge a model are called; the teacher is judged on each data set."""
    return f"{data.name}-teacher" if folder == args.teacher else folder.name


def fine_tuned(args, data: Data, folder: Path, labels: str, seed: int) -> float:
    """The metric after all weights were trained on all labels or on few."""
    # Rates by layer are for models of ours.
    training = ["--do_train", *WHOLE_IMAGES, "--learning_rate", "5e-4"] if folder == args.teacher else GENTLE_TRAINING
    flags = [*training, "--model_name_or_path", folder]
    # What a teacher taught wants gentler rates.
    is_taught = json.loads((folder / "config.json").read_text()).get("reconstruction_target") == "features"
    changes = ["--learning_rate", "1e-3", "--layer_decay", "0.5"] if is_taught else []
    return judged(args, data, f"{name_of(args, data, folder)}-finetuned", flags, labels, seed, changes=changes)


def from_scratch(args, data: Data, folder: Path, labels: str, seed: int) -> float:
    """The metric of a model of the same shape that was not pre-trained."""
    flags = [*TRAINING, "--config_name", folder]
    return judged(args, data, f"{data.name}-scratch", flags, labels, seed, longer=2 if data.name != "elpv" else 1)


def linear(args, data: Data, folder: Path, labels: str, seed: int) -> float:
    """The metric of a linear probe."""
    flags = ["--mode", "linear", "--do_train", "--balance", "true", *WHOLE_IMAGES]
    # Few images make few steps.
    flags += ["--lars", "false", "--learning_rate", "1e-2", "--model_name_or_path", folder]
    changes = ["--num_train_epochs", "20"] if labels == "few" else []
    return judged(args, data, f"{name_of(args, data, folder)}-linear", flags, labels, seed, changes=changes)


def neighbours(args, data: Data, folder: Path, labels: str, seed: int) -> float:
    """The metric of the 20 nearest neighbours."""
    flags = ["--mode", "knn", "--crop_pct", "1", "--model_name_or_path", folder]
    return judged(args, data, f"{name_of(args, data, folder)}-knn", flags, labels, seed)


def judged(args, data: Data, name: str, flags: list, labels: str, seed: int, longer: int = 1, changes=()) -> float:
    """The metric of a run of run_image_classification.py; `changes` are flags that win over all others."""
    if labels == "few":
        flags = [*flags, "--max_train_samples", data.few]
    if "knn" not in flags:
        flags = [*flags, "--num_train_epochs", longer * data.epochs[labels]]
    if args.teacher in flags:
        flags = [*flags, "--config_overrides", "image_size=128"]
        # Its head is of ImageNet's classes.
        flags += [] if "--mode" in flags else ["--ignore_mismatched_sizes", "true"]
    folder = args.output_dir / "judged" / f"{name}-{labels}-seed{seed}"
    return classify(folder, "--seed", seed, *data.labelled, *BF16, *flags, *changes)[data.metric]


def row(args, data: Data, name: str, folder: Path, judges: list[tuple]) -> str:
    """A line of a table: a way of judging and the labels for each column, a dash for none."""
    cells = []
    for judge, labels in judges:
        cells.append("" if judge is None else in_few_words([judge(args, data, folder, labels, s) for s in SEEDS]))
    line = f"| {name} | " + " | ".join(cells) + " |"
    print(line, flush=True)
    return line


def head(data: Data, judges: list[tuple], first: str = "") -> list[str]:
    """The first lines of a table."""
    names = {fine_tuned: "fine-tuned", linear: "linear probe", neighbours: "k-NN"}
    share = {"all": "all labels", "few": "10 % of the labels"}
    columns = [f"{names[judge]}, {share[labels]}" for judge, labels in judges]
    return [f"| {data.title}{first} | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]


def comparison(args, data: Data, methods: dict[str, list[str]], judges: list[tuple]) -> list[str]:
    """A table of methods that were pre-trained for the same time."""
    methods = dict(list(methods.items())[: args.first])
    steps = steps_in(args, data, methods)
    lines = head(data, judges, ", steps of pre-training")
    for method, flags in methods.items():
        folder = folder_of(args, args.study, method)
        pretrain(args, data, flags, folder, steps[method])
        lines.append(row(args, data, f"{method}, {steps[method]:,}", folder, judges))
    return lines


def controls(args, data: Data, judges: list[tuple], shape: Path, trains_teacher: bool = True) -> list[str]:
    """Rows of a model of the same shape from scratch, and of the teacher itself."""
    scratch = [(from_scratch if judge is fine_tuned else None, labels) for judge, labels in judges]
    of_teacher = [(judge if trains_teacher or judge is not fine_tuned else None, labels) for judge, labels in judges]
    return [
        row(args, data, "from scratch", shape, scratch),
        row(args, data, "the teacher itself", args.teacher, of_teacher),
    ]


def study_of_elpv(args) -> list[str]:
    """Photographs of solar cells: what to predict."""
    data, judges = elpv(), [(fine_tuned, "few"), (linear, "few"), (neighbours, "few")]
    shape = folder_of(args, args.study, "pixels")
    return [*comparison(args, data, METHODS, judges), *controls(args, data, judges, shape)]


def study_of_all_labels(args) -> list[str]:
    """Photographs of solar cells, all labels: pixels and features of a teacher."""
    data, judges = elpv(), [(fine_tuned, "all")]
    shapes = {method: folder_of(args, "elpv-targets", method) for method in ("pixels", "align")}
    rows = [row(args, data, method, folder, judges) for method, folder in shapes.items()]
    return [*head(data, judges), *rows, *controls(args, data, judges, shapes["pixels"])]


def study_of_photographs(args) -> list[str]:
    """Coloured photographs of clothes, ten classes: how far a student comes of the way to its teacher."""
    data, judges = photographs(args), [(fine_tuned, "few"), (linear, "few"), (neighbours, "few")]
    lines = head(data, judges)
    for method, (flags, steps) in STUDENTS.items():
        folder = folder_of(args, args.study, method)
        minutes = pretrain(args, data, flags, folder, steps)["train_runtime"] / 60
        lines.append(row(args, data, f"{method}, {minutes:.0f} minutes", folder, judges))
    # Its fine-tuning takes longest of all, and came to its linear probe in one try (74.6).
    return [*lines, *controls(args, data, judges, folder, trains_teacher=False)]


def study_of_ablations(args) -> list[str]:
    """Photographs of clothes: how much is hidden, which units, and what predicts them."""
    return comparison(args, photographs(args), ABLATIONS, [(linear, "few"), (neighbours, "few")])


def study_of_monitors(args) -> list[str]:
    """Which monitor tells how well a model will be fine-tuned."""
    lines = [
        "| Spearman correlation with fine-tuning on 10 % of the labels | k-NN | linear probe | RankMe | deviation |"
    ]
    lines.append("| --- " * 5 + "|")
    for data in (elpv(), photographs(args)):
        results = [path for pattern in data.studies for path in args.output_dir.glob(f"{pattern}/all_results.json")]
        folders = [path.parent for path in results]
        found = [folder for folder in folders if list(args.output_dir.glob(f"judged/{folder.name}-finetuned-few-*"))]
        if len(found) < 5:  # too few to tell
            continue
        scores = [statistics.mean(fine_tuned(args, data, folder, "few", seed) for seed in SEEDS) for folder in found]
        results = [json.loads((folder / "all_results.json").read_text()) for folder in found]
        cells = []
        for metric in ("eval_knn_accuracy", "eval_probe_accuracy", "eval_rankme", "eval_feature_std"):
            cells.append(f"{spearmanr([result[metric] for result in results], scores).statistic:.2f}")
        lines.append(f"| {data.name}, {len(found)} models | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


STUDIES = {
    "elpv-targets": study_of_elpv,
    "elpv-targets-all-labels": study_of_all_labels,
    "photographs-targets": study_of_photographs,
    "photographs-ablations": study_of_ablations,
    "monitors": study_of_monitors,
}
EQUAL_TIME = (
    "Pre-training of each: {minutes:g} minutes of one thread, in steps that short runs in turns came to; with "
    "a teacher, the time of its features (kept for whole images and their mirror images) is part of them "
    "where a study has methods without one. "
)
STUDENT_TIME = (
    "Time on one thread beside other work, without that of the teacher's features for eight views of each "
    "photograph, some 20 minutes once. "
)
MONITORED = (
    "Of ELPV the models of [elpv-targets](elpv-targets.md) and [recipes-pretraining](recipes-pretraining.md),"
    " pre-trained in different ways. The monitors are those of each run's last evaluation. "
)
CONDITIONS = (
    "The teacher is EfficientNet-Lite0 with ImageNet weights. ELPV: the model of `make pretrain` (1.3 M "
    "parameters, 128 px), 197 of 1,968 labels, 20 epochs (all labels: 8), tested on 656 photographs; the "
    "teacher sees 128 px. Clothes: width 96, 128 px, 307 of 3,068 labels, 30 epochs (linear 20, from scratch "
    "60), tested on 713 photographs; the teacher sees 256 px while it teaches, 128 px where it is judged "
    "itself. Mean and standard deviation in % over the seeds 0 to 2 of the labels and of their training; one "
    "pre-training each. bf16 on a processor with bf16 units. "
)


def write_page(args, study: Callable, name: str, text: str) -> None:
    """Runs a study on one thread and writes its table, with a text below it, to a page of docs/results."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    start = time.time()
    lines = "\n".join(study(args))
    page = ROOT / "docs" / "results" / f"{name}.md"
    page.write_text(f"# {study.__doc__.strip().rstrip('.')}\n\n{lines}\n\n{text}\n")
    print(f"{page}, after {math.ceil((time.time() - start) / 60)} minutes")


def main() -> None:
    """Runs a study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--minutes", type=float, default=5, help="of pre-training, by one thread")
    parser.add_argument("--first", type=int, help="compare only so many methods of a study")
    parser.add_argument("--photographs", type=Path, default=Path("clothing-dataset-small"))
    parser.add_argument("--teacher", type=Path, default=Path("outputs/efficientnet-lite0"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/target-studies"))
    args = parser.parse_args()
    if not args.study.startswith("elpv") and not (args.photographs / "train").is_dir():
        parser.error(f"--photographs is {str(args.photographs)!r}, which has no folder train.")
    if not (args.teacher / "config.json").exists():
        parser.error(f"--teacher is {str(args.teacher)!r}, which is no model; see the first lines of --help.")
    command = f"python benchmarks/targets.py {args.study} --minutes {args.minutes:g}"
    command += f" --first {args.first}" if args.first else ""
    times = {"photographs-targets": STUDENT_TIME, "monitors": MONITORED}
    time_of = times.get(args.study, EQUAL_TIME.format(minutes=args.minutes))
    if args.study == "monitors":
        command = "python benchmarks/targets.py monitors"
    write_page(args, STUDIES[args.study], args.study, f"{time_of}{CONDITIONS}Made by `{command}`.")


if __name__ == "__main__":
    main()
