# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Mixed precision where autocast alone would move more memory than is needed."""

import torch
from torch import nn


class GreenMIMLayerNorm(nn.LayerNorm):
    """Layer normalisation that hands on bfloat16 in mixed precision where it is given bfloat16, on every device.

    Autocast of a CPU does so. That of a GPU hands on single precision: a Swin's embedding ends with a norm, so all
    residuals would be added up in it, and every linear layer would cast its input back. Means and deviations are
    computed in single precision either way; on a GPU the gain and the bias are rounded to bfloat16, as autocast does
    with the weights of linear layers. float16 has too small a range for residuals: there autocast's rule holds.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., width)` -> the same."""
        device_type, dtype = hidden_states.device.type, hidden_states.dtype
        if dtype != torch.bfloat16 or not _autocast_widens_norms(device_type):
            return super().forward(hidden_states)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return nn.functional.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)


def _autocast_widens_norms(device_type: str) -> bool:
    """Whether autocast is on, and computes norms in single precision; some types of devices have none."""
    if device_type == "cpu" or not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type)
