"""The arguments of an autoencoder, as files hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from scripts.bundle.json_files import Must, PositiveInt, checked

__all__ = ["NetworkArguments", "total_downsample_factor"]


@dataclass(frozen=True)
class _Network:
    """Those arguments of an AutoencoderKL that are used; the others are only compared with another network's."""

    spatial_dims: Literal[1, 2, 3]
    channels: list[PositiveInt]
    downsample_factors: list[list[PositiveInt]]
    initial_downsample_factor: list[PositiveInt]
    initial_mode: str


NetworkArguments = Annotated[
    dict[str, Any], Must("the arguments of an AutoencoderKL", lambda found: checked(found, _Network, "network"))
]


def total_downsample_factor(network: Mapping[str, Any]) -> tuple[int, ...]:
    """The total factor along each axis of the network with these arguments."""
    return tuple(math.prod(along) for along in zip(network["initial_downsample_factor"], *network["downsample_factors"]))
