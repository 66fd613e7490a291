"""Back ends of window attention in groups, one stage after another: which is fastest, and so which is the default.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --dtype bf16 --batch_size 256

`eager` and `sdpa` add one bias for all pairs of slots, -inf across windows. `flex_attention` is a candidate that the
model does not have: it looks the bias up for each score, and its block mask skips pairs of different groups. Each
result is compared with eager's before it is timed. Training is forward and backward to queries, keys, values and the
bias table.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from training_step import IMAGE_SIZE, SIZES, random_plan, time_in_turns

from modeling_greenmim import GreenMIMConfig
from modeling_greenmim.attention import ALL_ATTENTION_FUNCTIONS, GreenMIMWindowAttention, eager_attention_forward
from modeling_greenmim.plans import GroupPlan


HEAD_DIM = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACK_ENDS = ("eager", "sdpa", "flex_attention")


def in_groups(name: str, attention: GreenMIMWindowAttention, plan: GroupPlan) -> Callable:
    """`eager` or `sdpa`, on `(batch, heads, groups * slots, head_dim)`."""
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    num_groups = plan.bias_index.shape[1]

    def run(query, key, value):
        parts = (part.unflatten(2, (num_groups, -1)).flatten(1, 2) for part in (query, key, value))
        output, _ = attend(attention, *parts, attention.bias(plan, query.dtype), scaling=HEAD_DIM**-0.5)
        return output.unflatten(2, (-1, num_groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    return run


def in_blocks(attention: GreenMIMWindowAttention, plan: GroupPlan) -> Callable:
    """`flex_attention` with the bias as score modification, on `(batch, heads, groups * slots, head_dim)`."""
    size, index = plan.group_size, plan.bias_index[0]
    compiled = torch.compile(flex_attention, dynamic=False)

    def same_group(batch, head, query, key):
        return query // size == key // size

    mask = create_block_mask(same_group, None, None, plan.num_slots, plan.num_slots, device=index.device)

    def run(query, key, value):
        table = attention.relative_position_bias_table.t().to(query.dtype)
        table = nn.functional.pad(table, (1, 1), value=-torch.inf)

        def add_bias(score, batch, head, query_slot, key_slot):
            return score + table[head, index[query_slot // size, query_slot % size, key_slot % size]]

        return compiled(query, key, value, score_mod=add_bias, block_mask=mask)

    return run


def measure_stage(config: GreenMIMConfig, stage: int, plan: GroupPlan, args) -> list[dict[str, float]]:
    """Seconds of every back end, in inference and in training, for one layer of a stage."""
    heads, window = config.num_heads[stage], config.stage_windows[stage]
    attention = GreenMIMWindowAttention(config, heads * HEAD_DIM, heads, window).to(args.device)
    nn.init.normal_(attention.relative_position_bias_table)
    inputs = torch.randn(3, args.batch_size, heads, plan.num_slots, HEAD_DIM, device=args.device)
    inputs = inputs.to(DTYPES[args.dtype])
    runs = {name: in_groups(name, attention, plan) for name in ("eager", "sdpa")}
    runs["flex_attention"] = in_blocks(attention, plan)

    def infer(name):
        with torch.inference_mode():
            return runs[name](*inputs)

    # A backward pass adds to these gradients as to those of a model.
    trained = [part.clone().requires_grad_() for part in inputs]

    def train(name):
        runs[name](*trained).sum().backward()

    tolerance = 1e-4 if args.dtype == "fp32" else 5e-2
    for name in BACK_ENDS[1:]:
        torch.testing.assert_close(infer(name), infer("eager"), rtol=tolerance, atol=tolerance)
    # Only a GPU has a backward pass of flex_attention.
    trainable = BACK_ENDS if args.device == "cuda" else BACK_ENDS[:2]
    return [
        time_in_turns({name: partial(call, name) for name in names}, args.device, args.rounds, args.calls)
        for call, names in ((infer, BACK_ENDS), (train, trainable))
    ]


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each back end")
    parser.add_argument("--calls", type=int, default=2, help="in a turn")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = GreenMIMConfig(image_size=IMAGE_SIZE, **SIZES[args.size])
    stages = random_plan(config).to(args.device).stages
    print(
        f"| {args.size}, batch {args.batch_size}, {args.dtype}, ms a layer | groups x slots | "
        + " | ".join(BACK_ENDS),
        "|",
    )
    print("| --- " * (2 + len(BACK_ENDS)) + "|")
    for stage, plan in enumerate(stages):
        shape = "{1} x {2}".format(*plan.groups[1].bias_index.shape)
        for work, times in zip(("inference", "training"), measure_stage(config, stage, plan.groups[1], args)):
            cells = " | ".join(f"{1000 * times[name]:.2f}" if name in times else "-" for name in BACK_ENDS)
            print(f"| stage {stage + 1}, {work} | {shape} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
