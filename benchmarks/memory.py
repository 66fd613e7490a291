"""Memory of a training step by the estimate of `--auto_batch_size`: the largest batches that fit, and a check.

The table needs no memory. The check trains in processes of their own, and compares the estimate with the most memory
that such a process had beyond what it had before there was a model, after a first step of another one. It makes
glibc give back what is freed (MALLOC_MMAP_THRESHOLD_), so that what its allocator keeps does not count; with
--as_it_comes it counts.

    python benchmarks/memory.py                               # named sizes and devices, bf16
    python benchmarks/memory.py --gradient_checkpointing
    python benchmarks/memory.py --device cuda                 # as a GPU keeps them, told where there is one
    python benchmarks/memory.py --check                       # Linux; up to 13 GB, 20 minutes on two cores
    python benchmarks/memory.py --check --sizes tiny --batch_sizes 8 --as_it_comes
"""

import argparse
import ctypes
import gc
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from training_step import peak_memory_of_this_process

from modeling_greenmim import GreenMIMConfig, GreenMIMForImageClassification, GreenMIMForPreTraining
from training_greenmim.classification import trainer as classification
from training_greenmim.pretraining import trainer as pretraining
from training_greenmim.runs.arguments import MIMTrainingArguments
from training_greenmim.runs.memory import SHARE, StepMemory, peak_of_step
from training_greenmim.runs.models import MODEL_SIZES, build_config


TASKS = ("pretraining", "classification")
CPU = torch.device("cpu")
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
DEVICES = (8, 12, 24, 80)
# What a CUDA context takes of a device in GiB, about.
CONTEXT = 0.5
MICRO_BATCHES = 2


def model_and_loss(task: str, name: str, with_checkpointing: bool) -> tuple:
    """A model of a named size in training mode, and its loss of a batch."""
    config: GreenMIMConfig = build_config(name)
    if task == "pretraining":
        args = MIMTrainingArguments(output_dir=tempfile.gettempdir(), use_cpu=True, report_to="none")
        loss_of_batch = pretraining.loss_of_batch(config, args)
        model = GreenMIMForPreTraining(config)
    else:
        config.num_labels = 1000
        loss_of_batch = classification.loss_of_batch(config, config.image_height_and_width)
        model = GreenMIMForImageClassification(config)
    if with_checkpointing:
        model.activation_checkpointing_enable()
    return model.train(), loss_of_batch


def print_table(args) -> None:
    """The largest batches that fit."""
    print(f"| {args.dtypes[0]} | MB an image | " + " | ".join(f"{memory} GB" for memory in DEVICES) + " |")
    print("| --- " * (2 + len(DEVICES)) + "|")
    for task, name in itertools.product(args.tasks, args.sizes):
        model, loss_of_batch = model_and_loss(task, name, args.gradient_checkpointing)
        needed = StepMemory.of(model, loss_of_batch, torch.device(args.device), DTYPES[args.dtypes[0]])
        batches = [needed.largest_batch(SHARE * (memory - CONTEXT) * 2**30) for memory in DEVICES]
        cells = " | ".join(str(batch) for batch in batches)
        print(f"| {task}, {name} | {needed.per_image / 1e6:.1f} | {cells} |", flush=True)


def print_check(args) -> None:
    """Estimates beside what processes had."""
    print("| | estimate, GB | process, GB | error |\n| --- | --- | --- | --- |")
    for task, name, dtype, batch in itertools.product(args.tasks, args.sizes, args.dtypes, args.batch_sizes):
        model, loss_of_batch = model_and_loss(task, name, args.gradient_checkpointing)
        estimate = peak_of_step(model, loss_of_batch, batch, CPU, DTYPES[dtype], MICRO_BATCHES) / 1e9
        command = [sys.executable, __file__, "--measure", "--tasks", task, "--sizes", name, "--dtypes", dtype]
        command += ["--batch_sizes", str(batch), *["--gradient_checkpointing"] * args.gradient_checkpointing]
        environment = {**os.environ} if args.as_it_comes else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        measured = float(process.stdout)
        what = f"{task}, {name}, {dtype}, batch {batch}{', checkpointing' * args.gradient_checkpointing}"
        print(f"| {what} | {estimate:.2f} | {measured:.2f} | {estimate / measured - 1:+.1%} |", flush=True)


def measure(args) -> float:
    """GB that this process has at most for steps of a model, beyond what it had before."""
    work = args.tasks[0], args.sizes[0], args.gradient_checkpointing
    train(*work, args.dtypes[0], [1])  # libraries and their kernels
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    before = int(line.split()[1]) * 1024 / 1e9
    train(*work, args.dtypes[0], [1, args.batch_sizes[0]])
    return peak_memory_of_this_process("cpu") - before


def train(task: str, name: str, with_checkpointing: bool, dtype: str, batches: list[int]) -> None:
    """Steps of a new model, the first of which makes AdamW's moments."""
    torch.manual_seed(0)
    model, loss_of_batch = model_and_loss(task, name, with_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for batch in batches:
        for _ in range(MICRO_BATCHES):
            with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32"):
                loss = loss_of_batch(batch, CPU)(model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the table")
    parser.add_argument("--check", action="store_true", help="compare with steps on this CPU")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument(
        "--sizes", nargs="+", choices=list(MODEL_SIZES), help="default: all; of the check tiny and base"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), help="default: bf16 (autocast); of the check both"
    )
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[8, 32], help="of the check")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--as_it_comes", action="store_true", help="count what glibc's allocator keeps too")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    checks = args.check or args.measure
    args.sizes = args.sizes or (["tiny", "base"] if checks else list(MODEL_SIZES))
    args.dtypes = args.dtypes or (list(DTYPES) if checks else ["bf16"])
    if args.measure:
        print(measure(args))
    elif args.check:
        print_check(args)
    else:
        print_table(args)


if __name__ == "__main__":
    main()
