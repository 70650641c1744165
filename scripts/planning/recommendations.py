"""Which factors suit a volume and a GPU: powers of two, divided among the axes so that the latent is nearly isotropic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from scripts.bundle.config import CONFIGS
from scripts.bundle.json_files import PositiveFloat, PositiveInt, checked
from scripts.bundle.progress import ProgressBar
from scripts.layers.factors import by, padded_size, per_axis
from scripts.planning.autoencoder_estimates import TRAIN, estimate_changes, estimate_memory, read_plan
from scripts.planning.estimates import Estimate

MAX_FACTOR = 64
INITIAL_FACTORS = {1: 0.5, 2: 0.0, 4: 0.25, 8: 1.0}  # and the penalty of each in the ranking, octaves
STEP_OF_4 = 0.1  # penalty of a step of 4 between levels, octaves
MAX_INITIAL = 4  # unless nothing else fits
MAX_LATENT_CHANNELS = 256
FACTOR_KEYS = ("initial_downsample_factor", "downsample_factors", "latent_channels")


@dataclass
class Recommendation:
    """
    Factors for a volume.

    Args:
        overlay: factors and patch size, with the other keys of the request, as an overlay of ``train.json``.
        block: number of voxels of a latent voxel.
        latent_spacing: edges of a latent voxel, in mm where the spacing is known, otherwise in voxels.
        score: distance from the request in octaves; less is better.
        reason: reason for its rank.
        last_resort: whether it is used only if nothing else fits.
        estimate: what it needs; not set for one that has only been ranked.
    """

    overlay: dict[str, Any]
    block: int
    latent_spacing: tuple[float, ...]
    score: float
    reason: str
    last_resort: bool
    estimate: Estimate = field(init=False)


class NothingFits(ValueError):
    """No factors fit, not even those that need ``least``; ``changes`` are options that would save memory."""

    def __init__(self, least: Recommendation, changes: Mapping[str, int]) -> None:
        self.least, self.changes = least, changes
        super().__init__("nothing fits, not even with " + ", ".join(f"{key} {least.overlay[key]}" for key in FACTOR_KEYS))


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

    Factors are powers of two, the initial one at most 4 (8 if nothing else fits), divided among the axes so that the latent
    is as nearly isotropic in millimetres as possible. They are ranked by their distance from the request in octaves: the
    longest axis of the latent against ``target_latent_size``, its anisotropy, the padding, and small penalties for initial
    factors other than 2 and for steps of 4.

    Args:
        spatial_size: size of the volumes, voxels; one number for a cube. The plan is to train on whole volumes.
        target_latent_size: wanted size of the latent along its longest axis.
        memory_gb: limit in GiB for training and for reconstruction, margin included; None for no limit.
        spacing: mm per voxel along each axis; None is isotropic.
        voxels_per_latent: wanted voxels for each number of the latent; None takes those of the preset with the nearest
            factors.
        count: how many to return at most.
        device: ``"cuda"`` or ``"cpu"``.
        overrides: further config keys, such as ``channels`` or ``batch_size``, which the overlays repeat.

    Returns:
        the best first.

    Raises:
        NothingFits: when nothing fits.
        ValueError: for a request that makes no sense.
    """
    network = read_plan(device=device, **overrides).network
    size = per_axis("spatial_size", spatial_size, network.arguments["spatial_dims"])
    checked(target_latent_size, PositiveInt, "target_latent_size")
    checked(memory_gb, PositiveFloat | None, "memory_gb")
    checked(voxels_per_latent, PositiveFloat | None, "voxels_per_latent")
    checked(count, PositiveInt, "count")
    mm = None if spacing is None else checked(list(ensure_tuple(spacing)), list[PositiveFloat], "spacing")
    if mm and len(mm) != len(size):
        raise ValueError(f"`spacing` is {spacing!r}; it needs one value in mm per axis of {len(size)}.")
    found: list[Recommendation] = []
    too_large: list[Recommendation] = []
    candidates = _candidates(size, mm, len(network.downsample_factors), target_latent_size)
    for candidate in ProgressBar(candidates, desc="candidates", leave=False):
        if len(found) == count or (found and candidate.last_resort):
            break
        channels = _latent_channels(candidate.block, network.arguments["in_channels"], voxels_per_latent)
        candidate.overlay = {**overrides, **candidate.overlay, "latent_channels": channels}
        candidate.estimate = estimate_memory(device=device, **candidate.overlay)
        fits = memory_gb is None or candidate.estimate.fits(memory_gb)
        (found if fits else too_large).append(candidate)
    if not found:
        least = min(too_large, key=lambda item: item.estimate.needed)
        raise NothingFits(least, estimate_changes(least.estimate, device=device, **least.overlay))
    return found


def _latent_channels(block: int, image_channels: int, voxels_per_latent: float | None) -> int:
    """Latent channels where a latent voxel is for a ``block`` of voxels."""
    if voxels_per_latent is not None:
        return max(1, min(block * image_channels, round(block * image_channels / voxels_per_latent)))
    known, channels = min(_known_latents(), key=lambda known: abs(math.log2(block / known[0])))
    return max(1, min(MAX_LATENT_CHANNELS, round(block * channels / known) * image_channels))


def _known_latents() -> list[tuple[int, int]]:
    """Voxels and latent channels of one latent position, in the default config and in the presets."""
    known = []
    for overlay in [[], *([str(path)] for path in sorted((CONFIGS / "presets").glob("*.json")))]:
        config = ConfigParser.load_config_files([TRAIN, *overlay])
        factors = [config["initial_downsample_factor"], *config["downsample_factors"]]
        block = math.prod(math.prod(per_axis("factor", factor, config["spatial_dims"])) for factor in factors)
        known.append((block, config["latent_channels"]))
    return known


def _candidates(size: tuple[int, ...], mm: list[float] | None, transitions: int, target: int) -> list[Recommendation]:
    """All candidates for a volume with voxels of ``mm``, the best first, and those with the largest initial factor last."""
    edges = mm or [1.0] * len(size)
    splits: dict[tuple[tuple[int, ...], ...], None] = {}  # without those that small volumes have twice
    for initial, levels in itertools.product(INITIAL_FACTORS, itertools.combinations_with_replacement((4, 2), transitions)):
        if (total := initial * math.prod(levels)) <= MAX_FACTOR:
            along = (_factor_of_axis(total, n, edge / min(edges)) for n, edge in zip(size, edges))
            splits[tuple(_split(factor, levels) for factor in along)] = None
    found = [_candidate(size, mm, split, target) for split in splits]
    return sorted(found, key=lambda candidate: (candidate.last_resort, candidate.score))


def _candidate(
    size: tuple[int, ...], mm: list[float] | None, split: tuple[tuple[int, ...], ...], target: int
) -> Recommendation:
    """That with these factors along each axis, the initial one first."""
    initial, *per_level = zip(*split)
    totals = [math.prod(factors) for factors in split]
    padded = padded_size(size, totals)
    latent_spacing = tuple(edge * factor for edge, factor in zip(mm or [1.0] * len(size), totals))
    longest = max(n // factor for n, factor in zip(padded, totals))
    score = abs(math.log2(longest / target)) + math.log2(max(latent_spacing) / min(latent_spacing))
    score += math.log2(math.prod(padded) / math.prod(size))
    score += INITIAL_FACTORS[max(initial)] + STEP_OF_4 * sum(max(level) == 4 for level in per_level)
    reason = f"latent of {longest} along its longest axis" + (", as asked" if longest == target else f" ({target} asked)")
    if mm:
        reason += f"; latent voxels of {by(latent_spacing)} mm"
    if padded != size:
        reason += f"; pad to {by(padded)}"
    overlay = {
        "patch_size": list(padded),
        "initial_downsample_factor": _short(initial),
        "downsample_factors": [_short(level) for level in per_level],
    }
    return Recommendation(overlay, math.prod(totals), latent_spacing, score, reason, max(initial) > MAX_INITIAL)


def _short(factor: tuple[int, ...]) -> int | list[int]:
    return factor[0] if len(set(factor)) == 1 else list(factor)


def _factor_of_axis(total: int, size: int, relative_spacing: float) -> int:
    """The part of the total factor for an axis whose voxels are ``relative_spacing`` times as long as the shortest."""
    octaves = math.log2(total) - math.log2(relative_spacing)
    return 2 ** max(0, min(round(octaves), int(math.log2(max(size // 2, 1)))))


def _split(total: int, levels: Sequence[int]) -> tuple[int, ...]:
    """``total`` as an initial factor and one per level, of at most ``levels``. The deepest level gets its factor first, so
    that the first levels leave an axis with thick slices as it is."""
    rest, factors = total, []
    for level in reversed(levels):
        factors.append(min(level, rest))
        rest //= factors[-1]
    return (rest, *reversed(factors))
