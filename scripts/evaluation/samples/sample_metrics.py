"""How far a set of generated volumes is from a set of real ones: distances between distributions, diversity, spectra, and
the nearest training latent of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from scripts.evaluation.metrics import LargeVolumeMSSSIMMetric

__all__ = [
    "NUM_BANDS",
    "Nearest",
    "NearestLatents",
    "kernel_mmd",
    "median_distance",
    "pairwise_ms_ssim",
    "power_spectrum",
    "shrunk",
]

NUM_PERMUTATIONS = 1000
NUM_BANDS = 16  # of frequency, from a volume's lowest to half a cycle per voxel
MAX_SIZE = 64  # voxels along an axis of what MS-SSIM sees
MAX_PAIRS = 100
MS_SSIM = {"kernel_size": 5, "kernel_sigma": 1.0, "weights": (0.07, 0.45, 0.48)}  # the first three of five scales, sum 1
LEAST_POWER = 1e-12


def kernel_mmd(x: torch.Tensor, y: torch.Tensor, bandwidth: float, seed: int = 0) -> tuple[float, float]:
    """
    Squared maximum mean discrepancy with a Gaussian kernel (Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012), and a
    permutation test. MONAI's ``MMDMetric`` has a linear kernel, which compares means alone.

    Args:
        x: features of one set, ``MxK``, at least two.
        y: features of the other, ``NxK``, at least two.
        bandwidth: deviation of the kernel.
        seed: of the permutations.

    Returns:
        the unbiased estimate, which is around 0 and may be negative for sets of one distribution; and p, the share of 1,000
        divisions of both sets into two at random, the given one counted in, whose estimate is at least as large.
    """
    both = torch.cat([x, y]).double()
    kernel = torch.exp(-torch.cdist(both, both).square() / (2 * bandwidth**2)).fill_diagonal_(0)
    first = torch.arange(len(both)) < len(x)
    random = np.random.default_rng(seed)
    divisions = torch.stack([first, *(first[random.permutation(len(both))] for _ in range(NUM_PERMUTATIONS))]).double()
    others = 1 - divisions

    def mean_kernel(one: torch.Tensor, other: torch.Tensor, pairs: int) -> torch.Tensor:
        return ((one @ kernel) * other).sum(1) / pairs

    m, n = len(x), len(y)
    estimates = mean_kernel(divisions, divisions, m * (m - 1)) + mean_kernel(others, others, n * (n - 1))
    estimates -= 2 * mean_kernel(divisions, others, m * n)
    # a division that amounts to the given one must not count as smaller because of rounding
    as_large = int((estimates[1:] >= estimates[0] - 1e-12).sum())
    return float(estimates[0]), (1 + as_large) / (1 + NUM_PERMUTATIONS)


def median_distance(x: torch.Tensor) -> float:
    """Median distance between two of the features ``NxK``, the usual bandwidth of :py:func:`kernel_mmd`."""
    return float(torch.pdist(x.double()).median())


def shrunk(volume: torch.Tensor) -> torch.Tensor:
    """``CxHxWxD`` in [0, 1] with at most 64 voxels along each axis, for :py:func:`pairwise_ms_ssim`."""
    size = [min(n, MAX_SIZE) for n in volume.shape[1:]]
    return F.interpolate(volume[None].clamp(0, 1), size=size, mode="area")[0]


def pairwise_ms_ssim(volumes: Sequence[torch.Tensor], seed: int = 0) -> float | None:
    """
    How alike the volumes of a set are: mean of the multi-scale structural similarity (three scales, kernel of 5 voxels) over
    pairs. Higher than among real volumes is less diverse; 1 is a set of copies.

    Args:
        volumes: ``CxHxWxD`` each, see :py:func:`shrunk`. Those of different sizes make no pair.
        seed: of the choice, where there are more than 100 pairs.

    Returns:
        None where there is no pair, or where volumes have fewer than 20 voxels along an axis.
    """
    pairs = [(a, b) for a, b in itertools.combinations(range(len(volumes)), 2) if volumes[a].shape == volumes[b].shape]
    if len(pairs) > MAX_PAIRS:
        chosen = np.random.default_rng(seed).choice(len(pairs), MAX_PAIRS, replace=False)
        pairs = [pairs[i] for i in sorted(chosen)]
    if not pairs:
        return None
    metric = LargeVolumeMSSSIMMetric(spatial_dims=volumes[0].dim() - 1, **MS_SSIM)
    found = [float(torch.as_tensor(metric(volumes[a][None], volumes[b][None])).mean()) for a, b in pairs]
    return float(np.mean(found)) if np.isfinite(found).all() else None


def power_spectrum(volume: torch.Tensor) -> torch.Tensor:
    """
    Power in 16 bands of frequency, in dB: blurred volumes have less in the upper bands than real ones, noisy ones more.

    Args:
        volume: ``CxHxWxD`` in [0, 1].

    Returns:
        ``16``; a band is a shell of the radius k / 32 to (k + 1) / 32 cycles per voxel. NaN for a band without a frequency,
        in small volumes; the mean is left out.
    """
    axes = tuple(range(1, volume.dim()))
    power = torch.fft.rfftn(volume.float(), dim=axes).abs().square().mean(0) / volume[0].numel()
    along = [torch.fft.fftfreq(n) for n in volume.shape[1:-1]] + [torch.fft.rfftfreq(volume.shape[-1])]
    radius = (
        sum(f.square().reshape([-1 if i == axis else 1 for i in range(len(along))]) for axis, f in enumerate(along)) ** 0.5
    )
    band = (2 * NUM_BANDS * radius).long().flatten()  # type: ignore[union-attr]
    band[0] = NUM_BANDS  # the mean, left out like everything beyond
    total = torch.zeros(NUM_BANDS + 1, dtype=torch.float64)
    total.index_add_(0, band.clamp(max=NUM_BANDS), power.flatten().double())
    count = torch.bincount(band.clamp(max=NUM_BANDS), minlength=NUM_BANDS + 1)
    return (10 * torch.log10((total / count).clamp(min=LEAST_POWER)))[:NUM_BANDS]


@dataclass(frozen=True)
class Nearest:
    """
    Args:
        path: path of the training latent.
        distance: root mean square of the difference, in deviations of the latents in units of the image.
    """

    path: str
    distance: float


class NearestLatents:
    """
    Looks for the nearest of training latents that come one after the other: a generator may have learned volumes by heart.
    Those of another size are not compared.

    Args:
        latents: normalised latents, ``CxHxWxD`` each.
        paths: a file for each; one that was read from a training latent's file is not compared with itself.
    """

    def __init__(self, latents: Sequence[torch.Tensor], paths: Sequence[str]) -> None:
        self.latents, self.paths = latents, paths
        self.found: list[Nearest | None] = [None] * len(latents)

    def add(self, path: str, z: torch.Tensor) -> None:
        """Compare with a training latent, normalised, ``CxHxWxD``."""
        for i, (latent, own, known) in enumerate(zip(self.latents, self.paths, self.found)):
            if latent.shape == z.shape and own != path:
                distance = float((latent - z).square().mean().sqrt())
                if known is None or distance < known.distance:
                    self.found[i] = Nearest(path, distance)
