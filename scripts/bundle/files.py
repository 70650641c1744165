"""Writing files atomically, and their hashes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.data.utils import pickle_hashing

UNFINISHED = ".unfinished"  # suffix of a file that is being written


def write_atomically(content: bytes, path: Path) -> None:
    """
    Replace ``path`` by ``content`` in one step: after a crash at any moment it holds the old content or the new.

    Raises:
        OSError: when it cannot be written (full disk, read-only folder); the old content stays.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that a power failure cannot undo the new name
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise OSError(error.errno, f"{path} could not be written ({error.strerror or error})") from error


def content_hash(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


@functools.lru_cache
def file_hash(path: str) -> str:
    """SHA-256 of a file that does not change during the run, such as the weights."""
    return content_hash(Path(path).read_bytes())


def item_hash(item: Mapping[str, Any]) -> bytes:
    """
    ``hash_func`` of MONAI's ``PersistentDataset``: by paths, sizes and times of change of an item's files, so that a file
    that was replaced is read again.
    """
    paths = [Path(value) for value in item.values() if isinstance(value, (str, Path))]
    states = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    return pickle_hashing({**item, "states": states})


def serialise(content: Any) -> bytes:
    """The bytes that ``torch.save`` would write."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
