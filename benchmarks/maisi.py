"""Decoding with MAISI's network: its own ways to save memory beside one pass and slabs, by memory, time and exactness.

    OMP_NUM_THREADS=1 python -m benchmarks.maisi [--size 96] [--share 0.25]

Random weights of the published width, float32. Time is the processor time of this process, memory its growth. It runs on
Linux, where a process can read its own peak.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import fire
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer

from benchmarks.inference_peak import peak_bytes, restart_peak
from benchmarks.machine import described
from scripts.bundle.foreign_weights import named_as_here
from scripts.bundle.machine import GIB
from scripts.inference.slabs import stream
from scripts.planning.inference_costs import inference_cost

# Of NV-Generate's configs for 512x512x512: windows of the latent of 128x128x128, and their overlap
WINDOWS = {"24 GB": ((64, 64, 48), 0.4), "80 GB": ((80, 80, 80), 0.4)}
NUM_SPLITS = (4, 8)


def of_maisi(state: dict[str, torch.Tensor] | None = None, num_splits: int = 1) -> AutoencoderKlMaisi:
    """MAISI's network of the published width, with its splits along the second axis."""
    network = AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_res_blocks=(2, 2, 2),
        num_channels=(64, 128, 256),
        attention_levels=(False,) * 3,
        latent_channels=4,
        num_splits=num_splits,
        dim_split=1,
    )
    if state is not None:
        network.load_state_dict(state)
    return network.eval()


def compare(size: int = 96, share: float = 0.25) -> None:
    """
    Print memory, time and largest difference from one pass, as a share of its range, for each way to decode a cube.

    Args:
        size: edge of the cube, voxels, a multiple of 96, so that splits and windows are whole.
        share: budget of the slabs, as a share of the planner's peak of one pass.
    """
    print(described("cpu", "float32"))
    torch.manual_seed(0)
    theirs = of_maisi()
    state = theirs.state_dict()
    parser = ConfigParser()
    parser.read_config(["configs/inference.json", "configs/presets/maisi.json"])
    parser.update({"device": "cpu"})
    network = parser.get_parsed_content("network").eval()
    network.load_state_dict(named_as_here(state))
    budget = share * inference_cost(network, (size,) * 3, amp_dtype=None, device="cpu").peak / GIB
    z = torch.randn(1, 4, *(size // 4,) * 3)

    def windows(roi: tuple[int, ...], overlap: float) -> torch.Tensor:
        scaled = [n * size // 512 for n in roi]
        inferer = SlidingWindowInferer(scaled, sw_batch_size=1, overlap=overlap, mode="gaussian")
        return inferer(z, theirs.decode)

    ways: dict[str, Callable[[], torch.Tensor]] = {"MAISI, one pass": lambda: theirs.decode(z)}
    for splits in NUM_SPLITS:
        ways[f"MAISI, `num_splits` {splits}"] = lambda splits=splits: of_maisi(state, splits).decode(z)
    for name, window in WINDOWS.items():
        ways[f"MAISI, sliding window for {name}"] = lambda window=window: windows(*window)
    ways["ours, one pass"] = lambda: network.decode(z)
    ways[f"ours, slabs within {budget:.2f} GiB"] = lambda: stream(network, z, "decode", budget)
    whole: torch.Tensor | None = None
    with torch.no_grad():
        network.decode(z[..., :8, :8, :8])  # loads the libraries
        for name, decode in ways.items():
            before, start = restart_peak(), time.process_time()
            image = decode()
            grown, seconds = peak_bytes("cpu") - before, time.process_time() - start
            whole = image if whole is None else whole
            difference = ((image - whole).abs().max() / (whole.max() - whole.min())).item()
            print(f"{name}: {grown / GIB:.2f} GiB, {seconds:.1f} s, {difference:.1e}", flush=True)


if __name__ == "__main__":
    fire.Fire(compare)
