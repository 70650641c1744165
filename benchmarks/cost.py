"""What factors save: memory and time of a training step and of whole-volume reconstruction, as ratios to MONAI's network.

    python -m benchmarks.cost [--size 96] [--inference_size 256] [--device cpu]
    python -m benchmarks.cost peak "'initial 2, [2,2]'" 256 [--device cpu] [--memory_gb 0.5]

Prints the tables of docs/results/cost.md in Markdown, in the default precision of the device, which the first line names.
All ratios of a table are measured in one run on one machine. `peak` measures one reconstruction.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import fire
import torch
from ignite.engine import Events

from benchmarks.loop import Stopwatch
from benchmarks.networks import FACTORS, MONAI, build, total_factors
from benchmarks.tables import amp_dtype, described, print_table
from scripts.bundle.machine import MIB
from scripts.inference import StreamingInferer
from scripts.planning.fake_tensors import SavedTensors
from scripts.training.trainer import AutoencoderTrainer

REPEATS = 3
SWITCHED = "initial 2, [4,2]"
SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "channels_last": {"channels_last": True},
    "use_checkpoint, first level": {"use_checkpoint": [True, False, False]},
    "use_checkpoint, all levels": {"use_checkpoint": True},
    "compile": {"compiled": True},
    "compile, channels_last": {"compiled": True, "channels_last": True},
}
RECONSTRUCTED = ("initial 2, [2,2]", "initial 2, [4,2]", "initial 4, [2,2]")


def tables(size: int = 96, inference_size: int = 256, device: str = "cpu") -> None:
    """
    Print the tables.

    Args:
        size: edge of the cube that is trained on, voxels.
        inference_size: edge of the cube that is reconstructed, voxels.
        device: where to run.
    """
    monai = saved_activations(MONAI, size, device), training_step(MONAI, size, device)

    def cells(network: str, **switches: Any) -> Iterator[str]:
        nbytes = saved_activations(network, size, device, **switches)
        yield f"{nbytes / MIB:.0f} MiB"
        yield f"{1 - nbytes / monai[0]:.1%}"
        yield f"{monai[1] / training_step(network, size, device, **switches):.1f}x faster"

    header = ["saved activations", "less than MONAI", "training step"]
    print(f"{described(device)}.")
    print(f"Training step on {size}³, batch 1, channels (32, 64, 64):\n")
    print_table(["network", "total", *header], ([name, total(name), *cells(name)] for name in [MONAI, *FACTORS]))
    print(f"\nThe same with the switches of the config, {SWITCHED}, against MONAI without any:\n")
    print_table(["switches", *header], ([name, *cells(SWITCHED, **switches)] for name, switches in SWITCHES.items()))
    print(f"\nReconstruction of {inference_size}³ without gradients, float32, process peak above idle:\n")
    peaks = {name: inference_peak(name, inference_size, device) for name in [MONAI, *RECONSTRUCTED]}
    rows = ([name, total(name), f"{p / MIB:.0f} MiB", f"1/{peaks[MONAI] / p:.1f}"] for name, p in peaks.items())
    print_table(["network", "total", "peak", "of MONAI's"], rows)


def total(name: str) -> str:
    return f"{total_factors(build(name))[0]}x"


def switched_network(
    name: str, device: str, compiled: bool = False, channels_last: bool = False, **arguments: Any
) -> torch.nn.Module:
    """A network of the tables with switches of the config."""
    with torch.device(device):
        network = build(name, **arguments)
    if channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
    if compiled:
        network.compile()
    return network


def saved_activations(name: str, size: int, device: str, **switches: Any) -> int:
    """Bytes that one step keeps for the backward pass, without parameters, in the device's default precision."""
    network = switched_network(name, device, **switches)
    image = torch.rand(1, 1, size, size, size, device=device)
    saved, dtype = SavedTensors(list(network.parameters())), amp_dtype(device)
    with saved, torch.autocast(device, dtype, enabled=dtype is not None):
        kept = network(image)  # noqa: F841  a storage that is freed could be counted twice
    return saved.nbytes


def training_step(name: str, size: int, device: str, **switches: Any) -> float:
    """Seconds of a step with AdamW: the median of three, after one step of warm-up."""
    network = switched_network(name, device, **switches)
    images = [torch.rand(1, 1, size, size, size, device=device)] * (1 + REPEATS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    trainer = AutoencoderTrainer.of_images(images, network, optimizer, amp_dtype=amp_dtype(device))
    watch = Stopwatch(device)
    trainer.add_event_handler(Events.ITERATION_STARTED, watch.start)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, watch.stop)
    trainer.run()
    return median(watch.seconds[1:])


def inference_peak(name: str, size: int, device: str) -> int:
    """:py:func:`peak` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "peak", repr(name), str(size), device]  # fire reads literals
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(name: str, size: int, device: str = "cpu", memory_gb: float | None = None) -> int:
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
    fire.Fire({"peak": peak} if sys.argv[1:2] == ["peak"] else tables)
