"""The bytes by which the reconstruction of one volume raises the memory of this process, or of the GPU, at its peak.

python -m benchmarks.inference_peak "'initial 2, [2,2]'" 256 [--device cpu] [--memory_gb 0.5]
"""

from __future__ import annotations

import resource
from pathlib import Path

import fire
import torch

from benchmarks.networks import build, total_factors
from scripts.inference import StreamingInferer


def inference_peak(name: str, size: int, device: str = "cpu", memory_gb: float | None = None) -> int:
    """
    Reconstruct a cube in float32, without gradients.

    Args:
        name: name of the network, see :py:mod:`benchmarks.networks`.
        size: edge of the cube, voxels.
        device: where to run.
        memory_gb: budget in GiB, within which the network runs in slabs; None for one pass.

    Returns:
        bytes above what a process holds that has reconstructed a tiny volume.
    """
    network = build(name).eval().to(device)
    tiny = torch.rand(1, 1, *[4 * factor for factor in total_factors(network)], device=device)
    image = torch.rand(1, 1, size, size, size, device="cpu" if memory_gb else device)
    with torch.no_grad():
        network.reconstruct(tiny)  # loads the libraries
        before = restart_peak(device)
        if memory_gb is None:
            network.reconstruct(image)
        else:
            StreamingInferer(amp=False, amp_dtype="bfloat16", memory_gb=memory_gb)(image, network)
    return peak_bytes(device) - before


def restart_peak(device: str = "cpu") -> int:
    """Reset the peak of the process (Linux), or of the GPU, and return the bytes that it holds now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes(device: str = "cpu") -> int:
    """Peak memory of the process (Linux; ``getrusage`` would include the parent's peak), or of the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    fire.Fire(inference_peak)
