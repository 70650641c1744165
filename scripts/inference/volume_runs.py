"""Runs over many volumes that continue after a bad file: at the end it is named, and the exit code is 1."""

from __future__ import annotations

import datetime
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.data import Dataset
from monai.engines import SupervisedEvaluator

from scripts.bundle.errors import reason
from scripts.bundle.machine import merged, share_of
from scripts.data.file_names import without_ending
from scripts.data.spatial_files import find_spatial
from scripts.data.volume_checks import LabelMapError
from scripts.data.volume_lists import find_images

PROBLEM = "problem"  # key of an item that could not be loaded
LEFT_OUT = "left_out"  # key of an item that is no image
PATIENCE = datetime.timedelta(days=7)  # how long a process waits for the others to finish their volumes
logger = logging.getLogger(__name__)


def join_processes(output_dir: str) -> None:
    """Connect the processes of a run under ``torchrun``, and make the folder of its results, with an OSError where nothing
    can be written."""
    if "RANK" in os.environ and idist.get_world_size() == 1 and int(os.environ["WORLD_SIZE"]) > 1:
        idist.initialize("gloo", timeout=PATIENCE)
        if torch.cuda.is_available():
            torch.cuda.set_device(idist.get_local_rank())
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output_dir):  # fails where it cannot be written to
        pass


def find_share(
    dataset_dir: str, image_glob: str, output_dir: str | None = None, spatial_keys: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """
    This process's share of the volumes that :py:func:`find_images` finds, with their spatial conditions, see
    :py:func:`scripts.data.spatial_files.find_spatial`.

    Args:
        dataset_dir: folder to search.
        image_glob: pattern relative to it.
        output_dir: folder of the results, which is left out.
        spatial_keys: names of the conditions.

    Returns:
        ``[{"image": path, "keep_ending": whether the names of its results do}, ...]``

    Raises:
        FileNotFoundError: when the folder does not exist or nothing in it matches.
    """
    items = find_spatial(find_images(dataset_dir, image_glob, output_dir), dataset_dir, spatial_keys)
    whole = [os.path.relpath(item["image"], dataset_dir) for item in items]
    short = [without_ending(path) for path in whole]
    counts = Counter(name for names in zip(whole, short) for name in set(names))
    return share_of(
        [{**item, "keep_ending": counts[name] > 1 or Path(item["image"]).is_dir()} for item, name in zip(items, short)]
    )


class VolumeDataset(Dataset):
    """
    MONAI's ``Dataset`` of ``[{"image": path}, ...]`` that returns, in place of a volume that cannot be used, what is wrong
    with it, for :py:class:`VolumeEvaluator`.
    """

    def _transform(self, index: int) -> dict[str, Any]:
        path = self.data[index]["image"]
        try:
            item: Any = super()._transform(index)
            return {**item, "path": path}
        except Exception as error:  # readers raise errors of any type
            kind = LEFT_OUT if isinstance(reason(error), LabelMapError) else PROBLEM
            return {"path": path, kind: _in_words(error, path)}


class VolumeEvaluator(SupervisedEvaluator):
    """
    MONAI's ``SupervisedEvaluator`` for a :py:class:`VolumeDataset`: a volume that cannot be read, processed or written is
    logged, and the run continues with the next one.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.problems: dict[str, str] = {}

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Process all volumes; an empty list is allowed."""
        if len(self.data_loader) == 0:  # type: ignore[arg-type]
            logger.info("there is nothing left to do")
            return
        super().run(global_epoch)

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> dict:
        path = batchdata["path"][0]
        if LEFT_OUT in batchdata:
            logger.warning(f"{path} is left out: it {batchdata[LEFT_OUT][0]}")
            return {}
        try:
            if PROBLEM in batchdata:
                raise ValueError(batchdata[PROBLEM][0])
            return super()._iteration(engine, batchdata)
        except Exception as error:
            self.problems[path] = _in_words(error, path)
            logger.error(f"{path}: {self.problems[path]}")
            return {}

    def finish(self) -> None:
        """Name the volumes of all processes that could not be done, if there are any, in a SystemExit of exit code 1."""
        problems = merged(self.problems)
        if problems:
            lines = [f"{path}: {problem}" for path, problem in sorted(problems.items())]
            raise SystemExit("\n  ".join([f"could not be done ({len(lines)}):", *lines]))


def _in_words(error: Exception, path: str) -> str:
    """What is wrong with a volume, as text that follows its path."""
    cause = reason(error)
    kind = "" if isinstance(cause, (ValueError, OSError)) else f"{type(cause).__name__}: "
    return " ".join(f"{kind}{cause}".removeprefix(path).split())
