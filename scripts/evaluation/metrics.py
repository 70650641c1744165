"""Metrics of reconstruction quality that MONAI lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.metrics import MultiScaleSSIMMetric, PSNRMetric, SSIMMetric
from monai.metrics.regression import RegressionMetric
from monai.utils.enums import CommonKeys as Keys

from scripts.data.intensity_window import intensity_window, unscaled

AIR = 0.05  # its highest intensity
EDGES = 0.1  # share of the voxels


class _PSNROfSomeVoxels(PSNRMetric):
    """Peak signal-to-noise ratio over the voxels that ``_voxels`` finds in a target ``CxHxWxD``."""

    _voxels: Callable[[torch.Tensor], torch.Tensor]

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        pairs = [(p[found], t[found]) for p, t, found in zip(y_pred, y, map(self._voxels, y))]
        return torch.cat([super(_PSNROfSomeVoxels, self)._compute_metric(p[None], t[None]) for p, t in pairs])


class ForegroundPSNRMetric(_PSNROfSomeVoxels):
    """
    Peak signal-to-noise ratio over the voxels of the target above 0.05. Volumes are mostly air, which is easy to
    reconstruct, so the ratio over all voxels is higher.
    """

    def _voxels(self, target: torch.Tensor) -> torch.Tensor:
        return target > AIR


class EdgePSNRMetric(_PSNROfSomeVoxels):
    """
    Peak signal-to-noise ratio over the tenth of the target's voxels with the largest gradients. There the eye sees whether a
    reconstruction is blurred, while the ratio over all voxels is mostly that of smooth regions.
    """

    def _voxels(self, target: torch.Tensor) -> torch.Tensor:
        strength = torch.zeros_like(target)
        for axis in range(1, target.ndim):
            if target.shape[axis] > 1:
                strength += torch.gradient(target, dim=axis)[0].square_()
        rank = strength.numel() - round(EDGES * strength.numel()) + 1
        return strength >= strength.flatten().kthvalue(rank).values


class _DefinedForLargeVolumes(RegressionMetric):
    """A metric that is NaN for a volume that is too small for its kernel, where MONAI's raises an error."""

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shrunk = max(1, len(getattr(self, "weights", ())) - 1) ** 2  # MONAI's formula, also where it is not 2 ** halvings
        if any(size < kernel * shrunk for size, kernel in zip(y.shape[2:], self.kernel_size)):  # type: ignore[attr-defined]
            return torch.full((len(y), 1), torch.nan, device=y.device)
        return super()._compute_metric(y_pred, y)  # type: ignore[safe-super]

    def aggregate(self, reduction: Any = None) -> torch.Tensor:
        """The mean over the volumes that are large enough; NaN if none is, where MONAI's would be 0."""
        return torch.as_tensor(self.get_buffer()).nanmean()


class LargeVolumeSSIMMetric(_DefinedForLargeVolumes, SSIMMetric):
    """MONAI's structural similarity; NaN for a volume smaller than its kernel (11 voxels along each axis)."""


class LargeVolumeMSSSIMMetric(_DefinedForLargeVolumes, MultiScaleSSIMMetric):
    """
    MONAI's multi-scale structural similarity; NaN for a volume that is too small: with the defaults of less than 176 voxels
    along an axis, as it is halved four times and must still hold the kernel of 11.
    """


class GridEnergyMetric(RegressionMetric):
    """:py:func:`grid_energy` of predictions, whose ``y`` is the size of a block along each axis, a tensor of integers."""

    def _check_shape(self, y_pred: torch.Tensor, y: torch.Tensor) -> None:
        """The second one is no image."""

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        energies = [[grid_energy(image[None], factors)] for image, factors in zip(y_pred, y.tolist())]
        return torch.tensor(energies, device=y_pred.device)


def grid_energy(image: torch.Tensor, factors: Sequence[int]) -> float:
    """
    How much the energy of detail varies with the position within a block of the latent's grid. Visible blocks have more
    energy at their borders, a checkerboard has more at every second voxel; anatomy does not depend on the grid.

    Args:
        image: ``BxCxHxWxD`` (2D: ``BxCxHxW``).
        factors: size of a block along each axis.

    Returns:
        the largest value of all axes: the standard deviation, divided by the mean, of the squared differences between
        neighbours, averaged for each position in a block. That of an image without a grid is not quite zero.
    """
    energies = [0.0]
    for axis, factor in enumerate(factors):
        blocks = (image.shape[axis + 2] - 1) // factor
        if factor == 1 or blocks == 0:
            continue
        energy = image.diff(dim=axis + 2).square().double().transpose(axis + 2, 0).flatten(1).mean(1)
        at_position = energy[: blocks * factor].reshape(blocks, factor).mean(0)
        energies.append(float(at_position.std(correction=0) / at_position.mean()))
    return max(energies)


class SharpnessMetric(RegressionMetric):
    """
    Mean magnitude of the differences between neighbouring voxels, relative to that of the image: 1 is as sharp as the image,
    less is blurred.
    """

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _mean_difference(y_pred) / _mean_difference(y)


def _mean_difference(image: torch.Tensor) -> torch.Tensor:
    differences = [image.diff(dim=axis).abs().flatten(1).mean(1, keepdim=True) for axis in range(2, image.ndim)]
    return torch.stack(differences).mean(0)


def trilinear_reconstruction(image: torch.Tensor, factors: Sequence[int]) -> torch.Tensor:
    """
    Shrink by ``factors`` and enlarge again with linear interpolation: the least that an autoencoder must improve on.

    Args:
        image: ``BxCxHxWxD``.
        factors: shrink factor along each axis; a size that it does not divide is rounded up, as the network pads it.

    Returns:
        the same shape.
    """
    shape = image.shape[2:]
    small = F.interpolate(image, size=[-(-n // f) for n, f in zip(shape, factors)], mode="trilinear")
    return F.interpolate(small, size=shape, mode="trilinear")


def in_file_units(output: Sequence[dict[str, MetaTensor]]) -> list[list[torch.Tensor]]:
    """An ``output_transform`` that gives a metric predictions and images in the units of their files, HU for CT."""
    windows = [intensity_window(item[Keys.IMAGE]) for item in output]
    return [
        [unscaled(item[key], window["intensity_low"], window["intensity_high"]) for item, window in zip(output, windows)]
        for key in (Keys.PRED, Keys.IMAGE)
    ]


def shrunk_and_image(output: Sequence[Any], factors: Sequence[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For an ``output_transform``: :py:func:`trilinear_reconstruction` in place of the predictions, and the images."""
    images = [item[Keys.IMAGE] for item in output]
    return [trilinear_reconstruction(image[None], factors)[0] for image in images], images
