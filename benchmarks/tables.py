"""What the benchmarks print: the machine that they ran on, and tables in Markdown."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Collection, Iterable
from pathlib import Path

import torch


def described(device: str, precision: str) -> str:
    """
    Device, instruction set, threads, PyTorch and precision in one line.

    Args:
        device: where a benchmark runs.
        precision: what it computes in.
    """
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
    names = (
        [line.split(": ", 1)[1] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()
