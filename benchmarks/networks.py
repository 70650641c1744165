"""The networks that the benchmarks compare: MONAI's AutoencoderKL, and this bundle's at the same width."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import AutoencoderKL as MonaiAutoencoderKL

from scripts.autoencoderkl import AutoencoderKL

MONAI = "MONAI [2,2]"
WIDTH: dict[str, Any] = {
    "spatial_dims": 3,
    "channels": (32, 64, 64),
    "num_res_blocks": 1,
    "attention_levels": (False, False, False),
    "latent_channels": 3,
    "norm_num_groups": 8,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
SUBPIXEL = {"initial_mode": "pixelshuffle"}
FACTORS: dict[str, dict[str, Any]] = {
    "[2,2]": {},
    "[4,2]": {"downsample_factors": [4, 2]},
    "[8,2]": {"downsample_factors": [8, 2]},
    "[2,4]": {"downsample_factors": [2, 4]},
    "initial 2 (conv), [4,2]": {"initial_downsample_factor": 2, "downsample_factors": [4, 2]},
    "initial 2 (conv), [8,2]": {"initial_downsample_factor": 2, "downsample_factors": [8, 2]},
    "initial 4 (conv), [4,2]": {"initial_downsample_factor": 4, "downsample_factors": [4, 2]},
    "initial 2, [2,2]": {"initial_downsample_factor": 2, **SUBPIXEL},
    "initial 2, [4,2]": {"initial_downsample_factor": 2, "downsample_factors": [4, 2], **SUBPIXEL},
    "initial 4, [2,2]": {"initial_downsample_factor": 4, **SUBPIXEL},
    "initial 4, [4,2]": {"initial_downsample_factor": 4, "downsample_factors": [4, 2], **SUBPIXEL},
}


def build(name: str, **arguments: Any) -> torch.nn.Module:
    """A network by its name in the tables, with ``arguments`` in place of those of the table."""
    torch.manual_seed(0)
    return MonaiAutoencoderKL(**WIDTH | arguments) if name == MONAI else AutoencoderKL(**WIDTH | FACTORS[name] | arguments)


def total_factors(network: torch.nn.Module) -> tuple[int, ...]:
    """The total downsample factor along each axis; MONAI's network has no attribute for it."""
    return network.total_downsample_factor if isinstance(network, AutoencoderKL) else (4, 4, 4)
