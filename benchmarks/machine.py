"""The machine that a measurement ran on, for the first lines of the benchmarks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

__all__ = ["described", "instruction_set", "processor"]

# a convolution that is large enough for oneDNN, which then prints the instruction set that it uses
CONVOLUTION = "import torch; torch.nn.functional.conv2d(torch.rand(1, 32, 64, 64), torch.rand(8, 32, 3, 3))"


def described(device: str, precision: str) -> str:
    """
    Device, instruction set, threads, PyTorch and precision in one line.

    Args:
        device: where a benchmark runs.
        precision: what it computes in.
    """
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, {precision}"
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    return f"{processor()}, {instruction_set()}, {threads} thread{plural}, PyTorch {torch.__version__}, {precision}"


def processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instruction_set(**environment: str) -> str:
    """
    The instruction set that oneDNN uses, by oneDNN's name. It follows ``ONEDNN_MAX_CPU_ISA`` and is found in a separate
    process.

    Args:
        environment: further environment variables of that process.
    """
    command = [sys.executable, "-c", CONVOLUTION]
    variables = {**os.environ, "ONEDNN_VERBOSE": "1", **environment}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout
    found = [line.split("isa:", 1)[1] for line in output.splitlines() if ",cpu,isa:" in line]
    return found[0] if found else f"{torch.backends.cpu.get_cpu_capability()} (without oneDNN)"
