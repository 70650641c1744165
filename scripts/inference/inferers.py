"""The inferers of whole volumes: in one pass, or in slabs within a memory budget, with the same result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

from scripts.bundle.machine import GIB, processes_on_host, total_memory
from scripts.bundle.precision import autocast_dtype
from scripts.layers.factors import padded_size
from scripts.layers.resampling import pad_to_multiple
from scripts.planning.inference_costs import inference_cost
from scripts.slabs import stream

OPERATIONS = ("reconstruct", "encode", "decode")
LEAST_BUDGET = 1e-6  # GiB: the smallest slabs
SHARE_OF_MEMORY = 0.8  # of the device's, for a run that sets no `memory_gb`; other programs use it too


def available_memory_gb(device: str | torch.device) -> float:
    """
    The memory budget, in GiB, of a run that does not set ``memory_gb``: a share of the device's memory, which several
    processes on one host divide. It is the same in every run on one machine, so that the same volumes are streamed.
    """
    total = total_memory(device)
    if total is None:
        raise OSError(f"this system does not say how much memory {device} has: set `memory_gb`.")
    processes = 1 if torch.device(device).type == "cuda" else processes_on_host()
    return SHARE_OF_MEMORY * total / processes / GIB


class ReconstructionInferer(Inferer):
    """
    Reconstruct whole volumes of any size, with mixed precision on any device (MONAI's evaluators cast for CUDA only).

    Args:
        amp: whether to use mixed precision.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.
    """

    def __init__(self, amp: bool, amp_dtype: str) -> None:
        self.amp, self.dtype = amp, autocast_dtype(amp_dtype)

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Reconstructions of images ``BxCxHxWxD``, in float32."""
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.amp):
            return network.reconstruct(inputs).float()


class StreamingInferer(ReconstructionInferer):
    """
    Encode, decode or reconstruct volumes of any size: in one pass when that fits into ``memory_gb``, otherwise in slabs,
    with the same result up to rounding. See :py:func:`scripts.slabs.stream`.

    Args:
        amp: whether to use mixed precision.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.
        memory_gb: limit in GiB: on a GPU for its memory, the network included; on the CPU for the growth of the process. The
            memory of the given volume is not counted. None for :py:func:`available_memory_gb`.
        operation: ``"reconstruct"``, ``"encode"`` (to ``z_mu``) or ``"decode"``.
        progress: whether to show a progress bar over the layers of a volume that is streamed.
        others: further networks, whose memory on a GPU counts for ``memory_gb``.

    Raises:
        ValueError: for an unknown operation or data type.
    """

    def __init__(
        self,
        amp: bool,
        amp_dtype: str,
        memory_gb: float | None = None,
        operation: str = "reconstruct",
        progress: bool = False,
        others: Sequence[torch.nn.Module] = (),
    ) -> None:
        super().__init__(amp, amp_dtype)
        if operation not in OPERATIONS:
            raise ValueError(f"`operation` is {operation!r}; it must be one of {', '.join(OPERATIONS)}.")
        self.memory_gb, self.operation, self.progress, self.others = memory_gb, operation, progress, others
        self._peaks: dict[tuple[int, ...], int] = {}

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """
        Args:
            inputs: images ``BxCxHxWxD`` of any size, or latents to decode. They can stay on the host when the network is on
                a GPU.
            network: a :py:class:`scripts.autoencoderkl.AutoencoderKL`.

        Returns:
            float32 on the device of ``inputs``: reconstructions of the same shape, latents, or decoded images whose sizes
            are multiples of the total factor.
        """
        device = next(network.parameters()).device
        budget = max((self.memory_gb or available_memory_gb(device)) - self.held_by_others(device), LEAST_BUDGET)
        fits = self._whole_volume_peak(inputs.shape, network, device) <= budget * GIB
        with torch.no_grad(), torch.autocast(device.type, self.dtype, enabled=self.amp):
            if fits:
                return self._in_one_pass(inputs.to(device), network).float().to(inputs.device)
            return stream(network, inputs, self.operation, budget, self.progress).to(inputs.device)

    def held_by_others(self, device: torch.device) -> float:
        """GiB of a GPU's memory that the other networks hold."""
        tensors = [tensor for other in self.others for tensor in (*other.parameters(), *other.buffers())]
        return sum(t.nbytes for t in tensors if t.device == device) / GIB if device.type == "cuda" else 0.0

    def _in_one_pass(self, x: Tensor, network: Any) -> Tensor:
        if self.operation == "encode":
            return network.encode(pad_to_multiple(x, network.total_downsample_factor))[0]
        return getattr(network, self.operation)(x)

    def _whole_volume_peak(self, shape: torch.Size, network: Any, device: torch.device) -> int:
        """Bytes that a reconstruction in one pass needs, by which all operations are decided: a latent is decoded as its
        volume would be reconstructed."""
        (batch_size, _, *size), factors = shape, network.total_downsample_factor
        if self.operation == "decode":
            size = [n * factor for n, factor in zip(size, factors)]
        key = batch_size, *padded_size(size, factors)
        if key not in self._peaks:
            dtype = self.dtype if self.amp else None
            cost = inference_cost(network, key[1:], batch_size=batch_size, amp_dtype=dtype, device=device.type)
            self._peaks[key] = cost.peak + cost.convolution  # libraries may need as much again as the largest convolution
        return self._peaks[key]
