"""The planner's estimates against the memory that real training steps need, each in a separate process.

    python -m benchmarks.planning [--device cuda]

Prints the table of docs/results/planning.md in Markdown. On the CPU it runs on Linux, where a process can read its own
memory use.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import fire

from benchmarks.cost import peak_bytes, restart_peak
from benchmarks.networks import MONAI, build, total_factors
from benchmarks.tables import amp_dtype, described, print_table
from scripts.bundle.config import ROOT
from scripts.bundle.machine import GIB, MIB
from scripts.layers.factors import by
from scripts.planning.estimates import CONTEXT
from scripts.planning.generator_estimates import GeneratorPlan, estimate_generator, plan_generator
from scripts.planning.training_costs import training_cost
from tests.planning.real_steps import saved_in_a_generator_step, saved_in_a_step

# glibc keeps freed blocks of up to 32 MiB; returned at once, they show what is in use
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
ATTENTION = {"attention_levels": (False, False, True), "use_flash_attention": True}
LEAN_PRESET = {"channels": (64, 128, 256), "norm_num_groups": 1, "latent_channels": 64, "linear_shortcut": True}
THICK = {"initial_downsample_factor": [2, 2, 1], "downsample_factors": [[2, 2, 1], [2, 2, 2]]}
# Name in benchmarks.networks, size, batch size, further arguments of the network
ROWS: dict[str, tuple[str, tuple[int, ...], int, dict[str, Any]]] = {
    "MONAI's network": (MONAI, (80, 80, 80), 1, {}),
    "4x": ("[2,2]", (80, 80, 80), 1, {}),
    "4x, checkpointing": ("[2,2]", (80, 80, 80), 1, {"use_checkpoint": True}),
    "8x": ("initial 2, [2,2]", (160, 160, 160), 1, {}),
    "8x, linear shortcut, batch 3": ("initial 2, [2,2]", (112, 112, 112), 3, {"linear_shortcut": True}),
    "16x (conv)": ("initial 2 (conv), [4,2]", (160, 160, 160), 1, {}),
    "16x, attention at the last level": ("initial 2, [4,2]", (160, 160, 160), 1, ATTENTION),
    "16x_lean, the preset": ("initial 4, [2,2]", (256, 256, 256), 1, LEAN_PRESET),
    "32x (conv)": ("initial 4 (conv), [4,2]", (256, 256, 256), 1, {}),
    "64x": ("initial 4, [4,2]", (320, 320, 320), 1, {"initial_downsample_factor": 8}),
    "thick slices": ("initial 2, [2,2]", (192, 192, 64), 1, THICK),
}
GENERATORS: dict[str, tuple[str, int, dict[str, Any]]] = {  # preset of the autoencoder, edge of the volumes, config keys
    "generator, 16x": ("16x", 512, {}),
    "generator, 16x, 132 classes": ("16x", 512, {"spatial_keys": ["label"], "num_classes": 132}),
    "generator, 8x, velocity, batch 2": ("8x", 192, {"batch_size": 2, "prediction": "v"}),
}


def table(device: str = "cpu") -> None:
    """Print the table; on ``"cuda"`` the rows of autoencoders."""
    print(f"{described(device)}:\n", flush=True)
    header = ["", "size", "batch", "saved: estimated", "counted", "needed: estimated", "measured", "off by"]
    names = ROWS if device == "cuda" else {**ROWS, **GENERATORS}
    print_table(header, (compare(name, device) for name in names))


def compare(name: str, device: str) -> list[str]:
    """The cells of a row. The estimate is without what an idle process needs, as the measurement is."""
    if name in GENERATORS:
        found = estimate_generator(plan_of(name))
        cost, size, batch_size = found.costs["training"], found.spatial_size, found.batch_size
    else:
        network, size, batch_size, arguments = ROWS[name]
        precision = {"amp_dtype": amp_dtype(device), "device": device}
        cost = training_cost(build(network, **arguments), size, batch_size=batch_size, **precision)
    command = [sys.executable, "-m", __spec__.name, "step", repr(name), device]  # fire reads literals
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    saved, peak = map(int, process.stdout.split()[-2:])
    needed = cost.needed - int(CONTEXT[device] * GIB)
    numbers = [f"{nbytes / MIB:.0f} MiB" for nbytes in (cost.saved_activations, saved, needed, peak)]
    return [name, by(size), str(batch_size), *numbers, f"{needed / peak - 1:+.1%}"]


def step(name: str, device: str) -> None:
    """Print the bytes that a step of a row saves, and the bytes by which two steps raise the peak above what was held before
    the network was built. A small step before them loads the libraries."""
    saved_in_row(name, device, small=True)
    gc.collect()  # a trainer and its handlers refer to each other, and so keep the network in memory
    before = restart_peak(device)
    saved = saved_in_row(name, device)
    print(saved, peak_bytes(device) - before)


def saved_in_row(name: str, device: str, small: bool = False) -> int:
    """Bytes that the second step of a row saves."""
    if name in GENERATORS:
        return saved_in_a_generator_step(plan_of(name, **({"spatial_size": 64, "batch_size": 1} if small else {})))
    network_name, size, batch_size, arguments = ROWS[name]
    network = build(network_name, **arguments)
    if small:
        size, batch_size = tuple(2 * factor for factor in total_factors(network)), 1
    return saved_in_a_step(network, size, batch_size, amp_dtype(device), device)


def plan_of(name: str, **changes: Any) -> GeneratorPlan:
    """Plan of a generator on the CPU."""
    preset, size, keys = GENERATORS[name]
    autoencoder = str(ROOT / f"configs/presets/{preset}.json")
    return plan_generator(**{"spatial_size": size, "autoencoder": autoencoder, "device": "cpu", **keys, **changes})


if __name__ == "__main__":
    fire.Fire({"table": table, "step": step} if sys.argv[1:2] == ["step"] else table)
