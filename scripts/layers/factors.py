"""Downsample factors: their checks, the sizes that they divide, and how both are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any


def per_axis(name: str, factor: Any, spatial_dims: int) -> tuple[int, ...]:
    """Return ``factor`` as one positive integer per spatial axis, or raise a ``ValueError`` that names ``name``."""
    values = tuple(factor) if isinstance(factor, Sequence) and not isinstance(factor, str) else (factor,) * spatial_dims
    if len(values) != spatial_dims:
        raise ValueError(
            f"`{name}` has {len(values)} values ({factor!r}); it needs one integer, or one per axis of {spatial_dims}."
        )
    if any(isinstance(v, bool) or not isinstance(v, Integral) or v < 1 for v in values):
        raise ValueError(f"`{name}` is {factor!r}; it needs integers of at least 1.")
    return tuple(int(v) for v in values)


def per_transition(
    name: str, factors: Sequence[Any] | None, channels: Sequence[int], spatial_dims: int
) -> list[tuple[int, ...]]:
    """Return one tuple of per-axis factors for each step between two levels of ``channels``."""
    needed = len(channels) - 1
    if factors is None:
        factors = [2] * needed
    if isinstance(factors, str) or not isinstance(factors, Sequence):
        raise ValueError(f"`{name}` is {factors!r}; it needs a sequence of {needed} factors, one between two levels.")
    if len(factors) != needed:
        raise ValueError(
            f"`{name}` has {len(factors)} factors ({list(factors)!r}); the {len(channels)} levels of "
            f"`channels` {list(channels)!r} need {needed}, one between two levels."
        )
    return [per_axis(f"{name}[{i}]", factor, spatial_dims) for i, factor in enumerate(factors)]


def padded_size(spatial_size: Sequence[int], factors: Sequence[int]) -> tuple[int, ...]:
    """The smallest size, not below ``spatial_size``, that ``factors`` divide."""
    return tuple(-(-size // factor) * factor for size, factor in zip(spatial_size, factors))


def by(sizes: Iterable[float], sign: str = "x") -> str:
    """Sizes, factors or spacings of all axes as text, such as ``128x128x64``."""
    return sign.join(str(size) if isinstance(size, int) else f"{size:g}" for size in sizes)
