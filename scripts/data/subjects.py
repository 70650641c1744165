"""Which volumes are of one subject, and which subjects are for training and for validation."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from scripts.data.file_names import without_ending

__all__ = ["split_by_subject", "subjects_of"]

BIDS_SUBJECT = re.compile(r"(?:^|[/_])(sub-[^/_.]+)")
COLLECTION = re.compile(  # a folder of many subjects
    r"(?:images?|train(?:ing)?|val(?:idation)?|test(?:ing)?)(?:tr|ts|val)?|(?:raw|source|nifti)?data|derivatives|scans|volumes|niftis?",
    re.IGNORECASE,
)
CHANNEL = re.compile(r"_000\d$")  # of nnU-Net, counted from 0
EXAMPLES = 3  # subjects in the log
logger = logging.getLogger(__name__)


def split_by_subject(
    items: list[dict[str, str]], dataset_dir: str, val_fraction: float, seed: int, subject_pattern: str | None = None
) -> dict[str, list[dict[str, str]]]:
    """
    Set a share of the subjects aside. Where a subject goes depends on its name, ``val_fraction`` and ``seed`` alone, so that
    further volumes move nobody; except that both lists get one subject at least.

    Args:
        items: ``[{"image": path}, ...]``, with any further keys.
        dataset_dir: folder of the volumes.
        val_fraction: probability of a subject to be for validation, between 0 and 1.
        seed: of the split.
        subject_pattern: see :py:func:`subjects_of`.

    Raises:
        ValueError: for another share, or when there is only one subject.
    """
    if isinstance(val_fraction, bool) or not isinstance(val_fraction, (int, float)) or not 0 < val_fraction < 1:
        raise ValueError(f"`val_fraction` is {val_fraction!r}; it must lie between 0 and 1, both excluded.")
    subjects: dict[str, list[dict[str, str]]] = defaultdict(list)
    for item, subject in zip(items, subjects_of([item["image"] for item in items], dataset_dir, subject_pattern)):
        subjects[subject].append(item)
    if len(subjects) < 2:
        raise ValueError(
            f"{dataset_dir!r} holds {len(items)} volumes of one subject ({', '.join(subjects)}); training and validation "
            "need two. Set `subject_pattern` if they are of several, or list them in a `dataset.json`."
        )
    drawn = {subject: _drawn(subject, seed) for subject in subjects}
    num_validation = sum(number < val_fraction for number in drawn.values())
    in_order = sorted(subjects, key=drawn.__getitem__)
    validation = set(in_order[: min(max(1, num_validation), len(subjects) - 1)])
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
        paths: of the volumes.
        dataset_dir: their folder.
        subject_pattern: regular expression that finds the subject in a path relative to ``dataset_dir`` instead: its first
            group, or all that it matches.

    Raises:
        ValueError: for a pattern that is not valid, or does not match a path.
    """
    relatives = [Path(os.path.relpath(path, dataset_dir)) for path in paths]
    names = {without_ending(relative.name) for relative in relatives}
    one_folder = len({relative.parent for relative in relatives}) == 1
    found = []
    for relative in relatives:
        if subject_pattern is not None:
            found.append(("`subject_pattern`", _matched(subject_pattern, relative.as_posix())))
        elif named := BIDS_SUBJECT.search(relative.as_posix()):
            found.append(("`sub-*` in the path", named.group(1)))
        else:
            folders = [part for part in relative.parent.parts if part != ".." and not COLLECTION.fullmatch(part)]
            if folders and not one_folder:
                found.append(("the first folder", folders[0]))
            else:
                name = without_ending(relative.name)
                case = CHANNEL.sub("", name)
                found.append(("the name of the file", case if f"{case}_0000" in names else name))
    subjects = sorted({subject for _, subject in found})
    origins = " or ".join(f"{origin} ({count} volumes)" for origin, count in Counter(origin for origin, _ in found).items())
    examples = ", ".join(subjects[:EXAMPLES]) + ", ..." * (len(subjects) > EXAMPLES)
    logger.info(f"{len(subjects)} subjects ({examples}), each named by {origins}; `subject_pattern` can say otherwise")
    return [subject for _, subject in found]


def _matched(subject_pattern: str, path: str) -> str:
    try:
        match = re.search(subject_pattern, path)
    except (re.error, TypeError) as error:
        raise ValueError(f"`subject_pattern` {subject_pattern!r} is not a regular expression ({error}).") from error
    if match is None:
        raise ValueError(f"`subject_pattern` {subject_pattern!r} finds no subject in {path!r}; it must match every path.")
    return match.group(1) if match.re.groups else match.group()


def _drawn(subject: str, seed: int) -> float:
    """A number from 0 to 1 that depends on a subject and a seed alone."""
    digest = hashlib.sha256(os.fsencode(f"{subject}{seed}")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
