"""The sets of latents that an evaluation of samples compares: samples, held-out and training volumes, and Gaussians."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.progress import ProgressBar
from scripts.data.latents import read_description, read_spatial
from scripts.data.spatial_kinds import SpatialKind
from scripts.diffusion.conditions import Volume
from scripts.diffusion.sampler import Sampler
from scripts.diffusion.statistics import LatentStatistics
from scripts.diffusion.training_data import ReadLatentd
from scripts.evaluation.samples.sample_features import coarse_latent
from scripts.training.repeatable_batches import derive_seed

__all__ = [
    "CONDITION",
    "COVARIANCE",
    "GAUSSIAN",
    "HELD_OUT",
    "SAMPLES",
    "TRAINING",
    "TRAINING_MEAN",
    "CovarianceGaussian",
    "LatentReader",
    "VolumeSet",
    "draw_samples",
    "gaussians",
    "plain_gaussian",
]

SAMPLES, HELD_OUT, TRAINING, COVARIANCE, GAUSSIAN = "samples", "held_out", "training", "covariance_gaussian", "gaussian"
CONDITION, TRAINING_MEAN = "condition_", "training_mean"  # the first one before a key

Shape = tuple[int, ...]


@dataclass
class VolumeSet:
    """
    Latents that are measured together.

    Args:
        latents: normalised, ``CxHxWxD`` each.
        volumes: size, spacing and conditions of each; empty for Gaussians.
        paths: files that the latents were read from or, of samples, those of the volumes whose conditions they have; empty
            for Gaussians.
    """

    latents: list[torch.Tensor] = field(default_factory=list)
    volumes: list[Volume] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def add(self, latent: torch.Tensor, volume: Volume, path: str) -> None:
        """Add a latent."""
        self.latents.append(latent)
        self.volumes.append(volume)
        self.paths.append(path)


class LatentReader:
    """
    Reads latents, and normalises them.

    Args:
        statistics: statistics of the latents.
    """

    def __init__(self, statistics: LatentStatistics) -> None:
        self.statistics, self._read = statistics, ReadLatentd(statistics)

    def read(self, path: str) -> tuple[torch.Tensor, Volume]:
        """A normalised latent, ``CxHxWxD``, and its volume."""
        found = self._read({Keys.IMAGE: path})
        return self.statistics.normalised(found[Keys.IMAGE][None])[0], found["volume"]

    def spatial(self, path: str, kinds: Mapping[str, SpatialKind]) -> dict[str, torch.Tensor]:
        """
        Latents of those spatial conditions that a volume has, as the autoencoder makes them.

        Args:
            path: path of its latent.
            kinds: spatial conditions by key.

        Returns:
            ``1x(planes * C)xHxWxD`` each, by key.

        Raises:
            ValueError: for a condition of another kind.
        """
        description = read_description(Path(path))
        for key, kind in kinds.items():
            found = description.spatial.get(key)
            if found is not None and found.kind != kind:
                raise ValueError(f"{path}: {key!r} was encoded as {found.kind}; the generator was trained with {kind}.")
        return {key: z[None] for key, z in read_spatial(Path(path), description, kinds).items()}

    def chosen(self, paths: Sequence[str], count: int, seed: int) -> VolumeSet:
        """Up to ``count`` of the latents, drawn at random."""
        found = VolumeSet()
        for i in sorted(np.random.default_rng(seed).permutation(len(paths))[:count]):
            found.add(*self.read(paths[i]), paths[i])
        return found


def draw_samples(
    sampler: Sampler, reader: LatentReader, like: VolumeSet, kinds: Mapping[str, SpatialKind], count: int, seed: int
) -> VolumeSet:
    """
    Samples of a generator, each with size, spacing and conditions of one of the volumes, which take turns.

    Args:
        sampler: sampler that makes them.
        reader: reader of the volumes' spatial conditions, by whose statistics samples are normalised.
        like: volumes.
        kinds: spatial conditions, by key, that are given where a volume has them.
        count: number of samples.
        seed: seed of the run; a sample depends on it and on its number.
    """
    drawn, keys = VolumeSet(), sampler.generator.statistics.conditions.keys
    for index in ProgressBar(range(count), desc="sampling", unit="sample", leave=False):
        volume, path = like.volumes[index % len(like.volumes)], like.paths[index % len(like.paths)]
        given = replace(volume, conditions={key: volume.conditions[key] for key in keys if key in volume.conditions})
        z = sampler(**sampler.start(given, derive_seed(seed, index)), spatial=reader.spatial(path, kinds)).cpu()
        drawn.add(reader.statistics.normalised(z)[0], given, path)
    return drawn


def gaussians(
    reader: LatentReader, training: Sequence[str], like: Sequence[torch.Tensor], seed: int
) -> tuple[dict[str, VolumeSet], list[torch.Tensor]]:
    """
    Gaussian samples, and coarse features of the training latents, which this reads once.

    Args:
        reader: reader of the latents.
        training: paths of the training latents.
        like: latents whose shapes the samples have.
        seed: seed of the samples.
    """
    shapes = [tuple(z.shape) for z in like]
    coarse, sizes = [], []
    for path in ProgressBar(training, desc="sizes", unit="latent", leave=False):
        z, _ = reader.read(path)
        coarse.append(coarse_latent(z))
        sizes.append(tuple(z.shape))
    gaussian = CovarianceGaussian(shapes, sizes, seed)
    for path in ProgressBar(training, desc="covariance", unit="latent", leave=False):
        gaussian.add(reader.read(path)[0])
    sets = {COVARIANCE: VolumeSet(gaussian.samples)} if gaussian.samples else {}
    return {**sets, GAUSSIAN: VolumeSet(plain_gaussian(shapes, reader.statistics.amplitude, seed))}, coarse


def plain_gaussian(shapes: Sequence[Shape], deviation: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """
    Independent values with the deviations of the channels.

    Args:
        shapes: shapes of the samples, ``CxHxWxD`` each.
        deviation: deviation of each channel around its mean, which is 0.
        seed: seed of the samples.
    """
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=random) * deviation.reshape(-1, *[1] * (len(shape) - 1)) for shape in shapes]


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
