"""Voxels that hold no measurement: NaN, infinite, and the padding of CT outside the scanner's circle."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from monai.transforms.utils_pytorch_numpy_unification import percentile

__all__ = ["find_missing", "pack_missing", "put_back_missing"]

LOWEST = -1500  # HU; less is no measurement in CT, whose air is at -1000, or -1024 as the least of 12 bits
FAR = 0.1  # of the range of the other voxels. In CT padded with -1500 the gap is 0.25 of it, with -3024 it is 1
SHARE = 0.001  # of the voxels, at least, for a padding value
LEVEL = 6  # of zlib


def find_missing(channels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Find the voxels that hold no measurement. A padding value is one of -1500 or less that many voxels have, and that lies
    far below all higher ones.

    Args:
        channels: ``CxHxWxD``.

    Returns:
        A mask for each value, such as ``"nan"`` or ``"-3024.0"``, that is found; none in the usual case.
    """
    low, high = (float(end) for end in channels.aminmax())  # NaN if any voxel is
    masks = {}
    if not math.isfinite(low) or not math.isfinite(high):
        found = {"nan": channels.isnan(), "inf": channels == math.inf, "-inf": channels == -math.inf}
        masks = {value: mask for value, mask in found.items() if mask.any()}
    if masks or low <= LOWEST:
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
    value = float(percentile(values, 100 * SHARE))  # type: ignore[arg-type]  # not the minimum, which one voxel may be
    rest = values[values > value]
    if value > LOWEST or not len(rest) or (values == value).float().mean() < SHARE:
        return None
    bottom, top = percentile(rest, [100 * SHARE, 100 - 100 * SHARE]).tolist()  # type: ignore[union-attr,arg-type]
    return value if bottom - value > FAR * (top - bottom) else None


def pack_missing(masks: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The masks of :py:func:`find_missing` as text, for JSON."""
    return {
        value: base64.b64encode(zlib.compress(np.packbits(mask.numpy()).tobytes(), LEVEL)).decode()
        for value, mask in masks.items()
    }


def put_back_missing(channels: np.ndarray, packed: Mapping[str, str]) -> None:
    """
    Write the values of voxels that were missing into a volume, in place.

    Args:
        channels: ``CxHxWxD``, of the shape in which they were found.
        packed: result of :py:func:`pack_missing`.

    Raises:
        ValueError: for text that is not a mask of this shape.
    """
    size = -(-channels.size // 8)
    for value, text in packed.items():
        try:
            content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
        except (ValueError, zlib.error) as error:
            raise ValueError(f"the mask of missing voxels with the value {value} is damaged ({error})") from error
        if len(content) != size:
            raise ValueError(f"the mask of missing voxels with the value {value} is not one of {channels.shape} voxels")
        bits = np.unpackbits(np.frombuffer(content, np.uint8), count=channels.size)
        channels[bits.reshape(channels.shape).astype(bool)] = float(value)
