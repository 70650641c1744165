"""Scaling of an intensity window to [0, 1], without the voxels that hold no measurement: NaN, infinite, and the padding of
CT outside of the scanner's circle. Both are recorded and can be restored."""

from __future__ import annotations

import base64
import functools
import logging
import math
import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, TraceableTransform
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import ImageMetaKey

from scripts.bundle.json_files import Must, checked

FEW = 0.1  # percent of the voxels
FAR = 0.1  # of the window; in clinical CT and MR the minimum is at most 0.01 of it below the 0.1st percentile
SPARSE = 0.95  # share of voxels with one value; 0.81 in a map of white matter, the sparsest of the ordinary volumes
MOST_MISSING = 0.99  # of a channel; 0.8 around a brain
LARGEST = 1e38  # so that differences are float32 numbers too
LEAST_RANGE = 0.01  # of the window; the brain alone takes 0.04 of -1000 to 1000 HU
LOWEST = -1500  # HU; less is no measurement in CT, whose air is at -1000, or -1024 as the least of 12 bits
PADDING_FAR = 0.1  # of the range of the other voxels. In CT padded with -1500 the gap is 0.25 of it, with -3024 it is 1
PADDING_SHARE = 0.001  # of the voxels, at least
LEVEL = 6  # of zlib
Range = Annotated[tuple[float, float], Must("two numbers with the lower one first", lambda pair: pair[0] < pair[1])]
logger = logging.getLogger(__name__)
warn_once = functools.cache(logger.warning)  # a training reads a file many times


def intensity_window(image: MetaTensor) -> dict[str, Any]:
    """
    What :py:class:`ScaleIntensityWindowd` did to an image, ``CxHxWxD``, which further transforms may have changed.

    Returns:
        ``intensity_low`` and ``intensity_high``, for each channel the intensity that became 0 and the one that became 1;
        ``clipped``, the share of voxels outside, and its parts ``clipped_below`` and ``clipped_above``; ``missing``, the
        masks of voxels without a measurement, see :py:func:`scripts.data.intensity_window.pack_missing`.
    """
    name = ScaleIntensityWindowd.__name__
    return next(op for op in reversed(image.applied_operations) if op["class"] == name)["extra_info"]


def unscaled(values: torch.Tensor, low: Sequence[float], high: Sequence[float]) -> torch.Tensor:
    """Map [0, 1], ``CxHxWxD``, back to the intensities of each channel from ``low`` to ``high``."""
    bottom, top = (_per_channel(side, values) for side in (low, high))
    return values * (top - bottom) + bottom


def measured_voxels(channels: torch.Tensor, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    The masks of :py:func:`find_missing`, and the mask of the other voxels, which decide about an intensity window.

    Raises:
        ValueError: for a channel that is constant or nearly all of whose voxels are missing, with text that begins with
            ``name``.
    """
    missing = find_missing(channels)
    present = ~torch.stack([torch.zeros_like(channels, dtype=torch.bool), *missing.values()]).any(0)
    for index, (channel, mask) in enumerate(zip(channels, present)):
        about = f"{name} (channel {index})" if len(channels) > 1 else name
        share = 1 - mask.float().mean().item()
        if share > MOST_MISSING:
            raise ValueError(f"{about} is NaN, infinite or padding in {share:.1%} of its voxels.")
        low, high = channel[mask].aminmax()
        if low == high:
            raise ValueError(f"{about} is constant ({low:g}).")
    return missing, present


class ScaleIntensityWindowd(MapTransform, TraceableTransform):
    """
    Scale a window of intensities to [0, 1] and clip what lies outside, as MONAI's ``ScaleIntensityRangePercentilesd`` and
    ``ScaleIntensityRanged`` do, with a window of percentiles that a few voxels cannot decide. Where the lower percentile,
    such as the minimum, is far below the 0.1st, that one is the lower end. In a sparse volume, nearly all voxels of which
    have one value, the percentiles are those of the others.

    Voxels without a measurement (:py:func:`scripts.data.intensity_window.find_missing`) are left out and set to 0. They are
    recorded in the file's grid, so this comes before the volume is turned or resampled. What was done is recorded, for
    :py:func:`intensity_window`.

    Args:
        keys: keys of the images, each ``CxHxWxD``.
        percentiles: lower and upper percentile (0 to 100) of each channel that become 0 and 1.
        intensity_range: fixed lower and upper intensity instead, e.g. ``[-1000, 1000]`` HU for CT; None for percentiles.

    Raises:
        ValueError: for a window that is empty, and, when called, for a channel that is constant or nearly all of whose
            voxels are missing.
    """

    def __init__(
        self, keys: KeysCollection, percentiles: Sequence[float], intensity_range: Sequence[float] | None = None
    ) -> None:
        super().__init__(keys)
        self.percentiles = checked(percentiles, Range, "intensity_percentiles")
        self.intensity_range = checked(intensity_range, Range | None, "intensity_range")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key].to(torch.float32)
            values, name = image.as_tensor(), str(image.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "the volume"))
            missing, present = measured_voxels(values, name)
            windows = [self._window(channel[mask], name) for channel, mask in zip(values, present)]
            low, high = (_per_channel(side, values) for side in zip(*windows))
            scaled = ((image - low) / (high - low)).clamp_(0, 1).masked_fill_(~present, 0)
            below, above = ((mask & present).float().mean().item() for mask in (values < low, values > high))
            window = {
                "intensity_low": low.flatten().tolist(),
                "intensity_high": high.flatten().tolist(),
                "clipped": below + above,
                "clipped_below": below,
                "clipped_above": above,
                "missing": pack_missing(missing),
            }
            d[key] = self.push_transform(scaled, extra_info=window)
        return d

    def _window(self, channel: torch.Tensor, name: str) -> tuple[float, float]:
        """Lower and upper intensity of the voxels of a channel."""
        if self.intensity_range is None:
            low, high = _percentile_window(channel, self.percentiles)
        else:
            low, high = self.intensity_range
            least, greatest = (float(end) for end in channel.aminmax())
            used = max(0.0, (min(greatest, high) - max(least, low)) / (high - low))
            if used < LEAST_RANGE:
                warn_once(
                    f"{name}: its intensities, {least:g} to {greatest:g}, take {used:.1%} of `intensity_range`, {low:g} to "
                    f"{high:g}; nearly nothing is left of its contrast"
                )
        if max(-low, high) > LARGEST:
            raise ValueError(f"{name} has intensities from {low:g} to {high:g}; more than {LARGEST:g} are not supported.")
        return low, high


def _percentile_window(values: torch.Tensor, percentiles: Sequence[float]) -> tuple[float, float]:
    """The window of percentiles, as :py:class:`ScaleIntensityWindowd` says."""
    lower, upper = percentiles
    few = min(FEW, 100 - upper)
    low, inner, background, high = percentile(values, [lower, few, 50.0, upper]).tolist()  # type: ignore
    sparse = (values == background).float().mean() >= SPARSE
    if sparse:
        others = values[values != background].numpy()
        low, high = (float(np.percentile(others, p, method="lower")) for p in percentiles)
        inner = float(np.percentile(others, few, method="higher"))
    if inner - low > FAR * (high - inner):
        low = inner
    if sparse:
        low, high = min(low, background), max(high, background)
    if not low < high:
        low, high = (float(end) for end in values.aminmax())
    return low, high


def _per_channel(side: Sequence[float], channels: torch.Tensor) -> torch.Tensor:
    """A number for each channel, shaped for arithmetic with ``CxHxWxD``."""
    return channels.new_tensor(side).reshape(-1, *[1] * (channels.ndim - 1))


def find_missing(channels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Masks, ``CxHxWxD``, of the voxels that hold no measurement, by their value, such as ``"nan"`` or ``"-3024.0"``; usually
    none. A padding value is one of -1500 or less that many voxels have, and that lies far below all higher ones.
    """
    low, high = (float(end) for end in channels.aminmax())  # NaN if any voxel is
    if low > LOWEST and high < math.inf:
        return {}
    found = {"nan": channels.isnan(), "inf": channels == math.inf, "-inf": channels == -math.inf}
    masks = {value: mask for value, mask in found.items() if mask.any()}
    for index, channel in enumerate(channels):
        rest = channel[channel.isfinite()]
        while (value := _padding(rest)) is not None:
            masks.setdefault(str(value), torch.zeros_like(channels, dtype=torch.bool))[index] = channel == value
            rest = rest[rest > value]
    return masks


def _padding(values: torch.Tensor) -> float | None:
    """The padding value below all others, or None."""
    if not len(values) or values.min() > LOWEST:
        return None
    value = float(percentile(values, 100 * PADDING_SHARE))  # type: ignore[arg-type]  # not the minimum, which one voxel may be
    rest = values[values > value]
    if value > LOWEST or not len(rest) or (values == value).float().mean() < PADDING_SHARE:
        return None
    bottom, top = percentile(rest, [100 * PADDING_SHARE, 100 - 100 * PADDING_SHARE]).tolist()  # type: ignore[union-attr,arg-type]
    return value if bottom - value > PADDING_FAR * (top - bottom) else None


def pack_missing(masks: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The masks of :py:func:`find_missing` as text, for JSON."""
    return {
        value: base64.b64encode(zlib.compress(np.packbits(mask.numpy()).tobytes(), LEVEL)).decode()
        for value, mask in masks.items()
    }


def put_back_missing(channels: np.ndarray, packed: Mapping[str, str]) -> None:
    """
    Write the values of missing voxels into a volume, ``CxHxWxD``, in place.

    Raises:
        ValueError: for text that :py:func:`pack_missing` does not make of a mask of this shape.
    """
    size = -(-channels.size // 8)
    for value, text in packed.items():
        try:
            content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
            if len(content) != size:
                raise ValueError(f"it is not one of {channels.shape} voxels")
        except (ValueError, zlib.error) as error:
            raise ValueError(f"the mask of missing voxels with the value {value} is damaged: {error}.") from error
        bits = np.unpackbits(np.frombuffer(content, np.uint8), count=channels.size)
        channels[bits.reshape(channels.shape).astype(bool)] = float(value)
