"""The GPU's memory that a run in slabs needs, and the smallest budget that works, found by running it on fake tensors.

The run is that of :py:mod:`scripts.slabs`, with its network on a fake GPU: what lies in the host's memory is not
counted. Of the slabs of a layer, those in the middle are alike, so one of them is run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.bundle.machine import GIB
from scripts.layers.factors import padded_size
from scripts.planning.allocations import AllocationTracker
from scripts.planning.fake_tensors import fake_copy, fake_tensors
from scripts.slabs import FeatureMap, PaddedImage, SlabRun

__all__ = ["OPERATIONS", "SlabCost", "least_slab_cost", "slab_cost"]

GPU = "cuda"
OPERATIONS = ("reconstruct", "decode")


@dataclass(frozen=True)
class SlabCost:
    """
    What a run in slabs needs on a GPU. All but ``slabs`` are bytes.

    Args:
        budget: ``memory_gb``, in bytes.
        peak: largest amount in use at one time, the network included.
        convolution: input and result of the largest convolution: libraries may need as much again to reorder them.
        slabs: their number, over all layers.
    """

    budget: int
    peak: int
    convolution: int
    slabs: int


def slab_cost(
    network: Any,
    spatial_size: Sequence[int],
    memory_gb: float,
    *,
    operation: str = "reconstruct",
    amp_dtype: torch.dtype | None = torch.bfloat16,
) -> SlabCost:
    """
    Cost of a run in slabs on a GPU, as :py:func:`scripts.slabs.stream` makes it. No GPU is needed.

    Args:
        network: a :py:class:`scripts.autoencoderkl.AutoencoderKL`. It is not changed, and may be on the ``meta`` device.
        spatial_size: size of the volume, voxels.
        memory_gb: budget in GiB, the network included.
        operation: ``"reconstruct"``, or ``"decode"`` from the latent of such a volume.
        amp_dtype: data type of mixed precision, None for none.
    """
    tracker = AllocationTracker(GPU, only=GPU)
    budget = int(memory_gb * GIB)
    with fake_tensors(), torch.no_grad():
        network = fake_copy(network, GPU).eval()
        image = torch.empty(1, network.arguments["in_channels"], *spatial_size)
        latent = torch.empty(1, *network.latent_shape(padded_size(spatial_size, network.total_downsample_factor)))
        with tracker, _autocast(amp_dtype):
            tracker.track(network.state_dict())
            run = _FakeRun(network, latent if operation == "decode" else image, operation, budget)
            if operation == "decode":
                run.decode(FeatureMap(latent, run.dim))
            else:
                run.decode(run.encode(PaddedImage(image, network.total_downsample_factor, run.dim)))
    return SlabCost(budget, tracker.peak, tracker.convolution, run.slabs)


def least_slab_cost(network: Any, spatial_size: Sequence[int], **kwargs: Any) -> SlabCost:
    """
    Cost of a run with the smallest ``memory_gb`` that it keeps within, a convolution's workspace included.

    Args:
        network: see :py:func:`slab_cost`.
        spatial_size: ditto.
        kwargs: ditto.
    """
    found = slab_cost(network, spatial_size, 0, **kwargs)  # the thinnest slabs
    while found.peak + found.convolution > found.budget:  # with more memory, slabs may be thicker
        found = slab_cost(network, spatial_size, (found.peak + found.convolution) / GIB, **kwargs)
    return found


class _FakeRun(SlabRun):
    """A run on fake tensors, with all maps in the host's memory."""

    def __init__(self, network: Any, x: torch.Tensor, operation: str, budget: int) -> None:
        super().__init__(network, x, operation, budget, Path(), None)
        self.for_maps = sys.maxsize
        self.slabs = 0

    def _moments(self, slab: torch.Tensor) -> torch.Tensor:
        return super()._moments(slab[:, :1]).expand(-1, -1, slab.shape[1])  # channels are alike

    def _next_start(self, start: int, stop: int, thickness: int, units: int) -> int:
        self.slabs += 1
        remaining = -(-(units - stop) // thickness)
        if start == 0 or remaining < 2:
            return stop
        self.slabs += remaining - 1
        return stop + (remaining - 1) * thickness  # the last slab


@contextlib.contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Mixed precision as on a GPU; ``torch.autocast`` disables itself without one."""
    before = torch.is_autocast_enabled(GPU), torch.get_autocast_dtype(GPU)
    torch.set_autocast_enabled(GPU, dtype is not None)
    torch.set_autocast_dtype(GPU, dtype or before[1])
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(GPU, before[0])
        torch.set_autocast_dtype(GPU, before[1])
