"""Scaling of an intensity window to [0, 1] that records the window, so that a reconstruction can be returned in the units of
its input."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, TraceableTransform
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import ImageMetaKey

__all__ = ["ScaleIntensityWindowd", "intensity_window", "unscaled"]


def intensity_window(image: MetaTensor) -> dict[str, Any]:
    """
    The window that :py:class:`ScaleIntensityWindowd` scaled to [0, 1].

    Args:
        image: ``CxHxWxD``, after the transform and possibly further ones.

    Returns:
        ``low`` and ``high``, lists with an intensity for each channel; ``clipped``, the share of voxels outside, and its
        parts ``clipped_below`` and ``clipped_above``.
    """
    name = ScaleIntensityWindowd.__name__
    return next(op for op in reversed(image.applied_operations) if op["class"] == name)["extra_info"]


def unscaled(values: torch.Tensor, low: Sequence[float], high: Sequence[float]) -> torch.Tensor:
    """
    Map [0, 1] back to a window of intensities.

    Args:
        values: ``CxHxWxD``.
        low: intensity of each channel that 0 stands for.
        high: intensity of each channel that 1 stands for.

    Returns:
        the same shape, in the units of the file.
    """
    per_channel = (-1, *[1] * (values.ndim - 1))
    bottom, top = (values.new_tensor(side).reshape(per_channel) for side in (low, high))
    return values * (top - bottom) + bottom


class ScaleIntensityWindowd(MapTransform, TraceableTransform):
    """
    Scale a window of intensities to [0, 1] and clip what lies outside, as MONAI's ``ScaleIntensityRangePercentilesd`` and
    ``ScaleIntensityRanged`` do. The window and the shares of voxels that were clipped are recorded, for
    :py:func:`intensity_window`.

    Args:
        keys: keys of the images, each ``CxHxWxD``.
        percentiles: lower and upper percentile (0 to 100) of each channel that become 0 and 1.
        intensity_range: fixed lower and upper intensity instead, e.g. ``[-1000, 1000]`` HU for CT; None for percentiles.
        allow_missing_keys: do not raise when a key is missing.

    Raises:
        ValueError: for a window that is empty, and, when called, for a volume with values that are not finite or that are
            all the same.
    """

    def __init__(
        self,
        keys: KeysCollection,
        percentiles: Sequence[float],
        intensity_range: Sequence[float] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        for name, window in (("intensity_percentiles", percentiles), ("intensity_range", intensity_range)):
            if window is not None and (len(window) != 2 or not window[0] < window[1]):
                raise ValueError(f"`{name}` is {window!r}; it needs two numbers, the lower one first.")
        self.percentiles = [float(p) for p in percentiles]
        self.intensity_range = intensity_range

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key].to(torch.float32)
            low, high = self._window(image)
            below, above = ((image < low).float().mean().item(), (image > high).float().mean().item())
            clipped = {"clipped": below + above, "clipped_below": below, "clipped_above": above}
            scaled = ((image - low) / (high - low)).clamp_(0, 1)
            window = {"low": low.flatten().tolist(), "high": high.flatten().tolist(), **clipped}
            d[key] = self.push_transform(scaled, extra_info=window)
        return d

    def _window(self, image: MetaTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper intensity for each channel, ``Cx1x1x1``."""
        values = image.as_tensor()
        name = image.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "the volume")
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} has voxels that are NaN or infinite; repair it or take it out of `dataset_dir`.")
        if self.intensity_range is not None:
            window = torch.tensor(self.intensity_range, dtype=torch.float32).expand(len(values), 2)
        else:
            window = torch.stack([torch.as_tensor(percentile(channel, self.percentiles)) for channel in values])
            if (window[:, 0] == window[:, 1]).any():  # nearly all voxels have the same value
                window = torch.stack([values.flatten(1).amin(1), values.flatten(1).amax(1)], dim=1)
            if (window[:, 0] == window[:, 1]).any():
                raise ValueError(f"{name} is constant ({float(values.flatten()[0])}); take it out of `dataset_dir`.")
        low, high = window.float().reshape(len(values), 2, *[1] * (values.ndim - 1)).unbind(1)
        return low, high
