"""What reconstructing, encoding or decoding a volume in one pass needs, found by running it on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn

from scripts.planning.allocations import AllocationTracker, nbytes_of
from scripts.planning.costs import Cost
from scripts.planning.fake_tensors import autocast, casting_rules, fake_copy, fake_image, fake_tensors

__all__ = ["inference_cost"]


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
    Cost of reconstructing, encoding or decoding whole volumes without gradients, as ``ReconstructionInferer`` runs it.

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
    return tracker.cost(nbytes_of(network.state_dict()), in_slabs=in_slabs)
