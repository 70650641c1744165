"""Spatial conditions, which are images or label maps: reading them on the grid of a volume."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import ImageMetaKey
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.json_files import Sha256, Share, checked, shortened
from scripts.bundle.machine import merged
from scripts.bundle.progress import ProgressBar
from scripts.data.grids import grid_of, on_grid, preprocessed_grid
from scripts.data.intensity_window import ScaleIntensityWindowd, intensity_window
from scripts.data.restored_volumes import with_record
from scripts.data.spatial_kinds import MOST_CLASSES, SpatialKind, labels_in
from scripts.data.volume_reader import check_shape, read_volume, state_of

THREADS = 4
LABEL_KEYS = (Keys.LABEL.value, "dseg", "seg", "mask")  # names that label maps have, in BIDS among others
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SpatialDescription:
    """
    What is known of the spatial condition of a volume.

    Args:
        kind: image or label map, and how it is encoded.
        source: path of the file, relative to ``dataset_dir``.
        source_state: hash of :py:func:`scripts.data.volume_reader.state_of`.
        intensity_low: intensity of each channel of an image that 0 stands for.
        intensity_high: intensity of each channel of an image that 1 stands for.
        covered: share of the volume's grid that its field of view covers.
        latent_sha256: hash of the file with the latents of its planes; None before it is encoded.
        labels_sha256: hash of the file with its label map on the preprocessed grid; None without one.
    """

    kind: SpatialKind
    source: str
    source_state: str
    intensity_low: tuple[float, ...] = ()
    intensity_high: tuple[float, ...] = ()
    covered: Share
    latent_sha256: Sha256 | None = None
    labels_sha256: Sha256 | None = None


def learn_kinds(
    items: Sequence[Mapping[str, Any]],
    spatial_keys: Sequence[str],
    label_keys: Sequence[str] = (),
    intensity_percentiles: Sequence[float] = (0.0, 99.9),
    intensity_range: Sequence[float] | None = None,
    spatial_ranges: Mapping[str, Sequence[float] | None] | None = None,
) -> dict[str, SpatialKind]:
    """
    The kind of each spatial condition of a run, over the volumes of all its processes. Label maps are those called
    ``label``, ``dseg``, ``seg`` or ``mask``, and ``label_keys``; a file that cannot be read is refused where it is encoded.

    Args:
        items: ``[{"image": path, "spatial": {key: path}, ...}, ...]`` of this process.
        spatial_keys: names of the conditions.
        label_keys: further names of label maps.
        intensity_percentiles: ``percentiles`` of :py:class:`ScaleIntensityWindowd`, for images.
        intensity_range: its ``intensity_range``.
        spatial_ranges: the same for single keys.

    Raises:
        ValueError: for label maps without a label, or with too many.
    """
    ranges = {**dict.fromkeys(spatial_keys, intensity_range), **(spatial_ranges or {})}
    for name, keys in (("label_keys", label_keys), ("spatial_ranges", ranges)):
        unknown = [key for key in keys if key not in spatial_keys]
        if unknown:
            raise ValueError(f"`{name}` has {unknown[0]!r}, which is not among `spatial_keys` {list(spatial_keys)}.")
    kinds = {}
    for key in spatial_keys:
        if key in label_keys or key in LABEL_KEYS:
            kinds[key] = SpatialKind(_classes(items, key))
            logger.info(f"{key!r} is a label map with the classes {shortened(list(kinds[key].classes))}")
        else:
            window = {"intensity_percentiles": intensity_percentiles, "intensity_range": ranges[key]}
            kinds[key] = checked(window, SpatialKind)
            logger.info(f"{key!r} is an image")
    return kinds


def _classes(items: Sequence[Mapping[str, Any]], key: str) -> tuple[int, ...]:
    paths = [item["spatial"][key] for item in items if key in item["spatial"]]
    with ThreadPoolExecutor(THREADS) as pool:
        bar = ProgressBar(pool.map(_labels, paths), total=len(paths), desc=f"labels of {key!r}", unit="volume", leave=False)
        found = merged(dict(zip(paths, bar)))
    classes = sorted({label for labels in found.values() for label in labels} - {0})
    if not 0 < len(classes) <= MOST_CLASSES:
        raise ValueError(f"the label maps {key!r} have {len(classes)} labels beside 0, and need 1 to {MOST_CLASSES}.")
    return tuple(classes)


def _labels(path: str) -> list[int]:
    try:
        return labels_in(read_volume(path)[0])
    except ValueError as error:
        logger.warning(f"{path} {str(error).removeprefix(path).strip()}")
        return []


class LoadSpatiald(Transform):
    """
    Load spatial conditions on the grid of the preprocessed image, or without an image on that of the first condition, turned
    to right, anterior and superior: label maps by the nearest voxel, images scaled to [0, 1] in the grid of their file and
    then interpolated linearly. Outside of their field of view they are 0.

    ``data["spatial"]``, ``{key: path}``, becomes ``{key: volume}``: ``1xHxWxD`` for a label map, int32, and ``CxHxWxD`` for
    an image, float32; each with its affine and its :py:class:`SpatialDescription`.

    Args:
        kinds: conditions that are loaded, in order; those that an item has not are left out.
        dataset_dir: folder; the descriptions hold paths relative to it.
        image_channels: number of channels of the network. An image may also have one, for all of them.
        spacing: spacing in mm along each axis without an image, or None for that of the first condition's file.

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
        loaded: dict[str, MetaTensor] = {}
        for key in (key for key in self.kinds if key in paths):
            like = image if isinstance(image, MetaTensor) else next(iter(loaded.values()), None)
            try:
                loaded[key] = self._load(paths[key], self.kinds[key], like)
            except ValueError as error:
                raise ValueError(f"{paths[key]} {str(error).removeprefix(paths[key]).strip()}") from error
        return {**data, "spatial": loaded}

    def _load(self, path: str, kind: SpatialKind, like: MetaTensor | None) -> MetaTensor:
        values, header = read_volume(path)
        if kind.is_label_map:
            kind.check(labels_in(values), path)
        check_shape(values.shape, 1 if values.ndim == 3 else self.image_channels)
        values = np.moveaxis(values, -1, 0) if values.ndim > 3 else values[None]
        known: dict[str, Any]
        if kind.is_label_map:
            values, known = values.astype(np.int32), {}
        else:
            image = MetaTensor(torch.from_numpy(values.astype(np.float32)), meta={ImageMetaKey.FILENAME_OR_OBJ: path})
            scale = ScaleIntensityWindowd(Keys.IMAGE, kind.intensity_percentiles, kind.intensity_range)
            image = scale({Keys.IMAGE: image})[Keys.IMAGE]
            values, window = image.as_tensor().numpy(), intensity_window(image)
            known = {name: tuple(window[name]) for name in ("intensity_low", "intensity_high")}
        grid = preprocessed_grid(header.grid, self.spacing) if like is None else grid_of(like)
        values, covered = on_grid(values, header.affine, grid, nearest=kind.is_label_map)
        source = os.path.relpath(path, self.dataset_dir)
        record = SpatialDescription(kind=kind, source=source, source_state=state_of(path), covered=covered, **known)
        return with_record(MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(grid.affine)), record)
