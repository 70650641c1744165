"""Checks whether volumes can be used: every file is read completely before the first epoch, so that a bad file does not end
a run hours later. Label maps are known by their voxels."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.transforms import MapTransform

from scripts.bundle.files import write_atomically
from scripts.bundle.json_files import read_dataclass
from scripts.bundle.machine import merged, share_of
from scripts.bundle.progress import ProgressBar
from scripts.data.intensity_window import measured_voxels
from scripts.data.volume_lists import Lists, describe
from scripts.data.volume_reader import read_volume, state_of

SHOWN = 20  # problems in an error message; the log has all
MAX_CACHE = 2**30  # bytes of the file of results; a million volumes take a quarter of it
LABEL_MAP = "looks like a label map: few integers, in regions. If it is an image, name it in `image_glob`."
MAX_LABELS = 256
FEW_LABELS = 4  # whose regions may be thin
LEAST_EQUAL = 0.6  # share of a voxel's neighbours that have its label
SAMPLED = 2**20  # about so many voxels are looked at before all are
logger = logging.getLogger(__name__)


def usable_volumes(
    lists: Lists,
    image_channels: int,
    skip_bad_files: bool,
    cache: str,
    max_volumes: int | None = None,
    num_threads: int = 4,
    guess_labels: bool = False,
) -> Lists:
    """
    Check all volumes (:py:func:`find_problem`) and log their number, sizes and spacings. Processes share the work.

    Args:
        lists: ``{"training": [{"image": path}, ...], "validation": [...]}``.
        image_channels: number of channels that every volume must have.
        skip_bad_files: leave out the volumes that cannot be used, instead of stopping.
        cache: path of a JSON file with the results; only new and changed volumes are checked again.
        max_volumes: check and return only so many of each list.
        num_threads: files to read at the same time.
        guess_labels: leave out what looks like a label map, with a line of the log.

    Returns:
        the lists without the volumes that cannot be used.

    Raises:
        ValueError: when volumes cannot be used and are not to be skipped, or when a list would be empty without them; it
            names the files and the reasons.
    """
    lists = {name: items[:max_volumes] for name, items in lists.items()}
    paths = sorted({item["image"] for items in lists.values() for item in items})
    problems = _check_all(paths, image_channels, Path(cache), num_threads)
    if not guess_labels:
        problems = {path: problem for path, problem in problems.items() if problem != LABEL_MAP}
    lines = [f"{path} {problem}" for path, problem in problems.items()]
    log = logger.warning if idist.get_rank() == 0 else logger.debug
    for line in lines:
        log(line)
    good = {name: [item for item in items if item["image"] not in problems] for name, items in lists.items()}
    empty = [name for name, items in good.items() if lists[name] and not items]
    if empty or (set(problems.values()) - {LABEL_MAP} and not skip_bad_files):
        end = f"Nothing is left for {' and '.join(empty)}." if empty else "Set `skip_bad_files` to go on without them."
        first = f"{len(problems)} of {len(paths)} volumes cannot be used:"
        raise ValueError("\n  ".join([first, *lines[:SHOWN], *["..."] * (len(lines) > SHOWN), end]))
    if problems:
        log(f"going on without {len(problems)} of {len(paths)} volumes")
    for name, items in good.items():
        if items:
            logger.info(f"{name}: {describe(items)}")
    return good


def find_problem(path: str, image_channels: int) -> str | None:
    """
    Read a whole volume and say why it cannot be trained on, as text that follows the path: None when it can,
    :py:data:`LABEL_MAP` for one that can but should not.
    """
    try:
        values = np.asarray(read_volume(path, image_channels)[0], dtype=np.float32)
        measured_voxels(torch.from_numpy(values.reshape(*values.shape[:3], -1)).movedim(-1, 0), path)
    except (ValueError, MemoryError, RuntimeError) as error:
        return str(error).removeprefix(path).strip()
    return LABEL_MAP if is_label_map(values) else None


class LabelMapError(ValueError):
    """A volume that :py:class:`RefuseLabelMapd` refuses."""


class RefuseLabelMapd(MapTransform):
    """
    Refuse volumes, ``CxHxWxD`` as they were read, that look like label maps (:py:func:`is_label_map`).

    Raises:
        LabelMapError: when called, for a label map.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            if is_label_map(np.moveaxis(np.asarray(data[key]), 0, -1)):
                raise LabelMapError(LABEL_MAP)
        return dict(data)


def is_label_map(values: np.ndarray) -> bool:
    """
    Whether voxels, ``HxWxD`` or ``HxWxDxC``, are labels: at most 256 integers, most of which have neighbours with the same
    one; or at most 4 integers.
    """
    sampled = values[:, :: max(1, values.size // SAMPLED)]  # lines along the first axis
    labels, counts = np.unique(sampled, return_counts=True)
    if len(labels) == 1 or not _are_labels(labels):
        return False
    one, other = sampled[1:], sampled[:-1]
    inside = (one != labels[counts.argmax()]) | (other != labels[counts.argmax()])  # not in the background
    in_regions = len(labels) <= FEW_LABELS or (one == other)[inside].mean() > LEAST_EQUAL
    return bool(in_regions) and _are_labels(np.unique(values))


def _are_labels(labels: np.ndarray) -> bool:
    return len(labels) <= MAX_LABELS and bool((labels == np.rint(labels)).all())


def _check_all(paths: list[str], image_channels: int, cache: Path, num_threads: int) -> dict[str, str]:
    """What is wrong with the volumes of all processes that have a problem."""
    known = _read_cache(cache)
    keys = {path: f"{image_channels} {state_of(path)} {path}" for path in share_of(paths)}
    unknown = [path for path, key in keys.items() if key not in known]
    with ThreadPoolExecutor(num_threads) as pool:
        results = pool.map(lambda path: find_problem(path, image_channels), unknown)
        bar = ProgressBar(zip(unknown, results), total=len(unknown), desc="checking volumes", unit="file")
        known |= {keys[path]: problem for path, problem in bar}
    found = merged({path: (key, known[key]) for path, key in keys.items()})
    if idist.get_rank() == 0:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(json.dumps(dict(found.values()), indent=1).encode(), cache)
    return {path: problem for path, (_, problem) in found.items() if problem}


def _read_cache(file: Path) -> dict[str, str | None]:
    try:
        return read_dataclass(file, dict[str, str | None], MAX_CACHE) if file.is_file() else {}
    except (OSError, ValueError) as error:
        logger.warning(f"{error} So all volumes are checked again.")
        return {}
