"""Rectified flow (Liu et al., https://arxiv.org/abs/2209.03003): straight paths from noise to latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["FlowTarget", "RectifiedFlow"]

PREDICTIONS = ("gain", "x", "v")
BASE_VALUES = 4096  # latents of so many values need no shift (Zheng et al., https://arxiv.org/abs/2510.11690)
SPREAD = 1.5  # deviation of the logit of a time of training
LEAST_TIME = 0.05  # below it the weight of the loss grows no further (Li and He, https://arxiv.org/abs/2511.13720)


@dataclass(frozen=True)
class FlowTarget:
    """
    What a prediction is compared with.

    Args:
        clean: normalised latents, ``BxCxHxWxD``.
        noise: the same shape.
        noisy: what the network sees, between the two.
        times: ``B``.
        mask: 1 in the volume, 0 in the padding, ``Bx1xHxWxD``.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    noisy: torch.Tensor
    times: torch.Tensor
    mask: torch.Tensor


class RectifiedFlow:
    """
    A latent is mixed with noise, ``noisy = (1 - t) * clean + t * noise`` with a time t from 0 to 1. A network learns to tell
    the velocity ``clean - noise``, along which samples go from noise at t = 1 to a latent at t = 0. Sign and direction are
    those of MONAI's ``RFlowScheduler``.

    The network predicts the velocity (``prediction`` v) or the clean latent: directly (x), or by mean, gain and residual
    (gain, see :py:func:`scripts.diffusion.latent_unet.posterior`). The loss is the mean square error of the velocity in all
    cases, so that their values can be compared. An error of the clean latent, divided by t, is one of the velocity (below
    t = 0.05, by 0.05).

    Times of training are drawn from a logit-normal distribution (Esser et al., https://arxiv.org/abs/2403.03206) and shifted
    towards noise, as the steps of sampling are: neighbours in a large latent tell the same, and so it needs more noise to
    become unrecognisable. It is wider than theirs: shape is decided where there is nearly nothing but noise, and the fine
    channels where there is little.

    Args:
        prediction: ``"gain"``, ``"x"`` or ``"v"``.
        timestep_shift: the factor by which the odds t / (1 - t) grow; None for the square root of the number of values of a
            latent divided by 4096, as in RAE (https://arxiv.org/abs/2510.11690), at least 1.

    Raises:
        ValueError: for another ``prediction``, or a shift that is not positive.
    """

    def __init__(self, prediction: str, timestep_shift: float | None = None) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"`prediction` is {prediction!r}; it must be 'gain' or 'x' (the clean latent, with or without a gain of the "
                "noisy one) or 'v' (the velocity)."
            )
        if timestep_shift is not None and (isinstance(timestep_shift, (bool, str)) or not timestep_shift > 0):
            raise ValueError(f"`timestep_shift` is {timestep_shift!r}; it must be a positive number, or null.")
        self.prediction, self.timestep_shift = prediction, timestep_shift
        self.arguments = {"prediction": prediction, "timestep_shift": timestep_shift}

    def state_dict(self) -> dict[str, Any]:
        """The arguments, for checkpoints."""
        return self.arguments

    def load_state_dict(self, arguments: Mapping[str, Any]) -> None:
        """Nothing to take over: a run goes on with the same arguments only, see :py:meth:`must_match`."""

    @staticmethod
    def must_match(arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What cannot change between two parts of a run: weights and the best loss so far are of one target."""
        return dict(arguments)

    def shift(self, num_values: float) -> float:
        """The factor for a latent of so many values, padding left out."""
        return self.timestep_shift or max(1.0, math.sqrt(num_values / BASE_VALUES))

    def drawn_time(self, num_values: float, random: np.random.Generator) -> float:
        """A time of training for a latent of so many values."""
        return 1 / (1 + math.exp(-SPREAD * random.standard_normal()) / self.shift(num_values))

    def sampling_times(self, num_steps: int, num_values: float) -> list[float]:
        """The times between which ``num_steps`` steps lead, from exactly 1 to exactly 0."""
        shift = self.shift(num_values)
        even = [1 - step / num_steps for step in range(num_steps + 1)]
        return [time / (time + (1 - time) / shift) for time in even]

    def target(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, mask: torch.Tensor) -> FlowTarget:
        """What the network sees of ``clean`` at ``times`` (``B``), and what its prediction is compared with."""
        t = _per_item(times, clean)
        return FlowTarget(clean, noise, (1 - t) * clean + t * noise, times, mask)

    def clean(self, prediction: torch.Tensor, noisy: torch.Tensor, time: float | torch.Tensor) -> torch.Tensor:
        """The clean latent, from what the network predicts of a noisy one at a time above 0."""
        return noisy + time * prediction if self.prediction == "v" else prediction

    def velocity_error(self, prediction: torch.Tensor, target: FlowTarget) -> torch.Tensor:
        """What the velocity misses, ``BxCxHxWxD`` in float32."""
        if self.prediction == "v":
            return prediction.float() - (target.clean - target.noise)
        return (prediction.float() - target.clean) / _per_item(target.times, target.clean).clamp(min=LEAST_TIME)

    def clean_error(self, prediction: torch.Tensor, target: FlowTarget) -> torch.Tensor:
        """What the clean latent misses, ``BxCxHxWxD`` in float32."""
        times = _per_item(target.times, target.clean)
        return self.clean(prediction.float(), target.noisy, times) - target.clean

    def loss(self, prediction: torch.Tensor, target: FlowTarget) -> torch.Tensor:
        """Mean square error of the velocity, of each latent without its padding, averaged over the batch."""
        return channel_means(self.velocity_error(prediction, target).square(), target.mask).mean()


def channel_means(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Means over the voxels in the mask, ``BxC``, of ``BxCxHxWxD``."""
    return (values * mask).flatten(2).sum(2) / mask.flatten(2).sum(2)


def _per_item(times: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return times.reshape(-1, *[1] * (like.dim() - 1))
