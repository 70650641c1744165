"""Which precision pays with which instruction set: seconds of a training step and of a reconstruction, default network.

    python -m benchmarks.precision [--limit 60] [--precisions "[float32,bfloat16]"]

Prints the table of docs/performance.md in Markdown, a row for each instruction set that this processor has: it acts as
a smaller one where `ONEDNN_MAX_CPU_ISA` and `ATEN_CPU_CAPABILITY` say so. Each number is of a process of its own. What is
not done within the limit is measured on half the edge, and if need be on a quarter; the cell then says on what.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from statistics import median

import fire
import torch
from monai.bundle import ConfigParser

from benchmarks.cost import print_table
from benchmarks.machine import described, instruction_set, now
from scripts.bundle.precision import LOWER_PRECISIONS, autocast_dtype

STEP_SIZE = 96  # the default `patch_size`
VOLUME_SIZE = 128
REPEATS = 3
HALVINGS = 2
START = 60  # seconds that a process may take before it computes
# as oneDNN's environment variable names them, with the kernels that PyTorch's own would choose there
INSTRUCTION_SETS = {
    "AVX2": "avx2",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_BF16": "avx512",
    "AVX512_CORE_AMX": "avx512",
}


def table(limit: float = 60.0, precisions: Sequence[str] = ("float32", *LOWER_PRECISIONS[:1])) -> None:
    """
    Print the table.

    Args:
        limit: seconds that the measurement of a cell may take on one size.
        precisions: ``float32``, ``bfloat16``, ``float16``.
    """
    print(f"Training step on {STEP_SIZE}³ and reconstruction of {VOLUME_SIZE}³, {described('cpu', 'as the rows say')}:\n")
    rows = (
        [name, precision, *(cell(operation, precision, limit, environment) for operation in SIZES)]
        for name, environment in available().items()
        for precision in precisions
    )
    print_table(["instruction set", "precision", f"training step, {STEP_SIZE}³", f"reconstruction, {VOLUME_SIZE}³"], rows)


def available() -> dict[str, dict[str, str]]:
    """The environment for each instruction set that this processor has, by oneDNN's name of it."""
    found: dict[str, dict[str, str]] = {}
    for name, capability in INSTRUCTION_SETS.items():
        environment = {"ONEDNN_MAX_CPU_ISA": name, "ATEN_CPU_CAPABILITY": capability}
        found.setdefault(instruction_set(**environment), environment)  # what it lacks falls back to a smaller one
    return found


def cell(operation: str, precision: str, limit: float, environment: dict[str, str]) -> str:
    """Seconds of an operation, or on which smaller size it took how long, or that it took too long on all."""
    for halving in range(1 + HALVINGS):
        size = SIZES[operation] >> halving
        seconds = in_a_process(operation, precision, size, limit, environment)
        if seconds is not None:
            return f"{seconds:.3g} s" if halving == 0 else f"more than {limit:g} s; on {size}³ {seconds:.3g} s"
    return f"more than {limit:g} s on {size}³"


def in_a_process(operation: str, precision: str, size: int, limit: float, environment: dict[str, str]) -> float | None:
    """Seconds, or None when the process was stopped at the limit."""
    command = [sys.executable, "-m", "benchmarks.precision", "measure", operation, precision, str(size), str(limit)]
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, **environment}, timeout=limit + START
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure(operation: str, precision: str, size: int, limit: float) -> None:
    """
    Print the seconds of an operation: the median of three after one to warm up, or what was done in the limit's half.

    Args:
        operation: ``training`` or ``reconstruction``.
        precision: what to compute in.
        size: edge of the cube, voxels.
        limit: seconds.
    """
    torch.manual_seed(0)
    parser = ConfigParser.load_config_file("configs/train.json" if operation == "training" else "configs/inference.json")
    config = ConfigParser(parser)
    config.update({"device": "cpu"})
    network = config.get_parsed_content("network_def")
    run = OPERATIONS[operation](network, torch.rand(1, 1, size, size, size))
    amp = precision != "float32"
    times: list[float] = []
    while len(times) <= REPEATS and sum(times) < limit / 2:
        start = now("cpu")
        with torch.autocast("cpu", autocast_dtype(precision) if amp else None, enabled=amp):
            run()
        times.append(now("cpu") - start)
    print(json.dumps(median(times[1:] or times)))


def training(network: torch.nn.Module, image: torch.Tensor) -> Callable[[], None]:
    """A training step with AdamW."""
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-4)

    def step() -> None:
        reconstruction, z_mu, _ = network(image)
        with torch.autocast("cpu", enabled=False):
            loss = torch.nn.functional.l1_loss(reconstruction.float(), image) + 1e-8 * z_mu.float().square().sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def reconstruction(network: torch.nn.Module, image: torch.Tensor) -> Callable[[], None]:
    """A reconstruction in one pass."""
    network.eval()

    @torch.no_grad()
    def reconstruct() -> None:
        network.reconstruct(image)  # type: ignore[operator]

    return reconstruct


SIZES = {"training": STEP_SIZE, "reconstruction": VOLUME_SIZE}
OPERATIONS = {"training": training, "reconstruction": reconstruction}

if __name__ == "__main__":
    fire.Fire({"table": table, "measure": measure} if sys.argv[1:2] == ["measure"] else table)
