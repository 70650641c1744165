"""Which volumes a run uses: everything below a folder, or the lists of a Medical Segmentation Decathlon ``dataset.json``."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
from monai.data import load_decathlon_datalist, partition_dataset
from nibabel.filebasedimages import ImageFileError

from scripts.bundle.machine import free_memory, processes_on_host

__all__ = ["affordable_cache_rate", "describe", "find_images", "is_nifti", "split_by_subject", "training_and_validation"]

LABEL_WORDS = re.compile(
    r"(?:^|[^a-z])(?:labels?(?:tr|ts|val)?|seg|segs|segmentations?|masks?|[ad]seg|probseg|rois?|annotations?)(?:[^a-z]|$)"
)
COLLECTION = re.compile(r"images?(?:tr|ts|val)?", re.IGNORECASE)  # a folder of many subjects, as in the Decathlon
NIFTI_SUFFIXES = (".nii", ".nii.gz")
CACHE_SHARE = 0.5  # of the free memory, for preprocessed float32 volumes
logger = logging.getLogger(__name__)


def training_and_validation(
    dataset_dir: str, image_glob: str, val_fraction: float, seed: int
) -> dict[str, list[dict[str, str]]]:
    """
    List the volumes for training and for validation: those of ``dataset_dir/dataset.json`` (Medical Segmentation
    Decathlon format) where there is one, otherwise everything that :py:func:`find_images` finds.

    Without a validation list, a seeded share of the subjects is set aside. The subject of a file is the ``sub-...`` in its
    path, otherwise its folder; where all files lie in one folder, or the folder is called ``images...``, each file is one.

    Args:
        dataset_dir: folder of the volumes.
        image_glob: pattern relative to it, used when there is no ``dataset.json``.
        val_fraction: share of the subjects for validation, between 0 and 1.
        seed: of the split.

    Returns:
        ``{"training": [{"image": path}, ...], "validation": [...]}``.

    Raises:
        FileNotFoundError: when there is nothing to train on.
        ValueError: when there is nothing to split.
    """
    lists = _decathlon_lists(Path(dataset_dir) / "dataset.json")
    if not lists:
        lists = {"training": find_images(dataset_dir, image_glob)}
    if not lists.get("validation"):
        lists = split_by_subject(lists["training"], dataset_dir, val_fraction, seed)
    return lists


def affordable_cache_rate(items: Sequence[dict[str, str]]) -> float:
    """
    Share of the volumes that fits, as float32, into half of the host's free memory. Several processes on one host divide
    that half.

    Args:
        items: ``[{"image": path}, ...]``.

    Returns:
        a ``cache_rate`` for MONAI's ``CacheDataset``, between 0 and 1.
    """
    needed = sum(4 * math.prod(_header(item["image"]).get_data_shape()) for item in items if is_nifti(item["image"]))
    free = free_memory()
    if not needed or free is None:
        return 0.0
    return min(1.0, CACHE_SHARE * free / processes_on_host() / needed)


def find_images(dataset_dir: str, image_glob: str) -> list[dict[str, str]]:
    """
    Find the volumes below a folder, without opening a file. Labels and segmentations, recognised by their names, are left
    out.

    Args:
        dataset_dir: folder to search.
        image_glob: pattern relative to it, ``**`` for any depth. A pattern that ends in a slash matches folders, each of
            which is a volume, as a DICOM series is: ``**/`` is every folder below ``dataset_dir`` that holds files.

    Returns:
        ``[{"image": path}, ...]``, sorted by path.

    Raises:
        FileNotFoundError: when the folder does not exist or nothing in it matches.
    """
    folder = Path(dataset_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"`dataset_dir` is {dataset_dir!r}, which is not a folder.")
    is_volume = _holds_files if image_glob.endswith("/") else Path.is_file
    found = sorted(path for path in folder.glob(image_glob) if path != folder and is_volume(path))
    images = [path for path in found if not _is_label(path.relative_to(folder))]
    if len(images) < len(found):
        logger.info(f"{dataset_dir}: left out {len(found) - len(images)} labels and segmentations, by their names")
    if not images:
        raise FileNotFoundError(
            f"no volume below `dataset_dir` {dataset_dir!r} matches `image_glob` {image_glob!r} "
            f"({len(found)} match and look like labels); set one of the two."
        )
    return [{"image": str(path)} for path in images]


def _holds_files(path: Path) -> bool:
    return path.is_dir() and any(child.is_file() for child in path.iterdir())


def _is_label(relative: Path) -> bool:
    # BIDS entities such as `label-GM` are covered, and so are the folders `labelsTr` and `masks`
    return any(LABEL_WORDS.search(part.lower()) for part in relative.parts)


def is_nifti(path: str) -> bool:
    """Whether a file has the name of a NIfTI file."""
    return path.lower().endswith(NIFTI_SUFFIXES)


def _decathlon_lists(path: Path) -> dict[str, list[dict[str, str]]]:
    if not path.is_file():
        return {}
    lists = {}
    for name in ("training", "validation"):
        try:
            entries: list[Any] = load_decathlon_datalist(path, is_segmentation=False, data_list_key=name)
        except ValueError as error:  # from MONAI, when a list is missing
            if name == "training":
                raise ValueError(f"{path} has no list `training`; it needs one, as in the Decathlon format.") from error
            continue
        lists[name] = [{"image": entry["image"]} for entry in entries]
    missing = [item["image"] for items in lists.values() for item in items if not Path(item["image"]).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} lists {len(missing)} files that do not exist, the first is {missing[0]!r}.")
    if not lists["training"]:
        raise FileNotFoundError(f"the list `training` of {path} is empty.")
    return lists


def split_by_subject(
    items: list[dict[str, str]], dataset_dir: str, val_fraction: float, seed: int
) -> dict[str, list[dict[str, str]]]:
    """
    Set a seeded share of the subjects aside, see :py:func:`training_and_validation`.

    Args:
        items: ``[{"image": path}, ...]``, with any further keys.
        dataset_dir: folder of the volumes.
        val_fraction: share of the subjects, between 0 and 1.
        seed: of the split.

    Raises:
        ValueError: for another share, or when there is only one subject.
    """
    if isinstance(val_fraction, bool) or not isinstance(val_fraction, (int, float)) or not 0 < val_fraction < 1:
        raise ValueError(f"`val_fraction` is {val_fraction!r}; it must lie between 0 and 1, both excluded.")
    subjects: dict[str, list[dict[str, str]]] = defaultdict(list)
    one_folder = len({Path(item["image"]).parent for item in items}) == 1
    for item in items:
        subjects[_subject(Path(item["image"]).relative_to(dataset_dir), one_folder)].append(item)
    if len(subjects) < 2:
        raise ValueError(
            f"{dataset_dir!r} holds {len(items)} volumes of {len(subjects)} subject; training and validation need at "
            "least two subjects (`sub-*` in the path, or a folder each), or a `dataset.json` with both lists."
        )
    num_validation = min(max(1, round(val_fraction * len(subjects))), len(subjects) - 1)
    validation, training = partition_dataset(
        sorted(subjects), ratios=[num_validation, len(subjects) - num_validation], shuffle=True, seed=seed
    )
    return {
        "training": [item for subject in sorted(training) for item in subjects[subject]],
        "validation": [item for subject in sorted(validation) for item in subjects[subject]],
    }


def _subject(relative: Path, one_folder: bool) -> str:
    named = re.search(r"sub-[A-Za-z0-9]+", str(relative))
    if named:
        return named.group()
    folder = relative.parent
    if one_folder or folder == Path(".") or COLLECTION.fullmatch(folder.name):
        return str(relative)
    return str(folder)


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
    spacings = [header.get_zooms()[:3] for header in headers]
    return f"{text}, size {_range(sizes, '{:d}')} voxels, spacing {_range(spacings, '{:.3g}')} mm"


def _range(values: Sequence[Sequence[float]], form: str) -> str:
    low, high = ("x".join(form.format(pick(axis)) for axis in zip(*values)) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _header(path: str) -> Any:
    try:
        return nib.load(path).header
    except (ImageFileError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as NIfTI ({error}); remove it or repair it.") from error
