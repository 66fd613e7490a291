"""Throughput of run_mim.py's trainer, with its data, against the bare training step of the same model.

Swin-T size, 224 px, the ELPV photographs, or JPEG files made from them (see loading.py). Bare steps (fixed images in
memory) and runs of the trainer (decoding, augmentation and normalisation included; its first steps, which wait for the
workers to start, left out) take turns.

    python benchmarks/end_to_end.py --batch_size 32 --photograph 500 375
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from loading import write_photographs
from training_step import loss_on_fresh_masks
from transformers import TrainerCallback
from transformers.utils import logging

from modeling_greenmim import GreenMIMForPreTraining
from modeling_greenmim.image_processing_greenmim import build_image_processor
from training_greenmim.data.image_dataset import ImageDataset
from training_greenmim.data.readers import elpv, load_folder
from training_greenmim.data.transforms import TrainTransform
from training_greenmim.pretraining.trainer import MIMTrainer
from training_greenmim.runs.arguments import MIMTrainingArguments
from training_greenmim.runs.models import build_config


# JPEG files, which a run reads more than once.
IMAGES = 512


class StepTimes(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def bare_images_per_second(model, args, steps: int) -> float:
    """Forward, backward and optimizer on images that lie ready."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(args.batch_size, 3, 224, 224, device=model.device)
    model.train()
    loss_of, ends = loss_on_fresh_masks(model), []
    for _ in range(steps):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            loss = loss_of(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return args.batch_size * (len(ends) - 1) / (ends[-1] - ends[0])


def trainer_images_per_second(model, records, args, steps: int) -> float:
    """A short run of the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        training_args = MIMTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            max_steps=steps + args.skipped,
            bf16=args.bf16,
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        dataset = ImageDataset(records, "image", TrainTransform((224, 224), 3), seed=0)
        times = StepTimes()
        image_processor = build_image_processor(model.config)
        trainer = MIMTrainer(
            model, training_args, train_dataset=dataset, image_processor=image_processor, callbacks=[times]
        )
        trainer.train()
    # Batches that were decoded while the first steps waited are used up by then.
    ends = times.ends[args.skipped :]
    return args.batch_size * (len(ends) - 1) / (ends[-1] - ends[0])


def main() -> None:
    """Prints both throughputs and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skipped", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--photograph", type=int, nargs=2, help="width and height of JPEG files; default: ELPV's PNGs")
    args = parser.parse_args()
    logging.set_verbosity_error()
    model = GreenMIMForPreTraining(build_config("tiny"))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    bare, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        if args.photograph:
            write_photographs(Path(folder), IMAGES, tuple(args.photograph))
        records = load_folder(folder, "folder") if args.photograph else elpv()[0]
        for _ in range(args.rounds):
            bare.append(bare_images_per_second(model, args, args.steps))
            whole.append(trainer_images_per_second(model, records, args, args.steps))
            print(f"bare step {bare[-1]:.1f} images/s, end to end {whole[-1]:.1f}", flush=True)
    ratio = statistics.median(end / start for start, end in zip(bare, whole))
    print(
        f"median: bare step {statistics.median(bare):.1f} images/s, end to end {statistics.median(whole):.1f},", end=""
    )
    print(f" median ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
