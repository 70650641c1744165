"""What reconstructing, encoding or decoding a volume needs, in one pass or in slabs, found by running it on fake tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
        network: MONAI's ``AutoencoderKL`` or one with its interface, on any device. It is not changed.
        spatial_size: size of the volume, voxels.
        batch_size: volumes at once.
        amp_dtype: data type of mixed precision, None for none.
        device: ``"cuda"`` or ``"cpu"``, whose casting rules and allocator are imitated. No such device is needed.
        operation: ``"reconstruct"``, ``"encode"``, or ``"decode"`` from the latent of such a volume.
        others: networks that are in memory meanwhile.
        in_slabs: whether the run would work in slabs where memory is short.
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
                (result[0] if operation == "encode" else result).to(given.dtype)  # which runs do too
    return Cost.counted(tracker, nbytes_of(network.state_dict()), in_slabs=in_slabs)


@dataclass(frozen=True)
class SlabCost:
    """
    What a run in slabs needs on a GPU, in bytes; what lies in the host's memory is not counted.

    Args:
        budget: ``memory_gb``, in bytes.
        peak: largest amount in use at one time, the network included.
        convolution: input and result of the largest convolution: libraries may need as much again to reorder them.
        slabs: number of slabs, over all layers.
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
    Cost of a run in slabs on a GPU, as :py:func:`scripts.slabs.stream` makes it. No GPU is needed. Further arguments are
    those of :py:func:`inference_cost`; ``"encode"`` is no operation here.

    Args:
        network: a :py:class:`scripts.autoencoderkl.AutoencoderKL`.
        memory_gb: budget in GiB, the network included.
    """
    tracker = AllocationTracker(GPU, only=GPU)
    budget = int(memory_gb * GIB)
    with fake_tensors(), torch.no_grad():
        network = fake_copy(network, GPU).eval()
        image = torch.empty(1, network.arguments["in_channels"], *spatial_size)
        latent = torch.empty(1, *network.latent_shape(padded_size(spatial_size, network.total_downsample_factor)))
        with tracker, torch.autocast(GPU, amp_dtype, enabled=False):  # it disables itself without a GPU
            torch.set_autocast_enabled(GPU, amp_dtype is not None)
            tracker.track(network.state_dict())
            run = _FakeRun(network, latent if operation == "decode" else image, operation, budget)
            if operation == "decode":
                run.decode(FeatureMap(latent, run.dim))
            else:
                run.decode(run.encode(PaddedImage(image, network.total_downsample_factor, run.dim)))
    return SlabCost(budget, tracker.peak, tracker.convolution, run.slabs)


def least_slab_cost(network: Any, spatial_size: Sequence[int], **kwargs: Any) -> SlabCost:
    """:py:func:`slab_cost` with the smallest ``memory_gb`` that a run keeps within, a convolution's workspace included."""
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
        skipped = 0 if start == 0 else max((units - stop - 1) // thickness, 0)  # all but the last slab
        self.slabs += 1 + skipped
        return stop + skipped * thickness
