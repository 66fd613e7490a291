"""Kernels, memory traffic and operations of a training step, counted: they are the same on any machine.

A step is forward and backward, without the optimizer. Tensors have shapes and no values, so nothing is computed and
Swin-B at batch 64 takes seconds. A kernel is a call of an operator that is no view; its traffic is what it reads and
writes, each tensor once; operations are those of matrix products and attention, as torch counts them. With --compile
the traffic is what inductor counts for its kernels, products included, joined as it joins them for a GPU.

Autocast and attention are those of the device: on a CPU norms take bf16, and attention is written out where its bias
learns. --device cuda wants a GPU, on which nothing is computed either.

    python benchmarks/counters.py                            # ours, SimMIM and MAE: pre-training, batch 64, bf16
    python benchmarks/counters.py --by_operator              # and where it comes from
    python benchmarks/counters.py --reference DIR            # and a checkout of the published code, which is computed
    python benchmarks/counters.py --task classification --size tiny
    python benchmarks/counters.py --peers --compile          # ours alone, compiled
    python benchmarks/counters.py --device cuda              # as a GPU runs them
"""

import argparse
import collections
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from training_step import IMAGE_SIZE, add_model_arguments, chosen_builders, random_plan

from modeling_greenmim import GreenMIMForPreTraining, GreenMIMPreTrainedModel
from modeling_greenmim.planning import plan_dense


# They touch no memory: they name it, or ask where it is.
NOT_KERNELS = {"_unsafe_view", "device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Counter(TorchDispatchMode):
    """Counts the operators that run inside it.

    Attributes:
        kernels, traffic, flops: calls, bytes and operations by the name of the operator.
        calls: bytes and operations of each call, in order.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.traffic, self.flops = (collections.Counter() for _ in range(3))
        self.calls: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Runs an operator and counts it."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function.overloadpacket
        if not function.is_view and packet.__name__ not in NOT_KERNELS:
            self.kernels[packet.__name__] += 1
            touched = [*_tensors((args, kwargs)), *_tensors(result)]  # what is changed in place counts twice
            traffic, flops = sum(tensor.numel() * tensor.element_size() for tensor in touched), 0
            self.traffic[packet.__name__] += traffic
            if packet in flop_registry:
                flops = flop_registry[packet](*args, **kwargs, out_val=result)
                self.flops[packet.__name__] += flops
            self.calls.append((traffic, flops))
        return result


def _tensors(tree) -> list[torch.Tensor]:
    """The tensors of arguments or results, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)}.values())


def count(build: Callable, args, dtype: str, computed: bool = False) -> Counter:
    """Counts of forward and backward of a batch.

    Args:
        build: gives a model and the loss of images, as those of `training_step.TASKS`.
        args: `batch_size`, `size` and what else the builder reads.
        dtype: fp32, or bf16 for autocast.
        computed: with values, for code that looks at them.
    """
    torch.manual_seed(0)
    model, loss_of = build(args)
    model.train()
    if isinstance(model, GreenMIMForPreTraining):
        plan = random_plan(model.config).to(args.device)  # the data loader's work
        loss_of = lambda images: model(images, plan=plan).loss  # noqa: E731
    elif isinstance(model, GreenMIMPreTrainedModel):
        # Made once, and kept for later models: its tensors need their values.
        plan_dense(model.config, (IMAGE_SIZE, IMAGE_SIZE), torch.device(args.device))
    with nullcontext() if computed else FakeTensorMode(allow_non_fake_inputs=True):
        if computed:
            model.to(args.device)
        else:
            _forget_values(model, args.device)
        images = torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=args.device)
        with Counter() as counter:
            with torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bf16"):
                loss = loss_of(images)
            loss.backward()
    return counter


def _forget_values(model: nn.Module, device: str) -> None:
    """Leaves the parameters and buffers of a model nothing but their shapes, on a device."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            setattr(module, name, fake)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))


def traffic_of_compiled(build: Callable, args, dtype: str) -> int:
    """Bytes that inductor counts for the kernels of forward and backward, joined as it joins them for a GPU.

    Graphs are compiled up to this point: no kernel is made, and what runs instead returns zeros.
    """
    traffic = []

    def count_and_stop(graph):
        graph._update_scheduler()
        traffic.append(sum(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes))
        raise InterruptedError

    def zeros_of(graph, inputs, **options):
        (outputs,) = graph.graph.output_node().args
        values = [output.meta["val"] if isinstance(output, torch.fx.Node) else None for output in outputs]
        counted = len(traffic)
        try:
            compile_fx_inner(graph, inputs, **options)
        except Exception:
            if len(traffic) == counted:
                raise

        def run(inputs):
            inputs.clear()
            return [_zeros_like(value) for value in values]

        run._boxed_call = True
        return run

    torch.manual_seed(0)
    torch._dynamo.reset()
    model, loss_of = build(args)
    model.to(args.device).train()
    model.compile(backend=lambda graph, inputs: compile_fx(graph, inputs, inner_compile=zeros_of))
    images = torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=args.device)
    # What is kept of an earlier compilation has not been counted.
    settings = {"cpu_backend": "triton", "fx_graph_cache": False}
    with inductor_config.patch(settings), mock.patch.object(GraphLowering, "codegen", count_and_stop):
        with torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of(images)
        loss.backward()
    return sum(traffic)


def _zeros_like(value: torch.Tensor | None) -> torch.Tensor | None:
    """Zeros with the shape, strides and type of a tensor without values."""
    if value is None:
        return None
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).zero_()


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(batch_size=64, dtype=["bf16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="whose kernels")
    parser.add_argument("--by_operator", action="store_true", help="a table of GreenMIM's operators too")
    args = parser.parse_args()
    args.inference = False
    return args


def main() -> None:
    """Counts and prints a table."""
    args = parse_arguments()
    print(f"| {args.task}, {args.size}, batch {args.batch_size} | kernels | MB an image | GFLOP an image |")
    print("| --- " * 4 + "|")
    for dtype in args.dtype:
        for name, build in chosen_builders(args).items():
            if args.compile:
                traffic = traffic_of_compiled(build, args, dtype) / args.batch_size / 1e6
                print(f"| {name}, {dtype}, compiled | | {traffic:.0f} | |", flush=True)
                continue
            counter = count(build, args, dtype, computed=name == "reference")
            per_image = [sum(values.values()) / args.batch_size for values in (counter.traffic, counter.flops)]
            kernels = sum(counter.kernels.values())
            print(
                f"| {name}, {dtype} | {kernels:,} | {per_image[0] / 1e6:.0f} | {per_image[1] / 1e9:.1f} |", flush=True
            )
            if name == "greenmim":
                ours = counter
    if args.by_operator and not args.compile:
        print("\n| operator | calls | MB an image |\n| --- | --- | --- |")
        for name, traffic in ours.traffic.most_common():
            print(f"| `{name}` | {ours.kernels[name]} | {traffic / args.batch_size / 1e6:.1f} |")


if __name__ == "__main__":
    main()
