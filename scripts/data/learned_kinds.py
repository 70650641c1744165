"""Learns the spatial conditions of a data set: which of them are label maps, and what labels these have."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ignite.distributed as idist

from scripts.bundle.processes import merged
from scripts.bundle.progress import ProgressBar
from scripts.data.latents import described
from scripts.data.spatial_kinds import MOST_CLASSES, SpatialKind, labels_in
from scripts.data.volume_checks import explanation
from scripts.data.volume_reader import read_volume, state_of

__all__ = ["learn_kinds"]

LABEL = "label"
THREADS = 4
Range = Sequence[float]
logger = logging.getLogger(__name__)


def learn_kinds(
    items: Sequence[Mapping[str, Any]],
    dataset_dir: str,
    output_dir: str,
    spatial_keys: Sequence[str],
    label_keys: Sequence[str] = (),
    intensity_percentiles: Range = (0.0, 99.9),
    intensity_range: Range | None = None,
    spatial_ranges: Mapping[str, Range | None] | None = None,
) -> dict[str, SpatialKind]:
    """
    The kind of each spatial condition of a run, over the volumes of all its processes. Label maps are the key ``label`` and
    ``label_keys``; each is read once, unless a latent in ``output_dir`` says what labels it has. One that cannot be read is
    left out here, and refused where it is encoded.

    Args:
        items: ``[{"image": path, "spatial": {key: path}, ...}, ...]`` of this process.
        dataset_dir: folder of the volumes.
        output_dir: folder of the latents.
        spatial_keys: names of the conditions.
        label_keys: those that are label maps, beside ``label``.
        intensity_percentiles: of images, that become 0 and 1.
        intensity_range: of images, instead.
        spatial_ranges: ditto of single keys; None for the percentiles.

    Raises:
        ValueError: for label maps without a label, or with too many.
    """
    label_maps = [key for key in spatial_keys if key == LABEL or key in label_keys]
    low_and_high = {**dict.fromkeys(spatial_keys, intensity_range), **(spatial_ranges or {})}
    for name, keys in (("label_keys", label_keys), ("spatial_ranges", spatial_ranges or {})):
        unknown = sorted(set(keys) - set(spatial_keys))
        if unknown:
            raise ValueError(f"`{name}` has {unknown[0]!r}, which is not among `spatial_keys` {list(spatial_keys)}.")
    percentiles: Any = tuple(map(float, intensity_percentiles))
    kinds = {}
    for key in spatial_keys:
        if key in label_maps:
            kinds[key] = SpatialKind(_classes(items, key, dataset_dir, output_dir))
        else:
            ends = low_and_high[key]
            kinds[key] = SpatialKind((), percentiles, None if ends is None else (float(ends[0]), float(ends[1])))
        if idist.get_rank() == 0:
            logger.info(f"spatial condition {key!r}: {kinds[key].summary()}")
    return kinds


def _classes(items: Sequence[Mapping[str, Any]], key: str, dataset_dir: str, output_dir: str) -> tuple[int, ...]:
    with_key = [item for item in items if key in item["spatial"]]
    bar = ProgressBar(total=len(with_key), desc=f"labels of {key!r}", unit="volume", leave=False)
    with bar, ThreadPoolExecutor(THREADS) as pool:

        def labels_of(item: Mapping[str, Any]) -> list[int] | str:
            found = _labels(item, key, dataset_dir, output_dir)
            bar.update()
            return found

        found = merged(dict(zip((item["spatial"][key] for item in with_key), pool.map(labels_of, with_key))))
    problems = [f"; {path} {problem}" for path, problem in sorted(found.items()) if isinstance(problem, str)]
    classes = sorted({label for labels in found.values() if not isinstance(labels, str) for label in labels} - {0})
    if not classes or len(classes) > MOST_CLASSES:
        raise ValueError(
            f"the label maps {key!r} below {dataset_dir} have {len(classes)} different labels beside 0, and need 1 to "
            f"{MOST_CLASSES}{''.join(problems[:1])}"
        )
    return tuple(classes)


def _labels(item: Mapping[str, Any], key: str, dataset_dir: str, output_dir: str) -> list[int] | str:
    """The labels of a label map, or why they are unknown."""
    path = item["spatial"][key]
    known = described(item, dataset_dir, output_dir)
    if known is not None and key in known.spatial:
        before = known.spatial[key]
        if (before.source, before.source_state) == (os.path.relpath(path, dataset_dir), state_of(path)):
            return list(before.labels)
    try:
        return labels_in(read_volume(path)[0])
    except Exception as error:  # readers raise errors of any type
        return explanation(error, path)
