"""Which factors suit a volume and a GPU: powers of two, divided among the axes so that the latent is nearly isotropic."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bundle.config import ROOT
from scripts.bundle.files import write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.layers.factors import padded_size, per_axis
from scripts.planning.costs import Estimate
from scripts.planning.estimates import Change, estimate_plan, what_would_fit
from scripts.planning.plans import TRAIN, Plan, positive, read_plan, voxels, whole

__all__ = ["FACTOR_KEYS", "Recommendation", "leanest", "recommend_downsample_factors", "write_overlay"]

MAX_FACTOR = 64
INITIAL_FACTORS = {1: 0.5, 2: 0.0, 4: 0.25, 8: 1.0}  # and the penalty of each in the ranking, octaves
STEP_OF_4 = 0.1  # penalty of a step of 4 between levels, octaves
MAX_INITIAL = 4  # unless nothing else fits
MAX_LATENT_CHANNELS = 256
FACTOR_KEYS = ("initial_downsample_factor", "downsample_factors", "latent_channels")


@dataclass(frozen=True)
class Candidate:
    """
    Factors for a volume.

    Args:
        initial_downsample_factor: one factor per axis.
        downsample_factors: one factor per axis for each step between levels.
        total_downsample_factor: total factor of each axis.
        padded_size: the size to train at, which the total factor divides; the volume's own if that already does.
        latent_spacing: edges of a latent voxel, in mm where the spacing is known, otherwise in voxels.
        score: distance from the request in octaves; less is better.
        reason: reason for its rank.
    """

    initial_downsample_factor: tuple[int, ...]
    downsample_factors: tuple[tuple[int, ...], ...]
    total_downsample_factor: tuple[int, ...]
    padded_size: tuple[int, ...]
    latent_spacing: tuple[float, ...]
    score: float
    reason: str


@dataclass(frozen=True)
class Recommendation(Candidate):
    """
    A candidate that suits a request.

    Args:
        estimate: what it needs.
        overlay: its config keys, as an overlay of ``train.json``.
    """

    estimate: Estimate
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
        spatial_size: size of the volumes, voxels; one number for a cube. The plan is to train on whole volumes.
        target_latent_size: wanted size of the latent along its longest axis.
        memory_gb: limit in GiB for training and for reconstruction, margin included; None for no limit.
        spacing: mm per voxel along each axis; None is isotropic.
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
    ranked = _candidates(size, mm, len(plan.network.downsample_factors), target_latent_size)
    usual = [candidate for candidate in ranked if max(candidate.initial_downsample_factor) <= MAX_INITIAL]
    last_resort = [candidate for candidate in ranked if candidate not in usual]
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
    every = _candidates(size, None, len(plan.network.downsample_factors), target=1)
    largest = max(max(candidate.initial_downsample_factor) for candidate in every)
    coarse = [each for each in every if max(each.initial_downsample_factor) >= min(MAX_INITIAL, largest)]
    bar = ProgressBar(coarse, desc="looking for the leanest", leave=False)
    lean = [_recommendation(candidate, plan, None, device, overrides) for candidate in bar]
    least = min(lean, key=lambda item: item.estimate.needed)
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
    totals, image_channels = candidate.total_downsample_factor, plan.network.arguments["in_channels"]
    factors: dict[str, Any] = {
        "initial_downsample_factor": _short(candidate.initial_downsample_factor),
        "downsample_factors": [_short(level) for level in candidate.downsample_factors],
        "latent_channels": _latent_channels(totals, image_channels, voxels_per_latent),
    }
    estimate = estimate_plan(plan.with_network(**factors), candidate.padded_size, device=device)
    overlay = {**overrides, "patch_size": list(candidate.padded_size), **factors}
    return Recommendation(**vars(candidate), estimate=estimate, overlay=overlay)


def _candidates(
    size: tuple[int, ...], spacing: tuple[float, ...] | None, transitions: int, target: float
) -> list[Candidate]:
    """All candidates for a volume with ``spacing`` mm per voxel (None is isotropic), the best first."""
    found: dict[Any, Candidate] = {}
    splits = itertools.product(INITIAL_FACTORS, itertools.combinations_with_replacement((4, 2), transitions))
    for initial, levels in splits:
        if initial * math.prod(levels) <= MAX_FACTOR:
            candidate = _candidate(size, spacing, initial, levels, target)
            found.setdefault((candidate.initial_downsample_factor, candidate.downsample_factors), candidate)
    return sorted(found.values(), key=lambda candidate: candidate.score)


def _candidate(
    size: tuple[int, ...], spacing: tuple[float, ...] | None, initial: int, levels: tuple[int, ...], target: float
) -> Candidate:
    mm = spacing or (1.0,) * len(size)
    total = initial * math.prod(levels)
    split = [_split(_factor_of_axis(total, n, s / min(mm)), levels) for n, s in zip(size, mm)]
    initials = tuple(s[0] for s in split)
    per_level = tuple(zip(*(s[1:] for s in split)))
    totals = tuple(math.prod(s) for s in split)
    padded = padded_size(size, totals)
    latent_spacing = tuple(s * t for s, t in zip(mm, totals))
    longest = max(n // t for n, t in zip(padded, totals))
    anisotropy = max(latent_spacing) / min(latent_spacing)
    score = abs(math.log2(longest / target)) + math.log2(anisotropy) + math.log2(math.prod(padded) / math.prod(size))
    score += INITIAL_FACTORS[max(initials)] + STEP_OF_4 * sum(max(level) == 4 for level in per_level)
    reasons = [f"latent of {longest} along its longest axis" + (", as asked" if longest == target else f" ({target} asked)")]
    if spacing is not None:
        reasons.append(f"latent voxels of {'x'.join(f'{edge:.3g}' for edge in latent_spacing)} mm")
    if padded != size:
        reasons.append(f"pad to {'x'.join(str(n) for n in padded)}")
    if max(initials) == 1:
        reasons.append("feature maps at full resolution")
    return Candidate(initials, per_level, totals, padded, latent_spacing, score, "; ".join(reasons))


def _factor_of_axis(total: int, size: int, relative_spacing: float) -> int:
    """The part of the total factor for an axis whose voxels are ``relative_spacing`` times as long as the shortest."""
    octaves = math.log2(total) - math.log2(relative_spacing)
    return 2 ** max(0, min(round(octaves), int(math.log2(max(size // 2, 1)))))


def _split(total: int, levels: Sequence[int]) -> tuple[int, ...]:
    """
    ``total`` as an initial factor and one per level, of at most ``levels``. The deepest level gets its factor first, so that
    the first levels leave an axis with thick slices as it is.
    """
    rest, factors = total, []
    for level in reversed(levels):
        factors.append(min(level, rest))
        rest //= factors[-1]
    return (rest, *reversed(factors))
