"""Memory that whole volumes need in training and reconstruction, computed on fake tensors, at sizes too large to measure.

    python -m benchmarks.large_volumes

Prints tables of docs/results/cost.md in Markdown, under the rules of CUDA's mixed precision. No GPU is needed, nothing is
allocated.
"""

from __future__ import annotations

import torch

from benchmarks.networks import FACTORS, MONAI, build_with, total_factors
from benchmarks.tables import print_table
from scripts.bundle.machine import GIB
from scripts.planning.config_keys import read_plan
from scripts.planning.inference_costs import inference_cost
from scripts.planning.training_costs import training_cost

SIZES = ((256, 256, 64), (256, 256, 256), (512, 512, 512))
FIELD = {"channels": (64, 128, 256), "num_res_blocks": 2}  # the width that is common in the field
PRESETS = ("4x", "8x", "16x", "16x_lean", "32x", "64x", "thick_slices", "maisi")


def main() -> None:
    """Print the tables."""
    header = ["network", *(f"{name}, {size(s)}" for s in SIZES for name in ("train", "reconstruct"))]
    print("Peak, GiB, width (32, 64, 64), batch 1, bfloat16 mixed precision, AdamW:\n")
    print_table(header, ([name, *peaks(build_with(name))] for name in (MONAI, *FACTORS)))
    print("\nThe same at width (64, 128, 256) with two residual blocks per level:\n")
    wide = (MONAI, "initial 2, [2,2]", "initial 2, [4,2]", "initial 4, [2,2]")
    print_table(header, ([name, *peaks(build_with(name, **FIELD))] for name in wide))
    print("\nPresets:\n")
    print_table(header, ([name, *peaks(preset(name))] for name in PRESETS))
    print("\nReconstruction of 512³ with all in bfloat16, and what training on 256³ saves under both rules for norms:\n")
    header = ["network", "reconstruct, GiB", "saved, norms in bfloat16, GiB", "saved, CUDA's rule, GiB"]
    print_table(header, ([name, *rules(name)] for name in wide))


def peaks(network: torch.nn.Module) -> list[str]:
    """Peak of a training step and of a reconstruction for each size, in GiB."""
    cells = []
    for spatial_size in SIZES:
        if any(n % f for n, f in zip(spatial_size, total_factors(network))):
            cells.append("-")
        else:
            cells.append(f"{training_cost(network, spatial_size).peak / GIB:.2f}")
        cells.append(f"{inference_cost(network, spatial_size).peak / GIB:.2f}")
    return cells


def rules(name: str) -> list[str]:
    """Reconstruction in pure bfloat16, and saved activations with norms in the autocast type and in float32."""
    network = build_with(name)
    saved = [training_cost(network, SIZES[1], device=device).saved_activations for device in ("cpu", "cuda")]
    peak = inference_cost(network.to(torch.bfloat16), SIZES[2], amp_dtype=None).peak
    return [f"{n / GIB:.2f}" for n in (peak, *saved)]


def preset(name: str) -> torch.nn.Module:
    """The network of a preset, on the ``meta`` device."""
    return read_plan(["configs/train.json", f"configs/presets/{name}.json"]).network


def size(spatial_size: tuple[int, ...]) -> str:
    """A spatial size as text."""
    return f"{spatial_size[0]}³" if len(set(spatial_size)) == 1 else "x".join(map(str, spatial_size))


if __name__ == "__main__":
    main()
