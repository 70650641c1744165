"""What a data set says of its volumes: a Medical Segmentation Decathlon ``dataset.json`` (lists and conditions), and the
BIDS tables ``participants.tsv`` and ``sub-*_sessions.tsv`` (conditions such as age, sex and diagnosis)."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

from scripts.data.file_names import without_ending

LISTS = ("training", "validation")
NAMES = ("image", "label", "fold", "participant_id", "session_id")  # of files, lists and rows, which describe no volume
SESSION = re.compile(r"(?:^|[_/])ses-([^_./]+)")
MISSING = ("", "n/a", "na", "nan", "none", "null")  # BIDS writes n/a, R writes NA
Item = dict[str, Any]
Lists = dict[str, list[Item]]
Row = dict[str, str]
logger = logging.getLogger(__name__)


def dataset_lists(dataset_dir: str) -> Lists:
    """
    The lists of ``dataset_dir/dataset.json``: ``{"training": [{"image": path, ...}, ...], "validation": [...]}``. Empty
    where there is no such file, or one without these lists, as nnU-Net writes it.

    Raises:
        ValueError: for a file that cannot be used: broken, an item that is not one file, a file in both lists, no training.
    """
    return _dataset_json(*_as_of_now(Path(dataset_dir, "dataset.json")))[0]


def dataset_list_of(path: str, dataset_dir: str) -> str | None:
    """
    The list of ``dataset.json`` that a volume is in: ``"training"``, ``"validation"``, or ``"none"`` if it is in neither.
    None where there are no lists.
    """
    return _listed(path, dataset_dir)[0] if dataset_lists(dataset_dir) else None


def conditions_of(path: str, dataset_dir: str) -> dict[str, Any]:
    """
    Everything that is known of a volume.

    Args:
        path: path of the volume.
        dataset_dir: folder of the volumes. Its ``dataset.json`` is read, and the nearest ``participants.tsv`` and
            ``sub-*_sessions.tsv``: in the folder of the volume or in one above it, up to ``dataset_dir``.

    Returns:
        numbers, texts and flags by name, sorted; what is missing for this volume is left out. The item in ``dataset.json``
        decides before the session, and the session before the participant.

    Raises:
        ValueError: for a file that cannot be read, and for several rows that could be those of the volume.
    """
    folders = [folder for folder in Path(path).parents if folder.is_relative_to(dataset_dir)]
    participants = [folder / "participants.tsv" for folder in folders]
    sessions = [folder / f"{folder.name}_sessions.tsv" for folder in folders]
    found: dict[str, Any] = {}
    for nearest in (next(filter(Path.is_file, tables), None) for tables in (participants, sessions)):
        found |= _known(_row(nearest, path, dataset_dir)) if nearest is not None else {}
    return dict(sorted((found | _known(_listed(path, dataset_dir)[1])).items()))


def _as_of_now(path: Path) -> tuple[str, int]:
    """A file and the time of its last change, as the key of a cache of its content; 0 where there is no file."""
    return str(path), path.stat().st_mtime_ns if path.is_file() else 0


@functools.lru_cache
def _dataset_json(file: str, changed: int) -> tuple[Lists, dict[str, tuple[str, Item]]]:
    """The lists, and the list and the item of each volume by its real path."""
    if not changed:
        return {}, {}
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON that can be read ({error}).") from error
    if not isinstance(content, dict) or not any(name in content for name in LISTS):
        logger.info(f"{file} is left aside: it has no list `training`, as that of the Medical Segmentation Decathlon has")
        return {}, {}
    found: Lists = {name: content[name] for name in LISTS if name in content}
    if not all(isinstance(entries, list) for entries in found.values()) or not found.get("training"):
        raise ValueError(f"{file} needs a list `training` that is not empty, and may have a list `validation`.")
    lists = {name: [_item(entry, file, name) for entry in entries] for name, entries in found.items()}
    of_path = {name: {os.path.realpath(item["image"]): (name, item) for item in items} for name, items in lists.items()}
    training, validation = (of_path.get(name, {}) for name in LISTS)
    both = sorted(training.keys() & validation.keys())
    if both:
        raise ValueError(f"{file} has {len(both)} files in both lists, such as {both[0]}.")
    return lists, training | validation


def _item(entry: Any, file: str, name: str) -> Item:
    item = entry if isinstance(entry, dict) else {"image": entry}
    image = item.get("image")
    if not isinstance(image, str):
        raise ValueError(f"`{name}` in {file} has {image!r} as an `image`, which must be the path of one file.")
    return {**item, "image": os.path.normpath(Path(file).parent / image)}


def _listed(path: str, dataset_dir: str) -> tuple[str, Item]:
    """The list and the item of a volume in ``dataset.json``."""
    return _dataset_json(*_as_of_now(Path(dataset_dir, "dataset.json")))[1].get(os.path.realpath(path), ("none", {}))


def _row(table: Path, path: str, dataset_dir: str) -> Row:
    """The row of a volume, empty where it has none."""
    relative = Path(os.path.relpath(path, dataset_dir))
    match = SESSION.search(relative.as_posix())
    rows = _rows(*_as_of_now(table))
    if table.name == "participants.tsv":
        known = {row["participant_id"].removeprefix("sub-") for row in rows} - {""}
        names = (name.removeprefix("sub-") for part in relative.parts if part[:4] == "sub-" for name in _beginnings(part))
        subject = next((name for name in names if name in known), None)
        rows = [row for row in rows if row["participant_id"].removeprefix("sub-") == subject]
    if match is not None:
        sessions = [row.get("session_id", "").removeprefix("ses-") for row in rows]
        rows = [row for row, each in zip(rows, sessions) if each == match.group(1) or each.lower() in MISSING]
    if len(rows) > 1:
        raise ValueError(
            f"{table} has {len(rows)} rows that may be of {path}; give each its `session_id`, and name the session of the "
            "volume (`ses-*`) in its path."
        )
    return rows[0] if rows else {}


def _beginnings(part: str) -> list[str]:
    """A part of a path, and what it begins with before each ``_`` and ``.``; the longest first."""
    return [*itertools.accumulate(re.split(r"(?=[_.])", part))][::-1]


@functools.lru_cache
def _rows(file: str, changed: int) -> list[Row]:
    """The rows of a table. Quotation marks have no meaning in BIDS; those around a whole cell are left out."""
    lines = [line for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line.strip()] or [""]
    names, *cells = [[re.sub(r'^"(.*)"$', r"\1", cell.strip()).strip() for cell in line.split("\t")] for line in lines]
    column = "session_id" if file.endswith("_sessions.tsv") else "participant_id"
    if column not in names:
        raise ValueError(f"{file} has no column `{column}`; BIDS asks for one, separated from the others by tabs.")
    for number, row in enumerate(cells, start=2):
        if any(row[len(names) :]):
            raise ValueError(f"{file} has {len(row)} cells in line {number}, and {len(names)} names of columns.")
    return [{**dict.fromkeys(names, ""), **dict(zip(names, row))} for row in cells]


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Without missing and nested values and paths of files; text that is a number becomes one."""
    found = {name: _value(value) for name, value in values.items() if name and name not in NAMES}
    return {name: value for name, value in found.items() if value is not None}


def _value(value: Any) -> float | str | None:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value).strip() if isinstance(value, (str, int, float)) else ""
    if text.lower() in MISSING or without_ending(text) != text:  # the path of a volume
        return None
    try:
        number = float(text.replace("_", " "))  # 1_000 is a word
    except ValueError:
        return text
    return number if math.isfinite(number) else None
