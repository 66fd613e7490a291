"""What full depth is worth: the ELPV photographs as 12-bit values in 16-bit files.

    python benchmarks/depth.py [--steps 1000]

The photographs have 8 bits, so that 12-bit ones, 16 times the values, know no more: read in full depth they should
come to what the originals come to, and cut to their upper byte, which leaves 16 grey levels, they show what is lost.
Each is pre-trained and fine-tuned on 10 % of the labels by three seeds. All is in bf16 on one thread. Finished runs
are kept under --output_dir. The table goes to docs/results/depth.md.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from elpv import EPOCHS, GENTLE_TRAINING, PRETRAINING, ROOT, classify, in_few_words
from PIL import Image
from targets import BF16, SEEDS

import run_mim
from training_greenmim.data.images import open_image
from training_greenmim.data.readers import LABEL, elpv


GREY_LEVELS = 16  # of the upper byte of 12 bits
METHODS = {
    "8 bits": ("8", []),
    "12 bits in full depth": ("12", []),
    "12 bits cut to the upper byte": ("12", ["--image_statistics", "imagenet"]),
}


def write_photographs(folder: Path) -> None:
    """The photographs as PNG files of 8 bits and of 12 in 16, in folders for the parts and the classes."""
    for part, records in zip(("train", "test"), elpv()):
        for index, record in enumerate(records):
            values = np.asarray(open_image(record["image"]))
            for bits, scaled in (("8", values), ("12", values.astype(np.uint16) * GREY_LEVELS)):
                path = folder / bits / part / f"class-{record[LABEL]}" / f"{index:04}.png"
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(scaled).save(path)


def pretrained(output: Path, data: list[str], steps: int) -> Path:
    """The model of `make pretrain` on other files."""
    if not (output / "all_results.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        argv = [PRETRAINING, *data, "--output_dir", str(output), "--max_steps", str(steps), *BF16]
        argv += ["--report_to", "none", "--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true"]
        argv += ["--dataloader_num_workers", "0", "--decode_once", "true"]
        print("python run_mim.py", *argv, flush=True)
        run_mim.main(argv)
    return output


def main() -> None:
    """Runs the study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of pre-training")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/depth"))
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    write_photographs(args.output_dir)
    lines = ["| | validation loss | ROC AUC, 10 % of the labels |", "| --- " * 3 + "|"]
    for method, (bits, more) in METHODS.items():
        folder = args.output_dir / bits
        data = ["--train_dir", str(folder / "train"), "--validation_dir", str(folder / "test"), *more]
        output = pretrained(args.output_dir / method.replace(" ", "-"), data, args.steps)
        values = []
        for seed in SEEDS:
            flags = [*data, *GENTLE_TRAINING, *BF16, "--model_name_or_path", output, "--max_train_samples", 197]
            flags += ["--num_train_epochs", EPOCHS["10 % of the labels"], "--seed", seed]
            values.append(classify(args.output_dir / f"{output.name}-seed{seed}", *flags)["eval_roc_auc"])
        loss = json.loads((output / "all_results.json").read_text())["eval_loss"]
        lines.append(f"| {method} | {loss:.3f} | {in_few_words(values)} |")
        print(lines[-1], flush=True)
    text = (
        f"{args.steps:,} steps of pre-training, then 20 epochs on 197 labels, tested on 656 photographs; mean and"
        " standard deviation in % over the seeds 0 to 2 of fine-tuning. Losses of the last row are of other targets."
        " bf16 on one thread of a processor with bf16 units. Made by `python benchmarks/depth.py --steps"
        f" {args.steps}`."
    )
    page = "# Images of 12 bits in full depth\n\n" + "\n".join(lines) + f"\n\n{text}\n"
    (ROOT / "docs" / "results" / "depth.md").write_text(page)


if __name__ == "__main__":
    main()
