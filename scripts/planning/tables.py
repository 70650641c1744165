"""What the planner prints: estimates, recommendations and checks as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.bundle.machine import GIB, MIB
from scripts.bundle.text_table import table
from scripts.layers.factors import by
from scripts.planning.estimates import Estimate
from scripts.planning.recommendations import Recommendation
from scripts.planning.savings import Change
from scripts.planning.self_test import CheckResult

__all__ = ["checks_table", "estimate_table", "memory", "one_pass_verdict", "recommendations_table", "verdict"]


def memory(nbytes: int | None) -> str:
    """In GiB or MiB."""
    if nbytes is None:
        return "-"
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.1 * GIB else f"{nbytes / MIB:.1f} MiB"


def estimate_table(estimate: Estimate) -> str:
    """The whole estimate."""
    latent = f"{estimate.latent_shape[0]} channels x {by(estimate.latent_shape[1:])}"
    facts = (
        f"total factor {by(estimate.downsample_factor)}, latent {latent}, {estimate.voxels_per_latent:.3g} voxels per value"
    )
    parts = [facts]
    training = estimate.training
    if training is not None:
        rows = [
            ("parameters", memory(training.parameters)),
            ("gradients", memory(training.gradients)),
            ("optimizer state", memory(training.optimizer_state)),
            ("saved activations", memory(training.saved_activations)),
            *((f"  {level.part} {by(level.spatial_shape)}".rstrip(), memory(level.saved)) for level in training.levels),
            (f"peak (in the {training.peak_phase} pass)", memory(training.peak)),
            ("with margin", memory(estimate.training_bytes)),
            ("operations", f"{training.flops / 1e12:.3g} TFLOP"),
        ]
        parts.append(
            table([f"training step, {by(estimate.spatial_size)}, batch {estimate.batch_size}", estimate.device], rows)
        )
    inference = estimate.inference
    rows = [
        ("parameters", memory(inference.parameters)),
        ("peak", memory(inference.peak)),
        ("with margin", memory(estimate.inference_bytes)),
        ("operations", f"{inference.flops / 1e12:.3g} TFLOP"),
    ]
    parts.append(table([f"reconstruction of {by(estimate.volume_size)}", estimate.device], rows))
    return "\n\n".join(parts)


def verdict(estimate: Estimate, memory_gb: float, changes: Sequence[Change]) -> str:
    """Whether an estimate fits into a budget, and which changes would make it fit."""
    parts = (("training", estimate.training_bytes), ("reconstruction", estimate.inference_bytes))
    lines = [_fit(what, needed, memory_gb) for what, needed in parts if needed]
    if changes:
        lines.append(
            "what would fit:" if changes[0].nbytes <= memory_gb * GIB else "no single change is enough; what helps:"
        )
        lines += [f"  {change.what}: {memory(change.nbytes)}" for change in changes]
    elif not estimate.fits(memory_gb):
        lines.append("no change of batch, patch, checkpointing or initial factor makes it smaller")
    return "\n".join(lines)


def one_pass_verdict(estimate: Estimate, memory_gb: float) -> str:
    """Whether a volume fits into a budget in one pass, for networks that run in slabs where it does not."""
    in_one_pass = _fit("reconstruction in one pass", estimate.inference_bytes, memory_gb)
    return in_one_pass if estimate.fits(memory_gb) else f"{in_one_pass}; inference with this memory_gb runs in slabs"


def _fit(what: str, needed: int, memory_gb: float) -> str:
    fits = "fits" if needed <= memory_gb * GIB else "does not fit"
    return f"{what} {fits} into {memory_gb:g} GiB: it needs {memory(needed)}, margin included"


def recommendations_table(recommendations: Sequence[Recommendation], generators: Sequence[int]) -> str:
    """Recommendations in their order, each with the bytes that training a generator on its latents needs."""
    header = ["rank", "initial", "per level", "latent", "voxels/value", "training", "inference", "TFLOP/step"]
    header += ["generator", "why"]
    rows = []
    for rank, (item, generator) in enumerate(zip(recommendations, generators), start=1):
        estimate = item.estimate
        assert estimate.training is not None  # recommendations are for training
        rows.append(
            [
                str(rank),
                by(item.initial_downsample_factor),
                ", ".join(by(factor) for factor in item.downsample_factors),
                f"{estimate.latent_shape[0]} x {by(estimate.latent_shape[1:])}",
                f"{estimate.voxels_per_latent:.3g}",
                memory(estimate.training_bytes),
                memory(estimate.inference_bytes),
                f"{estimate.training.flops / 1e12:.3g}",
                memory(generator),
                item.reason,
            ]
        )
    return table(header, rows)


def checks_table(results: Sequence[CheckResult]) -> str:
    """Results of the self-test."""
    header = ["configuration", "factor", "latent", "parameters", "saved, estimated", "counted", "peak, estimated", "counted"]
    return table(
        [*header, "verdict"],
        (
            [
                result.name,
                by(result.downsample_factor),
                by(result.latent_shape),
                f"{result.parameters / 1e6:.2f} M",
                memory(result.saved_estimated),
                memory(result.saved_counted),
                memory(result.peak_estimated),
                memory(result.peak_counted),
                "good" if result.error is None else result.error,
            ]
            for result in results
        ),
    )
