"""What the planner prints of a generator."""

from __future__ import annotations

from scripts.bundle.machine import GIB
from scripts.bundle.text_table import table
from scripts.layers.factors import by
from scripts.planning.generator_estimates import GeneratorEstimate
from scripts.planning.tables import memory

__all__ = ["generator_table", "generator_verdict"]


def generator_table(estimate: GeneratorEstimate) -> str:
    """The whole estimate of a generator."""
    latent = f"{estimate.latent_shape[0]} channels x {by(estimate.latent_shape[1:])}"
    network = f"network of {estimate.parameters / 1e6:.3g} million parameters"
    facts = f"volumes of {by(estimate.spatial_size)}, latent {latent}, {network}"
    training = estimate.training
    rows = [
        ("parameters, and their average", memory(training.parameters)),
        ("gradients", memory(training.gradients)),
        ("optimizer state", memory(training.optimizer_state)),
        ("saved activations", memory(training.saved_activations)),
        (f"peak (in the {training.peak_phase} pass)", memory(training.peak)),
        ("with margin", memory(estimate.training_bytes)),
        ("operations", f"{training.flops / 1e12:.3g} TFLOP"),
    ]
    parts = [facts, table([f"training step, batch {estimate.batch_size}", estimate.device], rows)]
    for what, cost, needed in (
        ("one step of sampling, with guidance", estimate.sampling, estimate.sampling_bytes),
        ("decoding in one pass", estimate.decoding, estimate.decoding_bytes),
    ):
        rows = [
            ("peak", memory(cost.peak)),
            ("with margin", memory(needed)),
            ("operations", f"{cost.flops / 1e12:.3g} TFLOP"),
        ]
        parts.append(table([what, estimate.device], rows))
    return "\n\n".join(parts)


def generator_verdict(estimate: GeneratorEstimate, memory_gb: float) -> str:
    """Whether a generator fits into a budget."""
    lines = []
    for what, needed in (("training", estimate.training_bytes), ("sampling", estimate.sampling_bytes)):
        fits = "fits" if needed <= memory_gb * GIB else "does not fit"
        lines.append(f"{what} {fits} into {memory_gb:g} GiB: it needs {memory(needed)}, margin included")
    needed = estimate.decoding_bytes
    one_pass = f"decoding in one pass needs {memory(needed)}, margin included"
    lines.append(one_pass + ("" if needed <= memory_gb * GIB else "; with less it works in slabs, with the same result"))
    return "\n".join(lines)
