"""The model card of a generator, in the template of the Model Zoo, of what training and evaluation recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.bundle.text_table import summary_table
from scripts.diffusion.conditions import ClassCondition
from scripts.diffusion.generator import Generator
from scripts.diffusion.statistics import ranges

__all__ = ["write_card"]

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
PREDICTS = {
    "gain": "mean, gain and residual of each value of the clean latent",
    "x": "the clean latent",
    "v": "the velocity",
}


def write_card(
    generator: Generator,
    metrics: Mapping[str, Any] | None,
    data_source: str,
    license: str,
) -> str:
    """
    Fill the card.

    Args:
        generator: that it is of.
        metrics: what is shared of an evaluation, or None.
        data_source: where the training volumes are from; empty if that is not stated.
        license: of the weights; ditto.

    Returns:
        Markdown, without names of files of the training.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    statistics = generator.statistics
    return environment.get_template(TEMPLATE.name).render(
        arguments=generator.network.arguments,
        close=_close(metrics),
        condition_dropout=generator.condition_dropout,
        conditions={key: _values(seen) for key, seen in statistics.conditions.keys.items()},
        data_source=data_source,
        example={key: _example(seen) for key, seen in statistics.conditions.keys.items()},
        factors=statistics.factors,
        timestep_shift=generator.flow.timestep_shift,
        guided=_guided(metrics),
        known=statistics,
        license=license,
        metrics=metrics,
        parameters=sum(each.numel() for each in generator.network.parameters()),
        predicts=PREDICTS[generator.network.arguments["prediction"]],
        sampling=_sampling(metrics),
        scores=summary_table(metrics["sets"]) if metrics else "",
        sha256=generator.sha256,
        sizes=ranges(statistics.seen("size")),
        spacings=ranges(statistics.seen("spacing")),
        trained=generator.trained,
        windows=list(zip(statistics.intensity_low, statistics.intensity_high)),
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


def _sampling(metrics: Mapping[str, Any] | None) -> str:
    """Options of the command line with which the evaluation has sampled."""
    if metrics is None:
        return ""
    settings = metrics["settings"]
    options = {name: settings[name] for name in ("num_inference_steps", "solver", "guidance_scale")}
    if _guided(metrics):
        options["guidance_interval"] = f'"{settings["guidance_interval"]}"'
    if settings["guide_sha256"] is not None:
        options["guide"] = "GUIDE"
    return "".join(f" --{name} {value}" for name, value in options.items())


def _guided(metrics: Mapping[str, Any] | None) -> str:
    """Between which times the samples were guided, where that is not at all of them."""
    low, high = metrics["settings"]["guidance_interval"] if metrics else (0, 1)
    return "" if (low, high) == (0, 1) else f"{low} to {high}"


def _close(metrics: Mapping[str, Any] | None) -> float | None:
    """Share of the samples that are closer to a training volume than 95 % of the held-out ones, where that is known."""
    return metrics["sets"]["samples"].get("close") if metrics else None
