"""By which rule weights of RGB are carried to other channels: grey solar cells, and photographs of five bands.

    python benchmarks/targets.py photographs-targets --photographs clothing-dataset-small    # the weights of RGB
    python benchmarks/channels.py --photographs clothing-dataset-small

`--photographs` is a copy of https://github.com/alexeygrigorev/clothing-dataset-small (CC0). Bands are its colours, its
blurred luminance and the luminance's gradients, shuffled, and with the colours first and in their order, which makes a
difference to `first` alone. Each is fine-tuned on 10 % of the labels by several seeds, with a mild decay of rates by
layer: what is new at the entrance would hardly learn otherwise. All is in bf16 on one thread. Each run is one of
run_image_classification.py with the arguments that are printed. Finished runs are kept under --output_dir and not
repeated: the study may be interrupted. Its table goes to docs/results/channels.md.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from elpv import WHOLE_IMAGES, classify, in_few_words
from PIL import Image, ImageFilter
from targets import BF16, SEEDS, write_page

from training_greenmim.data.images import open_image
from training_greenmim.runs.starts import CHANNEL_RULES


# Of the bands that `bands_of` makes; what `first` keeps are the first three.
ORDERS = {"shuffled bands": (4, 2, 3, 0, 1), "RGB first": (0, 1, 2, 3, 4)}
# Of the files, in px.
SHORTER_SIDE, BLUR = 160, 4
DECAY = "0.8"
# A control that is not pre-trained, beside the rules.
SCRATCH = "from scratch"


@dataclass
class Data:
    """What weights are carried to.

    Args:
        flags: of run_image_classification.py: its data, its labels, the number of channels.
        epochs: of fine-tuning, and as many from scratch.
        metric, title: what is reported.
        columns: the rules that are compared, and from scratch.
    """

    flags: list
    epochs: int
    metric: str
    title: str
    columns: tuple[str, ...] = (*CHANNEL_RULES, SCRATCH)


def bands_of(image: Image.Image) -> np.ndarray:
    """A photograph as bands of 8 bits, `(height, width, 5)`: red, green, blue, blurred luminance, gradients."""
    image = image.convert("RGB")
    scale = SHORTER_SIDE / min(image.size)
    image = image.resize([max(SHORTER_SIDE, round(scale * side)) for side in image.size], Image.Resampling.BICUBIC)
    grey = image.convert("L")
    slopes = np.hypot(*np.gradient(np.asarray(grey, np.float32))).clip(0, 255).astype(np.uint8)
    return np.dstack([np.asarray(image), np.asarray(grey.filter(ImageFilter.GaussianBlur(BLUR))), slopes])


def write_bands(args, order: str) -> Path:
    """Files of five bands, in folders for the parts and the classes; validation and test are one part."""
    folder = args.output_dir / order.replace(" ", "-")
    for path in sorted(args.photographs.glob("*/*/*.jpg")):
        part, name = path.parent.parent.name, path.parent.name
        target = folder / ("train" if part == "train" else "test") / name / f"{part}-{path.stem}.npy"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, bands_of(open_image(path))[..., ORDERS[order]])
    return folder


def data_sets(args) -> dict[str, Data]:
    """Five bands of photographs of clothes in two orders, and grey photographs of solar cells."""
    clothes = {}
    for order in ORDERS:
        folder = write_bands(args, order)
        flags = ["--train_dir", folder / "train", "--validation_dir", folder / "test"]
        flags += ["--config_overrides", "num_channels=5", "--max_train_samples", 307]
        clothes[order] = Data(flags, 15, "eval_accuracy", "accuracy")
    clothes["RGB first"].columns = ("first",)
    flags = ["--config_overrides", "num_channels=1", "--max_train_samples", 197]
    cells = Data(flags, 10, "eval_roc_auc", "ROC AUC")
    return {
        "clothes, shuffled bands": clothes["shuffled bands"],
        "solar cells": cells,
        "clothes, RGB first": clothes["RGB first"],
    }


def score(args, data: Data, title: str, column: str, seed: int) -> float:
    """The metric of a run of run_image_classification.py."""
    flags = ["--do_train", *WHOLE_IMAGES, "--learning_rate", "1e-3", "--num_train_epochs", data.epochs, *BF16]
    if column == SCRATCH:
        flags, name = [*flags, "--config_name", args.start], f"{title}-scratch"
    else:
        flags += ["--model_name_or_path", args.start, "--channel_weights", column, "--layer_decay", DECAY]
        name = f"{title}-{column}-{DECAY}"
    folder = args.output_dir / f"{name}-seed{seed}".replace(", ", "-").replace(" ", "-")
    return classify(folder, *data.flags, *flags, "--seed", seed)[data.metric]


def study(args) -> list[str]:
    """Weights of RGB carried to other channels."""
    found = data_sets(args)
    runs = [(title, column, seed) for seed in SEEDS for title, data in found.items() for column in data.columns]
    # One seed of all rules after the other, so that what is there can be compared at any time.
    runs.sort(key=lambda run: run[1] == SCRATCH)
    scores = {run: score(args, found[run[0]], *run) for run in runs}
    columns = [*(f"`{rule}`" for rule in CHANNEL_RULES), SCRATCH]
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    for title, data in found.items():
        cells = [
            in_few_words([scores[title, column, seed] for seed in SEEDS]) if column in data.columns else ""
            for column in (*CHANNEL_RULES, SCRATCH)
        ]
        lines.append(f"| {title}: {data.title} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Runs the study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, default=Path("clothing-dataset-small"))
    start = Path("outputs/target-studies/photographs-targets-align-3000-steps-constant-rate")
    parser.add_argument("--start", type=Path, default=start, help="the weights of RGB")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/channels"))
    args = parser.parse_args()
    if not (args.photographs / "train").is_dir():
        parser.error(f"--photographs is {str(args.photographs)!r}, which has no folder train.")
    if not (args.start / "config.json").exists():
        parser.error(f"--start is {str(args.start)!r}, which is no model; see the first lines of --help.")
    text = (
        "Accuracy and ROC AUC in %, mean and standard deviation over the seeds 0 to 2 of the labels and of their"
        " training. The weights of RGB are those of the student with a constant rate of"
        " [photographs-targets](photographs-targets.md) (width 96, 128 px), fine-tuned at 1e-3 with a layer-wise decay"
        f" of {DECAY}. Clothes: ten classes, 307 labels, 15 epochs, tested on 713 photographs of five bands: red,"
        " green, blue, blurred luminance and the luminance's gradients; shuffled, `first` gives the weights of red to"
        " the gradients, of green to blue, of blue to the luminance. To the order other rules are indifferent. Solar"
        " cells: grey, 197 labels, 10 epochs, tested on 656 photographs. From scratch: as many epochs. bf16 on one"
        " thread of a processor with bf16 units, beside other work. Made by `python benchmarks/channels.py`."
    )
    write_page(args, study, "channels", text)


if __name__ == "__main__":
    main()
