"""Candidate factors for a volume: powers of two, divided among the axes so that the latent is nearly isotropic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.layers.factors import padded_size

__all__ = ["Candidate", "candidates"]

MAX_FACTOR = 64
INITIAL_FACTORS = {1: 0.5, 2: 0.0, 4: 0.25, 8: 1.0}  # and the penalty of each in the ranking, octaves
STEP_OF_4 = 0.1  # penalty of a step of 4 between levels, octaves


@dataclass(frozen=True)
class Candidate:
    """
    Factors for one volume.

    Args:
        initial: the initial factor, one per axis.
        levels: factors of the steps between levels, one per axis.
        totals: total factor of each axis.
        padded: the volume's size, padded so that the totals divide it.
        latent_spacing: edges of a latent voxel in mm, or in voxels where no spacing is known.
        score: distance from the request in octaves; less is better.
        reasons: for and against it.
    """

    initial: tuple[int, ...]
    levels: tuple[tuple[int, ...], ...]
    totals: tuple[int, ...]
    padded: tuple[int, ...]
    latent_spacing: tuple[float, ...]
    score: float
    reasons: tuple[str, ...]


def candidates(size: tuple[int, ...], spacing: tuple[float, ...] | None, transitions: int, target: float) -> list[Candidate]:
    """
    All candidates for a volume, the best first.

    Args:
        size: of the volume, voxels.
        spacing: mm per voxel along each axis; None is isotropic.
        transitions: number of steps between levels.
        target: wanted size of the latent along its longest axis.
    """
    found: dict[Any, Candidate] = {}
    splits = itertools.product(INITIAL_FACTORS, itertools.combinations_with_replacement((4, 2), transitions))
    for initial, levels in splits:
        if initial * math.prod(levels) <= MAX_FACTOR:
            candidate = _candidate(size, spacing, initial, levels, target)
            found.setdefault((candidate.initial, candidate.levels), candidate)
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
    return Candidate(initials, per_level, totals, padded, latent_spacing, score, tuple(reasons))


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
