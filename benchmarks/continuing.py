"""Whether it pays to go on from a model on new images, and by which recipe: halves of the ELPV photographs.

    python benchmarks/continuing.py continuing-sweep    # learning rate, layer-wise decay and warm-up, one seed
    python benchmarks/continuing.py continuing          # from scratch, as from scratch, --recipe continue

The model of `make pretrain` is trained on every second photograph for training, then on the others. All is in bf16 on
one thread. Each run is one of run_mim.py with the arguments that are printed, evaluated at regular intervals on the
photographs for testing, by a mask that all runs of a seed share. Finished runs are kept under --output_dir and not
repeated: a study may be interrupted. Its table goes to docs/results/<study>.md.
"""

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path

from elpv import PRETRAINING
from targets import BF16, write_page

import run_mim
from training_greenmim.data.readers import elpv


SEEDS = range(3)
# Steps on the first half, and from scratch on the second; of going on there.
STEPS, STEPS_ON = 600, 300
BATCH = 64
# Evaluations are so many steps apart.
INTERVAL = 30
# As examples/pretrain_elpv.yaml has it, but for the model.
AS_FROM_SCRATCH = ["--learning_rate", "2e-3"]
SWEEP = {
    "2e-3, as from scratch": AS_FROM_SCRATCH,
    "1e-3": ["--learning_rate", "1e-3"],
    "5e-4": ["--learning_rate", "5e-4"],
    "2e-3, decay 0.9": [*AS_FROM_SCRATCH, "--layer_decay", "0.9"],
    "1e-3, decay 0.9": ["--learning_rate", "1e-3", "--layer_decay", "0.9"],
    "1e-3, decay 0.75": ["--learning_rate", "1e-3", "--layer_decay", "0.75"],
    "1e-3, decay 0.9, warm-up 1 %": ["--learning_rate", "1e-3", "--layer_decay", "0.9", "--warmup_steps", "0.01"],
}
GOING_ON = {
    "as from scratch, 2e-3": AS_FROM_SCRATCH,
    "`--recipe continue`": ["--recipe", "continue"],
    "defaults of `run_mim.py`, 3.75e-5": [],
}
SEVERAL_SEEDS = (
    f"Steps and images for the seeds {list(SEEDS)} of the second half, 0 where the first half's model was there"
    " already; losses: mean and standard deviation over them, most of it that of the mask, which each seed draws."
)
CONDITIONS = (
    f"First half: {STEPS} steps of {BATCH} images, once. Second half, the other 984 photographs: from scratch for as"
    f" many steps, going on for {STEPS_ON}, each with a cosine over its own steps. The loss is that on 656 photographs"
    f" for testing, of runs that go on every {INTERVAL} steps; the one to reach is that of the run from scratch of the"
    " same seed at its end. The model of `make pretrain` (1.3 M parameters, 128 px), whose rate from scratch is 2e-3;"
    " warm-up 5 % of the steps unless said. bf16 on one thread of a processor with bf16 units, beside other work."
    " {seeds} "
)


def halves(args) -> dict[str, Path]:
    """Folders of links: every second photograph for training, the others, and those for testing."""
    train, test = elpv()
    parts = {"first": train["image"][::2], "second": train["image"][1::2], "test": test["image"][:]}
    for name, images in parts.items():
        folder = args.output_dir / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        for image in images:
            link = folder / Path(image["path"]).name
            if not link.is_symlink():
                link.symlink_to(image["path"])
    return {name: args.output_dir / "images" / name for name in parts}


def losses(args, half: str, name: str, steps: int, seed: int, *flags) -> dict[int, float]:
    """Loss on the photographs for testing by steps, of a run that is made unless its folder is there."""
    folder = args.output_dir / name
    results = folder / "all_results.json"
    # Results of training are there before those of evaluation.
    if not results.exists() or "eval_loss" not in json.loads(results.read_text()):
        shutil.rmtree(folder, ignore_errors=True)
        folders = halves(args)
        argv = ["--train_dir", folders[half], "--validation_dir", folders["test"], "--output_dir", folder]
        argv += ["--do_train", "--do_eval", "--max_steps", steps, "--seed", seed, "--min_crop_scale", "0.5"]
        argv += ["--per_device_train_batch_size", BATCH, "--per_device_eval_batch_size", BATCH, *BF16]
        argv += ["--eval_strategy", "steps", "--eval_steps", INTERVAL, "--eval_on_start", "true"]
        argv += ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--decode_once", "true"]
        argv += ["--num_pictures", "0"]
        argv = [str(value) for value in (*argv, "--dataloader_num_workers", "0", *flags)]
        # The file of the quick start comes first; flags win over it.
        argv = [PRETRAINING, *argv] if half == "first" else argv
        print("python run_mim.py", *argv, flush=True)
        run_mim.main(argv)
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}


def first_half(args) -> Path:
    """The model that was pre-trained on the first half."""
    losses(args, "first", "first-half", STEPS, 0, "--eval_steps", STEPS)
    return args.output_dir / "first-half"


def from_scratch(args, seed: int) -> dict[int, float]:
    """Losses of a model of the same shape that is trained on the second half alone."""
    flags = ["--config_name", first_half(args), *AS_FROM_SCRATCH, "--eval_steps", STEPS // 5]
    return losses(args, "second", f"scratch-seed{seed}", STEPS, seed, *flags)


def going_on(args, seed: int, flags: list[str]) -> dict[int, float]:
    """Losses of the first half's model as it is trained on the second half."""
    name = "-".join(flag.lstrip("-") for flag in flags) or "defaults"
    flags = ["--model_name_or_path", first_half(args), *flags]
    return losses(args, "second", f"on-{name}-seed{seed}", STEPS_ON, seed, *flags)


def steps_to(goal: float, found: dict[int, float]) -> float:
    """Steps of the first evaluation with a loss of at most the goal; infinite where there is none."""
    return min((step for step, loss in found.items() if loss <= goal), default=math.inf)


def images_in(args, steps: float) -> float:
    """Images of the second half that so many steps see; the last batch of an epoch is not full."""
    if math.isinf(steps):
        return steps
    count = len(list(halves(args)["second"].iterdir()))
    epochs, rest = divmod(steps, math.ceil(count / BATCH))
    return epochs * count + rest * BATCH


def of_each_seed(values: list[float]) -> str:
    """Numbers of the seeds in their order; a dash where a run did not come that far."""
    return "; ".join("-" if math.isinf(value) else f"{value:,}" for value in values)


def mean_of(values: list[float]) -> str:
    """Mean and standard deviation of losses."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def compared(args, methods: dict[str, list[str]], seeds: range) -> list[str]:
    """A table of ways of going on, against from scratch."""
    goals = {seed: from_scratch(args, seed)[STEPS] for seed in seeds}
    lines = [f"| | steps to the loss of {STEPS} from scratch | images | steps in all | loss at the end |"]
    lines.append("| --- " * 5 + "|")
    images = f"{images_in(args, STEPS):,}"
    lines.append(f"| from scratch | {STEPS} | {images} | {STEPS} | {mean_of(list(goals.values()))} |")
    for name, flags in methods.items():
        found = {seed: going_on(args, seed, flags) for seed in seeds}
        steps = [steps_to(goals[seed], found[seed]) for seed in seeds]
        images = of_each_seed([images_in(args, count) for count in steps])
        final = mean_of([found[seed][STEPS_ON] for seed in seeds])
        lines.append(f"| {name} | {of_each_seed(steps)} | {images} | {STEPS_ON} | {final} |")
        print(lines[-1], flush=True)
    return lines


def study_of_rates(args) -> list[str]:
    """Going on from a model: learning rate, layer-wise decay and warm-up."""
    return compared(args, SWEEP, range(1))


def study_of_recipes(args) -> list[str]:
    """Going on from a model of other photographs: from scratch, as from scratch, by `--recipe continue`."""
    return compared(args, GOING_ON, SEEDS)


STUDIES = {"continuing-sweep": study_of_rates, "continuing": study_of_recipes}


def main() -> None:
    """Runs a study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/continuing"))
    args = parser.parse_args()
    seeds = "One seed." if args.study == "continuing-sweep" else SEVERAL_SEEDS
    text = f"{CONDITIONS.format(seeds=seeds)}Made by `python benchmarks/continuing.py {args.study}`."
    write_page(args, STUDIES[args.study], args.study, text)


if __name__ == "__main__":
    main()
