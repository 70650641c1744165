"""The inferer of validation and inference, which reconstructs whole volumes."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer

from scripts.bundle.precision import autocast_dtype

__all__ = ["ReconstructionInferer"]


class ReconstructionInferer(Inferer):
    """
    Reconstruct whole volumes of any size, with mixed precision on any device (MONAI's evaluators cast for CUDA only).

    Args:
        amp: whether to use mixed precision.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.
    """

    def __init__(self, amp: bool, amp_dtype: str) -> None:
        self.amp = amp
        self.dtype = autocast_dtype(amp_dtype)

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            inputs: images, ``BxCxHxWxD``.
            network: a :py:class:`scripts.autoencoderkl.AutoencoderKL`.

        Returns:
            float32 reconstructions of the same shape.
        """
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.amp):
            return network.reconstruct(inputs).float()
