"""What a data set says of its volumes: a Medical Segmentation Decathlon ``dataset.json`` (lists and conditions), and the
BIDS tables ``participants.tsv`` and ``sub-*_sessions.tsv`` (conditions such as age, sex and diagnosis)."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from scripts.bundle.processes import merged
from scripts.data.file_names import without_ending

__all__ = ["conditions_of", "dataset_list_of", "dataset_lists", "log_participants"]

LISTS = ("training", "validation")
OF_THE_FILE = ("image", "label", "fold")  # keys of a Decathlon item that do not describe the volume
OF_THE_ROW = ("participant_id", "session_id")
SESSION = re.compile(r"(?:^|_)ses-([^_.]+)")
MISSING = ("", "n/a", "na", "nan", "none", "null")  # BIDS writes n/a, R writes NA
SHOWN = 10  # rows in the log
Row = dict[str, str]
logger = logging.getLogger(__name__)


def dataset_lists(dataset_dir: str) -> dict[str, list[dict[str, Any]]]:
    """
    The lists of ``dataset_dir/dataset.json``: ``{"training": [{"image": path, ...}, ...], "validation": [...]}``. Empty
    where there is no such file, or one without these lists, as nnU-Net writes it.

    Raises:
        ValueError: for a file that cannot be used: broken, an item that is not one file, a file in both lists, no training.
    """
    return _dataset_json(*_as_of_now(Path(dataset_dir) / "dataset.json"))


def dataset_list_of(path: str, dataset_dir: str) -> str | None:
    """
    The list of ``dataset.json`` that a volume is in: ``"training"``, ``"validation"``, or ``"none"`` if it is in neither.
    None where there are no lists.

    Args:
        path: of the volume.
        dataset_dir: folder of the volumes.
    """
    return _listed(path, dataset_dir)[0] if dataset_lists(dataset_dir) else None


def conditions_of(path: str, dataset_dir: str) -> dict[str, Any]:
    """
    Everything that is known of a volume.

    Args:
        path: of the volume.
        dataset_dir: folder of the volumes. Its ``dataset.json`` is read, and the nearest ``participants.tsv`` and
            ``sub-*_sessions.tsv``: in the folder of the volume or in one above it, up to ``dataset_dir``.

    Returns:
        numbers, texts and flags by name, sorted; what is missing for this volume is left out. The item in ``dataset.json``
        decides before the session, and the session before the participant.

    Raises:
        ValueError: for a file that cannot be read, and for several rows that could be those of the volume.
    """
    rows = [_row(table, path, dataset_dir)[1] for table in _tables(path, dataset_dir)]
    found = {name: value for values in (*rows, _listed(path, dataset_dir)[1]) for name, value in _known(values).items()}
    return {name: found[name] for name in sorted(found)}


def log_participants(paths: Sequence[str], dataset_dir: str) -> None:
    """
    Log how many volumes have a row in a ``participants.tsv``, and which rows have no volume.

    Args:
        paths: of the volumes of this process; those of the others are counted too.
        dataset_dir: folder of the volumes.

    Raises:
        ValueError: as :py:func:`conditions_of` does.
    """
    found = merged(
        {path: [(table, _row(table, path, dataset_dir)[0]) for table in _tables(path, dataset_dir)] for path in paths}
    )
    numbers = defaultdict(list)
    for table, number in (pair for pairs in found.values() for pair in pairs):
        numbers[table].append(number)
    for table, used in numbers.items() if idist.get_rank() == 0 else ():
        unused = [row for number, row in enumerate(_rows(*_as_of_now(table))) if number not in used]
        names = ", ".join(" ".join(row[name] for name in OF_THE_ROW if row.get(name)) for row in unused[:SHOWN])
        log = logger.info if any(number is not None for number in used) else logger.warning
        log(
            f"{table}: {sum(number is not None for number in used)} of {len(used)} volumes have a row"
            + f"; rows without a volume: {names}{', ...' * (len(unused) > SHOWN)}" * bool(unused)
        )


def _as_of_now(path: Path) -> tuple[str, int]:
    """A file and the time of its last change, as the key of a cache of its content; 0 where there is no file."""
    return str(path), path.stat().st_mtime_ns if path.is_file() else 0


@functools.lru_cache
def _dataset_json(file: str, changed: int) -> dict[str, list[dict[str, Any]]]:
    path = Path(file)
    if not changed:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON that can be read ({error}); repair it or remove it.") from error
    if not isinstance(content, dict) or not any(name in content for name in LISTS):
        logger.info(f"{path} is left aside: it has no list `training`, as that of the Medical Segmentation Decathlon has")
        return {}
    lists = {name: content[name] for name in LISTS if name in content}
    if not all(isinstance(entries, list) for entries in lists.values()) or not lists.get("training"):
        raise ValueError(f"{path} needs a list `training` that is not empty, and may have a list `validation`.")
    found = {
        name: [_item(entry, path.parent, f"item {number} of `{name}` in {path}") for number, entry in enumerate(entries)]
        for name, entries in lists.items()
    }
    training, validation = ({os.path.realpath(item["image"]) for item in found.get(name, [])} for name in LISTS)
    both = sorted(training & validation)
    if both:
        raise ValueError(f"{path} has {len(both)} files in both lists, such as {both[0]}; take them out of one.")
    return found


def _item(entry: Any, folder: Path, where: str) -> dict[str, Any]:
    item = entry if isinstance(entry, dict) else {"image": entry}
    image = item.get("image")
    if not isinstance(image, str):
        found = f"{len(image)} files" if isinstance(image, list) else repr(image)
        raise ValueError(f"{where} has {found} as `image`, which must be the path of one file, with its channels in it.")
    return {**item, "image": os.path.normpath(folder / image)}


def _listed(path: str, dataset_dir: str) -> tuple[str, dict[str, Any]]:
    """The list and the item of a volume in ``dataset.json``."""
    return _items(*_as_of_now(Path(dataset_dir) / "dataset.json")).get(os.path.realpath(path), ("none", {}))


@functools.lru_cache
def _items(file: str, changed: int) -> dict[str, tuple[str, dict[str, Any]]]:
    lists = _dataset_json(file, changed)
    return {os.path.realpath(item["image"]): (name, item) for name, items in lists.items() for item in items}


def _tables(path: str, dataset_dir: str) -> list[Path]:
    """The nearest table of participants and that of the subject's sessions, as far as there are such."""
    folders = [folder for folder in Path(path).parents if folder.is_relative_to(dataset_dir)]
    participants = [folder / "participants.tsv" for folder in folders]
    sessions = [folder / f"{folder.name}_sessions.tsv" for folder in folders]
    nearest = (next(filter(Path.is_file, tables), None) for tables in (participants, sessions))
    return [table for table in nearest if table is not None]


def _row(table: Path, path: str, dataset_dir: str) -> tuple[int | None, Row]:
    """Number and content of a volume's row, None and nothing where it has none."""
    parts = Path(os.path.relpath(path, dataset_dir)).parts
    session = next((match.group(1) for part in parts for match in [SESSION.search(part)] if match), None)
    rows = dict(enumerate(_rows(*_as_of_now(table))))
    if table.name == "participants.tsv":
        known = {f"sub-{row['participant_id'].removeprefix('sub-')}" for row in rows.values()}
        subject = next((name for part in parts for name in _beginnings(part) if name in known), "")
        rows = {n: row for n, row in rows.items() if row["participant_id"].removeprefix("sub-") == subject[4:] != ""}
    if session is not None:
        rows = {n: row for n, row in rows.items() if _session(row) in (None, session)}
    if len(rows) > 1:
        raise ValueError(
            f"{table} has {len(rows)} rows that may be of {path}; give each its `session_id`, and name the session of the "
            "volume (`ses-*`) in its path."
        )
    return next(iter(rows.items()), (None, {}))


def _beginnings(part: str) -> list[str]:
    """A part of a path, and what it begins with before each ``_`` and ``.``; the longest first."""
    return [part, *(part[: end.start()] for end in reversed(list(re.finditer(r"[_.]", part))))]


def _session(row: Row) -> str | None:
    value = row.get("session_id", "")
    return None if value.lower() in MISSING else value.removeprefix("ses-")


@functools.lru_cache
def _rows(file: str, changed: int) -> list[Row]:
    """The rows of a table. Quotation marks have no meaning in BIDS; those around a whole cell are left out."""
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); repair it or remove it.") from error
    names, *cells = [[re.sub(r'^"(.*)"$', r"\1", cell.strip()).strip() for cell in line.split("\t")] for line in lines] or [
        []
    ]
    column = "session_id" if file.endswith("_sessions.tsv") else "participant_id"
    if lines and column not in names:
        raise ValueError(f"{file} has no column `{column}`; BIDS asks for one, separated from the others by tabs.")
    for number, row in enumerate(cells, start=2):
        if any(row[len(names) :]):
            raise ValueError(f"{file} has {len(row)} cells in line {number}, and {len(names)} names of columns.")
    return [{**dict.fromkeys(names, ""), **dict(zip(names, row))} for row in cells]


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Without missing and nested values and paths of files; text that is a number becomes one."""
    found = {name: _value(value) for name, value in values.items() if name and name not in (*OF_THE_FILE, *OF_THE_ROW)}
    return {name: value for name, value in found.items() if value is not None}


def _value(value: Any) -> float | str | None:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value).strip() if isinstance(value, (str, int, float)) else ""
    if text.lower() in MISSING or without_ending(text) != text:  # the path of a volume
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return number if abs(number) < float("inf") else None
