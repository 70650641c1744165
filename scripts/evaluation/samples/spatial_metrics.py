"""How a volume follows its spatial conditions: a label map, a volume that it should be like, a hole that it fills."""

from __future__ import annotations

import torch
from monai.metrics import PSNRMetric

from scripts.evaluation.metrics import LargeVolumeSSIMMetric

__all__ = ["border_step", "explained_share", "fidelity", "inside_mae"]


def explained_share(volume: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Share of a volume's variance that a label map explains (R² of the class means), over the voxels whose label is not 0:
    1 - variance around the means of the classes / variance.

    Args:
        volume: ``CxHxWxD``; the variances are sums over the channels.
        labels: ``1xHxWxD``, integers.

    Returns:
        0 to 1; NaN where the volume is constant over these voxels.
    """
    inside = labels[0] != 0
    values = volume[:, inside].double()
    _, member = labels[0][inside].unique(return_inverse=True)
    count = member.bincount()
    means = values.new_zeros(len(values), len(count)).index_add_(1, member, values) / count
    within, total = (values - means[:, member]).square().sum(), (values - values.mean(1, keepdim=True)).square().sum()
    return float(1 - within / total)


def fidelity(volume: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """
    Peak signal-to-noise ratio, dB, and structural similarity.

    Args:
        volume: ``CxHxWxD`` in [0, 1].
        truth: of the same shape.

    Returns:
        ``psnr`` and ``ssim``; the latter is NaN for less than 11 voxels along an axis.
    """
    metrics = {"psnr": PSNRMetric(max_val=1.0), "ssim": LargeVolumeSSIMMetric(spatial_dims=volume.dim() - 1)}
    return {name: float(torch.as_tensor(metric(volume[None], truth[None]))) for name, metric in metrics.items()}


def inside_mae(volume: torch.Tensor, truth: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Mean absolute difference of two volumes where the label is not 0.

    Args:
        volume: ``CxHxWxD``.
        truth: of the same shape.
        labels: ``1xHxWxD``.

    Returns:
        in units of the volumes; NaN without such voxels.
    """
    return float((volume - truth)[:, labels[0] != 0].abs().mean())


def border_step(volume: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Step across the border of a region: mean absolute difference of neighbouring voxels of which one has the label 0 and the
    other has not.

    Args:
        volume: ``CxHxWxD``.
        labels: ``1xHxWxD``.

    Returns:
        in units of the volume; NaN without a border.
    """
    inside = labels[0] != 0
    steps = [
        volume.diff(dim=axis + 1)[:, inside.diff(dim=axis)].abs().flatten()  # of booleans, whether they differ
        for axis in range(inside.dim())
    ]
    return float(torch.cat(steps).mean())
