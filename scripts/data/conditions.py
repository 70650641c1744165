"""What is known of a volume beside its voxels (age, sex, diagnosis, ...): further keys of its item in a Decathlon
``dataset.json``, and its subject's row in a BIDS ``participants.tsv``."""

from __future__ import annotations

import csv
import functools
import json
import re
from pathlib import Path
from typing import Any

__all__ = ["conditions_of", "dataset_list_of"]

OF_THE_FILE = ("image", "label", "fold")  # keys of a Decathlon item that say nothing of the volume
SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
MISSING = ("", "n/a", "nan", "none", "null")  # BIDS writes n/a


def conditions_of(path: str, dataset_dir: str) -> dict[str, Any]:
    """
    Everything that is known of a volume.

    Args:
        path: of the volume.
        dataset_dir: folder of the volumes. Its ``dataset.json`` is read, and the ``participants.tsv`` nearest to the volume:
            in its own folder or in one above it, up to ``dataset_dir``.

    Returns:
        numbers, texts and flags by name, sorted; what is missing for this volume is left out. Where both files have a key,
        ``dataset.json`` decides.

    Raises:
        ValueError: for a file that cannot be read.
    """
    _, item = _decathlon_items(*_as_of_now(Path(dataset_dir) / "dataset.json")).get(_absolute(path), (None, {}))
    found = {**_participant(Path(path), Path(dataset_dir)), **item}
    return {key: found[key] for key in sorted(found)}


def dataset_list_of(path: str, dataset_dir: str) -> str | None:
    """
    Where a volume stands in ``dataset.json``: ``"training"``, ``"validation"``, or ``"none"`` for one that neither list has.
    None without such a file.

    Args:
        path: of the volume.
        dataset_dir: folder of the volumes.
    """
    items = _decathlon_items(*_as_of_now(Path(dataset_dir) / "dataset.json"))
    return items.get(_absolute(path), ("none", {}))[0] if items else None


def _as_of_now(path: Path) -> tuple[str, int]:
    """A file and when it was changed last: what is kept of it counts until it changes. 0 where there is none."""
    return str(path), path.stat().st_mtime_ns if path.is_file() else 0


@functools.lru_cache
def _decathlon_items(file: str, changed: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """The list and the further keys of every volume in ``dataset.json``, by its absolute path."""
    path = Path(file)
    if not changed:
        return {}
    try:
        content = json.loads(path.read_text())
        return {
            _absolute(str(path.parent / item["image"])): (name, _known(item))
            for name in ("validation", "training")
            for item in content.get(name, [])
            if isinstance(item, dict) and isinstance(item.get("image"), str)
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); repair it or remove it.") from error


def _participant(path: Path, dataset_dir: Path) -> dict[str, Any]:
    subject = SUBJECT.search(str(path.relative_to(dataset_dir)) if path.is_relative_to(dataset_dir) else path.name)
    for folder in path.parents if subject else ():
        if not folder.is_relative_to(dataset_dir):
            break
        table, changed = _as_of_now(folder / "participants.tsv")
        if changed:
            return _participants(table, changed).get(subject.group(), {})  # type: ignore[union-attr]
    return {}


@functools.lru_cache
def _participants(path: str, changed: int) -> dict[str, dict[str, Any]]:
    """The rows of ``participants.tsv`` by subject."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); repair it or remove it.") from error
    if rows and "participant_id" not in rows[0]:
        raise ValueError(f"{path} has no column `participant_id`; BIDS asks for one, separated from the others by tabs.")
    found = {}
    for row in rows:
        subject = f"sub-{row.pop('participant_id').removeprefix('sub-')}"
        found[subject] = _known({key: value for key, value in row.items() if key})
    return found


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is missing, nested, or says where the files are; text that is a number becomes one."""
    numbers_and_words = {key: _value(value) for key, value in values.items() if key not in OF_THE_FILE}
    return {key: value for key, value in numbers_and_words.items() if value is not None}


def _value(value: Any) -> float | str | None:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value).strip() if isinstance(value, (str, int, float)) else ""
    if text.lower() in MISSING:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return number if abs(number) < float("inf") else None


def _absolute(path: str) -> str:
    return str(Path(path).resolve())
