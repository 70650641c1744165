"""How far a set of generated volumes is from a set of real ones: distances between distributions, diversity, spectra, and
the nearest training latent of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from scripts.evaluation.metrics import LargeVolumeMSSSIMMetric
from scripts.evaluation.reports import mean_of_finite
from scripts.evaluation.samples.sample_sets import Latent

NUM_PERMUTATIONS = 1000
NUM_BANDS = 16  # of frequency, from a volume's lowest to half a cycle per voxel
MAX_SIZE = 64  # voxels along an axis of what MS-SSIM sees
MAX_PAIRS = 100
MS_SSIM: dict[str, Any] = {"kernel_size": 5, "kernel_sigma": 1.0, "weights": (0.07, 0.45, 0.48)}  # three scales, sum 1
LEAST_POWER = 1e-12


def kernel_mmd(x: torch.Tensor, y: torch.Tensor, bandwidth: float, seed: int = 0) -> tuple[float, float]:
    """
    Squared maximum mean discrepancy with a Gaussian kernel (Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012), and a
    permutation test. MONAI's ``MMDMetric`` has a linear kernel, which compares means alone.

    Args:
        x: features of one set, ``MxK``.
        y: features of the other, ``NxK``.
        bandwidth: deviation of the kernel.
        seed: seed of the permutations.

    Returns:
        the unbiased estimate, around 0 for sets of one distribution; and p, the share of 1,000 random divisions of both sets
        into two, the given one counted in, whose estimate is at least as large. NaN for sets of one, and a bandwidth of 0.
    """
    m, n = len(x), len(y)
    if min(m, n) < 2 or not bandwidth > 0:
        return math.nan, math.nan
    both = torch.cat([x, y]).double()
    kernel = torch.exp(-torch.cdist(both, both).square() / (2 * bandwidth**2)).fill_diagonal_(0)
    first = torch.arange(len(both)) < m
    random = np.random.default_rng(seed)
    divisions = torch.stack([first, *(first[random.permutation(len(both))] for _ in range(NUM_PERMUTATIONS))]).double()
    others = 1 - divisions

    def mean_kernel(one: torch.Tensor, other: torch.Tensor, pairs: int) -> torch.Tensor:
        return ((one @ kernel) * other).sum(1) / pairs

    estimates = mean_kernel(divisions, divisions, m * (m - 1)) + mean_kernel(others, others, n * (n - 1))
    estimates -= 2 * mean_kernel(divisions, others, m * n)
    # a division that amounts to the given one must not count as smaller because of rounding
    as_large = int((estimates[1:] >= estimates[0] - 1e-12).sum())
    return float(estimates[0]), (1 + as_large) / (1 + NUM_PERMUTATIONS)


def shrunk(volume: torch.Tensor) -> torch.Tensor:
    """``CxHxWxD`` in [0, 1] with at most 64 voxels along each axis, for :py:func:`pairwise_ms_ssim`."""
    size = [min(n, MAX_SIZE) for n in volume.shape[1:]]
    return F.interpolate(volume[None].clamp(0, 1), size=size, mode="area")[0]


def pairwise_ms_ssim(volumes: Sequence[torch.Tensor], seed: int = 0) -> float:
    """
    How alike the volumes of a set are: mean of the multi-scale structural similarity (three scales, kernel of 5 voxels) over
    pairs, 1 for a set of copies. NaN without a pair of equal size, and of fewer than 20 voxels along an axis.

    Args:
        volumes: ``CxHxWxD`` each, see :py:func:`shrunk`.
        seed: seed of the choice, where there are more than 100 pairs.
    """
    pairs = [(a, b) for a, b in itertools.combinations(range(len(volumes)), 2) if volumes[a].shape == volumes[b].shape]
    if len(pairs) > MAX_PAIRS:
        chosen = np.random.default_rng(seed).choice(len(pairs), MAX_PAIRS, replace=False)
        pairs = [pairs[i] for i in sorted(chosen)]
    metric = LargeVolumeMSSSIMMetric(spatial_dims=3, **MS_SSIM)
    return mean_of_finite(float(torch.as_tensor(metric(volumes[a][None], volumes[b][None]))) for a, b in pairs)


def power_spectrum(volume: torch.Tensor) -> torch.Tensor:
    """
    Power in 16 bands of frequency, in dB: blurred volumes have less in the upper bands than real ones, noisy ones more. A
    band is a shell of the radius k / 32 to (k + 1) / 32 cycles per voxel, NaN without a frequency; the mean is left out.

    Args:
        volume: ``CxHxWxD`` in [0, 1].
    """
    power = torch.fft.rfftn(volume.float(), dim=(1, 2, 3)).abs().square().mean(0) / volume[0].numel()
    *sizes, last = volume.shape[1:]
    along = torch.meshgrid(*map(torch.fft.fftfreq, sizes), torch.fft.rfftfreq(last), indexing="ij")
    band = (2 * NUM_BANDS * torch.stack(along).square().sum(0).sqrt()).long().clamp(max=NUM_BANDS).flatten()
    band[0] = NUM_BANDS  # the mean, left out like everything beyond
    total = torch.zeros(NUM_BANDS + 1, dtype=torch.float64).index_add_(0, band, power.flatten().double())
    return (10 * torch.log10((total / band.bincount(minlength=NUM_BANDS + 1)).clamp(min=LEAST_POWER)))[:NUM_BANDS]


class NearestLatents:
    """
    Looks for the nearest of training latents that come one after the other: a generator may have learned volumes by heart.
    Those of another size are not compared, and none with itself.

    Args:
        sets: latents by the name of their set.
    """

    def __init__(self, sets: Mapping[str, Sequence[Latent]]) -> None:
        self.sets = sets
        self.found = {name: [(math.inf, "")] * len(latents) for name, latents in sets.items()}
        """Distance (root mean square, in deviations of the latents in units of the image) and path of the nearest one."""

    def add(self, path: str, z: torch.Tensor) -> None:
        """Compare with a training latent, normalised, ``CxHxWxD``."""
        for name, latents in self.sets.items():
            for i, latent in enumerate(latents):
                if latent.z.shape == z.shape and latent.path != path:
                    distance = float((latent.z - z).square().mean().sqrt())
                    self.found[name][i] = min(self.found[name][i], (distance, path))
