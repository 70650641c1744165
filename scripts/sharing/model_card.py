"""Model cards in the template of the Model Zoo, of what training and evaluation recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.bundle.json_files import Count, Must, Sha256, Share
from scripts.bundle.network_arguments import NetworkArguments
from scripts.bundle.text_table import summary_table, table
from scripts.diffusion.conditions import ClassCondition
from scripts.diffusion.generator import GeneratorDescription, Trained
from scripts.diffusion.statistics import ranges

__all__ = ["AutoencoderDescription", "AutoencoderMetrics", "GeneratorMetrics", "write_card"]

PREDICTS = {
    "gain": "mean, gain and residual of each value of the clean latent",
    "x": "the clean latent",
    "v": "the velocity",
}
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
Row = dict[str, int | float | None]


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of an evaluation of samples that are shared."""

    num_samples: int
    seed: int
    val_fraction: Share
    num_inference_steps: int
    solver: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    guide_sha256: Sha256 | None
    amp_dtype: str | None


@dataclass(frozen=True)
class GeneratorMetrics:
    """What is shared of an evaluation of samples; the rest has paths and describes held-out volumes."""

    weights_sha256: Sha256
    training_volumes: Count
    held_out_volumes: Count
    settings: SamplingSettings
    notes: list[str]
    sets: Annotated[dict[str, Row], Must("numbers of `samples`, `held_out` and others", {"samples", "held_out"}.issubset)]


@dataclass(frozen=True)
class AutoencoderMetrics:
    """What is shared of an evaluation of reconstructions: means over the validation volumes."""

    weights_sha256: Sha256
    mean: Row


@dataclass(frozen=True)
class AutoencoderDescription:
    """The JSON file beside the weights of an autoencoder."""

    network: NetworkArguments
    sha256: Sha256
    sha256_before: Sha256 | None = None
    trained: Trained | None = None


def write_card(
    network: torch.nn.Module,
    known: AutoencoderDescription | GeneratorDescription,
    metrics: AutoencoderMetrics | GeneratorMetrics | None,
    data_source: str,
    license: str,
) -> str:
    """
    Fill a card.

    Args:
        network: network with its weights.
        known: description that is stored beside the weights.
        metrics: part of an evaluation that is shared, or None.
        data_source: origin of the training volumes; empty if that is not stated.
        license: licence of the weights; ditto.

    Returns:
        Markdown, without names of files of the training.
    """
    common = {
        "data_source": data_source,
        "known": known,
        "license": license,
        "metrics": metrics,
        "parameters": sum(each.numel() for each in network.parameters()),
    }
    if isinstance(known, AutoencoderDescription):
        means = metrics.mean if isinstance(metrics, AutoencoderMetrics) else {}
        rows = [[name, "-" if value is None else f"{value:.4g}"] for name, value in means.items()]
        return ENVIRONMENT.get_template("autoencoder_card.md.jinja").render(
            **common, factors=network.total_downsample_factor, scores=table(["", "mean"], rows)
        )
    found = metrics if isinstance(metrics, GeneratorMetrics) else None
    latents = known.latents
    return ENVIRONMENT.get_template("generator_card.md.jinja").render(
        **common,
        arguments=known.network,
        close=found.sets["samples"].get("close") if found else None,
        conditions={key: _values(seen) for key, seen in latents.conditions.keys.items()},
        example={key: _example(seen) for key, seen in latents.conditions.keys.items()},
        guided=_guided(found),
        latents=latents,
        predicts=PREDICTS[known.network["prediction"]],
        sampling=_sampling(found),
        scores=summary_table(found.sets) if found else "",
        sizes=ranges(latents.seen("size")),
        spacings=ranges(latents.seen("spacing")),
        windows=list(zip(latents.intensity_low, latents.intensity_high)),
    )


def _values(seen: Any) -> str:
    """The values of a condition that training saw."""
    if isinstance(seen, ClassCondition):
        return ", ".join(f"{name} ({count})" for name, count in seen.classes.items())
    return f"{seen}, mean {seen.mean:.4g}"


def _example(seen: Any) -> str | float:
    """A value that can be asked for: the most frequent class, or the mean."""
    if isinstance(seen, ClassCondition):
        return max(seen.classes, key=lambda name: seen.classes[name])
    return float(f"{seen.mean:.3g}")


def _sampling(metrics: GeneratorMetrics | None) -> str:
    """Options of the command line with which the evaluation has sampled."""
    if metrics is None:
        return ""
    settings = metrics.settings
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("num_inference_steps", "solver", "guidance_scale")}
    if _guided(metrics):
        options["guidance_interval"] = f'"{list(settings.guidance_interval)}"'
    if settings.guide_sha256 is not None:
        options["guide"] = "GUIDE"
    return "".join(f" --{name} {value}" for name, value in options.items())


def _guided(metrics: GeneratorMetrics | None) -> str:
    """Between which times the samples were guided, where that is not at all of them."""
    low, high = metrics.settings.guidance_interval if metrics else (0, 1)
    return "" if (low, high) == (0, 1) else f"{low} to {high}"
