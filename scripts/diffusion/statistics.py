"""Statistics of the latents that a generator is trained on: the autoencoder that made them, how their channels are
normalised, conditions, sizes, spacings and intensities.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from scripts.bundle.json_files import (
    Must,
    NetworkArguments,
    PositiveFloat,
    PositiveInt,
    Sha256,
    Share,
    checked,
    total_downsample_factor,
)
from scripts.data.spatial_kinds import SpatialKind
from scripts.diffusion.conditions import Conditions
from scripts.diffusion.flow import per_item

NORMALISATION = ("latent_gamma", "channel_mean", "channel_deviation", "channel_amplitude")
MAX_SIZE = 2**15 - 1  # voxels along an axis, NIfTI's largest
Size = Annotated[int, Must(f"an integer from 1 to {MAX_SIZE}", lambda n: 0 < n <= MAX_SIZE)]
DataType = Annotated[str, Must("a data type such as <i2", lambda name: name[0] in "<>|" and name[1:2] in "iuf")]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentAutoencoder:
    """Arguments and hash of the weights of the autoencoder that made the latents."""

    network: NetworkArguments
    sha256: Sha256


@dataclass(frozen=True)
class Geometry:
    """A size (voxels) and a spacing (mm), and how many training volumes have both."""

    size: list[Size]
    spacing: list[PositiveFloat]
    count: PositiveInt


@dataclass
class LatentStatistics:
    """
    Statistics of the latents of the training volumes.

    A generator works with normalised latents: each channel minus its mean, divided by its deviation and times an amplitude,
    its deviation in units of the image (see :py:class:`scripts.layers.LinearShortcut`) to the power of ``latent_gamma``:
    with 0 all channels are equally strong, with 1 as strong as in the image. A common factor makes the mean square 1, as
    that of the noise.

    Args:
        autoencoder: autoencoder that made the latents.
        volumes: number of training volumes.
        latent_gamma: 0 to 1, see above.
        channel_mean: mean of each channel.
        channel_deviation: standard deviation of each channel.
        channel_amplitude: amplitude of each channel, see above.
        conditions: conditions and what was seen of them.
        geometries: sizes and spacings, the most frequent first.
        intensity_low: lower end of the median intensity window, of each image channel.
        intensity_high: its upper end.
        data_type: type of the volumes' voxels, float32 where it differs.
        scl_slope: their scale.
        scl_inter: their offset.
        training_mean: mean of each channel over the training latents, where ``channel_mean`` is that of the latents that the
            pretrained weights were trained on.
        spatial: spatial conditions by key.
    """

    autoencoder: LatentAutoencoder
    volumes: PositiveInt
    latent_gamma: Share
    channel_mean: list[float]
    channel_deviation: list[PositiveFloat]
    channel_amplitude: list[PositiveFloat]
    conditions: Conditions
    geometries: Annotated[list[Geometry], Must("sizes and spacings", len)]
    intensity_low: list[float]
    intensity_high: list[float]
    data_type: DataType = "<f4"
    scl_slope: float = 1.0
    scl_inter: float = 0.0
    training_mean: list[float] | None = None
    spatial: dict[str, SpatialKind] = field(default_factory=dict)

    @property
    def factors(self) -> tuple[int, ...]:
        """Total factor of the autoencoder along each axis."""
        return total_downsample_factor(self.autoencoder.network)

    @property
    def latent_channels(self) -> int:
        return len(self.channel_mean)

    @property
    def spatial_channels(self) -> int:
        """Number of channels of :py:meth:`spatial_input`."""
        return len(self.spatial_entries)

    @property
    def amplitude(self) -> Tensor:
        return torch.tensor(self.channel_amplitude)

    @property
    def own_mean(self) -> list[float]:
        """Mean of each channel over the training latents."""
        return self.training_mean or self.channel_mean

    def spatial_kinds(self, spatial_keys: Sequence[str]) -> dict[str, SpatialKind]:
        """Spatial conditions by name; a ValueError for one that the generator does not have."""
        for key in set(spatial_keys) - self.spatial.keys():
            known = ", ".join(self.spatial) or "none"
            raise ValueError(f"`spatial_keys` names {key!r}; this generator has the spatial conditions {known}.")
        return {key: self.spatial[key] for key in spatial_keys}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints: a run that is resumed keeps the statistics that it began with."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the statistics of a checkpoint, with a warning where they are of other latents."""
        here = self.volumes, self.own_mean
        vars(self).update(vars(checked(dict(state), LatentStatistics)))
        if here != (self.volumes, self.own_mean):
            logger.warning("the training latents are not those that the run began with; its statistics stay those of then")

    @staticmethod
    def must_match(state: Mapping[str, Any]) -> dict[str, Any]:
        """What cannot change when a run is resumed."""
        found = {
            "SHA-256 of the autoencoder's weights": state["autoencoder"]["sha256"][:12],
            "condition_keys": list(state["conditions"]["keys"]),
            "spatial_keys": list(state["spatial"]),
        }
        # a fine-tuned generator has the `latent_gamma` of the weights that it started from
        return found if state["training_mean"] else {**found, "latent_gamma": state["latent_gamma"]}

    def inherit_normalisation(self, before: LatentStatistics) -> None:
        """Normalise latents, and standardise conditions, as a generator that is trained further does."""
        self.training_mean = self.own_mean
        for name in NORMALISATION:
            setattr(self, name, getattr(before, name))
        self.conditions = self.conditions.standardised_as(before.conditions)

    def seen(self, name: str) -> list[tuple[float, float]]:
        """Lowest and highest ``size`` (voxels) or ``spacing`` (mm) of the training volumes along each axis."""
        return [(min(along), max(along)) for along in zip(*(getattr(each, name) for each in self.geometries))]

    def normalised(self, z: Tensor) -> Tensor:
        """Latents as the autoencoder makes them, ``BxCxHxWxD``, to what the generator works with."""
        mean, scale = self._mean_and_scale(z)
        return (z - mean) * scale

    def denormalised(self, z: Tensor) -> Tensor:
        """The reverse of :py:meth:`normalised`."""
        mean, scale = self._mean_and_scale(z)
        return z / scale + mean

    def stacked(self, latents: Mapping[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """
        The spatial conditions of one volume.

        Args:
            latents: those that it has, each ``(planes * C)xHxWxD``.
            size: size of its latent, ``HxWxD``.

        Returns:
            the latents of all conditions, one after the other, zeros for those that it does not have,
            ``(planes * C)xHxWxD``; and for each condition 1 if it has it, and otherwise 0.
        """
        stacked = [torch.zeros(0, *size)]
        for key, kind in self.spatial.items():
            stacked.append(latents[key] if key in latents else torch.zeros(kind.num_planes * self.latent_channels, *size))
        return torch.cat(stacked), torch.tensor([float(key in latents) for key in self.spatial])

    def spatial_input(self, latents: Tensor, given: Tensor) -> Tensor:
        """
        What a network sees of spatial conditions: their latents, normalised as those of the images are, and for each
        condition one channel that is 1 where it is given. What is not given is zeros.

        Args:
            latents: ``Bx(planes * C)xHxWxD``, as :py:meth:`stacked` returns them.
            given: ``BxK``.
        """
        of_key = [per_item(known, latents) for known in given.unbind(1)]
        of_plane = [known for known, kind in zip(of_key, self.spatial.values()) for _ in range(kind.num_planes)]
        planes = [self.normalised(z) * known for z, known in zip(latents.split(self.latent_channels, 1), of_plane)]
        return torch.cat([*planes, *(known.expand(-1, -1, *latents.shape[2:]) for known in of_key)], 1)

    @property
    def spatial_entries(self) -> list[tuple[Any, ...]]:
        """What each channel of :py:meth:`spatial_input` says: a key, a plane of it and a channel; or a key."""
        planes = [(key, plane) for key, kind in self.spatial.items() for plane in kind.names]
        channels = [(*plane, channel) for plane in planes for channel in range(self.latent_channels)]
        return [*channels, *((key,) for key in self.spatial)]

    def _mean_and_scale(self, z: Tensor) -> list[Tensor]:
        scale = np.divide(self.channel_amplitude, self.channel_deviation).tolist()
        shape = (1, -1, *[1] * (z.dim() - 2))
        return [torch.tensor(values, device=z.device).reshape(shape) for values in (self.channel_mean, scale)]

    def summary(self) -> str:
        """In words, for the log."""
        conditions = ", ".join([*self.conditions.summary(), *self.spatial, "size", "spacing"])
        return (
            f"{self.volumes} training latents of {self.latent_channels} channels, `latent_gamma` {self.latent_gamma:g}; "
            f"conditions: {conditions}"
        )


def ranges(seen: Sequence[tuple[float, float]]) -> str:
    """The lowest and the highest value along each axis as text, such as ``64 to 96 x 80 x 64``."""
    return " x ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in seen)
