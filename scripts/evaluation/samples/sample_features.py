"""What distributions of volumes are compared by, without a network that would have to be downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

__all__ = ["Standardised", "channel_statistics", "coarse_latent", "local_statistics", "nearest_class"]

GRID = 4  # cells along each axis
NUM_CHANNELS = 4
LEAST_SHARE = 0.1  # of the largest deviation; features that hardly vary, as those of air, would count as much as any other


def coarse_latent(z: torch.Tensor) -> torch.Tensor:
    """
    The four leading channels of a latent averaged in 4 x 4 x 4 cells: size, position and shape of what is in the volume.

    Args:
        z: ``CxHxWxD`` in units of the image, so that each channel counts for as much as it does there.

    Returns:
        ``K``, the same for latents of all sizes.
    """
    return _cells(z[:NUM_CHANNELS])


def channel_statistics(z: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
    """
    Mean and deviation of each channel over a latent, in units of the channel: how much detail of each kind there is. Heads
    differ in it from a Gaussian with their mean and covariance, which coarse latents hardly distinguish from heads.

    Args:
        z: ``CxHxWxD``.
        amplitude: deviation of each channel over all training latents.

    Returns:
        ``2C``.
    """
    values = z.flatten(1) / amplitude[:, None]
    return torch.cat([values.mean(1), values.std(1, correction=0)])


def local_statistics(volume: torch.Tensor) -> torch.Tensor:
    """
    Mean, deviation and mean magnitude of the differences between neighbours in 4 x 4 x 4 cells of a volume: what tissue
    looks like. Sums of volumes, as a Gaussian with the right covariance makes them, have other deviations.

    Args:
        volume: ``CxHxWxD`` in [0, 1].

    Returns:
        ``K``, the same for volumes of all sizes.
    """
    mean, square = _cells(volume), _cells(volume.square())
    steps = [_cells(volume.diff(dim=axis).abs()) for axis in range(1, volume.dim())]
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt(), torch.stack(steps).mean(0)])


def _cells(values: torch.Tensor) -> torch.Tensor:
    """Averages of ``CxHxWxD`` in cells, flattened."""
    pool = F.adaptive_avg_pool2d if values.dim() == 3 else F.adaptive_avg_pool3d
    return pool(values[None].float(), GRID).flatten()


class Standardised:
    """
    Features minus their mean over real ones, divided by their deviation (at least a tenth of the largest deviation).

    Args:
        real: ``K`` each, of training volumes.
    """

    def __init__(self, real: Sequence[torch.Tensor]) -> None:
        features = torch.stack(list(real)).double()
        deviation = features.std(0, correction=0)
        self.mean, self.deviation = features.mean(0), deviation.clamp(min=max(LEAST_SHARE * float(deviation.max()), 1e-12))

    def __call__(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """``NxK`` in float64."""
        return (torch.stack(list(features)).double() - self.mean) / self.deviation


def nearest_class(
    features: Sequence[torch.Tensor],
    training: Sequence[torch.Tensor],
    labels: Sequence[str],
    classes: Iterable[str],
    standardised: Standardised,
) -> list[str]:
    """
    The class whose mean over the training volumes is nearest to each volume's features.

    Args:
        features: of the volumes, ``K`` each.
        training: of the training volumes, ``K`` each.
        labels: of the training volumes.
        classes: to choose from.
        standardised: makes features comparable.
    """
    rows = {name: [z for z, label in zip(training, labels) if label == name] for name in classes}
    present = [name for name, found in rows.items() if found]
    means = torch.stack([standardised(rows[name]).mean(0) for name in present])
    return [present[i] for i in torch.cdist(standardised(features), means).argmin(1).tolist()]
