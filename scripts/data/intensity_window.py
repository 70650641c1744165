"""Scaling of an intensity window to [0, 1] that records the window, so that a reconstruction can be returned in the units of
its input."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, TraceableTransform
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import ImageMetaKey

from scripts.data.missing_voxels import find_missing, pack_missing

__all__ = ["ScaleIntensityWindowd", "intensity_window", "measured_voxels", "unscaled"]

FEW = 0.1  # percent of the voxels
FAR = 0.1  # of the window; in clinical CT and MR the minimum is at most 0.01 of it below the 0.1st percentile
SPARSE = 0.95  # share of voxels with one value; 0.81 in a map of white matter, the sparsest of the ordinary volumes
MOST_MISSING = 0.99  # of a channel; 0.8 around a brain
LARGEST = 1e38  # so that differences are float32 numbers too
LEAST_RANGE = 0.01  # of the window; the brain alone takes 0.04 of -1000 to 1000 HU
logger = logging.getLogger(__name__)


def intensity_window(image: MetaTensor) -> dict[str, Any]:
    """
    The window that :py:class:`ScaleIntensityWindowd` scaled to [0, 1].

    Args:
        image: ``CxHxWxD``, after the transform and possibly further ones.

    Returns:
        ``low`` and ``high``, lists with an intensity for each channel; ``clipped``, the share of voxels outside, and its
        parts ``clipped_below`` and ``clipped_above``; ``missing``, the masks of voxels without a measurement, packed by
        :py:func:`scripts.data.missing_voxels.pack_missing`.
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
    bottom, top = (_per_channel(values.new_tensor(side), values) for side in (low, high))
    return values * (top - bottom) + bottom


def measured_voxels(channels: torch.Tensor, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    The voxels that decide about an intensity window.

    Args:
        channels: ``CxHxWxD``.
        name: of the file, for errors.

    Returns:
        masks of the others, see :py:func:`scripts.data.missing_voxels.find_missing`; and the voxels of each channel by its
        name for messages, of any shape.

    Raises:
        ValueError: for a channel that is constant or nearly all of whose voxels are missing, with text that starts with
            ``name``.
    """
    missing, measured = find_missing(channels), {}
    present = ~torch.stack([*missing.values()]).any(0) if missing else None
    for index, channel in enumerate(channels):
        about = f"{name} (channel {index})" if len(channels) > 1 else name
        if present is not None:
            share = 1 - present[index].float().mean().item()
            if share > MOST_MISSING:
                raise ValueError(f"{about} is NaN, infinite or padding in {share:.1%} of its voxels.")
            channel = channel[present[index]]
        low, high = channel.aminmax()
        if low == high:
            raise ValueError(f"{about} is constant ({low:g}).")
        measured[about] = channel
    return missing, measured


class ScaleIntensityWindowd(MapTransform, TraceableTransform):
    """
    Scale a window of intensities to [0, 1] and clip what lies outside, as MONAI's ``ScaleIntensityRangePercentilesd`` and
    ``ScaleIntensityRanged`` do, with a window of percentiles that a few voxels cannot decide. Where the lower percentile,
    such as the minimum, is far below the 0.1st, that one is the lower end. In a sparse volume, nearly all voxels of which
    have one value, the percentiles are those of the others.

    Voxels without a measurement (:py:func:`scripts.data.missing_voxels.find_missing`) are left out and set to 0. They are
    recorded in the file's grid, so this comes before the volume is turned or resampled. The window and the shares of voxels
    that were clipped are recorded too, for :py:func:`intensity_window`.

    Args:
        keys: keys of the images, each ``CxHxWxD``.
        percentiles: lower and upper percentile (0 to 100) of each channel that become 0 and 1.
        intensity_range: fixed lower and upper intensity instead, e.g. ``[-1000, 1000]`` HU for CT; None for percentiles.
        allow_missing_keys: do not raise when a key is missing.

    Raises:
        ValueError: for a window that is empty, and, when called, for a channel that is constant or nearly all of whose
            voxels are missing.
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
            values, name = image.as_tensor(), str(image.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "the volume"))
            missing, measured = measured_voxels(values, name)
            windows = [self._window(channel, about) for about, channel in measured.items()]
            low, high = (_per_channel(values.new_tensor(side), values) for side in zip(*windows))
            scaled = ((image - low) / (high - low)).clamp_(0, 1)
            below, above = values < low, values > high
            if missing:
                absent = torch.stack([*missing.values()]).any(0)
                scaled.masked_fill_(absent, 0)
                below, above = below & ~absent, above & ~absent
                counts = " and ".join(f"{int(mask.sum()):,} voxels of {value}" for value, mask in missing.items())
                _log_once(logging.INFO, f"{name}: {counts} are left out of the intensity window; they come back as they are")
            window = {
                "low": low.flatten().tolist(),
                "high": high.flatten().tolist(),
                "clipped_below": below.float().mean().item(),
                "clipped_above": above.float().mean().item(),
                "missing": pack_missing(missing),
            }
            window["clipped"] = window["clipped_below"] + window["clipped_above"]
            d[key] = self.push_transform(scaled, extra_info=window)
        return d

    def _window(self, channel: torch.Tensor, name: str) -> tuple[float, float]:
        """Lower and upper intensity of the voxels of a channel."""
        if self.intensity_range is None:
            low, high = _percentile_window(channel, self.percentiles, name)
        else:
            low, high = map(float, self.intensity_range)
            least, greatest = (float(end) for end in channel.aminmax())
            used = max(0.0, (min(greatest, high) - max(least, low)) / (high - low))
            if used < LEAST_RANGE:
                _log_once(
                    logging.WARNING,
                    f"{name}: its intensities, {least:g} to {greatest:g}, take {used:.1%} of `intensity_range`, {low:g} to "
                    f"{high:g}; nearly nothing is left of its contrast",
                )
        if max(-low, high) > LARGEST:
            raise ValueError(f"{name} has intensities from {low:g} to {high:g}; more than {LARGEST:g} are not supported.")
        return low, high


def _percentile_window(values: torch.Tensor, percentiles: Sequence[float], name: str) -> tuple[float, float]:
    """The window of percentiles, as :py:class:`ScaleIntensityWindowd` says; ``name`` is for the log."""
    lower, upper = percentiles
    few = min(FEW, 100 - upper)
    low, inner, background, high = percentile(values, [lower, few, 50.0, upper]).tolist()  # type: ignore
    sparse = (values == background).float().mean() >= SPARSE
    if sparse:
        others = values[values != background].numpy()
        low, high = (float(np.percentile(others, p, method="lower")) for p in percentiles)
        inner = float(np.percentile(others, few, method="higher"))
    far_below = inner - low > FAR * (high - inner)
    if far_below:
        low = inner
    if sparse:
        low, high = min(low, background), max(high, background)
    if not low < high:
        low, high = (float(end) for end in values.aminmax())
    elif far_below:
        _log_once(logging.INFO, f"{name}: few voxels are far below the others, and are clipped at {low:g}")
    return low, high


def _per_channel(side: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """A number for each channel, shaped for arithmetic with ``CxHxWxD``."""
    return side.reshape(-1, *[1] * (channels.ndim - 1))


@functools.cache
def _log_once(level: int, message: str) -> None:
    """For messages about a file, which is read many times in a training."""
    logger.log(level, message)
