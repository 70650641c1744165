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
import torch

from benchmarks.inference_peak import peak_bytes, resident
from benchmarks.machine import described
from benchmarks.networks import MONAI, build_with, total_factors
from benchmarks.tables import print_table
from scripts.bundle.config import ROOT
from scripts.bundle.machine import GIB, MIB
from scripts.bundle.precision import choose_precision
from scripts.layers.factors import by
from scripts.planning.costs import CONTEXT, Cost
from scripts.planning.generator_estimates import GeneratorPlan, estimate_generator, plan_generator
from scripts.planning.training_costs import training_cost
from tests.planning.real_steps import saved_in_a_generator_step, saved_in_a_step

# glibc keeps freed blocks of up to 32 MiB; returned at once, they show what is in use
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
ATTENTION = {"attention_levels": (False, False, True), "use_flash_attention": True}
LEAN_PRESET = {"channels": (64, 128, 256), "norm_num_groups": 1, "latent_channels": 64, "linear_shortcut": True}
THICK = {"initial_downsample_factor": [2, 2, 1], "downsample_factors": [[2, 2, 1], [2, 2, 2]]}
# Name in benchmarks.networks, size, batch size, mixed precision where it is the default, further arguments of the network
ROWS: dict[str, tuple[str, tuple[int, ...], int, bool, dict[str, Any]]] = {
    "MONAI's network": (MONAI, (80, 80, 80), 1, True, {}),
    "4x": ("[2,2]", (80, 80, 80), 1, True, {}),
    "4x, without AMP": ("[2,2]", (64, 64, 64), 1, False, {}),
    "4x, checkpointing": ("[2,2]", (80, 80, 80), 1, True, {"use_checkpoint": True}),
    "8x": ("initial 2, [2,2]", (160, 160, 160), 1, True, {}),
    "8x, linear shortcut, batch 3": ("initial 2, [2,2]", (112, 112, 112), 3, True, {"linear_shortcut": True}),
    "16x (conv)": ("initial 2 (conv), [4,2]", (160, 160, 160), 1, True, {}),
    "16x, attention at the last level": ("initial 2, [4,2]", (160, 160, 160), 1, True, ATTENTION),
    "16x_lean, the preset": ("initial 4, [2,2]", (256, 256, 256), 1, True, LEAN_PRESET),
    "32x (conv)": ("initial 4 (conv), [4,2]", (256, 256, 256), 1, True, {}),
    "64x": ("initial 4, [4,2]", (320, 320, 320), 1, True, {"initial_downsample_factor": 8}),
    "thick slices": ("initial 2, [2,2]", (192, 192, 64), 1, True, THICK),
}
GENERATORS: dict[str, tuple[str, int, dict[str, Any]]] = {  # preset of the autoencoder, edge of the volumes, config keys
    "generator, 16x": ("16x", 512, {}),
    "generator, 16x, 132 classes": ("16x", 512, {"spatial_keys": ["label"], "num_classes": 132}),
    "generator, 8x, velocity, batch 2": ("8x", 192, {"batch_size": 2, "prediction": "v"}),
}


def table(device: str = "cpu") -> None:
    """
    Print the table.

    Args:
        device: ``"cpu"``, or ``"cuda"`` for the rows of autoencoders.
    """
    print(f"{described(device, choose_precision(device).name + ' unless the row says otherwise')}:\n", flush=True)
    header = ["", "size", "batch", "saved: estimated", "counted", "needed: estimated", "measured", "off by"]
    names = ROWS if device == "cuda" else {**ROWS, **GENERATORS}
    print_table(header, (compare(name, device) for name in names))


def compare(name: str, device: str) -> list[str]:
    """The cells of a row. The estimate is without what an idle process needs, as the measurement is."""
    cost, size, batch_size = estimate(name, device)
    command = [sys.executable, "-m", __spec__.name, "step", repr(name), device]  # fire reads literals
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    saved, peak = map(int, process.stdout.split()[-2:])
    needed = cost.needed - int(CONTEXT[device] * GIB)
    numbers = [f"{nbytes / MIB:.0f} MiB" for nbytes in (cost.saved_activations, saved, needed, peak)]
    return [name, by(size), str(batch_size), *numbers, f"{needed / peak - 1:+.1%}"]


def estimate(name: str, device: str) -> tuple[Cost, tuple[int, ...], int]:
    """Cost of a row's step, its size and its batch size."""
    if name in GENERATORS:
        plan = plan_of(*GENERATORS[name])
        found = estimate_generator(plan, device)
        return found.costs["training"], found.spatial_size, found.batch_size
    network, size, batch_size, amp, arguments = ROWS[name]
    dtype = amp_dtype(amp, device)
    cost = training_cost(build_with(network, **arguments), size, batch_size=batch_size, amp_dtype=dtype, device=device)
    return cost, size, batch_size


def plan_of(preset: str, size: int, keys: dict[str, Any]) -> GeneratorPlan:
    """Plan of a generator on the CPU."""
    return plan_generator(spatial_size=size, autoencoder=str(ROOT / f"configs/presets/{preset}.json"), device="cpu", **keys)


def amp_dtype(amp: bool, device: str) -> torch.dtype | None:
    """Data type of mixed precision, where it is this machine's default."""
    precision = choose_precision(device)
    return getattr(torch, precision.amp_dtype) if amp and precision.amp else None


def step(name: str, device: str) -> None:
    """
    Print the bytes that a step saves, and the bytes by which two steps raise the peak above what was held before the network
    was built.

    Args:
        name: name of a row.
        device: ``"cpu"`` or ``"cuda"``.
    """
    if name in GENERATORS:
        preset, size, keys = GENERATORS[name]
        saved_in_a_generator_step(plan_of(preset, 64, {**keys, "batch_size": 1}))  # loads the libraries
        gc.collect()  # a trainer and its handlers refer to each other, and so keep the network in memory
        before = resident()
        print(saved_in_a_generator_step(plan_of(preset, size, keys)), peak_bytes(device) - before)
        return
    network, size_, batch_size, amp, arguments = ROWS[name]
    dtype, small = amp_dtype(amp, device), tuple(2 * f for f in total_factors(build_with(network, **arguments)))
    saved_in_a_step(build_with(network, **arguments), small, 1, dtype, device)
    gc.collect()
    before = resident() if device == "cpu" else torch.cuda.memory_allocated()
    saved = saved_in_a_step(build_with(network, **arguments), size_, batch_size, dtype, device)
    print(saved, peak_bytes(device) - before)


if __name__ == "__main__":
    fire.Fire({"table": table, "step": step} if sys.argv[1:2] == ["step"] else table)
