"""How the cost of a pre-training step grows with image size, mask ratio, batch and model.

    python benchmarks/scaling.py                        # CPU; writes docs/scaling.png
    python benchmarks/scaling.py --device cuda --batch_size 128 --dtype bf16

A step is forward, backward and fused AdamW. Across image sizes the batch shrinks so that a step has about as many
visible tokens. All settings of a table take turns in one process; peak memory is that of a process of its own.
"""

import argparse
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import matplotlib
import torch
from training_step import loss_on_fresh_masks, peak_memory_of_this_process, time_in_turns

from modeling_greenmim import GreenMIMConfig, GreenMIMForPreTraining
from modeling_greenmim.configuration_greenmim import count_visible_units
from training_greenmim.runs.models import MODEL_SIZES


PICTURE = Path(__file__).parent.parent / "docs" / "scaling.png"
IMAGE_SIZES = (224, 320, 448, 640, 896)
MASK_RATIOS = (0.5, 0.6, 0.75, 0.9)


def make_config(model: str, image_size: int, mask_ratio: float) -> GreenMIMConfig:
    """Configuration of a named size."""
    return GreenMIMConfig(**{**MODEL_SIZES[model], "image_size": image_size, "mask_ratio": mask_ratio})


def visible_tokens(config: GreenMIMConfig, batch_size: int) -> int:
    """Tokens of the first stage in a step."""
    num_units = config.unit_grid[0] * config.unit_grid[1]
    tokens_per_unit = (config.encoder_stride // config.patch_size) ** 2
    return batch_size * count_visible_units(num_units, config.mask_ratio) * tokens_per_unit


def make_step(config: GreenMIMConfig, batch_size: int, args):
    """A training step of a new model on noise."""
    torch.manual_seed(0)
    model = GreenMIMForPreTraining(config).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch_size, 3, config.image_size, config.image_size, device=args.device)
    loss_of = loss_on_fresh_masks(model)

    def step():
        with torch.autocast(args.device, torch.bfloat16) if args.dtype == "bf16" else nullcontext():
            loss = loss_of(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(setting: tuple[str, int, float, int], args) -> float:
    """Peak memory in GB of a process of three steps."""
    command = [sys.executable, __file__, "--measure_memory_of", *map(str, setting)]
    command += ["--device", args.device, "--dtype", args.dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(setting: list[str], args) -> float:
    """Peak memory in GB of this process (CPU) or of its allocations (CUDA)."""
    step = make_step(make_config(setting[0], int(setting[1]), float(setting[2])), int(setting[3]), args)
    for _ in range(3):
        step()
    return peak_memory_of_this_process(args.device)


def table(title: str, settings: list[tuple[str, int, float, int]], args) -> list[dict]:
    """Prints a table of settings and returns its rows."""
    print(f"\n{title}\n")
    print("| model | image, px | mask ratio | batch | step, s | visible tokens/s | µs a visible token | peak, GB |")
    print("| --- " * 8 + "|", flush=True)
    rows = []
    steps = {setting: make_step(make_config(*setting[:3]), setting[3], args) for setting in settings}
    for setting, seconds in time_in_turns(steps, args.device, args.rounds).items():
        model, image_size, mask_ratio, batch_size = setting
        tokens = visible_tokens(make_config(model, image_size, mask_ratio), batch_size)
        row = {"model": model, "image_size": image_size, "mask_ratio": mask_ratio, "batch_size": batch_size}
        row |= {"seconds": seconds, "microseconds": 1e6 * seconds / tokens, "memory": peak_memory(setting, args)}
        rows.append(row)
        print(
            f"| {model} | {image_size} | {mask_ratio} | {batch_size} | {seconds:.3f} | {tokens / seconds:,.0f}"
            f" | {row['microseconds']:.1f} | {row['memory']:.2f} |",
            flush=True,
        )
    return rows


def draw(sizes: list[dict], ratios: list[dict], path: Path) -> None:
    """Time per visible token over image size, and time and memory of a step over mask ratio."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for model in dict.fromkeys(row["model"] for row in sizes):
        rows = [row for row in sizes if row["model"] == model]
        left.plot([row["image_size"] for row in rows], [row["microseconds"] for row in rows], marker="o", label=model)
    left.set(xlabel="image side, px", ylabel="µs a visible token", ylim=(0, None), title="Image size")
    left.legend()
    for axis, name, label in ((middle, "seconds", "step, s"), (right, "memory", "peak memory, GB")):
        axis.plot([row["mask_ratio"] for row in ratios], [row[name] for row in ratios], marker="o")
        axis.set(xlabel="mask ratio", ylabel=label, ylim=(0, None), title=f"Mask ratio, {ratios[0]['model']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints tables and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 = autocast")
    parser.add_argument("--batch_size", type=int, default=16, help="at 224 px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["tiny", "base"], choices=list(MODEL_SIZES))
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--measure_memory_of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory_of:
        print(measure_memory(args.measure_memory_of, args))
        return
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, {args.dtype}, torch {torch.__version__}")
    batch = args.batch_size
    sizes = [
        row
        for model in args.models
        for row in table(
            f"Image size, {model}",
            [(model, size, 0.75, max(1, round(batch * (224 / size) ** 2))) for size in IMAGE_SIZES],
            args,
        )
    ]
    ratios = table("Mask ratio", [(args.models[0], 224, ratio, batch) for ratio in MASK_RATIOS], args)
    table("Batch", [(args.models[0], 224, 0.75, max(1, round(batch * share))) for share in (0.25, 0.5, 1, 2)], args)
    draw(sizes, ratios, args.picture)
    print(f"\n{args.picture}")


if __name__ == "__main__":
    main()
