"""What a configuration needs: one estimate, a cost for each thing that is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scripts.bundle.machine import GIB

__all__ = ["Cost", "Estimate", "LevelCost"]

CONTEXT = {"cuda": 0.6, "cpu": 0.5}  # GiB: CUDA's context and libraries; the process before the first step
FRAGMENTATION = 0.12  # share of the peak that an allocator holds and cannot use, and that other operations need beside it


@dataclass(frozen=True)
class LevelCost:
    """
    Bytes of one level that are kept for the backward pass.

    Args:
        part: ``"encoder"``, ``"decoder"`` or ``"other"`` (latent, shortcut and loss).
        spatial_shape: finest grid on which the level works, voxels; empty for ``"other"``.
        saved: bytes.
    """

    part: str
    spatial_shape: tuple[int, ...]
    saved: int


@dataclass(frozen=True)
class Cost:
    """
    What one operation needs, found by running it on fake tensors. Sizes are in bytes.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        parameters: networks, their buffers and the average of their weights.
        peak: largest amount in use at one time, everything included.
        convolution: input and result of the largest convolution: libraries may need as much again to reorder them.
        flops: operations, a multiplication and an addition counted as two.
        in_slabs: whether it works in slabs, with the same result, where memory is short.
        gradients: gradients of all trained parameters.
        optimizer_state: state of all optimizers.
        saved_activations: what forward pass and loss keep for the backward pass, parameters apart.
        levels: the same per level, from the image to the latent and back.
        peak_phase: ``"forward"``, ``"loss"``, ``"backward"``, ``"discriminator"`` or ``"optimizer"``.
    """

    device: str
    parameters: int
    peak: int
    convolution: int
    flops: int
    in_slabs: bool = False
    gradients: int = 0
    optimizer_state: int = 0
    saved_activations: int = 0
    levels: tuple[LevelCost, ...] = ()
    peak_phase: str = "forward"

    @property
    def needed(self) -> int:
        """
        Peak and margin: what PyTorch does not allocate (``CONTEXT``), what its allocator cannot use (``FRAGMENTATION``), and
        the workspace of one convolution.
        """
        return int(self.peak * (1 + FRAGMENTATION)) + self.convolution + int(CONTEXT[self.device] * GIB)


@dataclass(frozen=True)
class Estimate:
    """
    What a configuration needs.

    Args:
        spatial_size: size of the training patch, or of a generator's volumes, voxels.
        volume_size: size of the volume that is reconstructed or decoded, voxels.
        batch_size: patches or latents per training step.
        downsample_factor: total factor of the autoencoder along each axis.
        latent_shape: shape of one patch's latent, channels first.
        voxels_per_latent: voxels (times image channels) for each number of the latent.
        parameters: number of parameters of the network.
        costs: by name: ``"training"`` (a step) and ``"reconstruction"`` of an autoencoder, ``"training"``, ``"sampling"``
            (a step of the solver with guidance), ``"encoding"`` (a plane of a spatial condition) and ``"decoding"`` of a
            generator.
    """

    spatial_size: tuple[int, ...]
    volume_size: tuple[int, ...]
    batch_size: int
    downsample_factor: tuple[int, ...]
    latent_shape: tuple[int, ...]
    voxels_per_latent: float
    parameters: int
    costs: Mapping[str, Cost]

    @property
    def needed(self) -> int:
        """Bytes of the operation that needs most, margin included; those that work in slabs only where there is no other."""
        whole = [cost for cost in self.costs.values() if not cost.in_slabs]
        return max(cost.needed for cost in whole or self.costs.values())

    def fits(self, memory_gb: float) -> bool:
        """Whether ``memory_gb`` GiB are enough for everything that does not work in slabs."""
        return self.needed <= memory_gb * GIB

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**vars(self), "costs": {name: {**_plain(cost), "needed": cost.needed} for name, cost in self.costs.items()}}


def _plain(cost: Cost) -> dict[str, Any]:
    return {**vars(cost), "levels": [vars(level) for level in cost.levels]}
