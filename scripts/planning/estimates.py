"""What a plan needs in memory and operations, margin included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.bundle.machine import GIB
from scripts.layers.factors import padded_size
from scripts.planning.config_keys import TRAIN, Plan, read_plan
from scripts.planning.inference_costs import InferenceCost, inference_cost
from scripts.planning.request_checks import voxels
from scripts.planning.training_costs import TrainingCost, training_cost

__all__ = ["Estimate", "estimate_memory", "estimate_plan", "with_margin"]

CONTEXT = {"cuda": 0.6, "cpu": 0.5}  # GiB: CUDA's context and libraries; the process before the first step
FRAGMENTATION = 0.08  # share of the peak that an allocator holds and cannot use


@dataclass(frozen=True)
class Estimate:
    """
    What a configuration needs.

    Args:
        spatial_size: of the training patch, voxels.
        volume_size: of the volume that is reconstructed, voxels.
        batch_size: patches per training step.
        downsample_factor: total factor along each axis.
        latent_shape: of one patch, channels first.
        voxels_per_latent: voxels (times image channels) for each number of the latent.
        training: cost of a step; None for a config that does not train.
        inference: cost of reconstructing a volume.
        device: ``"cuda"`` or ``"cpu"``.
    """

    spatial_size: tuple[int, ...]
    volume_size: tuple[int, ...]
    batch_size: int
    downsample_factor: tuple[int, ...]
    latent_shape: tuple[int, ...]
    voxels_per_latent: float
    training: TrainingCost | None
    inference: InferenceCost
    device: str

    @property
    def training_bytes(self) -> int:
        """Memory that training needs: the peak, and the margin for context, allocator and convolution workspace."""
        return 0 if self.training is None else with_margin(self.training, self.device)

    @property
    def inference_bytes(self) -> int:
        """Memory that reconstruction needs, the same margin included."""
        return with_margin(self.inference, self.device)

    @property
    def needed_bytes(self) -> int:
        """The larger of the two."""
        return max(self.training_bytes, self.inference_bytes)

    def fits(self, memory_gb: float) -> bool:
        """Whether training and reconstruction both fit into ``memory_gb`` GiB."""
        return self.needed_bytes <= memory_gb * GIB


def estimate_memory(
    spatial_size: int | Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    downsample_factors: Sequence[Any] | None = None,
    batch_size: int | None = None,
    *,
    config_file: str | Sequence[str] = TRAIN,
    volume_size: int | Sequence[int] | None = None,
    device: str = "cuda",
    **overrides: Any,
) -> Estimate:
    """
    What a configuration needs in memory and operations, for a training step and for reconstructing a volume. The real
    network runs on fake tensors: nothing is allocated, no GPU is needed, and it takes a second or two at any size.

    Args:
        spatial_size: of the training patch, voxels; one number for a cube. None takes the config's ``patch_size``.
        channels: feature channels of each level; None, as below, takes the config's.
        downsample_factors: the shrink between two levels, each an integer or one integer per axis.
        batch_size: patches per step.
        config_file: a config, or a list of a config and its overlays, as ``monai.bundle run`` takes them.
        volume_size: of the volume that is reconstructed, voxels; None is ``spatial_size``.
        device: ``"cuda"`` or ``"cpu"``: whose rules of mixed precision, optimizer and allocator apply.
        overrides: further config keys, such as ``initial_downsample_factor``, ``amp`` or ``gradient_accumulation_steps``.

    Raises:
        ValueError: for sizes that do not fit the network, unknown keys, and configs of another network.
        FileNotFoundError: for a config that does not exist.
    """
    given = {"channels": channels, "downsample_factors": downsample_factors, "batch_size": batch_size}
    overrides.update({key: value for key, value in given.items() if value is not None})
    return estimate_plan(read_plan(config_file, device=device, **overrides), spatial_size, volume_size, device)


def estimate_plan(
    plan: Plan,
    spatial_size: int | Sequence[int] | None = None,
    volume_size: int | Sequence[int] | None = None,
    device: str = "cuda",
) -> Estimate:
    """:py:func:`estimate_memory` of a :py:class:`Plan`."""
    network = plan.network
    if spatial_size is None:
        spatial_size = plan.patch_size if plan.patch_size is not None else volume_size
    if spatial_size is None:
        raise ValueError("this config does not train, so it has no `patch_size`: set `spatial_size`.")
    size = voxels("spatial_size", spatial_size, network.arguments["spatial_dims"])
    volume = size if volume_size is None else voxels("volume_size", volume_size, network.arguments["spatial_dims"])
    latent = network.latent_shape(
        size if plan.patch_size is not None else padded_size(size, network.total_downsample_factor)
    )
    return Estimate(
        spatial_size=size,
        volume_size=volume,
        batch_size=plan.batch_size,
        downsample_factor=network.total_downsample_factor,
        latent_shape=latent,
        voxels_per_latent=math.prod(network.total_downsample_factor) * network.arguments["in_channels"] / latent[0],
        training=None if plan.patch_size is None else _training_cost(plan, size, device),
        inference=inference_cost(network, volume, amp_dtype=plan.amp_dtype, device=device),
        device=device,
    )


def _training_cost(plan: Plan, size: Sequence[int], device: str) -> TrainingCost:
    return training_cost(
        plan.network,
        size,
        batch_size=plan.batch_size,
        amp_dtype=plan.amp_dtype,
        device=device,
        loss=plan.loss,
        loss_terms=plan.loss_terms,
        optimizer=plan.optimizer,
        accumulates=plan.accumulates,
        discriminator=plan.discriminator,
        averaged=plan.averaged,
    )


def with_margin(cost: TrainingCost | InferenceCost, device: str) -> int:
    """
    Peak and margin, bytes. The margin is for memory that PyTorch does not allocate itself (``CONTEXT``), for memory that its
    allocator cannot use (``FRAGMENTATION``), and on CUDA for the workspace of one convolution, which the peak leaves out.
    """
    workspace = cost.convolution if device == "cuda" else 0
    return int(cost.peak * (1 + FRAGMENTATION)) + workspace + int(CONTEXT[device] * GIB)
