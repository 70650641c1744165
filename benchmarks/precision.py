"""Which precision is fast with which instruction set: seconds of a training step and of a reconstruction, default network.

    python -m benchmarks.precision [--limit 60] [--precisions "[float32,bfloat16]"]

Prints the table of docs/results/precision.md in Markdown, with rows for each instruction set that this processor has:
`ONEDNN_MAX_CPU_ISA` and `ATEN_CPU_CAPABILITY` make it use a smaller one. Each number is from a separate process. An
operation that would take longer than the limit is measured on a cube of half or a quarter of the edge, which the cell names.
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

from benchmarks.machine import described, instruction_set, now
from benchmarks.tables import print_table
from scripts.bundle.precision import LOWER_PRECISIONS, autocast_dtype
from scripts.training.autoencoder_trainer import AutoencoderTrainer

Run = Callable[[torch.dtype | None], None]  # an operation, in a data type of mixed precision or in float32
STEP_SIZE = 96  # the default `patch_size`
VOLUME_SIZE = 128
REPEATS = 3
HALVINGS = 2
START = 60  # seconds that a process may take before it starts to compute
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
        limit: seconds that one run may take.
        precisions: ``float32``, ``bfloat16``, ``float16``.
    """
    print(f"Training step on {STEP_SIZE}³ and reconstruction of {VOLUME_SIZE}³, {described('cpu', 'precision by row')}:\n")
    rows = (
        [name, precision, *(cell(operation, precision, limit, environment) for operation in SIZES)]
        for name, environment in available().items()
        for precision in precisions
    )
    print_table(["instruction set", "precision", f"training step, {STEP_SIZE}³", f"reconstruction, {VOLUME_SIZE}³"], rows)


def available() -> dict[str, dict[str, str]]:
    """The environment variables for each instruction set that this processor has, by oneDNN's name of it."""
    found: dict[str, dict[str, str]] = {}
    for name, capability in INSTRUCTION_SETS.items():
        environment = {"ONEDNN_MAX_CPU_ISA": name, "ATEN_CPU_CAPABILITY": capability}
        found.setdefault(instruction_set(**environment), environment)  # what it lacks falls back to a smaller one
    return found


def cell(operation: str, precision: str, limit: float, environment: dict[str, str]) -> str:
    """Seconds of an operation; if it takes too long, those on a smaller size, with float32's on that size."""
    found = in_a_process(operation, precision, limit, environment)
    if found is None:
        return f"more than {limit:g} s on {SIZES[operation] >> HALVINGS}³"
    size, seconds, in_float32 = found
    if size == SIZES[operation]:
        return f"{seconds:.3g} s"
    return f"{seconds:.3g} s on {size}³, where float32 takes {in_float32:.2g} s"


def in_a_process(
    operation: str, precision: str, limit: float, environment: dict[str, str]
) -> tuple[int, float, float] | None:
    """The result of :py:func:`measure` in a separate process; None when even the smallest size takes too long."""
    command = [sys.executable, "-m", "benchmarks.precision", "measure", operation, precision, str(limit)]
    variables = {**os.environ, **environment}
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables, timeout=START + 9 * limit)
    except subprocess.TimeoutExpired:
        return None
    size, seconds, in_float32 = json.loads(done.stdout.splitlines()[-1])
    return size, seconds, in_float32


def measure(operation: str, precision: str, limit: float) -> None:
    """
    Print edge, seconds, and seconds in float32, of the largest size on which one run takes no longer than the limit.

    Sizes are tried from the smallest on, until eight times the seconds of one would be more than the limit.

    Args:
        operation: ``training`` or ``reconstruction``.
        precision: what to compute in.
        limit: seconds.
    """
    torch.manual_seed(0)
    config = ConfigParser(ConfigParser.load_config_file(f"configs/{CONFIGS[operation]}"))
    config.update({"device": "cpu"})
    network = config.get_parsed_content("network_def")
    seconds = 0.0
    for halving in range(HALVINGS, -1, -1):
        if 8 * seconds > limit:
            break
        size = SIZES[operation] >> halving
        run = OPERATIONS[operation](network, torch.rand(1, 1, size, size, size))
        in_float32 = seconds_of(run, "float32", limit)
        seconds = in_float32 if precision == "float32" else seconds_of(run, precision, limit)
    print(json.dumps([size, seconds, in_float32]))


def seconds_of(run: Run, precision: str, limit: float) -> float:
    """The median of three runs after one of warm-up, or of those that were done after half the limit."""
    dtype = None if precision == "float32" else autocast_dtype(precision)
    times: list[float] = []
    while len(times) <= REPEATS and sum(times) < limit / 2:
        start = now("cpu")
        run(dtype)
        times.append(now("cpu") - start)
    return median(times[1:] or times)


def training(network: torch.nn.Module, image: torch.Tensor) -> Run:
    """A training step with AdamW, in a data type of mixed precision or in float32."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step(dtype: torch.dtype | None) -> None:
        AutoencoderTrainer.of_images([image], network, optimizer, amp_dtype=dtype).run()

    return step


def reconstruction(network: torch.nn.Module, image: torch.Tensor) -> Run:
    """A reconstruction in one pass, ditto."""
    network.eval()

    @torch.no_grad()
    def reconstruct(dtype: torch.dtype | None) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            network.reconstruct(image)  # type: ignore[operator]

    return reconstruct


SIZES = {"training": STEP_SIZE, "reconstruction": VOLUME_SIZE}
CONFIGS = {"training": "train.json", "reconstruction": "inference.json"}
OPERATIONS = {"training": training, "reconstruction": reconstruction}

if __name__ == "__main__":
    fire.Fire({"table": table, "measure": measure} if sys.argv[1:2] == ["measure"] else table)
