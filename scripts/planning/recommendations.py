"""Which factors suit a volume and a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bundle.config import ROOT
from scripts.bundle.files import write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.layers.factors import per_axis
from scripts.planning.config_keys import TRAIN, Plan, read_plan
from scripts.planning.estimates import Estimate, estimate_plan
from scripts.planning.factor_candidates import Candidate, candidates
from scripts.planning.request_checks import positive, voxels, whole
from scripts.planning.savings import Change, what_would_fit

__all__ = ["FACTOR_KEYS", "Recommendation", "leanest", "recommend_downsample_factors", "write_overlay"]

MAX_INITIAL = 4  # unless nothing else fits
MAX_LATENT_CHANNELS = 256
FACTOR_KEYS = ("initial_downsample_factor", "downsample_factors", "latent_channels")


@dataclass(frozen=True)
class Recommendation:
    """
    A configuration that suits a request.

    Args:
        estimate: what it needs.
        initial_downsample_factor: one factor per axis.
        downsample_factors: one factor per axis for each step between levels.
        padded_size: the size to train at, which the total factor divides; the volume's own if that already does.
        latent_spacing: edges of a latent voxel, in mm where the spacing is known, otherwise in voxels.
        score: distance from the request in octaves; less is better.
        reason: for its rank.
        overlay: its config keys, as an overlay of ``train.json``.
    """

    estimate: Estimate
    initial_downsample_factor: tuple[int, ...]
    downsample_factors: tuple[tuple[int, ...], ...]
    padded_size: tuple[int, ...]
    latent_spacing: tuple[float, ...]
    score: float
    reason: str
    overlay: dict[str, Any]


def recommend_downsample_factors(
    spatial_size: int | Sequence[int],
    target_latent_size: int = 32,
    memory_gb: float | None = None,
    *,
    spacing: Sequence[float] | None = None,
    voxels_per_latent: float | None = None,
    count: int = 5,
    device: str = "cuda",
    **overrides: Any,
) -> list[Recommendation]:
    """
    The configurations that suit a volume best.

    Factors are powers of two, with an initial factor of at most 4 (8 if nothing else fits). They are divided among the axes
    so that the latent is as nearly isotropic in millimetres as possible. Candidates are ranked by their distance from the
    request in octaves: the longest axis of the latent against ``target_latent_size``, its anisotropy, the padding, and small
    penalties for initial factors other than 2 and for steps of 4.

    Args:
        spatial_size: of the volumes, voxels; one number for a cube. The plan is to train on whole volumes.
        target_latent_size: wanted size of the latent along its longest axis.
        memory_gb: limit in GiB for training and for reconstruction, margin included; None for no limit.
        spacing: of the volumes, mm per voxel along each axis; None is isotropic.
        voxels_per_latent: wanted voxels for each number of the latent, which determines ``latent_channels``; None takes the
            ratio of the preset with the nearest factors.
        count: how many to return at most.
        device: ``"cuda"`` or ``"cpu"``.
        overrides: further config keys, such as ``channels`` or ``batch_size``, which the overlays repeat.

    Returns:
        the best first; empty when nothing fits.

    Raises:
        ValueError: as :py:func:`estimate_memory`.
    """
    plan = read_plan(device=device, **overrides)
    size = voxels("spatial_size", spatial_size, plan.network.arguments["spatial_dims"])
    wanted = {"target_latent_size": target_latent_size, "memory_gb": memory_gb, "voxels_per_latent": voxels_per_latent}
    for name, value in wanted.items():
        if value is not None:
            positive(name, value)
    count = whole("count", count)
    mm = _spacing(spacing, len(size))
    ranked = candidates(size, mm, len(plan.network.downsample_factors), target_latent_size)
    usual = [candidate for candidate in ranked if max(candidate.initial) <= MAX_INITIAL]
    last_resort = [candidate for candidate in ranked if max(candidate.initial) > MAX_INITIAL]
    found: list[Recommendation] = []
    for candidate in ProgressBar(usual + last_resort, desc="candidates", leave=False):
        if len(found) == count or (found and candidate in last_resort):
            break
        recommendation = _recommendation(candidate, plan, voxels_per_latent, device, overrides)
        if memory_gb is None or recommendation.estimate.fits(memory_gb):
            found.append(recommendation)
    return found


def leanest(
    spatial_size: int | Sequence[int], memory_gb: float, device: str = "cuda", **overrides: Any
) -> tuple[Recommendation, list[Change]]:
    """
    For a budget that is too small for every candidate: of the configurations with an initial factor of 4 or more (or the
    largest, where the volume is too small for 4), the one that needs the least memory, and :py:func:`what_would_fit` for it.

    The arguments are those of :py:func:`recommend_downsample_factors`.
    """
    plan = read_plan(device=device, **overrides)
    size = voxels("spatial_size", spatial_size, plan.network.arguments["spatial_dims"])
    every = candidates(size, None, len(plan.network.downsample_factors), target=1)
    largest = max(max(candidate.initial) for candidate in every)
    coarse = [candidate for candidate in every if max(candidate.initial) >= min(MAX_INITIAL, largest)]
    bar = ProgressBar(coarse, desc="looking for the leanest", leave=False)
    lean = [_recommendation(candidate, plan, None, device, overrides) for candidate in bar]
    least = min(lean, key=lambda item: item.estimate.needed_bytes)
    factors = {key: least.overlay[key] for key in FACTOR_KEYS}
    padded = least.padded_size
    return least, what_would_fit(plan.with_network(**factors), padded, padded, memory_gb, device)


def write_overlay(recommendation: Recommendation, path: str | Path) -> None:
    """Write a recommendation as an overlay of ``train.json``; a file at ``path`` is replaced."""
    content = {"_desc_": recommendation.reason, **recommendation.overlay}
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_atomically(f"{{\n{lines}\n}}\n".encode(), Path(path))


def _spacing(spacing: Any, dims: int) -> tuple[float, ...] | None:
    if spacing is None:
        return None
    values = list(spacing) if isinstance(spacing, (list, tuple)) else [spacing] * dims
    if len(values) != dims:
        raise ValueError(f"`spacing` is {spacing!r}; it needs one value in mm per axis of {dims}.")
    return tuple(float(positive("spacing", value)) for value in values)


def _latent_channels(totals: Sequence[int], image_channels: int, voxels_per_latent: float | None) -> int:
    block = math.prod(totals) * image_channels
    if voxels_per_latent is not None:
        return max(1, min(block, round(block / voxels_per_latent)))
    nearest = min(_known_latents(), key=lambda known: abs(math.log2(math.prod(totals) / known[0])))
    return max(1, min(MAX_LATENT_CHANNELS, round(math.prod(totals) * nearest[1] / nearest[0]) * image_channels))


def _known_latents() -> list[tuple[int, int]]:
    """Voxels and latent channels of one latent position, in the default config and in the presets."""
    default = json.loads(Path(TRAIN).read_text())
    overlays = [json.loads(path.read_text()) for path in sorted((ROOT / "configs" / "presets").glob("*.json"))]
    known = []
    for config in [default, *({**default, **overlay} for overlay in overlays)]:
        factors = [config["initial_downsample_factor"], *config["downsample_factors"]]
        block = math.prod(math.prod(per_axis("factor", factor, config["spatial_dims"])) for factor in factors)
        known.append((block, config["latent_channels"]))
    return known


def _short(factor: tuple[int, ...]) -> int | list[int]:
    return factor[0] if len(set(factor)) == 1 else list(factor)


def _recommendation(
    candidate: Candidate, plan: Plan, voxels_per_latent: float | None, device: str, overrides: dict[str, Any]
) -> Recommendation:
    latent_channels = _latent_channels(candidate.totals, plan.network.arguments["in_channels"], voxels_per_latent)
    factors: dict[str, Any] = {
        "initial_downsample_factor": _short(candidate.initial),
        "downsample_factors": [_short(level) for level in candidate.levels],
        "latent_channels": latent_channels,
    }
    estimate = estimate_plan(plan.with_network(**factors), candidate.padded, device=device)
    return Recommendation(
        estimate=estimate,
        initial_downsample_factor=candidate.initial,
        downsample_factors=candidate.levels,
        padded_size=candidate.padded,
        latent_spacing=candidate.latent_spacing,
        score=candidate.score,
        reason="; ".join(candidate.reasons),
        overlay={**overrides, "patch_size": list(candidate.padded), **factors},
    )
