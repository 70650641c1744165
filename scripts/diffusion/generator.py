"""A trained generator, and the JSON file beside its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from scripts.bundle.json_files import Count, Must, PositiveFloat, PositiveInt, Sha256, Share
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.statistics import LatentStatistics

__all__ = ["Generator", "GeneratorDescription", "describe"]

MAX_CHANNELS, MAX_LEVELS = 2**16, 16
Width = Annotated[int, Must(f"an integer from 1 to {MAX_CHANNELS}", lambda n: 0 < n <= MAX_CHANNELS)]
Widths = Annotated[list[Width], Must("a list of integers", lambda widths: 0 < len(widths) <= MAX_LEVELS)]


@dataclass(frozen=True)
class DenoiserArguments:
    """Arguments of a :py:class:`scripts.diffusion.Denoiser`."""

    spatial_dims: Literal[2, 3]
    latent_channels: Width
    condition_size: Width
    channels: Widths
    attention_levels: list[bool]
    num_res_blocks: Widths
    norm_num_groups: Width
    num_head_channels: Width
    prediction: str
    spatial_channels: Count = 0


@dataclass(frozen=True)
class Trained:
    """How long weights were trained, and their validation loss."""

    iteration: PositiveInt
    epoch: PositiveInt
    best_metric: float


@dataclass(frozen=True)
class GeneratorDescription:
    """The JSON file beside a generator's weights."""

    network: DenoiserArguments
    latents: LatentStatistics
    timestep_shift: PositiveFloat | None
    condition_dropout: Share
    sha256: Sha256
    sha256_before: Sha256 | None = None
    trained: Trained | None = None

    def __post_init__(self) -> None:
        network, latents = self.network, self.latents
        per_channel = (latents.channel_mean, latents.channel_deviation, latents.channel_amplitude, latents.own_mean)
        agree = (
            all(len(values) == network.latent_channels for values in per_channel)
            and len(latents.conditions) == network.condition_size
            and all(len(each.size) == len(each.spacing) == network.spatial_dims for each in latents.geometries)
            and len(latents.conditions.geometry) == 2 * network.spatial_dims
            and len(latents.factors) == network.spatial_dims
            and latents.spatial_channels == network.spatial_channels
        )
        if not agree:
            raise ValueError("`network` and `latents` contradict each other in channels, conditions or axes.")


@dataclass(frozen=True)
class Generator:
    """
    Args:
        network: denoiser with its weights.
        statistics: statistics of its training latents.
        flow: flow that it has learned.
        condition_dropout: share of the steps without conditions.
        sha256: hash of its weights.
        trained: how long it was trained, if that is known.
    """

    network: Denoiser
    statistics: LatentStatistics
    flow: RectifiedFlow
    condition_dropout: float
    sha256: str
    trained: Trained | None = None


def describe(statistics: LatentStatistics, flow: RectifiedFlow, condition_dropout: float) -> dict[str, Any]:
    """What the JSON file beside a generator's weights says besides the arguments of its network."""
    return {"latents": asdict(statistics), **flow.state_dict(), "condition_dropout": condition_dropout}
