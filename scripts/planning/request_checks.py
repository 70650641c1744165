"""Checks of numbers that a user gives; each raises a ``ValueError`` that names the argument and says what it must be."""

from __future__ import annotations

import math
from typing import Any

from scripts.layers.factors import per_axis

__all__ = ["positive", "voxels", "whole"]


def positive(name: str, value: Any) -> Any:
    """A number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` is {value!r}; it must be a number above 0.")
    return value


def whole(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    if positive(name, value) != int(value):
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number.")
    return int(value)


def voxels(name: str, size: Any, spatial_dims: int) -> tuple[int, ...]:
    """A spatial size, as one number of voxels per axis; one number is a cube."""
    try:
        return per_axis(name, size, spatial_dims)
    except ValueError as error:
        needed = f"{spatial_dims} whole numbers of voxels, each at least 1"
        raise ValueError(f"`{name}` is {size!r}; it needs {needed}.") from error
