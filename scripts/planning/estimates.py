"""What a plan needs in memory and operations, margin included, and what would need less."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.machine import total_memory
from scripts.bundle.precision import autocast_dtype
from scripts.layers.factors import padded_size
from scripts.planning.plans import TRAIN, Plan, read_plan, total_loss
from scripts.planning.request_checks import voxels
from scripts.planning.step_costs import InferenceCost, TrainingCost, inference_cost, training_cost

__all__ = ["GIB", "Change", "Estimate", "estimate_memory", "estimate_plan", "log_estimate", "what_would_fit"]

GIB = 2**30
CONTEXT = {"cuda": 0.6, "cpu": 0.5}  # GiB: CUDA's context and libraries; the process before the first step
FRAGMENTATION = 0.08  # of the peak: what an allocator holds and cannot use
LAST_RESORT_INITIAL = 8
logger = logging.getLogger(__name__)


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
        return 0 if self.training is None else _with_margin(self.training, self.device)

    @property
    def inference_bytes(self) -> int:
        """Memory that reconstruction needs, the same margin included."""
        return _with_margin(self.inference, self.device)

    @property
    def needed_bytes(self) -> int:
        """The larger of the two."""
        return max(self.training_bytes, self.inference_bytes)

    def fits(self, memory_gb: float) -> bool:
        """Whether training and reconstruction both fit into ``memory_gb`` GiB."""
        return self.needed_bytes <= memory_gb * GIB


@dataclass(frozen=True)
class Change:
    """Something to do about a lack of memory: ``what``, and the bytes that training or reconstruction then needs."""

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
        optimizer=plan.optimizer,
        accumulates=plan.accumulates,
        discriminator=plan.discriminator,
        averaged=plan.averaged,
    )


def _with_margin(cost: TrainingCost | InferenceCost, device: str) -> int:
    """
    Peak and margin. The margin is for what PyTorch does not allocate itself (``CONTEXT``), for what its allocator cannot use
    (``FRAGMENTATION``), and on CUDA for one convolution's workspace, which is not in the peak there.
    """
    workspace = cost.convolution if device == "cuda" else 0
    return int(cost.peak * (1 + FRAGMENTATION)) + workspace + int(CONTEXT[device] * GIB)


def what_would_fit(
    plan: Plan, spatial_size: Sequence[int], volume_size: Sequence[int], memory_gb: float, device: str = "cuda"
) -> list[Change]:
    """
    Changes of a plan that needs too much memory, each estimated.

    Args:
        plan: the plan.
        spatial_size: of the training patch, voxels.
        volume_size: of the volume that is reconstructed, voxels.
        memory_gb: the budget, GiB.
        device: ``"cuda"`` or ``"cpu"``.

    Returns:
        the changes that fit, or if none does, those that help, least memory first.
    """
    changes = []
    needed = estimate_plan(plan, spatial_size, volume_size, device).needed_bytes
    for what, changed, patch in _changes(plan, tuple(spatial_size)):
        estimate = estimate_plan(changed, patch, volume_size, device)
        if estimate.needed_bytes < needed:
            changes.append(Change(what, estimate.needed_bytes))
    fitting = [change for change in changes if change.nbytes <= memory_gb * GIB]
    return fitting or sorted(changes, key=lambda change: change.nbytes)


def _changes(plan: Plan, size: tuple[int, ...]) -> Iterator[tuple[str, Plan, tuple[int, ...]]]:
    if plan.patch_size is not None:
        if plan.batch_size > 1:
            yield (
                f"batch_size 1 with gradient_accumulation_steps {plan.batch_size}",
                replace(plan, batch_size=1, accumulates=True),
                size,
            )
        if not plan.network.use_checkpoint:
            yield "activation checkpointing (use_checkpoint true)", plan.with_network(use_checkpoint=True), size
        for divisor in (2, 4):
            factors = plan.network.total_downsample_factor
            patch = tuple(max(n // divisor // f, 1) * f for n, f in zip(size, factors))
            yield f"patch_size {list(patch)}", plan, patch
    initial = [min(2 * f, LAST_RESORT_INITIAL) for f in plan.network.initial_downsample_factor]
    if max(initial) > max(plan.network.initial_downsample_factor):
        larger = plan.with_network(initial_downsample_factor=initial)
        yield f"initial_downsample_factor {initial}", larger, padded_size(size, larger.network.total_downsample_factor)


def log_estimate(
    network: AutoencoderKL,
    patch_size: Sequence[int],
    batch_size: int,
    amp_dtype: str | None,
    accumulation_steps: int,
    loss: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    loss_terms: dict[str, Any] | None = None,
    **further: Any,
) -> None:
    """
    Log in one line what a training step will need, and warn when the device has less.

    Args:
        network: the network.
        patch_size: spatial size of a training patch, voxels.
        batch_size: patches per step.
        amp_dtype: ``"bfloat16"`` or ``"float16"``, None without mixed precision.
        accumulation_steps: batches per optimizer step.
        loss: of reconstruction and image.
        optimizer: its kind and settings are used, not its state.
        device: where training will run.
        loss_terms: what is added to the loss, see :py:func:`total_loss`.
        further: arguments of :py:func:`scripts.planning.step_costs.training_cost`, such as ``discriminator``.
    """
    device = torch.device(device)
    rules = "cpu" if device.type == "cpu" else "cuda"
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    try:
        cost = training_cost(
            network,
            patch_size,
            batch_size=batch_size,
            amp_dtype=None if amp_dtype is None else autocast_dtype(amp_dtype),
            device=rules,
            loss=total_loss(loss, loss_terms),
            optimizer=partial(type(optimizer), **settings),
            accumulates=accumulation_steps > 1,
            **further,
        )
    except Exception as error:  # whatever private parts of PyTorch raise: a week of training is worth more than its forecast
        logger.warning(f"no estimate of the memory: {type(error).__name__}: {error}")
        return
    needed = _with_margin(cost, rules)
    logger.info(
        f"estimate for one training step: {needed / GIB:.2f} GiB with margin, {cost.peak / GIB:.3g} GiB without, of which "
        f"saved activations {cost.saved_activations / GIB:.3g} GiB; {cost.flops / 1e12:.3g} TFLOP"
    )
    available = total_memory(device)
    if available is not None and needed > available:
        logger.warning(
            f"{device} has {available / GIB:.1f} GiB, and training is estimated to need {needed / GIB:.1f} GiB. Ask "
            f"`python -m scripts estimate --memory_gb {available / GIB:.0f}` with this configuration what would fit."
        )
