"""What the planner prints: estimates, recommendations and checks as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monai.utils import ensure_tuple

from scripts.bundle.machine import GIB, MIB
from scripts.layers.factors import by
from scripts.planning.estimates import Cost, Estimate
from scripts.planning.inference_costs import SlabCost, least_slab_cost, slab_cost
from scripts.planning.recommendations import Recommendation
from scripts.planning.self_test import CheckResult

OPERATIONS = ("reconstruct", "decode")  # in slabs


def memory(nbytes: int | None) -> str:
    """In GiB or MiB."""
    if nbytes is None:
        return "-"
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.1 * GIB else f"{nbytes / MIB:.1f} MiB"


def estimate_table(estimate: Estimate) -> str:
    """The whole estimate, with a column for each cost."""
    facts = [
        f"training on {by(estimate.spatial_size)} with batch {estimate.batch_size}, volumes of {by(estimate.volume_size)}",
        f"total factor {by(estimate.downsample_factor)}, {estimate.parameters / 1e6:.3g} million parameters",
        f"latent {estimate.latent_shape[0]} channels x {by(estimate.latent_shape[1:])}",
        f"{estimate.voxels_per_latent:.3g} voxels per value",
    ]
    columns = {name: _column(cost) for name, cost in estimate.costs.items()}
    rows = dict.fromkeys(name for column in columns.values() for name in column)
    cells = [[row, *(column.get(row, "") for column in columns.values())] for row in rows]
    return f"{', '.join(facts)}\n\n{table(['', *columns], cells)}"


def _column(cost: Cost) -> dict[str, str]:
    sizes = {"parameters": cost.parameters}
    if cost.gradients:
        sizes |= {"gradients": cost.gradients, "optimizer state": cost.optimizer_state}
        sizes |= {"saved activations": cost.saved_activations}
        sizes |= {f"  {level}": nbytes for level, nbytes in cost.levels.items()}
    sizes |= {"peak": cost.peak, f"with margin, {cost.device}": cost.needed}
    return {**{name: memory(nbytes) for name, nbytes in sizes.items()}, "operations": f"{cost.flops / 1e12:.3g} TFLOP"}


def verdict(estimate: Estimate, memory_gb: float, changes: Mapping[str, int]) -> str:
    """Whether each part of an estimate fits into a budget, and which options need less."""
    lines = []
    for name, cost in estimate.costs.items():
        fits = cost.needed <= memory_gb * GIB
        says = f"{name} {'fits' if fits else 'does not fit'} into {memory_gb:g} GiB{' in one pass' * cost.in_slabs}"
        less = "" if fits or not cost.in_slabs else "; with less it works in slabs, with the same result"
        lines.append(f"{says}: it needs {memory(cost.needed)}, margin included{less}")
    for options, nbytes in changes.items():
        lines.append(f"  with {options}: {memory(nbytes)}, which {'fits' if nbytes <= memory_gb * GIB else 'does not fit'}")
    return "\n".join(lines)


def slab_table(network: Any, spatial_size: Sequence[int], memory_gb: float | None, amp_dtype: Any) -> str:
    """The smallest budget for reconstructing and for decoding in slabs on a GPU, and what they hold within ``memory_gb``."""
    ways: list[dict[str, Any]] = [{"operation": name, "amp_dtype": amp_dtype} for name in OPERATIONS]
    least = [least_slab_cost(network, spatial_size, **way) for way in ways]
    rows = [["smallest memory_gb", *(memory(cost.budget) for cost in least)], _slabs(least)]
    if memory_gb is not None:
        given = [slab_cost(network, spatial_size, memory_gb, **way) for way in ways]
        rows += [[f"peak with memory_gb {memory_gb:g}", *(memory(cost.peak) for cost in given)], _slabs(given)]
    return table([f"in slabs, {by(spatial_size)}", *OPERATIONS], rows)


def _slabs(costs: Sequence[SlabCost]) -> list[str]:
    return ["  slabs", *(str(cost.slabs) for cost in costs)]


def recommendations_table(pairs: Sequence[tuple[Recommendation, Estimate]]) -> str:
    """Recommendations in their order, each with what a generator needs on its latents."""
    header = ["rank", "initial", "per level", "latent", "voxels/value", "training", "reconstruction", "TFLOP/step"]
    rows = [
        [
            str(rank),
            by(ensure_tuple(item.overlay["initial_downsample_factor"])),
            ", ".join(by(ensure_tuple(factor)) for factor in item.overlay["downsample_factors"]),
            f"{item.estimate.latent_shape[0]} x {by(item.estimate.latent_shape[1:])}",
            f"{item.estimate.voxels_per_latent:.3g}",
            *(memory(item.estimate.costs[name].needed) for name in ("training", "reconstruction")),
            f"{item.estimate.costs['training'].flops / 1e12:.3g}",
            memory(generator.costs["training"].needed),
            item.reason,
        ]
        for rank, (item, generator) in enumerate(pairs, start=1)
    ]
    return table([*header, "generator", "why"], rows)


def checks_table(results: Sequence[CheckResult]) -> str:
    """Results of the self-test."""
    rows = []
    for result in results:
        cells = ["-"] * 7
        if result.estimate is not None:
            found = result.estimate
            cost = found.costs.get("training")
            sizes = (cost.saved_activations, result.saved, cost.peak, result.peak) if cost else (None,) * 4
            cells = [by(found.downsample_factor), by(found.latent_shape), f"{found.parameters / 1e6:.2f} M"]
            cells += map(memory, sizes)
        rows.append([result.name, *cells, result.error or "good"])
    header = ["configuration", "factor", "latent", "parameters", "saved, estimated", "counted", "peak, estimated", "counted"]
    return table([*header, "verdict"], rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with columns of equal width."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)
