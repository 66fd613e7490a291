# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Mixed precision with fewer casts than autocast makes alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class GreenMIMLayerNorm(nn.LayerNorm):
    """Layer normalisation that hands on bfloat16 where it is given bfloat16.

    On a GPU autocast would hand on single precision, in which all residuals would be added up then, and which every
    linear layer casts back. Means and deviations are of single precision either way, as are weights between steps.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., width)` -> the same."""
        dtype = hidden_states.dtype
        if torch.bfloat16 not in (dtype, self.weight.dtype):
            return super().forward(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return nn.functional.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)


class _CastTogether(torch.autograd.Function):
    """Casts tensors of one type to another by one call, and their gradients back by another."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(copies, tensors)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *grads):
        cast = iter(_CastTogether.apply(ctx.dtype, *(grad for grad in grads if grad is not None)))
        return None, *(None if grad is None else next(cast) for grad in grads)


@contextmanager
def weights_cast_together(block: nn.Module, device_type: str) -> Iterator[None]:
    """Inside it, linear layers and norms of a block have the weights that autocast would give them, cast by one call.

    Autocast casts every weight and every gradient of one by a kernel of its own: a third of a step's kernels. What
    learns in single precision is cast here; what is frozen, quantised or parametrised is left to autocast, and
    everything is where a compiler joins casts itself.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_traced or not torch.is_grad_enabled() or not _is_autocast_enabled(device_type):
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    # Of norms autocast to float16 keeps single precision, as their range needs.
    places = _weights_of(block, (nn.Linear, GreenMIMLayerNorm) if dtype == torch.bfloat16 else (nn.Linear,))
    weights = [parameters[name] for parameters, name in places]
    for (parameters, name), weight in zip(places, _CastTogether.apply(dtype, *weights) if weights else ()):
        parameters[name] = weight
    try:
        yield
    finally:
        for (parameters, name), weight in zip(places, weights):
            parameters[name] = weight


def _is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; some types of devices have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _weights_of(module: nn.Module, kinds: tuple[type, ...]) -> list[tuple[dict, str]]:
    """Where modules of these very types, not of subclasses, keep weights that learn in single precision."""
    places = []
    if type(module) in kinds:
        for name, weight in module._parameters.items():
            if weight is not None and weight.requires_grad and weight.dtype == torch.float32:
                places.append((module._parameters, name))
    for child in module._modules.values():
        places += _weights_of(child, kinds)
    return places
