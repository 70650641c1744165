"""Which volumes a run uses: everything below a folder, or the lists of a Medical Segmentation Decathlon ``dataset.json``,
and which of them are for validation, by subject."""

from __future__ import annotations

import hashlib
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

from scripts.bundle.machine import free_memory, processes_on_host
from scripts.data.dataset_tables import dataset_lists
from scripts.data.file_names import has_label_name, is_nifti, is_volume_name, without_ending
from scripts.data.volume_reader import NiftiHeader, identity_of, read_header
from scripts.layers.factors import by

EVERY_NIFTI = "**/*.nii*"  # the default `image_glob`
RESULT = re.compile(r"_(?:reconstruction|latent|(?:spatial|labels)-[\w-]+)\.nii\.gz$|^sample_\d{4,}\.nii\.gz$")
RESULT_WORDS = re.compile(r"reconstruction|latent|spatial-|labels-|sample")
BIDS_SUBJECT = re.compile(r"(?:^|[/_])(sub-[^/_.]+)")
COLLECTION = re.compile(  # a folder of many subjects
    r"(?:images?|train(?:ing)?|val(?:idation)?|test(?:ing)?)(?:tr|ts|val)?|(?:raw|source|nifti)?data|derivatives|scans|volumes|niftis?",
    re.IGNORECASE,
)
CHANNEL = re.compile(r"_000\d$")  # of nnU-Net, counted from 0
SHOWN = 5  # files or subjects in the log
CACHE_SHARE = 0.5  # of the free memory, for preprocessed float32 volumes
Lists = dict[str, list[dict[str, str]]]
logger = logging.getLogger(__name__)


def training_and_validation(
    dataset_dir: str,
    image_glob: str,
    val_fraction: float,
    seed: int,
    subject_pattern: str | None = None,
    output_dir: str | None = None,
) -> Lists:
    """
    List the volumes for training and for validation: those of ``dataset_dir/dataset.json`` (Medical Segmentation
    Decathlon format) where there is one, otherwise everything that :py:func:`find_images` finds. Without a validation list,
    a share of the subjects is set aside, see :py:func:`split_by_subject`.

    Args:
        dataset_dir: folder of the volumes.
        image_glob: pattern relative to it, used when there is no ``dataset.json``.
        val_fraction: share of the subjects for validation, between 0 and 1.
        seed: seed of the split.
        subject_pattern: see :py:func:`subjects_of`.
        output_dir: folder that is left out.

    Returns:
        ``{"training": [{"image": path}, ...], "validation": [...]}``.

    Raises:
        FileNotFoundError: when there is nothing to train on.
        ValueError: when there is nothing to split, or for a ``dataset.json`` that cannot be used.
    """
    lists = {name: [{"image": item["image"]} for item in items] for name, items in dataset_lists(dataset_dir).items()}
    missing = [item["image"] for items in lists.values() for item in items if not os.path.exists(item["image"])]
    if missing:
        raise FileNotFoundError(f"{dataset_dir}/dataset.json lists {len(missing)} files that do not exist: {_some(missing)}")
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
    folder = Path(dataset_dir)
    found: dict[tuple[int, int], Path] = {}
    left_out: dict[str, list[Path]] = defaultdict(list)
    for path in visible_files(dataset_dir, image_glob, output_dir):
        relative = path.relative_to(folder)
        if has_label_name(relative) and not has_label_name(Path(image_glob)):
            left_out["labels and segmentations, by their names"].append(relative)
        elif RESULT.search(path.name) and not RESULT_WORDS.search(image_glob):
            left_out["results of this bundle, by their names"].append(relative)
        else:
            found.setdefault(identity_of(path), path)
    for what, paths in left_out.items():
        logger.info(f"{dataset_dir}: left out {len(paths)} {what} ({_some(paths)})")
    if not found:
        raise FileNotFoundError(f"no volume below `dataset_dir` {dataset_dir!r} matches `image_glob` {image_glob!r}.")
    return [{"image": str(path)} for path in sorted(found.values())]


def visible_files(dataset_dir: str, image_glob: str, output_dir: str | None = None) -> list[Path]:
    """
    The files or folders that match a pattern and can be volumes by their names, see :py:func:`find_images`; those reached by
    a link come last.
    """
    folder, pattern = Path(dataset_dir), image_glob.lower().removesuffix("/").split("/")
    if not folder.is_dir():
        raise FileNotFoundError(f"`dataset_dir` is {dataset_dir!r}, which is not a folder.")
    seen = {identity_of(Path(output_dir))} - {identity_of(folder)} if output_dir and Path(output_dir).exists() else set()
    candidates = []
    for name, subfolders, files in os.walk(folder, onerror=logger.warning, followlinks=True):
        root = Path(name)
        if identity_of(root) in seen:
            subfolders.clear()
            continue
        seen.add(identity_of(root))
        visible = (each for each in subfolders if not each.startswith("."))
        subfolders[:] = sorted(visible, key=lambda each: ((root / each).is_symlink(), each))
        held = [root / each for each in sorted(files) if not each.startswith(".")]
        candidates += held if not image_glob.endswith("/") else [root] if held and root != folder else []
    nowhere = [path.relative_to(folder) for path in candidates if not path.exists()]
    if nowhere:
        logger.warning(f"{dataset_dir}: left out {len(nowhere)} links that lead nowhere ({_some(nowhere)})")
    volumes = [path for path in candidates if path.is_dir() or (path.is_file() and is_volume_name(path.name))]
    matching = [path for path in volumes if _matches([part.lower() for part in path.relative_to(folder).parts], pattern)]
    return sorted(matching, key=Path.is_symlink)


def guesses_labels(dataset_dir: str, image_glob: str) -> bool:
    """Whether label maps are left out by their voxels: where neither ``image_glob`` nor a ``dataset.json`` names volumes."""
    return image_glob == EVERY_NIFTI and not dataset_lists(dataset_dir)


def split_by_subject(
    items: list[dict[str, str]], dataset_dir: str, val_fraction: float, seed: int, subject_pattern: str | None = None
) -> Lists:
    """
    Set a share of the subjects aside. Where a subject goes depends on its name, ``val_fraction`` and ``seed`` alone, so that
    further volumes move nobody; except that both lists get one subject at least. Arguments as
    :py:func:`training_and_validation`, and ``[{"image": path}, ...]`` with any further keys.

    Raises:
        ValueError: for a share that is not between 0 and 1, or when there is only one subject.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"`val_fraction` is {val_fraction!r}; it must lie between 0 and 1, both excluded.")
    subjects: dict[str, list[dict[str, str]]] = defaultdict(list)
    for item, subject in zip(items, subjects_of([item["image"] for item in items], dataset_dir, subject_pattern)):
        subjects[subject].append(item)
    if len(subjects) < 2:
        raise ValueError(
            f"{dataset_dir!r} holds {len(items)} volumes of one subject ({', '.join(subjects)}); training and validation "
            "need two. `subject_pattern` says what a subject is."
        )
    drawn = sorted((_drawn(subject, seed), subject) for subject in subjects)
    num_validation = sum(number < val_fraction for number, _ in drawn)
    validation = {subject for _, subject in drawn[: min(max(1, num_validation), len(subjects) - 1)]}
    return {
        "training": [item for subject in sorted(subjects) if subject not in validation for item in subjects[subject]],
        "validation": [item for subject in sorted(validation) for item in subjects[subject]],
    }


def subjects_of(paths: Sequence[str], dataset_dir: str, subject_pattern: str | None = None) -> list[str]:
    """
    The subject of each volume: the ``sub-...`` in its path, otherwise its first folder below ``dataset_dir``, otherwise its
    name. A folder of many subjects (``imagesTr``, ``training``, or the only one that holds volumes) does not count, and the
    channels of nnU-Net (``case_0000``, ``case_0001``) are one subject. The log says what was taken.

    Args:
        paths: paths of the volumes.
        dataset_dir: their folder.
        subject_pattern: regular expression that finds the subject in a path relative to ``dataset_dir`` instead: its first
            group, or all that it matches.

    Raises:
        ValueError: for a pattern that does not match a path.
    """
    relatives = [Path(os.path.relpath(path, dataset_dir)) for path in paths]
    names = {without_ending(relative.name) for relative in relatives}
    one_folder = len({relative.parent for relative in relatives}) == 1
    pattern = BIDS_SUBJECT if subject_pattern is None else re.compile(subject_pattern)
    found = []
    for relative in relatives:
        match = pattern.search(relative.as_posix())
        folders = [part for part in relative.parent.parts if part != ".." and not COLLECTION.fullmatch(part)]
        name = without_ending(relative.name)
        case = CHANNEL.sub("", name)
        if match is not None:
            found.append(match.group(1) if pattern.groups else match.group())
        elif subject_pattern is not None:
            raise ValueError(f"`subject_pattern` {subject_pattern!r} finds no subject in {relative.as_posix()!r}.")
        elif folders and not one_folder:
            found.append(folders[0])
        else:
            found.append(case if f"{case}_0000" in names else name)
    subjects = sorted(set(found))
    logger.info(f"{len(subjects)} subjects ({_some(subjects)}); `subject_pattern` can say otherwise")
    return found


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
    needed = 4 * volumes_per_item * sum(math.prod(header.shape) for header in _headers(items))
    free = free_memory()
    if not needed or free is None:
        return 0.0
    return min(1.0, CACHE_SHARE * free / processes_on_host() / needed)


def describe(items: Sequence[dict[str, str]]) -> str:
    """Number, sizes and spacings of volumes, ``[{"image": path}, ...]``. Files that are not NIfTI are only counted."""
    headers, text = _headers(items), f"{len(items)} volume{'s' if len(items) != 1 else ''}"
    if not headers:
        return text
    sizes = [header.shape[:3] for header in headers]
    spacings = [nib.affines.voxel_sizes(header.affine) for header in headers]
    return f"{text}, size {_range(sizes)} voxels, spacing {_range(spacings)} mm"


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a glob pattern, both in their parts. ``Path.glob`` follows no links before Python 3.13."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _some(texts: Sequence[Any]) -> str:
    return ", ".join(map(str, texts[:SHOWN])) + ", ..." * (len(texts) > SHOWN)


def _drawn(subject: str, seed: int) -> float:
    """A number from 0 to 1 that depends on a subject and a seed alone."""
    digest = hashlib.sha256(os.fsencode(f"{subject}{seed}")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _headers(items: Sequence[dict[str, str]]) -> list[NiftiHeader]:
    return [read_header(item["image"]) for item in items if is_nifti(item["image"])]


def _range(values: Sequence[Sequence[float]]) -> str:
    low, high = (by(map(pick, zip(*values))) for pick in (min, max))
    return low if low == high else f"{low} to {high}"
