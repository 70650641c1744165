"""The sets of latents that an evaluation of samples compares: samples, held-out and training volumes, and Gaussians."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.progress import ProgressBar
from scripts.diffusion.latent_data import ReadLatentd
from scripts.diffusion.latent_space import LatentSpace
from scripts.evaluation.samples.reference_samples import CovarianceGaussian, plain_gaussian
from scripts.evaluation.samples.sample_features import coarse_latent
from scripts.inference.samples import PLAN, DrawStartd, SampleInferer

__all__ = [
    "COVARIANCE",
    "GAUSSIAN",
    "HELD_OUT",
    "SAMPLES",
    "TRAINING",
    "LatentReader",
    "VolumeSet",
    "draw_samples",
    "gaussians",
]

SAMPLES, HELD_OUT, TRAINING, COVARIANCE, GAUSSIAN = "samples", "held_out", "training", "covariance_gaussian", "gaussian"


@dataclass
class VolumeSet:
    """
    Latents that are measured together.

    Args:
        latents: normalised, ``CxHxWxD`` each.
        volumes: conditions, size and spacing of each, as :py:class:`ReadLatentd` notes them; empty for Gaussians.
        paths: files that the latents were read from; empty texts for samples.
    """

    latents: list[torch.Tensor] = field(default_factory=list)
    volumes: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def add(self, latent: torch.Tensor, volume: dict[str, Any], path: str = "") -> None:
        """Add a latent."""
        self.latents.append(latent)
        self.volumes.append(volume)
        self.paths.append(path)


class LatentReader:
    """
    Reads latents.

    Args:
        space: that normalises them.
    """

    def __init__(self, space: LatentSpace) -> None:
        self.space, self._read = space, ReadLatentd(space)

    def read(self, path: str) -> tuple[torch.Tensor, dict[str, Any]]:
        """A latent as the autoencoder made it, ``CxHxWxD``, and conditions, size and spacing of its volume."""
        found = self._read({Keys.IMAGE: path})
        return found[Keys.IMAGE], json.loads(found["volume"])

    def normalised(self, path: str) -> torch.Tensor:
        """A normalised latent, ``CxHxWxD``."""
        return self.space.normalised(self.read(path)[0][None])[0]

    def chosen(self, paths: Sequence[str], count: int, seed: int) -> VolumeSet:
        """Up to ``count`` of the latents, drawn at random."""
        found = VolumeSet()
        for i in sorted(np.random.default_rng(seed).permutation(len(paths))[:count]):
            z, volume = self.read(paths[i])
            found.add(self.space.normalised(z[None])[0], volume, paths[i])
        return found


def draw_samples(
    inferer: SampleInferer, space: LatentSpace, like: Sequence[Mapping[str, Any]], count: int, seed: int
) -> VolumeSet:
    """
    Samples of a generator, each with size, spacing and conditions of one of the volumes, which take turns.

    Args:
        inferer: that makes them.
        space: that normalises them.
        like: conditions, size and spacing of volumes.
        count: how many.
        seed: of the run; a sample depends on it and on its number.
    """
    generator, drawn = inferer.generator, VolumeSet()
    start, keys = DrawStartd(generator), generator.space.conditions.keys
    for index in ProgressBar(range(count), desc="sampling", unit="sample", leave=False):
        volume = like[index % len(like)]
        told = {key: volume["conditions"][key] for key in keys if key in volume["conditions"]}
        plan = {"index": index, "seed": seed, "conditions": told}
        item = start({PLAN: json.dumps({**plan, "spatial_size": volume["size"], "spacing": volume["spacing"]})})
        noise, *told_to_network = (item[key][None] for key in (Keys.IMAGE, "context", "latent_size", "noise_seed"))
        z = inferer.sample(noise, generator.network, *told_to_network).cpu()
        drawn.add(space.normalised(z)[0], {**volume, "conditions": told})
    return drawn


def gaussians(
    reader: LatentReader, training: Sequence[str], like: Sequence[torch.Tensor], seed: int
) -> tuple[dict[str, VolumeSet], list[torch.Tensor]]:
    """
    Gaussian samples, and coarse features of the training latents, which this reads once.

    Args:
        reader: of the latents.
        training: their paths.
        like: latents whose shapes the samples have.
        seed: of the samples.
    """
    shapes = [tuple(z.shape) for z in like]
    coarse, sizes = [], []
    for path in ProgressBar(training, desc="sizes", unit="latent", leave=False):
        z = reader.normalised(path)
        coarse.append(coarse_latent(z))
        sizes.append(tuple(z.shape))
    gaussian = CovarianceGaussian(shapes, sizes, seed)
    for path in ProgressBar(training, desc="covariance", unit="latent", leave=False):
        gaussian.add(reader.normalised(path))
    sets = {COVARIANCE: VolumeSet(gaussian.samples)} if gaussian.samples else {}
    return {**sets, GAUSSIAN: VolumeSet(plain_gaussian(shapes, reader.space.amplitude, seed))}, coarse
