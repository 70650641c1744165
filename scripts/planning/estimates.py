"""What an autoencoder needs in memory and operations, and which changes would need less."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scripts.bundle.machine import GIB
from scripts.layers.factors import padded_size
from scripts.planning.costs import Estimate
from scripts.planning.inference_costs import inference_cost
from scripts.planning.plans import TRAIN, Plan, read_plan, voxels
from scripts.planning.training_costs import training_cost

__all__ = ["Change", "estimate_memory", "estimate_plan", "what_would_fit"]

LAST_RESORT_INITIAL = 8


@dataclass(frozen=True)
class Change:
    """A change that saves memory: ``what`` to change, and the bytes that training or reconstruction then needs."""

    what: str
    nbytes: int


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
    What an autoencoder needs in memory and operations, for a training step and for reconstructing a volume. The real
    network runs on fake tensors: nothing is allocated, no GPU is needed, and it takes a few seconds at any size.

    Args:
        spatial_size: size of the training patch, voxels; one number for a cube. None takes the config's ``patch_size``.
        channels: feature channels of each level; None, as below, takes the config's.
        downsample_factors: the shrink between two levels, each an integer or one integer per axis.
        batch_size: patches per step.
        config_file: a config, or a list of a config and its overlays, as ``monai.bundle run`` takes them.
        volume_size: size of the volume that is reconstructed, voxels; None is ``spatial_size``.
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
    network, trains = plan.network, plan.patch_size is not None
    axes, factors = network.arguments["spatial_dims"], network.total_downsample_factor
    if spatial_size is None:
        spatial_size = plan.patch_size or volume_size
    if spatial_size is None:
        raise ValueError("this config does not train, so it has no `patch_size`: set `spatial_size`.")
    size = voxels("spatial_size", spatial_size, axes)
    volume = size if volume_size is None else voxels("volume_size", volume_size, axes)
    latent = network.latent_shape(size if trains else padded_size(size, factors))
    precision: dict[str, Any] = {"amp_dtype": plan.amp_dtype, "device": device}
    costs = {"training": training_cost(network, size, **precision, **plan.training)} if trains else {}
    return Estimate(
        spatial_size=size,
        volume_size=volume,
        batch_size=plan.training.get("batch_size", 1),
        downsample_factor=factors,
        latent_shape=latent,
        voxels_per_latent=math.prod(factors) * network.arguments["in_channels"] / latent[0],
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        costs={**costs, "reconstruction": inference_cost(network, volume, **precision, in_slabs=not trains)},
    )


def what_would_fit(
    plan: Plan, spatial_size: Sequence[int], volume_size: Sequence[int], memory_gb: float, device: str = "cuda"
) -> list[Change]:
    """
    Changes of a plan that needs too much memory, each estimated.

    Args:
        plan: the plan, of a config that trains.
        spatial_size: size of the training patch, voxels.
        volume_size: size of the volume that is reconstructed, voxels.
        memory_gb: the budget, GiB.
        device: ``"cuda"`` or ``"cpu"``.

    Returns:
        the changes that fit; if none does, those that save memory, the smallest need first.
    """
    needed = estimate_plan(plan, spatial_size, volume_size, device).needed
    changes = [
        Change(what, estimate_plan(changed, patch, volume_size, device).needed)
        for what, changed, patch in _changes(plan, tuple(spatial_size))
    ]
    fitting = [change for change in changes if change.nbytes <= memory_gb * GIB]
    return fitting or sorted((each for each in changes if each.nbytes < needed), key=lambda change: change.nbytes)


def _changes(plan: Plan, size: tuple[int, ...]) -> Iterator[tuple[str, Plan, tuple[int, ...]]]:
    batch_size, factors = plan.training["batch_size"], plan.network.total_downsample_factor
    if batch_size > 1:
        accumulating = replace(plan, training={**plan.training, "batch_size": 1, "accumulates": True})
        yield f"batch_size 1 with gradient_accumulation_steps {batch_size}", accumulating, size
    if not plan.network.use_checkpoint:
        yield "activation checkpointing (use_checkpoint true)", plan.with_network(use_checkpoint=True), size
    for divisor in (2, 4):
        patch = tuple(max(n // divisor // f, 1) * f for n, f in zip(size, factors))
        yield f"patch_size {list(patch)}", plan, patch
    initial = [min(2 * f, LAST_RESORT_INITIAL) for f in plan.network.initial_downsample_factor]
    if max(initial) > max(plan.network.initial_downsample_factor):
        larger = plan.with_network(initial_downsample_factor=initial)
        yield f"initial_downsample_factor {initial}", larger, padded_size(size, larger.network.total_downsample_factor)
