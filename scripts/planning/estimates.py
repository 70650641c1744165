"""What an operation and a whole configuration need, and the margin that is added."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from scripts.bundle.machine import GIB
from scripts.layers.factors import padded_size
from scripts.planning.fake_tensors import AllocationTracker

CONTEXT = {"cuda": 0.6, "cpu": 0.5}  # GiB: CUDA's context and libraries; the process before the first step
FRAGMENTATION = 0.12  # share of the peak that an allocator holds and cannot use, and that other operations need beside it


@dataclass(frozen=True)
class Cost:
    """
    What one operation needs. Sizes are in bytes.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        parameters: networks, their buffers and the average of their weights.
        peak: largest amount in use at one time, everything included.
        needed: peak and margin: what PyTorch does not allocate (``CONTEXT``), what its allocator cannot use
            (``FRAGMENTATION``), and ``convolution``.
        convolution: input and result of the largest convolution: libraries may need as much again to reorder them.
        flops: operations, a multiplication and an addition counted as two.
        in_slabs: whether it works in slabs, with the same result, where memory is short.
        gradients: gradients of all trained parameters.
        optimizer_state: state of all optimizers.
        saved_activations: what forward pass and loss keep for the backward pass, parameters apart.
        levels: the same for each level of an autoencoder, from the image to the latent and back.
    """

    device: str
    parameters: int
    peak: int
    needed: int
    convolution: int
    flops: int
    in_slabs: bool = False
    gradients: int = 0
    optimizer_state: int = 0
    saved_activations: int = 0
    levels: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def counted(cls, tracker: AllocationTracker, parameters: int, **parts: Any) -> Cost:
        """The cost of what a tracker has counted; ``parts`` are further fields."""
        needed = int(tracker.peak * (1 + FRAGMENTATION)) + tracker.convolution + int(CONTEXT[tracker.device] * GIB)
        return cls(tracker.device, parameters, tracker.peak, needed, tracker.convolution, tracker.flops, **parts)


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

    @classmethod
    def of(cls, network: nn.Module, autoencoder: Any, spatial_size: Sequence[int], **parts: Any) -> Estimate:
        """That of a network which is trained, and the autoencoder that makes the latents; ``parts`` are further fields."""
        factors = autoencoder.total_downsample_factor
        latent = autoencoder.latent_shape(padded_size(spatial_size, factors))
        return cls(
            spatial_size=tuple(spatial_size),
            downsample_factor=factors,
            latent_shape=latent,
            voxels_per_latent=math.prod(factors) * autoencoder.arguments["in_channels"] / latent[0],
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            **parts,
        )

    @property
    def needed(self) -> int:
        """Bytes of the operation that needs most, margin included; those that work in slabs only where there is no other."""
        return max(self.costs.values(), key=lambda cost: (not cost.in_slabs, cost.needed)).needed

    def fits(self, memory_gb: float) -> bool:
        """Whether ``memory_gb`` GiB are enough for everything that does not work in slabs."""
        return self.needed <= memory_gb * GIB
