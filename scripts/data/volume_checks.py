"""Checks whether volumes can be used: every file is read completely before the first epoch, so that a bad file does not end
a run hours later."""

from __future__ import annotations

import errno
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
from nibabel.filebasedimages import ImageFileError

from scripts.bundle.errors import reason
from scripts.bundle.files import write_atomically
from scripts.bundle.json_files import read_dataclass
from scripts.bundle.machine import GIB, total_memory
from scripts.bundle.processes import merged, share_of
from scripts.bundle.progress import ProgressBar
from scripts.data.intensity_window import measured_voxels
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

__all__ = ["check_claim", "check_header", "check_memory", "check_shape", "explanation", "find_problem", "usable_volumes"]

LISTED = 5  # volumes in the log
SHOWN = 20  # problems in an error message; the log has all
GZIP_RATIO = 1032  # deflate shrinks no file by more
FLOAT_SIZE = 4
NO_MEMORY = "can't allocate memory"  # of PyTorch's RuntimeError
MAX_CACHE = 2**30  # bytes of the file of results; a million volumes take a quarter of it
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
    results = _check_all(paths, image_channels, Path(cache), num_threads)
    problems = {path: results[path].problem for path in paths if results[path].problem}
    label_maps = [path for path, problem in problems.items() if problem == LABEL_MAP]
    for path in label_maps:
        del problems[path]
    log = logger.warning if idist.get_rank() == 0 else logger.debug
    if guess_labels and label_maps:
        log(f"left out {len(label_maps)} volumes, as {label_maps[0]}, which {LABEL_MAP}")
        lists = {name: [item for item in items if item["image"] not in label_maps] for name, items in lists.items()}
        if not all(lists.values()):
            raise ValueError(f"nothing but label maps is left: {label_maps[0]} and others {LABEL_MAP}")
    for path, problem in problems.items():
        log(f"{path} {problem}")
    good = {name: [item for item in items if item["image"] not in problems] for name, items in lists.items()}
    empty = [name for name, items in good.items() if lists[name] and not items]
    if problems and (not skip_bad_files or empty):
        shown = [f"{path} {problem}" for path, problem in problems.items()][:SHOWN]
        more = [f"... and {len(problems) - SHOWN} more, all of them in the log"] * (len(problems) > SHOWN)
        end = "Set `skip_bad_files` to true to go on without them."
        if skip_bad_files:
            end = f"Nothing is left for {' and '.join(empty)}."
        raise ValueError("\n  ".join([f"{len(problems)} of {len(paths)} volumes cannot be used:", *shown, *more, end]))
    if problems:
        log(f"going on without {len(problems)} of {len(paths)} volumes, because `skip_bad_files` is set")
    for name, items in good.items():
        if items:
            logger.info(f"{name}: {describe(items)}")
    names = ["/".join(Path(item["image"]).parts[-2:]) for item in good["validation"]]
    more = [f"{len(names) - LISTED} more"] * (len(names) > LISTED)
    logger.info(f"validated on {', '.join(names[:LISTED] + more)}")
    return good


def find_problem(path: str, image_channels: int) -> str | None:
    """
    Read a whole volume and say why it cannot be trained on.

    Args:
        path: of the volume, in any format that is read.
        image_channels: number of channels that it must have.

    Returns:
        None when it can be trained on, otherwise what is wrong, as text that follows the path; :py:data:`LABEL_MAP`
        when that is all.
    """
    try:
        check_header(path, image_channels)
        if is_read_by_nibabel(path) and (note := geometry_note(nib.load(path))):
            logger.warning(f"{path} {note}")
        values = np.asarray(read_volume(path)[0], dtype=np.float32)
        check_shape(values.shape, image_channels)
        measured_voxels(torch.from_numpy(values.reshape(*values.shape[:3], -1)).movedim(-1, 0), path)
    except Exception as error:  # readers raise errors of any type
        return explanation(error, path)
    return LABEL_MAP if is_label_map(values) else None


def explanation(error: BaseException, path: str) -> str:
    """What is wrong with a volume whose reader, check or transform raised an error, as text that follows its path."""
    error = reason(error)
    if isinstance(error, ValueError):
        return str(error).removeprefix(path).strip()
    if isinstance(error, PermissionError) or (isinstance(error, ImageFileError) and not os.access(path, os.R_OK)):
        return f"cannot be opened ({os.strerror(errno.EACCES)})."
    if isinstance(error, MemoryError) or NO_MEMORY in str(error):
        return "does not fit into the memory of this machine; crop it, or resample it (`spacing`)."
    return f"cannot be read to its end ({type(error).__name__}: {error}); copy or convert it again."


def check_header(path: str, image_channels: int) -> None:
    """
    Check what the header of a file says, before its voxels are read. Files that nibabel does not read are not looked at.

    Args:
        path: of the volume.
        image_channels: number of channels that it must have.

    Raises:
        ValueError: for a volume that cannot be used, with text that follows the path. nibabel raises errors of other types
            for what is no header.
    """
    if not is_read_by_nibabel(path):
        return
    image: Any = nib.load(path)
    data_type = image.get_data_dtype()
    if data_type.names:
        raise ValueError(f"has colours for voxels ({', '.join(data_type.names)}); convert them to channels or gray values.")
    if data_type.kind == "c":
        raise ValueError(f"has complex voxels ({data_type.name}); convert it to magnitudes.")
    check_shape(image.shape, image_channels)
    check_claim(image)
    problem = problem_of_affine(affine_of(image))
    if problem is not None:
        raise ValueError(f"has {problem}, so that its orientation and spacing are unknown.")


def check_claim(image: Any) -> None:
    """
    Check that voxels lie behind their header, in a file that is large enough for them, and that memory is enough for them.

    Args:
        image: of which nibabel has read the header.

    Raises:
        ValueError: with text that follows the path.
    """
    if getattr(image.header, "is_single", False) and image.dataobj.offset == 0:
        raise ValueError("says that its voxels begin where its header does (`vox_offset` 0); write it again.")
    claimed = " x ".join(f"{n}" for n in image.shape)
    num_voxels, item_size = math.prod(map(int, image.shape)), image.get_data_dtype().itemsize
    path = str(image.file_map["image"].filename)  # of the voxels, where the header has a file of its own
    end, size = image.dataobj.offset + num_voxels * item_size, os.path.getsize(path)
    compressed = path.lower().endswith(GZIP_SUFFIXES)
    if end > size * (GZIP_RATIO if compressed else 1):
        raise ValueError(
            f"cannot be read to its end: its header claims {claimed} voxels of {item_size} bytes up to byte {end:,}, and "
            f"the file has {size:,}{' compressed' * compressed} bytes. It is truncated or its header is false."
        )
    check_memory(FLOAT_SIZE * num_voxels, f"its {claimed} voxels in float32")


def check_memory(num_bytes: float, what: str) -> None:
    """
    Raises:
        ValueError: when ``what`` takes more bytes than this machine has, as far as that is known.
    """
    total = total_memory("cpu")
    if total is not None and num_bytes > total:
        raise ValueError(f"{what} take {num_bytes / GIB:,.0f} GiB, and this machine has {total / GIB:,.0f} GiB.")


def check_shape(shape: Sequence[int], image_channels: int) -> None:
    """
    Check that a shape, with the channels last, is that of a volume.

    Raises:
        ValueError: with text that follows the path.
    """
    found, channels = f"has the shape {tuple(map(int, shape))}", [n for n in shape[3:] if n != 1]
    if len(shape) == 2 or 1 in shape[:3]:
        raise ValueError(f"{found}: a 2D slice; stack the slices of a series to one volume.")
    if len(shape) < 3 or len(channels) > 1 or 0 in shape:
        raise ValueError(f"{found}; a volume has three axes, and the channels as a fourth.")
    if math.prod(channels) != image_channels:
        raise ValueError(
            f"{found}: its channels or times number {math.prod(channels)}, and `image_channels` is {image_channels}; split "
            "a series along the fourth axis."
        )


def _check_all(paths: Sequence[str], image_channels: int, cache: Path, num_threads: int) -> dict[str, Checked]:
    known = _of_leader(_read_cache(cache))
    states = {path: _state(path, image_channels) for path in paths}
    unknown = [path for path in paths if path not in known or known[path].state != states[path]]
    if unknown:
        share = share_of(unknown)
        bar = ProgressBar(total=len(share), desc="checking volumes", unit="file")
        with bar, ThreadPoolExecutor(num_threads) as pool:

            def check(path: str) -> str | None:
                problem = find_problem(path, image_channels)
                bar.update()
                return problem

            problems = merged(dict(zip(share, pool.map(check, share))))
        known |= {path: Checked(states[path], problem) for path, problem in problems.items()}
        if idist.get_rank() == 0:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(json.dumps(known, default=asdict, indent=1).encode(), cache)
    return known


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
    return [state_of(path), image_channels]


def _of_leader(content: dict[str, Checked]) -> dict[str, Checked]:
    """The content that the first process has read; another machine may see another file."""
    shared = [content]
    if idist.get_world_size() > 1:
        torch.distributed.broadcast_object_list(shared)
    return shared[0]
