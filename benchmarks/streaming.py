"""Reconstruction of a volume in slabs, within a share of the memory that one pass takes: how much it takes, and how long.

    OMP_NUM_THREADS=1 python -m benchmarks.streaming --size 256 --share 0.25 [--amp True]

Time is the processor time of this process. It runs on Linux, where a process can tell its peak.
"""

from __future__ import annotations

import time

import fire
import torch
from monai.bundle import ConfigParser

from benchmarks.inference_peak import peak_bytes, restart_peak
from benchmarks.machine import described
from scripts.bundle.precision import choose_precision, computing_dtype
from scripts.inference.streaming import StreamingInferer
from scripts.planning.step_costs import inference_cost

GIB = 2**30


def compare(size: int = 256, share: float = 0.25, amp: bool | None = None) -> None:
    """
    Print peak and time of one pass, and of slabs, with the network of `configs/inference.json`.

    Args:
        size: edge of the cube, voxels.
        share: of the peak of one pass, by the planner, that slabs may take.
        amp: bfloat16 in place of float32; None is what pays on this processor.
    """
    amp = choose_precision("cpu").amp if amp is None else amp
    print(described("cpu", computing_dtype(amp, "bfloat16")))
    parser = ConfigParser()
    parser.read_config("configs/inference.json")
    parser.update({"device": "cpu"})
    network = parser.get_parsed_content("network").eval()
    peak = inference_cost(network, (size,) * 3, amp_dtype=torch.bfloat16 if amp else None, device="cpu").peak
    image = torch.rand(1, 1, size, size, size)
    StreamingInferer(amp, "bfloat16", 1e-3)(image[..., :64, :64, :64], network)  # loads the libraries
    for name, budget in (("slabs", share * peak), ("one pass", 2 * peak)):
        before, start = restart_peak(), time.process_time()
        StreamingInferer(amp, "bfloat16", budget / GIB)(image, network)
        grown, seconds = peak_bytes("cpu") - before, time.process_time() - start
        print(f"{name}: {grown / GIB:.2f} GiB, {grown / budget:.0%} of its budget, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    fire.Fire(compare)
