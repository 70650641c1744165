"""Samples without a network, to compare a generator with: Gaussians with the statistics of the training latents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["CovarianceGaussian", "plain_gaussian"]

Shape = tuple[int, ...]


def plain_gaussian(shapes: Sequence[Shape], deviation: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """
    Independent values with the deviations of the channels.

    Args:
        shapes: of the samples, ``CxHxWxD`` each.
        deviation: of each channel around its mean, which is 0.
        seed: of the samples.
    """
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=random) * deviation.reshape(-1, *[1] * (len(shape) - 1)) for shape in shapes]


class CovarianceGaussian:
    """
    Gaussian samples with mean and full covariance of the training latents of their size: the mean plus a sum of all centred
    latents, each times a normal number, divided by the root of their number less one. Latents are added one after the other
    and the covariance is never written down.

    Args:
        shapes: of the samples, ``CxHxWxD`` each. One whose shape fewer than two training latents have is left out.
        training: shapes of the training latents.
        seed: of the samples.
    """

    def __init__(self, shapes: Sequence[Shape], training: Sequence[Shape], seed: int) -> None:
        random = np.random.default_rng(seed)
        counts = Counter(training)
        self.samples = [torch.zeros(shape) for shape in shapes if counts[shape] > 1]
        self._weights = [_weights(counts[tuple(sample.shape)], random) for sample in self.samples]
        self._taken: Counter[Shape] = Counter()

    def add(self, latent: torch.Tensor) -> None:
        """Add a training latent; the samples are done when all have been added."""
        shape = tuple(latent.shape)
        for sample, weights in zip(self.samples, self._weights):
            if sample.shape == shape:
                sample.add_(latent, alpha=float(weights[self._taken[shape]]))
        self._taken[shape] += 1


def _weights(count: int, random: np.random.Generator) -> np.ndarray:
    """What each of so many latents is multiplied by: its part in the mean, and in the sum of centred ones."""
    normal = random.standard_normal(count)
    return 1 / count + (normal - normal.mean()) / np.sqrt(count - 1)
