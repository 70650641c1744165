"""What reconstructing, encoding or decoding a volume needs, in one pass or in slabs, found by running it on fake tensors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from scripts.bundle.machine import GIB
from scripts.layers.factors import padded_size
from scripts.planning.estimates import Cost
from scripts.planning.fake_tensors import (
    AllocationTracker,
    autocast,
    casting_rules,
    fake_copy,
    fake_image,
    fake_tensors,
    nbytes_of,
)
from scripts.slabs import FeatureMap, PaddedImage, SlabRun

GPU = "cuda"


def inference_cost(
    network: nn.Module,
    spatial_size: Sequence[int],
    *,
    batch_size: int = 1,
    amp_dtype: torch.dtype | None = torch.bfloat16,
    device: str = "cuda",
    operation: str = "reconstruct",
    others: Sequence[nn.Module] = (),
    in_slabs: bool = False,
) -> Cost:
    """
    Cost of reconstructing, encoding or decoding whole volumes in one pass without gradients.

    Args:
        network: network with ``encoder.in_channels``, as MONAI's ``AutoencoderKL``. It is not changed, and may be on the
            ``meta`` device.
        spatial_size: size of the volume, voxels.
        batch_size: volumes at once.
        amp_dtype: data type of mixed precision, None for none.
        device: ``"cuda"`` or ``"cpu"``, whose casting rules and allocator are imitated. No such device is needed.
        operation: ``"reconstruct"``, ``"encode"``, or ``"decode"`` from the latent of such a volume.
        others: networks that are in memory meanwhile.
        in_slabs: whether the run would work in slabs where memory is short.

    Raises:
        ValueError: for another device.
    """
    tracker = AllocationTracker(device)
    with fake_tensors(), torch.no_grad():
        network = fake_copy(network).eval()
        others = [fake_copy(other) for other in others]
        given = fake_image(network, batch_size, spatial_size)
        if operation == "decode":
            given = given.new_empty(batch_size, *network.latent_shape(spatial_size))  # type: ignore[operator]
        with tracker, casting_rules(device):
            tracker.track(network.state_dict(), [other.state_dict() for other in others], given)
            with autocast(amp_dtype):
                result = getattr(network, operation)(given)
                result = (result[0] if operation == "encode" else result).to(given.dtype)
            del result
    return Cost.counted(tracker, nbytes_of(network.state_dict()), in_slabs=in_slabs)


@dataclass(frozen=True)
class SlabCost:
    """
    What a run in slabs needs on a GPU. All but ``slabs`` are bytes.

    Args:
        budget: ``memory_gb``, in bytes.
        peak: largest amount in use at one time, the network included. What lies in the host's memory is not counted.
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
        with tracker, _autocast_of_gpu(amp_dtype):
            tracker.track(network.state_dict())
            run = _FakeRun(network, latent if operation == "decode" else image, operation, budget)
            if operation == "decode":
                run.decode(FeatureMap(latent, run.dim))
            else:
                run.decode(run.encode(PaddedImage(image, network.total_downsample_factor, run.dim)))
    return SlabCost(budget, tracker.peak, tracker.convolution, run.slabs)


def least_slab_cost(network: Any, spatial_size: Sequence[int], **kwargs: Any) -> SlabCost:
    """
    Cost of a run with the smallest ``memory_gb`` that it keeps within, a convolution's workspace included. The arguments are
    those of :py:func:`slab_cost`.
    """
    found = slab_cost(network, spatial_size, 0, **kwargs)  # the thinnest slabs
    while found.peak + found.convolution > found.budget:  # with more memory, slabs may be thicker
        found = slab_cost(network, spatial_size, (found.peak + found.convolution) / GIB, **kwargs)
    return found


class _FakeRun(SlabRun):
    """A run on fake tensors, with all maps in the host's memory. Slabs in the middle of a layer are alike: one is run."""

    def __init__(self, network: Any, x: torch.Tensor, operation: str, budget: int) -> None:
        super().__init__(network, x, operation, budget, Path(), None)
        self.for_maps = sys.maxsize
        self.slabs = 0

    def _moments(self, slab: torch.Tensor) -> torch.Tensor:
        return super()._moments(slab[:, :1]).expand(-1, -1, slab.shape[1])  # channels are alike

    def _next_start(self, start: int, stop: int, thickness: int, units: int) -> int:
        remaining = -(-(units - stop) // thickness)
        skipped = 0 if start == 0 else max(remaining - 1, 0)  # all but the last slab
        self.slabs += 1 + skipped
        return stop + skipped * thickness


@contextlib.contextmanager
def _autocast_of_gpu(dtype: torch.dtype | None) -> Iterator[None]:
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
