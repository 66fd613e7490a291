"""Reading the golden vectors: numbers of independent implementations (official GreenMIM, a dense Swin and Twins).

Their weights have official GreenMIM's (Microsoft Swin's) names, or Twins' own. The expected losses and gradients were
drawn so that the published code's scrambled decoder placement plays no part.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from configuration_greenmim import GreenMIMConfig


FIXTURES = Path(__file__).parent / "fixtures"
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RENAMES = [
    ("encoder.patch_embed.proj", "greenmim.embeddings.patch_embeddings.projection"),
    ("encoder.patch_embed.norm", "greenmim.embeddings.norm"),
    ("encoder.layers", "greenmim.encoder.layers"),
    ("encoder.norm", "greenmim.layernorm"),
    ("decoder_blocks", "decoder.decoder_layers"),
    ("decoder_embed", "decoder.decoder_embed"),
    ("decoder_norm", "decoder.decoder_norm"),
    ("decoder_pred", "decoder.decoder_pred"),
    ("mask_token", "decoder.mask_token"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.", ".attention."),
]


def rename(key: str) -> str:
    """Our name of an official parameter."""
    for old, new in RENAMES:
        if old.startswith("."):
            key = key.replace(old, new)
        elif key.startswith(old):
            key = new + key.removeprefix(old)
    return key


def load_golden(name: str) -> tuple[GreenMIMConfig, dict, dict]:
    """Configuration, weights by our names, and everything else in the file."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    weights, rest = {}, {}
    for key, tensor in tensors.items():
        if key.startswith("state_dict."):
            key = key.removeprefix("state_dict.")
            if metadata.get("keys") == "microsoft_swin":
                key = f"encoder.{key}"
            weights[rename(key)] = tensor.flatten(1) if key.endswith("patch_embed.proj.weight") else tensor
        elif key.startswith("grad_norm."):
            rest.setdefault("grad_norms", {})[rename(key.removeprefix("grad_norm."))] = tensor.item()
        else:
            rest[key] = tensor
    positions = weights.pop("decoder_pos_embed", None)
    rest["decoder_positions"] = positions
    config = GreenMIMConfig(
        image_size=int(metadata["image_size"]),
        window_size=int(metadata["window_size"]),
        layer_norm_eps=float(metadata["layer_norm_eps"]),
        **{key: json.loads(metadata[key]) for key in ("embed_dim", "depths", "num_heads")},
        decoder_hidden_size=int(metadata.get("decoder_dim", 32)),
        decoder_num_hidden_layers=int(metadata.get("decoder_depth", 1)),
        decoder_num_attention_heads=int(metadata.get("decoder_heads", 4)),
        decoder_intermediate_size=4 * int(metadata.get("decoder_dim", 32)),
        mask_ratio=float(metadata.get("mask_ratio", 0.75)),
    )
    return config, weights, rest


def normalized(images: torch.Tensor) -> torch.Tensor:
    """uint8 images -> normalised float images."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (images / 255 - mean) / std
