"""Checks whether volumes can be used: every file is read completely before the first epoch, so that a bad file does not end
a run hours later."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch

from scripts.bundle.files import write_atomically
from scripts.bundle.json_files import read_dataclass
from scripts.bundle.machine import GIB, total_memory
from scripts.bundle.processes import merged, share_of
from scripts.bundle.progress import ProgressBar
from scripts.data.label_maps import LABEL_MAP, is_label_map
from scripts.data.volume_lists import describe
from scripts.data.volume_reader import (
    GZIP_SUFFIXES,
    affine_of,
    geometry_note,
    is_read_by_nibabel,
    problem_of_affine,
    read_volume,
    state_of,
)

__all__ = [
    "find_problem",
    "problem_of_claim",
    "problem_of_header",
    "problem_of_memory",
    "unreadable",
    "usable_volumes",
]

LISTED = 5  # volumes in the log
SHOWN = 20  # problems in an error message; the log has all
CHECKS = 4  # version; raise it when volumes that passed may now be refused, so that all are checked again
GZIP_RATIO = 1032  # deflate shrinks no file by more
FLOAT_SIZE = 4
MAX_CACHE = 2**30  # bytes of that file; a million volumes take a quarter of it
Lists = dict[str, list[dict[str, str]]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """
    Result of a check, in the cache.

    Args:
        state: what the result depends on.
        problem: what is wrong with the volume, or None.
    """

    state: list[int | str]
    problem: str | None


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
    Check all volumes (:py:func:`find_problem`), in parallel, and log their number, sizes and spacings. Distributed
    processes share the work.

    Args:
        lists: ``{"training": [{"image": path}, ...], "validation": [...]}``.
        image_channels: number of channels that every volume must have.
        skip_bad_files: leave out the volumes that cannot be used, instead of stopping.
        cache: path of a JSON file with the results; only new and changed volumes are checked again.
        max_volumes: check and return only so many of each list.
        num_threads: files to read at the same time; each is in memory as float32 for that time.
        guess_labels: leave out what looks like a label map, with a line of the log.

    Returns:
        the lists without the volumes that cannot be used.

    Raises:
        ValueError: when volumes cannot be used and are not to be skipped, or when a list would be empty without them; it
            names the files, the reasons, and what to do.
    """
    lists = {name: items[:max_volumes] for name, items in lists.items()}
    paths = sorted({item["image"] for items in lists.values() for item in items})
    problems = {path: problem for path, problem in _check_all(paths, image_channels, cache, num_threads).items() if problem}
    label_maps = [path for path, problem in problems.items() if problem == LABEL_MAP]
    for path in label_maps:
        del problems[path]
    log = logger.warning if idist.get_rank() == 0 else logger.debug
    if guess_labels and label_maps:
        log(f"left out {len(label_maps)} volumes ({', '.join(label_maps[:SHOWN])}): each {LABEL_MAP}")
        lists = {name: [item for item in items if item["image"] not in label_maps] for name, items in lists.items()}
        if not all(lists.values()):
            raise ValueError(f"nothing but label maps is left: {label_maps[0]} and others {LABEL_MAP}")
    for path, problem in problems.items():
        log(f"{path} {problem}")
    good = {name: [item for item in items if item["image"] not in problems] for name, items in lists.items()}
    empty = [name for name, items in good.items() if lists[name] and not items]
    if problems and (not skip_bad_files or empty):
        raise ValueError(_summary(problems, len(paths), empty if skip_bad_files else []))
    if problems:
        log(f"going on without {len(problems)} of {len(paths)} volumes, because `skip_bad_files` is set")
    for name, items in good.items():
        if items:
            logger.info(f"{name}: {describe(items)}")
    logger.info(f"validated on {_listed(good['validation'])}")
    return good


def find_problem(path: str, image_channels: int) -> str | None:
    """
    Read a whole volume and say why it cannot be trained on.

    Args:
        path: of the volume, in any format that is read.
        image_channels: number of channels that it must have.

    Returns:
        None when it can be trained on, otherwise what is wrong and what to do, as text that follows the path;
        :py:data:`LABEL_MAP` when that is all.
    """
    try:
        if is_read_by_nibabel(path):
            image: Any = nib.load(path)
            problem = _problem_of_image(image, path, image_channels)
            if problem is not None:
                return problem
            note = geometry_note(image)
            if note is not None:
                logger.warning(f"{path} {note}")
        values = np.asarray(read_volume(path)[0], dtype=np.float32)
    except Exception as error:  # readers raise errors of any type
        is_refused = isinstance(error, ValueError) and not is_read_by_nibabel(path)
        return str(error) if is_refused else unreadable(error)
    low, high = values.min(), values.max()  # NaN if any voxel is
    if not np.isfinite(low) or not np.isfinite(high):
        count = values.size - np.count_nonzero(np.isfinite(values))
        return f"has {count} voxels that are NaN or infinite; repair it, or remove it."
    if low == high:
        return f"is constant ({low:g}); remove it."
    return LABEL_MAP if is_label_map(values) else None


def problem_of_header(path: str, image_channels: int) -> str | None:
    """
    What is wrong with the header of a file that nibabel reads; see :py:func:`find_problem`. None for other formats.

    Args:
        path: of the volume.
        image_channels: number of channels that it must have.
    """
    if not is_read_by_nibabel(path):
        return None
    try:
        return _problem_of_image(nib.load(path), path, image_channels)
    except OSError as error:
        return unreadable(error)
    except Exception as error:
        return f"cannot be read as NIfTI ({error}); copy or convert it again, or remove it."


def unreadable(error: BaseException) -> str:
    """What is wrong with a volume whose reader raised an error, as text that follows the path."""
    if isinstance(error, PermissionError):
        return f"cannot be opened ({error.strerror}); change its permissions, or remove it."
    if isinstance(error, MemoryError):
        return "does not fit into the memory of this machine; crop or resample it, or remove it."
    return f"cannot be read to its end ({type(error).__name__}: {error}); copy or convert it again, or remove it."


def problem_of_claim(image: Any, path: str) -> str | None:
    """
    Why a header is false (the file is too small for it), or its volume too large for this machine; None if neither.

    Args:
        image: of which nibabel has read the header.
        path: of the file.
    """
    claimed = " x ".join(f"{n}" for n in image.shape)
    num_voxels, item_size = math.prod(map(int, image.shape)), image.get_data_dtype().itemsize
    end, size = image.dataobj.offset + num_voxels * item_size, os.path.getsize(path)
    compressed = path.lower().endswith(GZIP_SUFFIXES)
    if end > size * (GZIP_RATIO if compressed else 1):
        return (
            f"cannot be read to its end: its header claims {claimed} voxels of {item_size} bytes up to byte {end:,}, and "
            f"the file has {size:,}{' compressed' * compressed} bytes. It is truncated or its header is false; copy it "
            "again, or remove it."
        )
    problem = problem_of_memory(FLOAT_SIZE * num_voxels)
    return problem and f"has {claimed} voxels, as float32 {problem}; crop or resample it, or remove it."


def problem_of_memory(num_bytes: float) -> str | None:
    """That so many bytes exceed this machine's memory, as text; None when they do not, or the memory is not known."""
    total = total_memory("cpu")
    if total is None or num_bytes <= total:
        return None
    return f"{num_bytes / GIB:,.0f} GiB, and this machine has {total / GIB:,.0f} GiB"


def _problem_of_image(image: Any, path: str, image_channels: int) -> str | None:
    """What is wrong with a NIfTI file of which nibabel has read the header."""
    return (
        _problem_of_shape(image.shape, image_channels)
        or _problem_of_data_type(image.get_data_dtype())
        or problem_of_claim(image, path)
        or _problem_of_header_affine(affine_of(image))
    )


def _problem_of_data_type(data_type: np.dtype) -> str | None:
    if data_type.names:
        return (
            f"has colours for voxels ({', '.join(data_type.names)}); convert it to one number for each voxel, or to "
            f"{len(data_type.names)} channels along a fourth axis (and set `image_channels`), or remove it."
        )
    if data_type.kind == "c":
        return f"has complex voxels ({data_type.name}); save what you need of them, such as the magnitude, or remove it."
    return None


def _problem_of_header_affine(affine: np.ndarray) -> str | None:
    problem = problem_of_affine(affine)
    return problem and (
        f"has {problem}, so that its orientation and spacing are unknown; write the right sform or qform into its header, "
        "or remove it."
    )


def _problem_of_shape(shape: Sequence[int], image_channels: int) -> str | None:
    found = f"has the shape {tuple(map(int, shape))}"
    if len(shape) == 2 or 1 in shape[:3]:
        return f"{found}: a 2D slice; stack the slices of a series to one volume, or remove it."
    shape = (*shape[:3], *(n for n in shape[3:] if n != 1))
    channels = 1 if len(shape) == 3 else shape[-1]
    if len(shape) not in (3, 4) or min(shape, default=0) < 1:
        return f"{found}; a volume has three axes, and the channels as a fourth. Convert it, or narrow `image_glob`."
    if channels == image_channels:
        return None
    if len(shape) == 3:
        return f"{found}: one channel where {image_channels} are expected; set `image_channels` to 1, or remove it."
    return (
        f"{found}: a 4D series, or {channels} channels where {image_channels} "
        f"{'is' if image_channels == 1 else 'are'} expected; split it along the fourth axis, or set `image_channels` "
        f"to {channels} if all volumes have as many."
    )


def _listed(items: Sequence[dict[str, str]]) -> str:
    """The first few volumes, each with its folder."""
    names = ["/".join(Path(item["image"]).parts[-2:]) for item in items[:LISTED]]
    return ", ".join(names) + f" and {len(items) - LISTED} more" * (len(items) > LISTED)


def _check_all(paths: Sequence[str], image_channels: int, cache: str, num_threads: int) -> dict[str, str | None]:
    file = Path(cache)
    known = _of_leader(_read_cache(file))
    keys = {path: _state(path, image_channels) for path in paths}
    unknown = [path for path, key in keys.items() if path not in known or known[path].state != key]
    if unknown:
        share = share_of(unknown)
        bar = ProgressBar(total=len(share), desc="checking volumes", unit="file")
        with bar, ThreadPoolExecutor(num_threads) as pool:

            def check(path: str) -> str | None:
                problem = find_problem(path, image_channels)
                bar.update()
                return problem

            results = merged(dict(zip(share, pool.map(check, share))))
        known |= {path: Checked(keys[path], problem) for path, problem in results.items()}
        if idist.get_rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(json.dumps(known, default=asdict, indent=1).encode(), file)
    return {path: known[path].problem for path in paths}


def _read_cache(file: Path) -> dict[str, Checked]:
    try:
        return read_dataclass(file, dict[str, Checked], max_bytes=MAX_CACHE)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning(f"{error} So all volumes are checked again.")
        return {}


def _state(path: str, image_channels: int) -> list[int | str]:
    """What the result of a check depends on."""
    return [state_of(path), image_channels, CHECKS]


def _of_leader(content: dict[str, Any]) -> dict[str, Any]:
    """The content that the first process has read; another machine may see another file."""
    shared = [content]
    if idist.get_world_size() > 1:
        torch.distributed.broadcast_object_list(shared)
    return shared[0]


def _summary(problems: dict[str, str], total: int, empty: Sequence[str]) -> str:
    lines = [f"{path} {problem}" for path, problem in list(problems.items())[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more, all of them in the log")
    advice = (
        f"nothing is left for {' and '.join(empty)}." if empty else "Set `skip_bad_files` to true to go on without them."
    )
    return "\n  ".join([f"{len(problems)} of {total} volumes cannot be used:", *lines, advice])
