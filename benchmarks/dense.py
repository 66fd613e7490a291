"""Time of a training step of a dense task: a head of Transformers on our backbone, and on Transformers' Swin.

Both models have the same head and the same sizes, and take turns in one process, so that drifts of the machine hit
them alike. A step is forward, backward, fused AdamW and zeroing of gradients on fixed random images and labels.
`backbone` is forward and backward of the backbones alone, from given gradients of their maps.

    python benchmarks/dense.py --dtype bf16 fp32
    python benchmarks/dense.py --size base --hidden_size 128
    python benchmarks/dense.py --device cuda --dtype bf16 --batch_size 16 --steps_per_round 10
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
from training_step import SIZES, time_in_turns
from transformers import SwinBackbone, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from modeling_greenmim import (
    GreenMIMBackbone,
    GreenMIMConfig,
    GreenMIMUperNetConfig,
    GreenMIMUperNetForSemanticSegmentation,
)


NUM_LABELS = 150  # of ADE20K
KINDS = {
    "greenmim": (GreenMIMConfig, GreenMIMBackbone, GreenMIMUperNetConfig, GreenMIMUperNetForSemanticSegmentation),
    "swin": (SwinConfig, SwinBackbone, UperNetConfig, UperNetForSemanticSegmentation),
}


def backbone_config(kind: str, args):
    """Configuration of a backbone with maps of all stages, without stochastic depth."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return KINDS[kind][0](image_size=224, drop_path_rate=0.0, out_features=stages, **SIZES[args.size])


def random_images(args) -> torch.Tensor:
    """The same for every model."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=generator).to(args.device)


def autocast(args, dtype: str):
    """Mixed precision for bf16."""
    return torch.autocast(args.device, torch.bfloat16) if dtype == "bf16" else nullcontext()


def whole_step(kind: str, args, dtype: str) -> Callable[[], None]:
    """A training step of UperNet with its auxiliary head."""
    torch.manual_seed(0)
    _, _, config_class, model_class = KINDS[kind]
    config = config_class(
        backbone_config=backbone_config(kind, args), num_labels=NUM_LABELS, hidden_size=args.hidden_size
    )
    model = model_class(config).to(args.device).train()
    images = random_images(args)
    labels = torch.randint(NUM_LABELS, (args.batch_size, args.image_size, args.image_size)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with autocast(args, dtype):
            loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def backbone_step(kind: str, args, dtype: str) -> Callable[[], None]:
    """Forward and backward of a backbone alone."""
    torch.manual_seed(0)
    model = KINDS[kind][1](backbone_config(kind, args)).to(args.device).train()
    images = random_images(args)

    def step():
        with autocast(args, dtype):
            maps = model(images).feature_maps
        torch.autograd.backward(maps, [torch.ones_like(feature_map) for feature_map in maps])
        model.zero_grad()

    return step


PARTS = {"step": whole_step, "backbone": backbone_step}


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="of the Swin transformers")
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=512, help="of the head")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["bf16"], help="bf16 = autocast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each model")
    parser.add_argument("--steps_per_round", type=int, default=1)
    args = parser.parse_args()

    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    work = f"UperNet, {args.size}, {args.image_size} px, batch {args.batch_size}, {where}"
    print(f"| {work} | ours, s | Swin, s | ours is |")
    print("| --- | --- | --- | --- |")
    for dtype in args.dtype:
        for part in args.parts:
            steps = {kind: PARTS[part](kind, args, dtype) for kind in KINDS}
            seconds = time_in_turns(steps, args.device, args.rounds, args.steps_per_round)
            ours, theirs = seconds["greenmim"], seconds["swin"]
            print(f"| {part}, {dtype} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} x as fast |", flush=True)


if __name__ == "__main__":
    main()
