"""What a generator knows of the latents that it was trained on, kept with its weights: which autoencoder made them, how its
channels are normalised, conditions, sizes, spacings and intensities.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from scripts.diffusion.conditions import Conditions

__all__ = ["LatentSpace", "ranges", "spacing_of"]

NORMALISATION = ("latent_gamma", "channel_mean", "channel_deviation", "channel_amplitude")
LEAST_SHARE = 1e-6  # of the strongest channel's deviation; a weaker channel is as good as constant
PLAIN = {"data_type": "<f4", "scl_slope": 1.0, "scl_inter": 0.0}
logger = logging.getLogger(__name__)


class LatentSpace:
    """
    The latents of the training volumes, in numbers.

    A generator works with normalised latents: each channel minus its mean, divided by its deviation and times an amplitude.
    The amplitudes are the channels' deviations in units of the image (see :py:class:`scripts.layers.LinearShortcut`) to the
    power of ``latent_gamma``: with 0 all channels are equally strong, with 1 each is as strong as it is in the image, where
    the leading ones carry nearly all, and between is between. A common factor makes the mean square 1, so that the noise of
    the flow is as strong as the latents.

    Args:
        description: plain JSON, as :py:meth:`learn` makes it.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self._describe(description)

    @classmethod
    def learn(
        cls, descriptions: Sequence[Mapping[str, Any]], latent_gamma: float, condition_keys: Sequence[str] = ()
    ) -> LatentSpace:
        """
        What the JSON files of latents say of them.

        Args:
            descriptions: of the training latents, all of one autoencoder.
            latent_gamma: 0 to 1, see above.
            condition_keys: names of the conditions to use.

        Raises:
            ValueError: for a ``latent_gamma`` outside, or conditions that the volumes do not have.
        """
        if isinstance(latent_gamma, bool) or not isinstance(latent_gamma, (int, float)) or not 0 <= latent_gamma <= 1:
            raise ValueError(f"`latent_gamma` is {latent_gamma!r}; it must be a number from 0 to 1.")
        sizes = [each["preprocessed_shape"] for each in descriptions]
        spacings = [spacing_of(each) for each in descriptions]
        conditions = Conditions.learn(condition_keys, [each["conditions"] for each in descriptions], sizes, spacings)
        return cls(
            {
                "autoencoder": {"network": descriptions[0]["network"], "sha256": descriptions[0]["weights_sha256"]},
                "volumes": len(descriptions),
                "latent_gamma": latent_gamma,
                **_channels(descriptions, latent_gamma),
                "conditions": conditions.description,
                "geometries": _geometries(sizes, spacings),
                **_intensities(descriptions),
            }
        )

    @property
    def factors(self) -> tuple[int, ...]:
        """Total downsample factor of the autoencoder along each axis."""
        network = self.description["autoencoder"]["network"]
        return tuple(math.prod(along) for along in zip(network["initial_downsample_factor"], *network["downsample_factors"]))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return len(self.description["channel_mean"])

    def state_dict(self) -> dict[str, Any]:
        """The description, for checkpoints: a run that goes on keeps to the numbers that it began with."""
        return self.description

    def load_state_dict(self, description: Mapping[str, Any]) -> None:
        """Take over a description, with a warning where it is of other latents."""
        here = self.description["volumes"], self.training_mean
        self._describe(description)
        if here != (description["volumes"], self.training_mean):
            logger.warning(
                f"the training latents are not those that the run began with ({here[0]} now, {description['volumes']} "
                "then): statistics of the channels, sizes and conditions stay those of then. A new run learns them from all."
            )

    def _describe(self, description: Mapping[str, Any]) -> None:
        self.description = dict(description)
        self.conditions = Conditions(description["conditions"])
        self.amplitude = torch.tensor(description["channel_amplitude"])
        self._mean = torch.tensor(description["channel_mean"], dtype=torch.float64).float()
        deviation = torch.tensor(description["channel_deviation"], dtype=torch.float64)
        self._scale = (torch.tensor(description["channel_amplitude"], dtype=torch.float64) / deviation).float()

    @staticmethod
    def must_match(description: Mapping[str, Any]) -> dict[str, Any]:
        """What cannot change between two parts of a run. Statistics can: those of the first part stay."""
        chosen = {
            "SHA-256 of the autoencoder's weights": description["autoencoder"]["sha256"][:12],
            "condition_keys": list(description["conditions"]["keys"]),
        }
        # a fine-tuned generator has the one of the weights that it started from
        return chosen if "training_mean" in description else {**chosen, "latent_gamma": description["latent_gamma"]}

    def go_on_from(self, before: LatentSpace) -> None:
        """
        Normalise latents, and standardise conditions, as a generator does that is trained further. The mean of the channels
        over the training latents stays in ``training_mean``, which tells these latents from others.
        """
        kept = {name: before.description[name] for name in NORMALISATION}
        conditions = self.conditions.standardised_as(before.conditions).description
        self._describe({**self.description, **kept, "training_mean": self.training_mean, "conditions": conditions})

    def seen(self, name: str) -> list[tuple[float, float]]:
        """Lowest and highest ``size`` (voxels) or ``spacing`` (mm) of the training volumes along each axis."""
        return [(min(along), max(along)) for along in zip(*(each[name] for each in self.description["geometries"]))]

    @property
    def training_mean(self) -> list[float]:
        """Mean of each channel over the training latents."""
        return self.description.get("training_mean", self.description["channel_mean"])

    def normalised(self, z: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder makes them, ``BxCxHxWxD``, to what the generator works with."""
        return (z - _per_channel(self._mean, z)) * _per_channel(self._scale, z)

    def restored(self, z: torch.Tensor) -> torch.Tensor:
        """The reverse of :py:meth:`normalised`."""
        return z / _per_channel(self._scale, z) + _per_channel(self._mean, z)

    def summary(self) -> str:
        """In words, for the log."""
        strongest, weakest = self.amplitude.max().item(), self.amplitude.min().item()
        sizes = {tuple(each["size"]) for each in self.description["geometries"]}
        return (
            f"{self.description['volumes']} training latents of {self.latent_channels} channels, volumes of {len(sizes)} "
            f"size{'s' * (len(sizes) != 1)}; channels from {weakest:.3g} to {strongest:.3g} times as strong as the noise "
            f"(`latent_gamma` {self.description['latent_gamma']:g}); conditions: "
            f"{', '.join([*self.conditions.summary(), 'size', 'spacing'])}"
        )


def ranges(seen: Sequence[tuple[float, float]]) -> str:
    """The lowest and the highest value along each axis as text, such as ``64 to 96 x 80 x 64``."""
    return " x ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in seen)


def _per_channel(values: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return values.to(z.device).reshape(1, -1, *[1] * (z.dim() - 2))


def _channels(descriptions: Sequence[Mapping[str, Any]], latent_gamma: float) -> dict[str, list[float]]:
    """Mean, deviation and amplitude of each channel over all latents."""
    count = [each["count"] for each in descriptions]
    mean = np.average([each["channel_mean"] for each in descriptions], axis=0, weights=count)
    mean_square = np.average([each["channel_mean_square"] for each in descriptions], axis=0, weights=count)
    deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))
    deviation = np.maximum(deviation, LEAST_SHARE * deviation.max())
    amplitude = (deviation * np.array(descriptions[0]["image_scale"])) ** latent_gamma
    amplitude /= np.sqrt(np.mean(amplitude**2))
    return {
        "channel_mean": mean.tolist(),
        "channel_deviation": deviation.tolist(),
        "channel_amplitude": amplitude.tolist(),
    }


def spacing_of(description: Mapping[str, Any]) -> list[float]:
    """Spacing in mm of the volume that a latent was made of."""
    affine = np.array(description["preprocessed_affine"])
    return [round(float(length), 4) for length in np.sqrt(np.square(affine[:3, :3]).sum(0))]


def _geometries(sizes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Which sizes and spacings there are, and how often, the most frequent first."""
    counts = Counter((tuple(size), tuple(spacing)) for size, spacing in zip(sizes, spacings))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"size": list(size), "spacing": list(spacing), "count": count} for (size, spacing), count in ordered]


def _intensities(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median window, the range of the windows, and how voxels are stored: as in the files if these agree."""
    low, high = (np.array([each[f"intensity_{side}"] for each in descriptions]) for side in ("low", "high"))
    stored = {tuple(each[key] for key in PLAIN) for each in descriptions}
    (data_type, slope, inter) = stored.pop() if len(stored) == 1 else PLAIN.values()
    return {
        "intensity_low": np.median(low, axis=0).tolist(),
        "intensity_high": np.median(high, axis=0).tolist(),
        "intensity_windows": {"lowest": low.min(0).tolist(), "highest": high.max(0).tolist()},
        "data_type": data_type,
        "scl_slope": slope,
        "scl_inter": inter,
    }
