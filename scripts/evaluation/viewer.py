"""Volumes in a page of which every slice can be looked at: ``viewer.js`` unpacks and draws what is packed here."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from scripts.evaluation.pictures import ERROR_GAIN, PLANES, POSITION
from scripts.evaluation.reports import extents

View = dict[str, Any]  # as :py:func:`view_of` makes it
LARGEST = 255  # value of 8 bits
MAX_VOXELS = 2**25  # of a volume in a page, about 512x512x128


def view_of(
    volumes: Mapping[str, torch.Tensor],
    difference: str,
    affine: Sequence[Sequence[float]],
    window: tuple[float, float] = (0.0, 1.0),
    gain: int = ERROR_GAIN,
    max_voxels: int = MAX_VOXELS,
) -> View:
    """
    Pack volumes for a page, with 8 bits for a voxel, that is at 256 levels of the window [0, 1].

    Args:
        volumes: one or two by title, ``HxWxD`` in RAS orientation, values in [0, 1].
        difference: title of the second volume's difference from the first.
        affine: from voxel indices to mm, 4x4.
        window: intensities that 0 and 1 stand for.
        gain: how many times larger the difference is shown at first.
        max_voxels: of larger volumes only a part is packed, in full resolution: where the volumes differ most.

    Returns:
        what ``viewer.html.jinja`` takes: ``about``, which ``viewer.js`` reads; ``voxels`` of each volume; ``whole``, the
        shape of the whole volume; ``position``, the voxel to show at first, in the slices of ``panels_of`` unless this is a
        part; ``high`` and ``gain``.
    """
    first, *others = volumes.values()
    part = _part((others[0] - first).square() if others else first, max_voxels)
    start, shape = [each.start for each in part], [each.stop - each.start for each in part]
    low, high = window
    spacing = np.linalg.norm(np.array(affine)[:3, :3], axis=0).tolist()
    about = {
        "titles": [*volumes, *[difference] * len(others)],
        "shape": shape,
        "start": start,
        "affine": affine,
        "low": low,
        "step": (high - low) / LARGEST,
        "planes": PLANES,
        "extents": extents(shape, spacing),
    }
    return {
        "about": about,
        "voxels": [_packed(volume[part]) for volume in volumes.values()],
        "whole": list(first.shape),
        "position": [begin + int(size * POSITION) for begin, size in zip(start, shape)],
        "high": high,
        "gain": gain,
    }


def _part(weight: torch.Tensor, max_voxels: int) -> tuple[slice, ...]:
    """A box of at most ``max_voxels``, nearly a cube, which along each axis has the largest sum of weights."""
    shape = weight.shape
    side = next(n for n in range(max(shape), 0, -1) if n == 1 or math.prod(min(n, size) for size in shape) <= max_voxels)
    box = []
    for axis, size in enumerate(shape):
        length = min(side, size)
        profile = weight.sum([*{0, 1, 2} - {axis}], dtype=torch.float64)
        start = int(profile.unfold(0, length, 1).sum(1).argmax())
        box.append(slice(start, start + length))
    return tuple(box)


def _packed(volume: torch.Tensor) -> str:
    """
    Levels with the first axis fastest, as differences along the first two axes, which compress better; in zlib's format and
    base64. ``unpack`` in ``viewer.js`` does the opposite.
    """
    differences = (LARGEST * volume.clamp(0, 1)).round().byte().permute(2, 1, 0).cpu().numpy()
    for axis in (2, 1):
        differences = np.diff(differences, axis=axis, prepend=np.uint8(0))  # modulo 256
    return base64.b64encode(zlib.compress(differences.tobytes())).decode()
