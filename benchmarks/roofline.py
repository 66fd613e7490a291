"""A model, not a measurement: the time of a training step by three numbers of a device.

Every call of an operator, as `counters.py` counts them, takes the longest of these: its bytes by the bandwidth of the
memory, its operations by the peak of matrix products, what it costs to start a kernel. AdamW, fused, moves 28 bytes a
parameter. --check does the same with numbers that it measures on this CPU, and compares with steps that it times,
all in processor time of one thread, which other programs change little. It wants memory that is kept when it is freed,
as on a GPU: glibc would have the system clear the pages of every large tensor anew.

    python benchmarks/roofline.py                        # devices of the table, Swin-B and ViT-B, bf16, batch 64
    python benchmarks/roofline.py --batch_size 256 --reference DIR      # and a checkout of the published code
    python benchmarks/roofline.py --device cuda          # the calls that a GPU has, counted where there is one
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 python benchmarks/roofline.py --check    # some minutes
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from counters import count
from training_step import TASKS, add_model_arguments, chosen_builders, make_step


class Device(NamedTuple):
    """What the model knows of a device: bytes and operations a second, and seconds to start a kernel."""

    bandwidth: float
    peak: float
    launch: float


# Not of a data sheet: what an operator of PyTorch costs the host of a GPU, about, uncompiled and without CUDA graphs.
LAUNCH = 8e-6
# Data sheets of NVIDIA: H100 SXM5 80 GB, A100 SXM 80 GB, L4 (242 TFLOP/s with sparsity, half without), RTX 3060 12 GB
# ("102 Tensor-TFLOPS" with sparsity and sums in fp16: a quarter of it without, and with sums in fp32).
DEVICES = {
    "H100": Device(3.35e12, 989e12, LAUNCH),
    "A100": Device(2.04e12, 312e12, LAUNCH),
    "L4": Device(0.300e12, 121e12, LAUNCH),
    "RTX 3060": Device(0.360e12, 25.5e12, LAUNCH),
}
ADAMW_BYTES = 28  # weight, gradient and two moments read, three of them written, in fp32

# Task, model, size, data type and batch of the steps that --check times.
CHECKED = (
    ("pretraining", "greenmim", "tiny", "fp32", 16),
    ("pretraining", "greenmim", "tiny", "bf16", 16),
    ("pretraining", "greenmim", "tiny", "bf16", 4),
    ("pretraining", "greenmim", "base", "fp32", 16),
    ("pretraining", "greenmim", "base", "bf16", 16),
    ("pretraining", "simmim", "tiny", "fp32", 16),
    ("pretraining", "simmim", "tiny", "bf16", 16),
    ("pretraining", "vit_mae", "base", "fp32", 16),
    ("pretraining", "vit_mae", "base", "bf16", 16),
    ("classification", "greenmim", "tiny", "bf16", 16),
    ("classification", "swin", "tiny", "bf16", 16),
)


def calls_of_step(build: Callable, args, dtype: str) -> list[tuple[int, int]]:
    """Bytes and operations of every call of a step, AdamW's included."""
    counter = count(build, args, dtype, computed=build.__name__ == "reference")
    model, _ = build(args)
    return [*counter.calls, (ADAMW_BYTES * sum(weight.numel() for weight in model.parameters()), 0)]


def expected_seconds(calls: list[tuple[int, int]], device: Device) -> tuple[float, dict[str, float]]:
    """Seconds of a step by the model, and the share of each bound in it."""
    shares = {"launches": 0.0, "bytes": 0.0, "products": 0.0}
    for traffic, flops in calls:
        bounds = (device.launch, traffic / device.bandwidth, flops / device.peak)
        shares[list(shares)[bounds.index(max(bounds))]] += max(bounds)
    seconds = sum(shares.values())
    return seconds, {name: value / seconds for name, value in shares.items()}


def print_devices(args) -> None:
    """Images a second on the devices of the table, by the model."""
    builders = chosen_builders(args)
    calls = {name: calls_of_step(build, args, "bf16") for name, build in builders.items()}
    print(f"| model, not measured: {args.size}, bf16, batch {args.batch_size} |", " | ".join(builders), "| bound by |")
    print("| --- " * (2 + len(builders)) + "|")
    for name, device in DEVICES.items():
        expected = {model: expected_seconds(of_model, device) for model, of_model in calls.items()}
        cells = [f"{args.batch_size / seconds:,.0f}" for seconds, _ in expected.values()]
        shares = ", ".join(f"{bound} {share:.0%}" for bound, share in expected["greenmim"][1].items())
        print(f"| {name} |", " | ".join(cells), f"| {shares} |", flush=True)


def processor_seconds(work: Callable[[], None], calls: int) -> float:
    """Median processor time of a call, after one that warms up."""
    seconds = []
    for _ in range(calls + 1):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def this_machine(dtype: str) -> Device:
    """The three numbers of a thread of this CPU: adding large vectors, a large matrix product, adding tiny vectors."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    first, second, third = (torch.ones(2**25) for _ in range(3))
    left, right = (torch.randn(2048, 2048).to(kind) for _ in range(2))
    tiny = torch.ones(8)

    def many():
        for _ in range(1000):
            tiny.add(1)

    bandwidth = 3 * first.nbytes / processor_seconds(lambda: torch.add(first, second, out=third), 5)
    peak = 2 * 2048**3 / processor_seconds(lambda: left @ right, 5)
    return Device(bandwidth, peak, processor_seconds(many, 5) / 1000)


def print_check(args) -> None:
    """Seconds by the model and as timed."""
    torch.set_num_threads(1)
    machines = {dtype: this_machine(dtype) for dtype in ("fp32", "bf16")}
    for dtype, machine in machines.items():
        print(
            f"{dtype}: {machine.bandwidth / 1e9:.1f} GB/s, {machine.peak / 1e9:.0f} GFLOP/s,"
            f" {machine.launch * 1e6:.1f} us an operator"
        )
    print("\n| step | model, s | measured, s | model / measured |\n| --- | --- | --- | --- |")
    for task, name, size, dtype, batch in CHECKED[args.first : args.last]:
        settings = {"task": task, "size": size, "batch_size": batch, "reference": None, "device": "cpu"}
        step_args = argparse.Namespace(**{**vars(args), **settings})
        build = TASKS[task][name]
        expected, _ = expected_seconds(calls_of_step(build, step_args, dtype), machines[dtype])
        measured = processor_seconds(make_step(build, step_args, dtype), args.rounds)
        label = f"{task}, {name}, {size}, {dtype}, batch {batch}"
        print(f"| {label} | {expected:.3f} | {measured:.3f} | {expected / measured:.2f} |", flush=True)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(batch_size=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="whose calls")
    parser.add_argument("--check", action="store_true", help="compare with steps on this CPU")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each")
    parser.add_argument("--first", type=int, help="check from this step of the list on")
    parser.add_argument("--last", type=int, help="and up to, without, this one")
    args = parser.parse_args()
    args.inference = False
    if args.check:
        print_check(args)
    else:
        print_devices(args)


if __name__ == "__main__":
    main()
