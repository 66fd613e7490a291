"""The dense oracle: a plain Swin or Twins on the full token grid, with masked tokens excluded from every attention and
zeroed before every convolution that crosses units.

Written from the method alone, without the package's layout, grouping, masking or decoder code: only weights are read
from the model. Tokens are in raster order, windows come from the formula for each pair of tokens, attention is one
`L x L` softmax. What the model gives at visible tokens, and every gradient, must equal what this gives.
"""

import math

import torch
from torch.nn import functional

from configuration_greenmim import GreenMIMConfig
from modeling_greenmim import GreenMIMModel


def tiny_config(**changes) -> GreenMIMConfig:
    """A small model: 16 px units, a 6x6 grid of units, windows that the grids do not divide."""
    values = {
        "image_size": 96,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": (2, 2, 2),
        "num_heads": (1, 2, 4),
        "window_size": 5,
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 24,
    }
    return GreenMIMConfig(**{**values, **changes})


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter a random value in double precision: no bias is 0, no norm is 1."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "bias_table" in name or "mask_token" in name else 0.3
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(noise + 1.0 if is_norm_weight else noise)
    return model


def random_images(batch: int, height: int, width: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """Images of normal noise."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_masks(masks: int, num_units: int, num_visible: int, seed: int = 0) -> torch.Tensor:
    """Boolean masks, True = masked, every row with the same number of visible units."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(masks, num_units, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(num_units, generator=generator)[:num_visible]] = False
    return mask


def nested_coordinates(side: int) -> list[tuple[int, int]]:
    """(row, column) inside a unit of each token in nested order: 2x2 blocks, first down, then right, recursively."""
    if side == 1:
        return [(0, 0)]
    coarse = nested_coordinates(side // 2)
    return [(2 * row + down, 2 * column + right) for row, column in coarse for right in (0, 1) for down in (0, 1)]


def window_of(row: int, column: int, window: int, shift: int) -> tuple[int, int]:
    """The window of a token, by the formula."""
    offset = (window - shift) % window
    return (row + offset) // window, (column + offset) // window


def bias_row(query: tuple[int, int], key: tuple[int, int], window: int) -> int:
    """Row of the bias table for a query and a key, by the formula."""
    return (query[0] - key[0] + window - 1) * (2 * window - 1) + (query[1] - key[1] + window - 1)


def shift_of(block: int, grid: tuple[int, int], window: int) -> int:
    """Shift of a block on a grid."""
    return window // 2 if block % 2 and min(grid) > window else 0


def window_pairs(grid: tuple[int, int], window: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of tokens of a grid in raster order: whether they share a window, and their row of the table."""
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1]).repeat(grid[0])
    offset = (window - shift) % window
    window_rows, window_columns = (rows + offset) // window, (columns + offset) // window
    same = (window_rows[:, None] == window_rows) & (window_columns[:, None] == window_columns)
    index = (rows[:, None] - rows + window - 1) * (2 * window - 1) + (columns[:, None] - columns + window - 1)
    return same, torch.where(same, index, 0)


def layer_norm(hidden_states: torch.Tensor, norm: torch.nn.LayerNorm, eps: float) -> torch.Tensor:
    """Layer normalisation with the weights of `norm`, written out."""
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def attention(hidden_states, module, num_heads: int, allowed=None, index=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over `(batch, L, width)` with an `L x L` mask and bias; returns output and weights."""
    batch, length, width = hidden_states.shape
    weight = module.qkv.weight.view(3, num_heads, width // num_heads, width)
    qkv = torch.einsum("blc,phdc->pbhld", hidden_states, weight)
    if module.qkv.bias is not None:
        qkv = qkv + module.qkv.bias.view(3, 1, num_heads, 1, width // num_heads)
    scores = torch.einsum("bhqd,bhkd->bhqk", qkv[0], qkv[1]) / math.sqrt(width // num_heads)
    if index is not None:
        scores = scores + module.relative_position_bias_table[index].permute(2, 0, 1)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    weights = scores.softmax(-1)
    output = torch.einsum("bhqk,bhkd->bqhd", weights, qkv[2]).reshape(batch, length, width)
    return output @ module.proj.weight.T + module.proj.bias, weights


def mlp(hidden_states: torch.Tensor, module) -> torch.Tensor:
    """Linear, exact GELU, linear."""
    hidden = hidden_states @ module.fc1.weight.T + module.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ module.fc2.weight.T + module.fc2.bias


def merge(grid_states: torch.Tensor) -> torch.Tensor:
    """`(batch, rows, columns, width)` -> `(batch, rows / 2, columns / 2, 4 * width)` in Swin's order."""
    parts = [grid_states[:, down::2, right::2] for right in (0, 1) for down in (0, 1)]
    return torch.cat(parts, dim=-1)


def embed(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Patch embedding and its norm, `(batch, rows, columns, embed_dim)`."""
    config, projection = model.config, model.embeddings.patch_embeddings.projection
    kernel = projection.weight.view(config.embed_dim, config.num_channels, config.patch_size, config.patch_size)
    states = functional.conv2d(pixel_values, kernel, projection.bias, stride=config.patch_size)
    return layer_norm(states.permute(0, 2, 3, 1), model.embeddings.norm, config.layer_norm_eps)


def strided_convolution(grid_states: torch.Tensor, linear, side: int) -> torch.Tensor:
    """A convolution with kernel and stride `side` whose weight is kept as that of a linear layer on nested tokens."""
    places, width = nested_coordinates(side), grid_states.shape[-1]
    kernel = torch.empty(len(linear.weight), width, side, side, dtype=linear.weight.dtype)
    for number, (row, column) in enumerate(places):
        kernel[:, :, row, column] = linear.weight[:, number * width : (number + 1) * width]
    return functional.conv2d(grid_states.permute(0, 3, 1, 2), kernel, linear.bias, stride=side).permute(0, 2, 3, 1)


def attention_to_units(normed, module, num_heads: int, visible, seen, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Twins' global attention: `(batch, rows, columns, width)` to one key per visible unit; output and weights."""
    batch, rows, _, width = normed.shape
    side = rows // visible.shape[1]
    units = normed * seen[..., None]
    if side > 1:
        units = layer_norm(strided_convolution(units, module.reduction, side), module.norm, eps)
    query = functional.linear(normed, module.q.weight, module.q.bias).view(batch, -1, num_heads, width // num_heads)
    pairs = functional.linear(units, module.kv.weight, module.kv.bias)
    key, value = pairs.view(batch, -1, 2, num_heads, width // num_heads).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width // num_heads)
    weights = scores.masked_fill(~visible.flatten(1)[:, None, None, :], -math.inf).softmax(-1)
    output = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
    return output @ module.proj.weight.T + module.proj.bias, weights


class DenseEncoder:
    """Runs the dense network with the weights of a `GreenMIMModel`.

    Args:
        model: where the weights are.
        pixel_values: `(batch, channels, height, width)`, whole units.
        visible: `(1 or batch, unit rows, unit columns)` bool; default: everything.
        patch_grid: patches that hold image; those right or below are padding. Default: all of them.

    Attributes (maps in raster order, garbage where masked):
        inputs, outputs: what each stage starts from and ends with, `(batch, rows, columns, width)`.
        attentions: weights of each stage's last block, `(batch, heads, L, L)`.
        visible: `(1 or batch, rows, columns)` bool of each stage.
        latent: outputs of the last stage after the final norm.
    """

    def __init__(self, model, pixel_values, visible=None, patch_grid=None):
        config, eps = model.config, model.config.layer_norm_eps
        num_stages = len(config.depths)
        states = embed(model, pixel_values)
        patch_grid = patch_grid or states.shape[1:3]
        if visible is None:
            visible = torch.ones(1, *(side >> (num_stages - 1) for side in states.shape[1:3]), dtype=torch.bool)
        smaller_side = min(config.image_height_and_width) // config.patch_size
        self.inputs, self.outputs, self.attentions, self.visible = [], [], [], []
        for stage, layer in enumerate(model.encoder.layers):
            batch, rows, columns, width = states.shape
            grid = tuple(math.ceil(side / 2**stage) for side in patch_grid)
            window = min(config.window_size, smaller_side // 2**stage)
            scale = 2 ** (num_stages - 1 - stage)
            seen = visible.repeat_interleave(scale, 1).repeat_interleave(scale, 2).clone()
            seen[:, grid[0] :] = False
            seen[:, :, grid[1] :] = False
            self.visible.append(seen)
            self.inputs.append(states)
            tokens = states.flatten(1, 2)
            for number, block in enumerate(layer.blocks):
                normed = layer_norm(tokens, block.layernorm_before, eps)
                heads = config.num_heads[stage]
                if config.backbone_type == "twins" and number % 2:
                    normed = normed.view(batch, rows, columns, width)
                    attended, weights = attention_to_units(normed, block.attention, heads, visible, seen, eps)
                else:
                    shift = 0 if config.backbone_type == "twins" else shift_of(number, grid, window)
                    same, index = window_pairs((rows, columns), window, shift)
                    # A masked token sees itself, so that nothing is NaN; nobody else sees it.
                    allowed = (same & seen.flatten(1)[:, None, None, :]) | torch.eye(len(same), dtype=torch.bool)
                    index = None if config.backbone_type == "twins" else index
                    attended, weights = attention(normed, block.attention, heads, allowed, index)
                tokens = tokens + attended
                tokens = tokens + mlp(layer_norm(tokens, block.layernorm_after, eps), block.mlp)
                if config.backbone_type == "twins" and number == 0:
                    conv = layer.position_encoding.conv
                    grid_states = (tokens.view(batch, rows, columns, width) * seen[..., None]).permute(0, 3, 1, 2)
                    encoded = functional.conv2d(grid_states, conv.weight, conv.bias, padding=1, groups=width)
                    tokens = tokens + encoded.permute(0, 2, 3, 1).flatten(1, 2)
            self.attentions.append(weights)
            states = tokens.view(batch, rows, columns, width)
            self.outputs.append(states)
            if stage < num_stages - 1 and config.backbone_type == "twins":
                states = strided_convolution(states * seen[..., None], layer.downsample.reduction, 2)
                states = layer_norm(states, layer.downsample.norm, eps)
            elif stage < num_stages - 1:
                merged = merge(states * seen[..., None])
                states = layer_norm(merged, layer.downsample.norm, eps) @ layer.downsample.reduction.weight.T
        self.latent = layer_norm(self.outputs[-1], model.layernorm, eps)


def pick_visible(states: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Visible tokens of a map, in raster order: `(batch, rows, columns, width)` -> `(batch, tokens, width)`."""
    return torch.stack([states[i][visible[i % len(visible)]] for i in range(len(states))])


def positions(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Sine-cosine positions from the formula, one number after the other: `(rows * columns, width)`."""
    quarter = width // 4
    values = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            for place in (column, row):
                angles = [place * 10000 ** (-i / quarter) for i in range(quarter)]
                values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return torch.tensor(values, dtype=torch.float64).view(grid[0] * grid[1], width)


def units_of(pixel_values: torch.Tensor, unit: int) -> torch.Tensor:
    """Pixels of each unit in (row, column, channel) order, unit by unit."""
    height, width = pixel_values.shape[2:]
    units = [
        pixel_values[:, :, top : top + unit, left : left + unit].permute(0, 2, 3, 1).flatten(1)
        for top in range(0, height, unit)
        for left in range(0, width, unit)
    ]
    return torch.stack(units, dim=1)


def plain_loss(logits: torch.Tensor, pixel_values: torch.Tensor, mask: torch.Tensor, unit: int, norm_pix: bool):
    """The loss, unit after unit; `mask` is `(batch, num_units)`, true for masked."""
    target, losses = units_of(pixel_values, unit), []
    for sample in range(len(logits)):
        for number in range(logits.shape[1]):
            if not mask[sample, number]:
                continue
            values = target[sample, number]
            if norm_pix:
                mean = values.sum() / values.numel()
                variance = (values - mean).square().sum() / (values.numel() - 1)
                values = (values - mean) / (variance + 1e-6).sqrt()
            losses.append((logits[sample, number] - values).square().mean())
    return torch.stack(losses).mean()


def dense_pretraining(model, pixel_values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and logits of a `GreenMIMForPreTraining`; `mask` is `(1 or batch, num_units)` bool, True for masked."""
    config, eps, decoder = model.config, model.config.layer_norm_eps, model.decoder
    batch, unit = len(pixel_values), config.encoder_stride
    grid = (pixel_values.shape[2] // unit, pixel_values.shape[3] // unit)
    dense = DenseEncoder(model.greenmim, pixel_values, ~mask.view(-1, *grid))
    latents = dense.latent.flatten(1, 2) @ decoder.decoder_embed.weight.T + decoder.decoder_embed.bias
    states = torch.where(mask[..., None], decoder.mask_token, latents)
    states = states + positions(grid, config.decoder_hidden_size)
    for block in decoder.decoder_layers:
        normed = layer_norm(states, block.layernorm_before, eps)
        states = states + attention(normed, block.attention, config.decoder_num_attention_heads)[0]
        states = states + mlp(layer_norm(states, block.layernorm_after, eps), block.mlp)
    logits = layer_norm(states, decoder.decoder_norm, eps) @ decoder.decoder_pred.weight.T + decoder.decoder_pred.bias
    return plain_loss(logits, pixel_values, mask.expand(batch, -1), unit, config.norm_pix_loss), logits


def gradients(scalar: torch.Tensor, model: torch.nn.Module, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a scalar by name of the parameter, and of "pixel_values"; zero where nothing depends on one."""
    names, tensors = zip(*model.named_parameters(), ("pixel_values", pixel_values))
    values = torch.autograd.grad(scalar, tensors, allow_unused=True)
    return {n: torch.zeros_like(t) if v is None else v for n, t, v in zip(names, tensors, values)}


def weighted_sum(tensors) -> torch.Tensor:
    """A scalar whose gradient reaches every entry differently."""
    generator = torch.Generator().manual_seed(9)
    return sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9, name: str = "") -> None:
    """Relative to the largest expected value (at least 1e-3), since single entries cancel to anything."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def assert_all_close(actual: dict, expected: dict, tolerance: float = 1e-9) -> None:
    """Compares dictionaries of tensors."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], tolerance, name)


def check_against_oracle(config: GreenMIMConfig, mask: torch.Tensor | None, height: int, width: int, batch: int = 2):
    """Compares latents, hidden states and all gradients of a `GreenMIMModel`; `mask` as in `dense_pretraining`."""
    model = randomize(GreenMIMModel._from_config(config))
    pixel_values = random_images(batch, height, width).requires_grad_()
    outputs = model(pixel_values, bool_masked_pos=mask, output_hidden_states=True)

    grid = (height // config.encoder_stride, width // config.encoder_stride)
    dense = DenseEncoder(model, pixel_values, None if mask is None else ~mask.view(-1, *grid))
    latent = pick_visible(dense.latent, dense.visible[-1])
    hidden_states = [
        pick_visible(states, visible)
        for states, visible in zip([*dense.inputs, dense.outputs[-1]], [*dense.visible, dense.visible[-1]])
    ]
    assert_close(outputs.last_hidden_state, latent)
    assert_close(outputs.pooler_output, latent.mean(dim=1))
    assert len(outputs.hidden_states) == len(hidden_states) == len(config.depths) + 1
    for actual, expected in zip(outputs.hidden_states, hidden_states):
        assert_close(actual, expected)
    actual = gradients(weighted_sum([outputs.last_hidden_state, *outputs.hidden_states]), model, pixel_values)
    expected = gradients(weighted_sum([latent, *hidden_states]), model, pixel_values)
    assert_all_close(actual, expected)


def check_kind_of_mask(config: GreenMIMConfig, kind: str, height: int, width: int) -> None:
    """`check_against_oracle` with a third of the units visible, the mask "shared" or "per sample", or with "none"."""
    num_units = (height // config.encoder_stride) * (width // config.encoder_stride)
    masks = {"shared": 1, "per sample": 2, "none": 0}[kind]
    mask = random_masks(masks, num_units, max(1, num_units // 3)) if masks else None
    check_against_oracle(config, mask, height, width)
