"""What the planner prints: estimates, recommendations and checks as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.bundle.machine import GIB, MIB
from scripts.bundle.text_table import table
from scripts.layers.factors import by
from scripts.planning.costs import Cost, Estimate
from scripts.planning.estimates import Change
from scripts.planning.recommendations import Recommendation
from scripts.planning.self_test import CheckResult
from scripts.planning.slab_costs import OPERATIONS, least_slab_cost, slab_cost

__all__ = ["checks_table", "estimate_table", "recommendations_table", "slab_table", "verdict"]

IN_SLABS = "; with less it works in slabs, with the same result"


def memory(nbytes: int | None) -> str:
    """In GiB or MiB."""
    if nbytes is None:
        return "-"
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.1 * GIB else f"{nbytes / MIB:.1f} MiB"


def estimate_table(estimate: Estimate) -> str:
    """The whole estimate: a table for each cost."""
    latent = f"{estimate.latent_shape[0]} channels x {by(estimate.latent_shape[1:])}"
    factor, ratio = by(estimate.downsample_factor), f"{estimate.voxels_per_latent:.3g} voxels per value"
    facts = f"total factor {factor}, latent {latent}, {ratio}, {estimate.parameters / 1e6:.3g} million parameters"
    headings = {
        "training": f"training step, {by(estimate.spatial_size)}, batch {estimate.batch_size}",
        "reconstruction": f"reconstruction of {by(estimate.volume_size)}",
        "sampling": "one step of sampling, with guidance",
        "encoding": "encoding a plane of a spatial condition in one pass",
        "decoding": "decoding in one pass",
    }
    tables = [table([headings[name], cost.device], _rows(cost)) for name, cost in estimate.costs.items()]
    return "\n\n".join([facts, *tables])


def _rows(cost: Cost) -> list[tuple[str, str]]:
    trained = [
        ("gradients", memory(cost.gradients)),
        ("optimizer state", memory(cost.optimizer_state)),
        ("saved activations", memory(cost.saved_activations)),
        *((f"  {level.part} {by(level.spatial_shape)}".rstrip(), memory(level.saved)) for level in cost.levels),
    ]
    return [
        ("parameters", memory(cost.parameters)),
        *(trained if cost.gradients else []),
        (f"peak (in the {cost.peak_phase} pass)", memory(cost.peak)),
        ("with margin", memory(cost.needed)),
        ("operations", f"{cost.flops / 1e12:.3g} TFLOP"),
    ]


def verdict(estimate: Estimate, memory_gb: float, changes: Sequence[Change] = ()) -> str:
    """Whether each part of an estimate fits into a budget, and which changes would make it fit."""
    lines = []
    for name, cost in estimate.costs.items():
        fits = cost.needed <= memory_gb * GIB
        says = f"{name} {'fits' if fits else 'does not fit'} into {memory_gb:g} GiB{' in one pass' * cost.in_slabs}: "
        lines.append(f"{says}it needs {memory(cost.needed)}, margin included{'' if fits or not cost.in_slabs else IN_SLABS}")
    if changes:
        enough = changes[0].nbytes <= memory_gb * GIB
        lines.append("what would fit:" if enough else "no single change is enough; what helps:")
        lines += [f"  {change.what}: {memory(change.nbytes)}" for change in changes]
    return "\n".join(lines)


def slab_table(network: Any, spatial_size: Sequence[int], memory_gb: float | None, amp_dtype: Any) -> str:
    """
    The smallest budget for reconstructing and for decoding in slabs on a GPU, and what a given one holds.

    Args:
        network: see :py:func:`scripts.planning.slab_costs.slab_cost`.
        spatial_size: ditto.
        memory_gb: the given budget in GiB; None for none.
        amp_dtype: data type of mixed precision, None for none.
    """
    least = [least_slab_cost(network, spatial_size, operation=operation, amp_dtype=amp_dtype) for operation in OPERATIONS]
    rows = [
        ("smallest memory_gb", *(memory(cost.budget) for cost in least)),
        ("  slabs", *(str(cost.slabs) for cost in least)),
    ]
    if memory_gb is not None:
        given = [slab_cost(network, spatial_size, memory_gb, operation=name, amp_dtype=amp_dtype) for name in OPERATIONS]
        rows += [
            (f"peak with memory_gb {memory_gb:g}", *(memory(cost.peak) for cost in given)),
            ("  slabs", *(str(cost.slabs) for cost in given)),
        ]
    return table([f"in slabs, {by(spatial_size)}", *OPERATIONS], rows)


def recommendations_table(recommendations: Sequence[Recommendation], generators: Sequence[Estimate]) -> str:
    """Recommendations in their order, each with what a generator needs to be trained on its latents."""
    header = ["rank", "initial", "per level", "latent", "voxels/value", "training", "reconstruction", "TFLOP/step"]
    rows = [
        [
            str(rank),
            by(item.initial_downsample_factor),
            ", ".join(by(factor) for factor in item.downsample_factors),
            f"{item.estimate.latent_shape[0]} x {by(item.estimate.latent_shape[1:])}",
            f"{item.estimate.voxels_per_latent:.3g}",
            *(memory(item.estimate.costs[name].needed) for name in ("training", "reconstruction")),
            f"{item.estimate.costs['training'].flops / 1e12:.3g}",
            memory(generator.costs["training"].needed),
            item.reason,
        ]
        for rank, (item, generator) in enumerate(zip(recommendations, generators), start=1)
    ]
    return table([*header, "generator", "why"], rows)


def checks_table(results: Sequence[CheckResult]) -> str:
    """Results of the self-test."""
    header = ["configuration", "factor", "latent", "parameters", "saved, estimated", "counted", "peak, estimated", "counted"]
    rows = [
        [
            result.name,
            by(result.downsample_factor),
            by(result.latent_shape),
            f"{result.parameters / 1e6:.2f} M",
            memory(result.saved_estimated),
            memory(result.saved_counted),
            memory(result.peak_estimated),
            memory(result.peak_counted),
            result.error or "good",
        ]
        for result in results
    ]
    return table([*header, "verdict"], rows)
