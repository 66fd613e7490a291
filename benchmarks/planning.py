"""Time of planning one forward of Swin-B, and how much of the groups is padding.

All plans of a forward: every stage, with and without shift, for one mask that the batch shares. Padding is counted in
the stages that are grouped; stages whose tokens fit one group have none. Pairs of slots, which attention computes, are
counted in all plans. Static plans, for compiled models, have the same shapes for all masks but for unusual ones, whose
number is the last column.

    python benchmarks/planning.py
    python benchmarks/planning.py --image_sizes 224 --rounds 20000
"""

import argparse
import statistics
import time
from collections import Counter

import torch

from modeling_greenmim import GreenMIMConfig, plan_mask
from modeling_greenmim.masking import sample_noise, visible_units_from_noise


# Milliseconds of the published code at ratio 0.75, window 7, where they are known.
PUBLISHED = {(224, 7): 17, (448, 7): 153, (896, 7): 1693}


def measure(
    image_size: int, window_size: int, mask_ratio: float, rounds: int, static: bool
) -> tuple[float, float, float, int]:
    """Median milliseconds, share of padded slots, thousands of pairs, and masks whose plans have unusual shapes."""
    config = GreenMIMConfig(image_size=image_size, window_size=window_size, mask_ratio=mask_ratio)
    num_units = config.unit_grid[0] * config.unit_grid[1]
    seconds, tokens, slots, pairs, shapes = [], 0, 0, 0, Counter()
    for seed in range(rounds + 3):
        noise = sample_noise(num_units, generator=torch.Generator().manual_seed(seed))
        visible = visible_units_from_noise(noise, num_units, 1, mask_ratio)
        start = time.perf_counter()
        stages = plan_mask(config, visible, static=static).stages
        if seed >= 3:  # the first ones fill caches
            seconds.append(time.perf_counter() - start)
        shapes[tuple(plan.bias_index.shape for stage in stages for plan in stage.groups)] += 1
        for plan in {id(plan): plan for stage in stages for plan in stage.groups}.values():
            pairs += plan.bias_index.numel()
            if plan.slot_of_token is not None:
                tokens += plan.slot_of_token.shape[1]
                slots += plan.num_slots
    unusual = shapes.total() - max(shapes.values())
    return 1000 * statistics.median(seconds), 1 - tokens / max(1, slots), pairs / (rounds + 3) / 1000, unusual


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[224, 448, 896])
    parser.add_argument("--window_sizes", type=int, nargs="+", default=[7, 14])
    parser.add_argument("--mask_ratio", type=float, default=0.75)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    columns = ["image, px", "window", "plans of a forward, ms", "published, ms", "times faster"]
    columns += ["padded slots", "if static", "thousand pairs", "if static", "unusual"]
    print("|", " | ".join(columns), "|")
    print("| --- " * len(columns) + "|")
    for window_size in args.window_sizes:
        for image_size in args.image_sizes:
            work = (image_size, window_size, args.mask_ratio, args.rounds)
            milliseconds, padding, pairs, _ = measure(*work, static=False)
            _, static_padding, static_pairs, unusual = measure(*work, static=True)
            published = PUBLISHED.get((image_size, window_size)) if args.mask_ratio == 0.75 else None
            factor = f"{published / milliseconds:.0f}" if published else "-"
            row = [image_size, window_size, f"{milliseconds:.2f}", published or "-", factor, f"{padding:.1%}"]
            row += [f"{static_padding:.1%}", f"{pairs:.0f}", f"{static_pairs:.0f}", unusual]
            print("|", " | ".join(map(str, row)), "|")


if __name__ == "__main__":
    main()
