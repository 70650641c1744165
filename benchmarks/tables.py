"""What the benchmarks print: the machine that they ran on, and tables in Markdown."""

from __future__ import annotations

import itertools
import platform
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from scripts.bundle.precision import autocast_dtype, choose_precision


def amp_dtype(device: str) -> torch.dtype | None:
    """Data type of mixed precision where that is the default of the device, otherwise None."""
    precision = choose_precision(device)
    return autocast_dtype(precision.amp_dtype) if precision.amp else None


def described(device: str, precision: str | None = None) -> str:
    """Device, instruction set, threads, PyTorch and precision (without one, the device's default) in one line."""
    precision = precision or choose_precision(device).name
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, {precision}"
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {capability}, threads: {threads}, PyTorch {torch.__version__}, {precision}"


def print_table(header: Collection[str], rows: Iterable[Collection[str]]) -> None:
    """Print a Markdown table, row by row as they are measured."""
    for row in itertools.chain([header, ["---"] * len(header)], rows):
        print(f"| {' | '.join(row)} |", flush=True)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
