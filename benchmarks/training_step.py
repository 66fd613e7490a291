"""Time and peak memory of a full training step, or of inference: GreenMIM against its peers in Transformers.

All models take turns in one process, so that drifts of the machine hit them alike; peak memory is measured in a
process of its own for each model. A step is forward, backward, fused AdamW and zeroing of gradients; `--inference`
measures the forward pass alone, in eval mode. Operations are those of matrix products and attention, as torch counts
them.

    python benchmarks/training_step.py --batch_size 16 --dtype fp32 bf16
    python benchmarks/training_step.py --batch_size 32 --memory_only
    python benchmarks/training_step.py --reference DIR                    # and a checkout of the published code
    python benchmarks/training_step.py --reference DIR --peers reference  # no other peer
    python benchmarks/training_step.py --task classification --size tiny --no_memory      # fine-tuning: no mask
    python benchmarks/training_step.py --task classification --size tiny --no_memory --inference
    python benchmarks/training_step.py --task classification --device cuda --compile --steps_per_round 20 --no_memory
    python benchmarks/training_step.py --size tiny --no_memory --energy DEU     # and energy, by codecarbon offline
"""

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from configuration_greenmim import GreenMIMConfig
from modeling_greenmim import GreenMIMForImageClassification, GreenMIMForPreTraining, MaskPlan
from training_greenmim.pretraining.collator import draw_plan


IMAGE_SIZE = 224
NUM_LABELS = 1000
SIZES = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7},
}
SIMMIM_MASK_RATIO = 0.6


def random_plan(config: GreenMIMConfig, static: bool = False) -> MaskPlan:
    """A random mask at the configuration's ratio, planned."""
    return draw_plan(config, [None], static=static)


def loss_on_fresh_masks(model: GreenMIMForPreTraining, static: bool = False) -> Callable:
    """Loss of images on a mask that each call draws and plans, and hands to the device as a data loader does."""

    def loss_of(images):
        plan = random_plan(model.config, static)
        if images.device.type != "cpu":
            plan = plan.pin_memory().to(images.device, non_blocking=True)
        return model(images, plan=plan).loss

    return loss_of


def greenmim(args) -> tuple[torch.nn.Module, Callable]:
    """GreenMIM, mask ratio 0.75."""
    model = GreenMIMForPreTraining(GreenMIMConfig(image_size=IMAGE_SIZE, **SIZES[args.size]))
    return model, loss_on_fresh_masks(model, static=args.compile)


def simmim(args) -> tuple[torch.nn.Module, Callable]:
    """Transformers' SwinForMaskedImageModeling, masks of 32 px units at SimMIM's ratio."""
    config = SwinConfig(image_size=IMAGE_SIZE, encoder_stride=32, drop_path_rate=0.0, **SIZES[args.size])
    model = SwinForMaskedImageModeling(config)
    side = IMAGE_SIZE // 32
    units = torch.rand(args.batch_size, side, side).flatten(1).argsort(1) < int(SIMMIM_MASK_RATIO * side**2)
    mask = units.view(-1, side, side).repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1).to(args.device)
    return model, lambda images: model(images, bool_masked_pos=mask).loss


def vit_mae(args) -> tuple[torch.nn.Module, Callable]:
    """Transformers' ViTMAEForPreTraining, ViT-B."""
    model = ViTMAEForPreTraining(ViTMAEConfig(image_size=IMAGE_SIZE))
    return model, lambda images: model(images).loss


def reference(args) -> tuple[torch.nn.Module, Callable]:
    """The published GreenMIM code, from a checkout of the user's."""
    sys.path.insert(0, args.reference)
    module, _, factory = args.reference_factory.rpartition(".")
    model = getattr(importlib.import_module(module), factory)(norm_pix_loss=True)
    # The published model returns (loss, prediction, mask) or the loss alone.
    return model, lambda images: first_of(model(images))


def first_of(outputs):
    """The loss of a model that may return more."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def greenmim_classifier(args) -> tuple[torch.nn.Module, Callable]:
    """GreenMIMForImageClassification, every unit visible."""
    return _classifier(GreenMIMForImageClassification, GreenMIMConfig, args)


def swin_classifier(args) -> tuple[torch.nn.Module, Callable]:
    """Transformers' SwinForImageClassification."""
    return _classifier(SwinForImageClassification, SwinConfig, args)


def _classifier(model_class, config_class, args) -> tuple[torch.nn.Module, Callable]:
    """Cross-entropy with labels in training, logits alone in inference."""
    config = config_class(image_size=IMAGE_SIZE, num_labels=NUM_LABELS, drop_path_rate=0.0, **SIZES[args.size])
    model = model_class(config)
    if args.inference:
        return model, lambda images: model(images).logits
    labels = torch.randint(NUM_LABELS, (args.batch_size,)).to(args.device)
    return model, lambda images: model(images, labels=labels).loss


TASKS = {
    "pretraining": {"greenmim": greenmim, "simmim": simmim, "vit_mae": vit_mae},
    "classification": {"greenmim": greenmim_classifier, "swin": swin_classifier},
}


def make_step(build: Callable, args, dtype: str) -> Callable[[], None]:
    """One training step, or one forward pass, of a freshly built model on fixed random images."""
    torch.manual_seed(0)
    model, loss_of = build(args)
    model.to(args.device).train(not args.inference)
    if args.compile:
        model.compile()
    images = torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=args.device)

    def forward():
        with torch.autocast(args.device, torch.bfloat16) if dtype == "bf16" else nullcontext():
            return loss_of(images)

    if args.inference:
        return torch.inference_mode()(forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step():
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def wait(device: str) -> None:
    """Until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_in_turns(works: dict[str, Callable[[], None]], device: str, rounds: int, calls: int = 1) -> dict[str, float]:
    """Median seconds of a call of each, taking turns of so many calls; a first round warms up."""
    seconds = {name: [] for name in works}
    for round_index in range(rounds + 1):
        for name, work in works.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                work()
            wait(device)
            if round_index:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_steps(builders: dict, args, dtype: str) -> dict[str, float]:
    """Median seconds of a step for each model."""
    steps = {name: make_step(build, args, dtype) for name, build in builders.items()}
    return time_in_turns(steps, args.device, args.rounds, args.steps_per_round)


def matrix_flops(build: Callable, args, dtype: str) -> int:
    """Floating-point operations of the matrix products of a step."""
    step = make_step(build, argparse.Namespace(**{**vars(args), "compile": False}), dtype)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def joules_per_image(builders: dict, args, dtype: str) -> dict[str, float]:
    """Energy of an image for each model: at least 20 s of steps each."""
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        country_iso_code=args.energy, save_to_file=False, allow_multiple_runs=True, log_level="error"
    )
    joules = {}
    for name, build in builders.items():
        step, steps = make_step(build, args, dtype), 0
        step()
        wait(args.device)
        tracker.start_task(name)
        start = time.perf_counter()
        while time.perf_counter() - start < 20:
            step()
            wait(args.device)
            steps += 1
        joules[name] = tracker.stop_task(name).energy_consumed * 3.6e6 / (steps * args.batch_size)
    return joules


def peak_memory(args, dtype: str, name: str) -> float:
    """Peak memory in GB of a fresh process that makes four steps with one model."""
    command = [sys.executable, __file__, "--measure_memory_of", name, "--task", args.task, "--dtype", dtype]
    command += ["--batch_size", str(args.batch_size), "--device", args.device, "--size", args.size]
    command += ["--inference"] * args.inference + ["--compile"] * args.compile
    if args.reference:
        command += ["--reference", args.reference, "--reference_factory", args.reference_factory]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(build: Callable, args) -> float:
    """Peak memory in GB of this process (CPU) or of its allocations (CUDA) over four steps."""
    step = make_step(build, args, args.dtype[0])
    for _ in range(4):
        step()
    return peak_memory_of_this_process(args.device)


def peak_memory_of_this_process(device: str) -> float:
    """Peak memory in GB: of the process (CPU, Linux) or of its allocations (CUDA)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # getrusage would count what the parent had when it started this process.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e9


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which models are compared, and on what."""
    parser.add_argument("--task", choices=list(TASKS), default="pretraining")
    parser.add_argument("--size", choices=list(SIZES), default="base", help="of the Swin transformers")
    parser.add_argument("--compile", action="store_true", help="torch.compile all models")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"], help="bf16 = autocast")
    parser.add_argument("--reference", help="folder of a checkout of the published code")
    parser.add_argument(
        "--reference_factory",
        default="modeling.model_factory.green_mim_swin_base_patch4_dec512b1",
        help="module.function in that folder that builds its Swin-B for pre-training",
    )
    parser.add_argument("--peers", nargs="*", help="names of the models to compare with; default: all")


def chosen_builders(args) -> dict[str, Callable]:
    """What builds each model that the arguments name; a message and the end for unknown names."""
    builders = dict(TASKS[args.task])
    if args.reference:
        builders["reference"] = reference
    if args.peers is None:
        return builders
    if unknown := set(args.peers) - set(builders):
        sys.exit(f"--peers {' '.join(unknown)}: this task has {', '.join(builders)}; reference needs --reference.")
    return {name: build for name, build in builders.items() if name in ("greenmim", *args.peers)}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--inference", action="store_true", help="forward passes alone (--task classification)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each model")
    parser.add_argument("--steps_per_round", type=int, default=1)
    parser.add_argument("--no_memory", action="store_true", help="skip peak memory")
    parser.add_argument("--memory_only", action="store_true", help="skip times")
    parser.add_argument("--energy", metavar="COUNTRY", help="measure energy too; three letters of the country, as DEU")
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--measure_memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inference and args.task != "classification":
        parser.error("--inference needs --task classification; pre-training has no inference.")
    return args


def main() -> None:
    """Measures and prints a table."""
    args = parse_arguments()
    builders = chosen_builders(args)
    if args.measure_memory_of:
        print(measure_memory(builders[args.measure_memory_of], args))
        return
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    work = f"{args.task} {'inference' if args.inference else 'step'}, {args.size}, batch {args.batch_size}"
    results = {
        "work": work,
        "compile": args.compile,
        "device": device,
        "machine": platform.processor(),
        "torch": torch.__version__,
        "rows": [],
    }
    columns = ["images/s", "GreenMIM is", "matrix TFLOP/s", "peak memory, GB", "J an image"]
    print(f"| {work}, {device}{', compiled' * args.compile} |", " | ".join(columns), "|")
    print("| --- " * (1 + len(columns)) + "|")
    for dtype in args.dtype:
        seconds = {} if args.memory_only else time_steps(builders, args, dtype)
        joules = joules_per_image(builders, args, dtype) if args.energy else {}
        for name in builders:
            row = {"model": name, "dtype": dtype, "seconds_per_step": seconds.get(name)}
            row["peak_memory_gb"] = None if args.no_memory else round(peak_memory(args, dtype, name), 2)
            row["joules_per_image"] = joules.get(name)
            results["rows"].append(row)
            speed = f"{args.batch_size / seconds[name]:.2f}" if seconds else "-"
            factor = f"{seconds[name] / seconds['greenmim']:.2f} x as fast" if seconds else "-"
            flops = f"{matrix_flops(builders[name], args, dtype) / seconds[name] / 1e12:.3f}" if seconds else "-"
            print(
                f"| {name}, {dtype} | {speed} | {factor} | {flops} | {row['peak_memory_gb'] or '-'}"
                f" | {f'{joules[name]:.2f}' if joules else '-'} |",
                flush=True,
            )
    if args.output:
        with open(args.output, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
