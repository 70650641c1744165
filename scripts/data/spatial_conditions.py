"""Loads the spatial conditions of a volume on its grid, and learns what labels they have."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import ImageMetaKey
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.json_files import Sha256, Share, checked
from scripts.data.grids import Grid, on_grid, preprocessed_grid
from scripts.data.intensity_window import ScaleIntensityWindowd, intensity_window
from scripts.data.restored_volumes import Number, Source, with_record
from scripts.data.spatial_kinds import SpatialKind, labels_in
from scripts.data.volume_checks import check_shape, explanation
from scripts.data.volume_reader import read_volume, state_of

__all__ = ["LoadSpatiald", "SpatialDescription", "SpatialRecord"]


@dataclass(frozen=True, kw_only=True)
class SpatialRecord:
    """
    What is known of a spatial condition.

    Args:
        kind: image or label map, and how it is encoded.
        source: path of the file, relative to ``dataset_dir``.
        source_state: state of the file, see :py:func:`scripts.data.volume_reader.state_of`.
        labels: of the file's label map, 0 included.
        intensity_low: intensity of each channel of an image that 0 stands for.
        intensity_high: intensity of each channel of an image that 1 stands for.
        covered: share of the volume's grid that its field of view covers.
    """

    kind: SpatialKind
    source: Source
    source_state: str
    labels: tuple[int, ...] = ()
    intensity_low: tuple[Number, ...] = ()
    intensity_high: tuple[Number, ...] = ()
    covered: Share


@dataclass(frozen=True, kw_only=True)
class SpatialDescription(SpatialRecord):
    """
    What the description of a latent says of a spatial condition.

    Args:
        latent_sha256: hash of the file with the latents of its planes.
        labels_sha256: hash of the file with its label map on the preprocessed grid.
    """

    latent_sha256: Sha256
    labels_sha256: Sha256 | None = None


class LoadSpatiald(Transform):
    """
    Load spatial conditions on the grid of the preprocessed image, or without an image on that of the first condition, turned
    to right, anterior and superior: label maps by the nearest voxel, images scaled to [0, 1] in the grid of their file and
    then interpolated linearly. Outside of their field of view they are 0.

    ``data["spatial"]``, ``{key: path}``, becomes ``{key: volume}``: ``1xHxWxD`` for a label map, int32, and ``CxHxWxD`` for
    an image, float32; each with its affine and its record (:py:func:`scripts.data.restored_volumes.record_of`).

    Args:
        kinds: the conditions that are loaded, in order; those that an item has not are left out.
        dataset_dir: folder; the records hold paths relative to it.
        image_channels: number of channels of the network. An image may also have one, for all of them.
        spacing: mm along each axis without an image, or None for that of the first condition's file.

    Raises:
        ValueError: when called, for a label map with other values than integers or labels that are not among the classes,
            a wrong number of channels, or a volume that does not overlap the grid.
    """

    def __init__(
        self,
        kinds: Mapping[str, SpatialKind],
        dataset_dir: str,
        image_channels: int = 1,
        spacing: float | Sequence[float] | None = None,
    ) -> None:
        self.kinds, self.dataset_dir, self.image_channels, self.spacing = kinds, dataset_dir, image_channels, spacing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image, paths = data.get(Keys.IMAGE), data.get("spatial", {})
        grid = Grid(tuple(image.shape[1:]), image.affine.numpy()) if isinstance(image, MetaTensor) else None
        loaded: dict[str, MetaTensor] = {}
        for key in (key for key in self.kinds if key in paths):
            try:
                loaded[key] = self._load(paths[key], self.kinds[key], grid)
            except Exception as error:  # readers raise errors of any type
                raise ValueError(f"{paths[key]} {explanation(error, paths[key])}") from error
            grid = grid or Grid(tuple(loaded[key].shape[1:]), loaded[key].affine.numpy())
        return {**data, "spatial": loaded}

    def _load(self, path: str, kind: SpatialKind, grid: Grid | None) -> MetaTensor:
        values, affine = read_volume(path)
        values = np.moveaxis(values, -1, 0) if values.ndim > 3 else values[None]
        one_channel = kind.is_label_map or len(values) == 1
        check_shape((*values.shape[1:], len(values)), 1 if one_channel else self.image_channels)
        known: dict[str, Any] = {
            "kind": asdict(kind),
            "source": os.path.relpath(path, self.dataset_dir),
            "source_state": state_of(path),
        }
        if kind.is_label_map:
            labels = labels_in(values[0])
            kind.check(torch.tensor([labels]), "")
            values, known = values.astype(np.int32), {**known, "labels": tuple(labels)}
        else:
            values, window = _scaled(values, affine, path, kind)
            known |= {f"intensity_{side}": tuple(window[side]) for side in ("low", "high")}
        grid = grid or preprocessed_grid(Grid(values.shape[1:], affine), self.spacing)
        values, covered = on_grid(values, affine, grid, nearest=kind.is_label_map)
        record = checked({**known, "covered": covered}, SpatialRecord)
        return with_record(MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(grid.affine)), record)


def _scaled(values: np.ndarray, affine: np.ndarray, path: str, kind: SpatialKind) -> tuple[np.ndarray, dict[str, Any]]:
    """An image in [0, 1], ``CxHxWxD``, and its window."""
    image = MetaTensor(torch.from_numpy(values.astype(np.float32)), meta={ImageMetaKey.FILENAME_OR_OBJ: path})
    scale = ScaleIntensityWindowd(Keys.IMAGE, kind.intensity_percentiles, kind.intensity_range)
    scaled = scale({Keys.IMAGE: image})[Keys.IMAGE]
    return scaled.as_tensor().numpy(), intensity_window(scaled)
