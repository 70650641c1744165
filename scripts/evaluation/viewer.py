"""Volumes in a page of which every slice can be looked at: ``viewer.js`` unpacks and draws what is packed here."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scripts.evaluation.html_pages import extents
from scripts.evaluation.pictures import ERROR_GAIN, PLANES, POSITION

__all__ = ["MAX_VOXELS", "View", "view_of"]

LEVELS = 255  # of a value of 8 bits
MAX_VOXELS = 2**25  # of a volume in a page, about 512x512x128


@dataclass(frozen=True)
class View:
    """
    One volume or two in the form that ``viewer.html.jinja`` takes.

    Args:
        titles: of the volumes; if there are two, also of their difference.
        shape: of what is shown, in voxels.
        start: index of its first voxel in the whole volume.
        whole: shape of the whole volume.
        affine: from voxel indices of the whole volume to mm, 4x4.
        low: intensity of the lowest level.
        high: intensity of the highest level.
        gain: how many times larger a difference is shown at first.
        voxels: of each volume, as ``_packed`` makes them.
    """

    titles: list[str]
    shape: list[int]
    start: list[int]
    whole: list[int]
    affine: list[list[float]]
    low: float
    high: float
    gain: int
    voxels: list[str]

    @property
    def step(self) -> float:
        """Difference of two levels. A value is rounded to a level, so that it is wrong by half a step at most."""
        return (self.high - self.low) / LEVELS

    @property
    def script(self) -> dict[str, Any]:
        """What ``viewer.js`` needs, apart from the voxels."""
        spacing = np.linalg.norm(np.array(self.affine)[:3, :3], axis=0)
        known = {key: getattr(self, key) for key in ("titles", "shape", "start", "affine", "low", "step")}
        return {**known, "planes": PLANES, "extents": extents(self.shape, spacing.tolist())}

    @property
    def position(self) -> list[int]:
        """The voxel to show at first, in the slices of ``draw_panels`` unless this is a part."""
        return [start + int(size * POSITION) for start, size in zip(self.start, self.shape)]


def view_of(
    volumes: Mapping[str, torch.Tensor],
    difference: str,
    affine: Sequence[Sequence[float]],
    low: float = 0.0,
    high: float = 1.0,
    gain: int = ERROR_GAIN,
    max_voxels: int = MAX_VOXELS,
) -> View:
    """
    Pack volumes for a page.

    Args:
        volumes: one or two by title, ``HxWxD`` in RAS orientation, values in [0, 1].
        difference: title of the second volume's difference from the first.
        affine: from voxel indices to mm, 4x4.
        low: intensity that 0 stands for.
        high: intensity that 1 stands for.
        gain: how many times larger the difference is shown at first.
        max_voxels: of larger volumes only a part is packed, in full resolution: where the volumes differ most.

    Returns:
        the volumes with 8 bits for a voxel, that is at 256 levels of the window [0, 1].
    """
    first, *others = volumes.values()
    part = _part((others[0] - first).square() if others else first, max_voxels)
    return View(
        titles=[*volumes, *[difference] * len(others)],
        shape=[each.stop - each.start for each in part],
        start=[each.start for each in part],
        whole=list(first.shape),
        affine=np.asarray(affine, dtype=float).tolist(),
        low=low,
        high=high,
        gain=gain,
        voxels=[_packed(volume[part]) for volume in volumes.values()],
    )


def _part(weight: torch.Tensor, max_voxels: int) -> tuple[slice, ...]:
    """A box of at most ``max_voxels``, nearly a cube, which along each axis has the largest sum of weights."""
    shape = weight.shape
    side = next(n for n in range(max(shape), 0, -1) if n == 1 or math.prod(min(n, size) for size in shape) <= max_voxels)
    box = []
    for axis, size in enumerate(shape):
        length = min(side, size)
        profile = weight.sum([other for other in range(len(shape)) if other != axis], dtype=torch.float64)
        start = int(profile.unfold(0, length, 1).sum(1).argmax())
        box.append(slice(start, start + length))
    return tuple(box)


def _packed(volume: torch.Tensor) -> str:
    """
    Levels with the first axis fastest, as differences along the first two axes, which compress better; in zlib's format and
    base64. ``unpack`` in ``viewer.js`` does the opposite.
    """
    differences = (LEVELS * volume.clamp(0, 1)).round().byte().permute(2, 1, 0).cpu().numpy()
    for axis in (2, 1):
        differences = np.diff(differences, axis=axis, prepend=np.uint8(0))  # modulo 256
    return base64.b64encode(zlib.compress(differences.tobytes())).decode()
