"""The sets of latents that an evaluation of samples compares: samples, held-out and training volumes, and Gaussians."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from scripts.bundle.progress import ProgressBar
from scripts.data.latents import read_description, read_latent, read_spatial
from scripts.data.spatial_kinds import SpatialKind
from scripts.diffusion.sampler import Sampler
from scripts.diffusion.statistics import LatentStatistics
from scripts.diffusion.training_data import volume_of
from scripts.training.repeatable_batches import derive_seed

SAMPLES, HELD_OUT, TRAINING, COVARIANCE, GAUSSIAN = "samples", "held_out", "training", "covariance_gaussian", "gaussian"
CONDITION, TRAINING_MEAN = "condition_", "training_mean"  # the first one before a key

Shape = Sequence[int]


class Latent(NamedTuple):
    """
    A latent of a set. A Gaussian has nothing but ``z``.

    Args:
        z: normalised, ``CxHxWxD``.
        volume: size, spacing and conditions.
        path: file that it was read from or, of a sample, that of the volume whose conditions it has.
        known: what lies beside that file.
    """

    z: torch.Tensor
    volume: Any = None
    path: str = ""
    known: Any = None


class LatentReader:
    """
    Reads latents, and normalises them.

    Args:
        statistics: statistics of the latents.
        decode: from latents ``BxCxHxWxD`` to volumes.
    """

    def __init__(self, statistics: LatentStatistics, decode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.statistics, self._decode = statistics, decode

    def read(self, path: str) -> Latent:
        """A normalised latent."""
        known = read_description(Path(path))
        z = read_latent(Path(path), known)
        return Latent(self.statistics.normalised(z[None])[0], volume_of(known), path, known)

    def spatial(self, latent: Latent, kinds: Mapping[str, SpatialKind]) -> dict[str, torch.Tensor]:
        """
        Latents of those of the spatial conditions that a volume has, as the autoencoder makes them, ``1x(planes * C)xHxWxD``
        each.

        Raises:
            ValueError: for a condition of another kind.
        """
        for key in kinds.keys() & latent.known.spatial:
            found = latent.known.spatial[key].kind
            if found != kinds[key]:
                raise ValueError(f"{latent.path}: {key!r} was encoded as {found}; the generator has {kinds[key]}.")
        return {key: z[None] for key, z in read_spatial(Path(latent.path), latent.known, kinds).items()}

    def chosen(self, paths: Sequence[str], count: int, seed: int) -> list[Latent]:
        """Up to ``count`` of the latents, drawn at random."""
        return [self.read(paths[i]) for i in sorted(np.random.default_rng(seed).permutation(len(paths))[:count])]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """A normalised latent ``CxHxWxD`` to a volume in [0, 1], as samples are written, with its padding."""
        return self._decode(self.statistics.denormalised(z[None]))[0].clamp(0, 1)


def draw_samples(
    sampler: Sampler, reader: LatentReader, like: Sequence[Latent], kinds: Mapping[str, SpatialKind], count: int, seed: int
) -> list[Latent]:
    """
    Samples of a generator. Each has size, spacing and conditions of one of the volumes ``like``, which take turns, and those
    of the spatial conditions ``kinds`` that the volume has.
    """
    drawn, keys = [], sampler.generator.statistics.conditions.keys
    for index in ProgressBar(range(count), desc="sampling", unit="sample", leave=False):
        real = like[index % len(like)]
        known = real.volume.conditions
        volume = replace(real.volume, conditions={key: known[key] for key in keys if key in known})
        z = sampler(**sampler.start(volume, derive_seed(seed, index)), spatial=reader.spatial(real, kinds)).cpu()
        drawn.append(real._replace(z=reader.statistics.normalised(z)[0], volume=volume))
    return drawn


def plain_gaussian(shapes: Sequence[Shape], deviation: torch.Tensor, seed: int) -> list[Latent]:
    """Latents of the shapes, ``CxHxWxD``, whose values are independent and have the deviation of their channel."""
    random = torch.Generator().manual_seed(seed)
    return [Latent(torch.randn(*shape, generator=random) * deviation[:, None, None, None]) for shape in shapes]


class CovarianceGaussian:
    """
    Gaussian samples with mean and full covariance of the training latents of their size: the mean plus a sum of all centred
    latents, each times a normal number, divided by the root of their number less one. Latents are added one after the other
    and the covariance is never written down.

    Args:
        shapes: shapes of the samples, ``CxHxWxD`` each. One whose shape fewer than two training latents have is left out.
        training: shapes of the training latents.
        seed: seed of the samples.
    """

    def __init__(self, shapes: Sequence[Shape], training: Sequence[Shape], seed: int) -> None:
        random, counts = np.random.default_rng(seed), Counter(map(tuple, training))
        self.samples = [Latent(torch.zeros(*shape)) for shape in shapes if counts[tuple(shape)] > 1]
        self._weights = []  # by which the latents are multiplied, one after the other
        for sample in self.samples:
            count = counts[tuple(sample.z.shape)]
            normal = random.standard_normal(count)
            self._weights.append(iter((1 / count + (normal - normal.mean()) / np.sqrt(count - 1)).tolist()))

    def add(self, latent: torch.Tensor) -> None:
        """Add a training latent; the samples are done when all have been added."""
        for sample, weights in zip(self.samples, self._weights):
            if sample.z.shape == latent.shape:
                sample.z.add_(latent, alpha=next(weights))
