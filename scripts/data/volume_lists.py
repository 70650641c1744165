"""Which volumes a run uses: everything below a folder, or the lists of a Medical Segmentation Decathlon ``dataset.json``."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import nibabel as nib
from nibabel.filebasedimages import ImageFileError

from scripts.bundle.machine import free_memory, processes_on_host
from scripts.data.dataset_tables import dataset_lists
from scripts.data.file_names import is_nifti, is_volume_name
from scripts.data.label_maps import has_label_name
from scripts.data.subjects import split_by_subject
from scripts.data.volume_reader import affine_of, identity_of

__all__ = ["affordable_cache_rate", "describe", "find_images", "guesses_labels", "training_and_validation", "visible_files"]

EVERY_NIFTI = "**/*.nii*"  # the default `image_glob`
RESULT = re.compile(r"_(?:reconstruction|latent|(?:spatial|labels)-[\w-]+)\.nii\.gz$|^sample_\d{4,}\.nii\.gz$")
RESULT_WORDS = re.compile(r"reconstruction|latent|spatial-|labels-|sample")
SHOWN = 5  # files in the log
CACHE_SHARE = 0.5  # of the free memory, for preprocessed float32 volumes
logger = logging.getLogger(__name__)


def training_and_validation(
    dataset_dir: str,
    image_glob: str,
    val_fraction: float,
    seed: int,
    subject_pattern: str | None = None,
    output_dir: str | None = None,
) -> dict[str, list[dict[str, str]]]:
    """
    List the volumes for training and for validation: those of ``dataset_dir/dataset.json`` (Medical Segmentation
    Decathlon format) where there is one, otherwise everything that :py:func:`find_images` finds. Without a validation list,
    a share of the subjects is set aside, see :py:func:`split_by_subject`.

    Args:
        dataset_dir: folder of the volumes.
        image_glob: pattern relative to it, used when there is no ``dataset.json``.
        val_fraction: share of the subjects for validation, between 0 and 1.
        seed: of the split.
        subject_pattern: see :py:func:`split_by_subject`.
        output_dir: see :py:func:`find_images`.

    Returns:
        ``{"training": [{"image": path}, ...], "validation": [...]}``.

    Raises:
        FileNotFoundError: when there is nothing to train on.
        ValueError: when there is nothing to split, or for a ``dataset.json`` that cannot be used.
    """
    lists = {name: [{"image": item["image"]} for item in items] for name, items in dataset_lists(dataset_dir).items()}
    listed = [item["image"] for items in lists.values() for item in items]
    missing = [path for path in listed if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{dataset_dir}/dataset.json lists {len(missing)} files that do not exist: {_some(missing)}."
        )
    if not lists:
        lists = {"training": find_images(dataset_dir, image_glob, output_dir)}
    if not lists.get("validation"):
        lists = split_by_subject(lists["training"], dataset_dir, val_fraction, seed, subject_pattern)
    return lists


def find_images(dataset_dir: str, image_glob: str, output_dir: str | None = None) -> list[dict[str, str]]:
    """
    Find the volumes below a folder, without opening a file. Left out are hidden files and folders, results of this bundle,
    labels and segmentations by their names, and what has more after its ending (``x.nii.gz.md5``). Links to folders are
    followed; a file that is reached in several ways is one.

    Args:
        dataset_dir: folder to search.
        image_glob: pattern relative to it, ``**`` for any depth, in capitals or not. Names of labels or of results are taken
            where the pattern has them too. A pattern that ends in a slash matches folders, each of which is a volume, as a
            DICOM series is: ``**/`` is every folder below ``dataset_dir`` that holds files.
        output_dir: folder that is left out.

    Returns:
        ``[{"image": path}, ...]``, sorted by path.

    Raises:
        FileNotFoundError: when the folder does not exist or nothing in it matches.
    """
    folder = _existing(dataset_dir)
    pattern = image_glob.lower().removesuffix("/").split("/")
    found: dict[tuple[int, int], Path] = {}
    left_out: dict[str, list[Path]] = defaultdict(list)
    for path in _candidates(folder, image_glob.endswith("/"), output_dir):
        relative = path.relative_to(folder)
        matches = _matches([part.lower() for part in relative.parts], pattern)
        if not path.exists():
            if matches or not path.suffix:  # a folder, where it has no ending
                left_out["links that lead nowhere"].append(relative)
        elif not matches or (path.is_file() and not is_volume_name(path.name)):
            continue
        elif has_label_name(relative) and not has_label_name(Path(image_glob)):
            left_out["labels and segmentations, by their names"].append(relative)
        elif RESULT.search(path.name) and not RESULT_WORDS.search(image_glob):
            left_out["results of this bundle, by their names"].append(relative)
        elif found.setdefault(identity_of(path), path) != path:
            left_out["further paths to the same files"].append(relative)
    for what, paths in left_out.items():
        log = logger.warning if what == "links that lead nowhere" else logger.info
        log(f"{dataset_dir}: left out {len(paths)} {what} ({_some(paths)})")
    if not found:
        others = "; there are ".join(["", *(f"{len(paths)} {what}" for what, paths in left_out.items())])
        raise FileNotFoundError(
            f"no volume below `dataset_dir` {dataset_dir!r} matches `image_glob` {image_glob!r}{others}."
        )
    return [{"image": str(path)} for path in sorted(found.values())]


def visible_files(dataset_dir: str, image_glob: str) -> list[Path]:
    """
    The files below a folder that match a pattern, whatever they hold, but hidden ones.

    Args:
        dataset_dir: folder to search.
        image_glob: pattern relative to it, as for :py:func:`find_images`.

    Raises:
        FileNotFoundError: when the folder does not exist.
    """
    folder = _existing(dataset_dir)
    pattern = image_glob.lower().split("/")
    found = [path for path in _candidates(folder, False, None) if path.exists()]
    return [path for path in found if _matches([part.lower() for part in path.relative_to(folder).parts], pattern)]


def guesses_labels(dataset_dir: str, image_glob: str) -> bool:
    """Whether label maps are left out by their voxels: where neither ``image_glob`` nor a ``dataset.json`` names volumes."""
    return image_glob == EVERY_NIFTI and not dataset_lists(dataset_dir)


def _existing(dataset_dir: str) -> Path:
    if not Path(dataset_dir).is_dir():
        raise FileNotFoundError(f"`dataset_dir` is {dataset_dir!r}, which is not a folder.")
    return Path(dataset_dir)


def _candidates(folder: Path, folders: bool, output_dir: str | None) -> list[Path]:
    """The files below a folder, or the folders that hold files; those that are reached by a link come last."""
    seen = {identity_of(Path(output_dir))} - {identity_of(folder)} if output_dir and Path(output_dir).exists() else set()
    candidates, waiting = [], [folder]
    while waiting:
        for name, subfolders, files in os.walk(waiting.pop(0), onerror=_warn_of):
            root = Path(name)
            if identity_of(root) in seen:
                subfolders.clear()
                continue
            seen.add(identity_of(root))
            subfolders[:] = sorted(each for each in subfolders if not each.startswith("."))
            waiting += [root / each for each in subfolders if (root / each).is_symlink()]
            visible = [root / each for each in sorted(files) if not each.startswith(".")]
            candidates += visible if not folders else [root] if visible and root != folder else []
    return sorted(candidates, key=Path.is_symlink)


def _warn_of(error: OSError) -> None:
    logger.warning(f"{error.filename} cannot be searched ({error.strerror})")


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a glob pattern, both in their parts. ``Path.glob`` follows no links before Python 3.13."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _some(paths: Sequence[Any]) -> str:
    return ", ".join(map(str, paths[:SHOWN])) + ", ..." * (len(paths) > SHOWN)


def affordable_cache_rate(items: Sequence[dict[str, str]], volumes_per_item: int = 1) -> float:
    """
    Share of the volumes that fits, as float32, into half of the host's free memory. Several processes on one host divide
    that half.

    Args:
        items: ``[{"image": path}, ...]``.
        volumes_per_item: number of volumes of the image's size that an item holds.

    Returns:
        a ``cache_rate`` for MONAI's ``CacheDataset``, between 0 and 1.
    """
    voxels = sum(math.prod(_header(item["image"]).get_data_shape()) for item in items if is_nifti(item["image"]))
    needed = 4 * voxels * volumes_per_item
    free = free_memory()
    if not needed or free is None:
        return 0.0
    return min(1.0, CACHE_SHARE * free / processes_on_host() / needed)


def describe(items: Sequence[dict[str, str]]) -> str:
    """
    Number, sizes and spacings of volumes, for the log. Files that are not NIfTI are only counted.

    Args:
        items: ``[{"image": path}, ...]``.
    """
    headers = [_header(item["image"]) for item in items if is_nifti(item["image"])]
    text = f"{len(items)} volume{'s' if len(items) != 1 else ''}"
    if not headers:
        return text
    sizes = [header.get_data_shape()[:3] for header in headers]
    spacings = [nib.affines.voxel_sizes(affine_of(header)) for header in headers]
    return f"{text}, size {_range(sizes, '{:d}')} voxels, spacing {_range(spacings, '{:.3g}')} mm"


def _range(values: Sequence[Sequence[float]], form: str) -> str:
    low, high = ("x".join(form.format(pick(axis)) for axis in zip(*values)) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _header(path: str) -> Any:
    try:
        return nib.load(path).header
    except (ImageFileError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as NIfTI ({error}); remove it or repair it.") from error
