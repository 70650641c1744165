"""The memory and operations that reconstructing or decoding a volume needs, found by running it on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from scripts.planning.allocations import AllocationTracker, nbytes_of
from scripts.planning.cuda_casting import autocast, casting_rules
from scripts.planning.fake_tensors import fake_copy, fake_image, fake_tensors

__all__ = ["InferenceCost", "inference_cost"]


@dataclass(frozen=True)
class InferenceCost:
    """
    Cost of running a network without gradients. All but ``flops`` are bytes.

    Args:
        parameters: of the network, and its buffers.
        peak: largest amount in use at one time, everything included.
        convolution: input and result of the largest convolution: libraries may need as much again to reorder them.
        flops: operations, a multiplication and an addition counted as two.
    """

    parameters: int
    peak: int
    convolution: int
    flops: int


def inference_cost(
    network: nn.Module,
    spatial_size: Sequence[int],
    *,
    batch_size: int = 1,
    amp_dtype: torch.dtype | None = torch.bfloat16,
    device: str = "cuda",
    operation: str = "reconstruct",
    others: Sequence[nn.Module] = (),
) -> InferenceCost:
    """
    Cost of reconstructing or decoding whole volumes without gradients, as ``ReconstructionInferer`` runs it.

    Args:
        network: with ``encoder.in_channels``, as MONAI's ``AutoencoderKL``. It is not changed, and may be on the ``meta``
            device.
        spatial_size: of the volume, voxels.
        batch_size: volumes at once.
        amp_dtype: data type of mixed precision, None for none.
        device: ``"cuda"`` or ``"cpu"``, whose casting rules and allocator are imitated. No such device is needed.
        operation: ``"reconstruct"``, or ``"decode"`` from the latent of such a volume.
        others: networks that are in memory meanwhile.

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
                result = getattr(network, operation)(given).to(given.dtype)
            del result
    return InferenceCost(nbytes_of(network.state_dict()), tracker.peak, tracker.convolution, tracker.flops)
