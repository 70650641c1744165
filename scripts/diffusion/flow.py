"""Rectified flow (Liu et al., https://arxiv.org/abs/2209.03003): straight paths from noise to latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BASE_VALUES = 4096  # latents of so many values need no shift (Zheng et al., https://arxiv.org/abs/2510.11690)
SPREAD = 1.5  # deviation of the logit of a time of training
LEAST_TIME = 0.05  # below it the weight of the loss grows no further (Li and He, https://arxiv.org/abs/2511.13720)


@dataclass(frozen=True)
class FlowTarget:
    """Normalised latents ``BxCxHxWxD``, times ``B``, and a mask ``Bx1xHxWxD``: 1 in the volume, 0 in the padding."""

    clean: Tensor
    times: Tensor
    mask: Tensor


class RectifiedFlow:
    """
    A latent is mixed with noise, ``noisy = (1 - t) * clean + t * noise`` with a time t from 0 to 1. Samples follow the
    velocity ``clean - noise`` from t = 1 to t = 0, as with MONAI's ``RFlowScheduler``. Times of training are drawn from a
    logit-normal distribution (Esser et al., https://arxiv.org/abs/2403.03206) and shifted towards noise, as the steps of
    sampling are: neighbours in a large latent are alike, and so it needs more noise to become unrecognisable.

    Args:
        timestep_shift: the factor by which the odds t / (1 - t) grow; None for the square root of the number of values of a
            latent divided by 4096, as in RAE (https://arxiv.org/abs/2510.11690), at least 1.
    """

    def __init__(self, timestep_shift: float | None = None) -> None:
        self.timestep_shift = timestep_shift

    def state_dict(self) -> dict[str, Any]:
        return {"timestep_shift": self.timestep_shift}

    def load_state_dict(self, arguments: Mapping[str, Any]) -> None:
        """Nothing to take over: :py:meth:`must_match` allows no change."""

    @staticmethod
    def must_match(arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What cannot change when a run is resumed: the best loss so far is one of the same times."""
        return dict(arguments)

    def shift(self, num_values: float) -> float:
        """The factor for a latent of so many values, padding left out."""
        return self.timestep_shift or max(1.0, math.sqrt(num_values / BASE_VALUES))

    def draw_time(self, num_values: float, random: np.random.Generator) -> float:
        return 1 / (1 + math.exp(-SPREAD * random.standard_normal()) / self.shift(num_values))

    def sampling_times(self, num_steps: int, num_values: float) -> list[float]:
        """The times between which steps lead, from exactly 1 to exactly 0."""
        shift = self.shift(num_values)
        even = [1 - step / num_steps for step in range(num_steps + 1)]
        return [time / (time + (1 - time) / shift) for time in even]

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The noisy latents, ``BxCxHxWxD``, at times ``B``."""
        t = per_item(times, clean)
        return (1 - t) * clean + t * noise

    def loss(self, estimate: Tensor, target: FlowTarget) -> Tensor:
        """Mean square error of the velocity, that of the clean latents divided by t, without their padding."""
        error = (estimate.float() - target.clean) / per_item(target.times, target.clean).clamp(min=LEAST_TIME)
        return channel_means(error.square(), target.mask).mean()


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Noise of a shape and a seed, the same on every machine: it is drawn on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channel_means(values: Tensor, mask: Tensor) -> Tensor:
    """Means over the voxels in the mask, ``BxC``, of ``BxCxHxWxD``."""
    return (values * mask).flatten(2).sum(2) / mask.flatten(2).sum(2)


def per_item(times: Tensor, like: Tensor) -> Tensor:
    """Times ``B`` in the form ``Bx1x1x1x1``, of as many dimensions as ``like``."""
    return times.reshape(-1, *[1] * (like.dim() - 1))
