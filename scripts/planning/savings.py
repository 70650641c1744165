"""Changes that would save memory, for a plan that needs too much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from scripts.bundle.machine import GIB
from scripts.layers.factors import padded_size
from scripts.planning.config_keys import Plan
from scripts.planning.estimates import estimate_plan

__all__ = ["Change", "what_would_fit"]

LAST_RESORT_INITIAL = 8


@dataclass(frozen=True)
class Change:
    """A change that saves memory: ``what`` to change, and the bytes that training or reconstruction then needs."""

    what: str
    nbytes: int


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
        the changes that fit; if none does, those that save memory, the smallest need first.
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
