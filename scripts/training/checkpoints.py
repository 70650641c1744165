"""Checkpoints of a training run: ``checkpoint_*.pt``, from each of which it can be resumed bit for bit, and ``model.pt``,
the best weights so far."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events

from scripts.bundle.files import UNFINISHED, serialise, write_atomically
from scripts.bundle.precision import Precision, choose_precision
from scripts.bundle.weights import save_weights, what_is_wrong
from scripts.training.resumable_trainer import ResumableTrainer
from scripts.training.resume import RunState

__all__ = ["TrainingSaver", "claim_ckpt_dir", "find_checkpoints", "newest_checkpoint", "resumed_precision"]

CHECKPOINT = re.compile(r"checkpoint_(\d+)\.pt")  # the number is that of the last iteration
WEIGHTS = "model.pt"
logger = logging.getLogger(__name__)


def find_checkpoints(ckpt_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [(int(match[1]), path) for path in Path(ckpt_dir).glob("*.pt") if (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(ckpt_dir: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """
    The newest checkpoint in a folder that is not damaged, and its content; None where there is none. No code in it is run.

    Raises:
        ValueError: when all are damaged.
    """
    paths = find_checkpoints(ckpt_dir)
    for path in paths:
        try:
            return path, _read(path)
        except Exception as error:  # damaged archives raise errors of any type
            reason = what_is_wrong(error)
        logger.warning(f"{path} {reason}. Trying the one before.")
    if paths:
        raise ValueError(
            f"none of the {len(paths)} checkpoints in {ckpt_dir} can be used; {paths[-1]} {reason}. "
            "Remove them to start again, or choose another `ckpt_dir`."
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # the format of torch, which does not check the checksums in it
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} in it has changed")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def resumed_precision(ckpt_dir: str, device: str | torch.device) -> Precision:
    """
    The precision of the newest checkpoint, so that a run continues as it began, on another processor too. Without a
    checkpoint, the default of the device.

    Args:
        ckpt_dir: folder of the checkpoints.
        device: device on which the run continues.
    """
    for path in find_checkpoints(ckpt_dir):
        with contextlib.suppress(Exception):  # a damaged file raises any; it is reported when it is loaded
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped: no tensor is read
            return Precision(str(device), **content["precision"], reason=f"that of {path}, from which the run is resumed")
    return choose_precision(device)


def claim_ckpt_dir(ckpt_dir: str, resume: bool, overwrite: bool) -> None:
    """
    Refuse to start a new run in a folder with checkpoints or weights of another one, or in a folder that cannot be written
    to.

    Args:
        ckpt_dir: folder for the checkpoints, made if necessary.
        resume: whether the run continues from the checkpoints in it.
        overwrite: whether the run may replace what is in it.

    Raises:
        FileExistsError: when the folder holds checkpoints and neither is set, or weights without a checkpoint and
            ``overwrite`` is not.
        OSError: when the folder cannot be made or written to.
    """
    folder = Path(ckpt_dir)
    present = find_checkpoints(folder)
    names = [path.name for path in (*present, folder / WEIGHTS) if path.exists()]
    if resume and names == [WEIGHTS] and not overwrite:
        raise FileExistsError(
            f"`ckpt_dir` {ckpt_dir!r} holds {WEIGHTS}, but no checkpoint that could be resumed. Replace it (`--overwrite "
            f"true`), or start from it in another `output_dir` (`--pretrained {folder / WEIGHTS}`)."
        )
    if names and not resume and not overwrite:
        raise FileExistsError(
            f"`ckpt_dir` {ckpt_dir!r} holds {' and '.join(names)} of an earlier run. Go on with it (`--resume true`), "
            "replace it (`--overwrite true`), or choose another `ckpt_dir` or `output_dir`."
        )
    if idist.get_rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"`ckpt_dir` {ckpt_dir!r} cannot be written to; choose another one, or another `output_dir`.")
    for path in folder.glob(f"*{UNFINISHED}"):  # of a run that was killed while it wrote
        path.unlink()


@dataclass(eq=False)
class TrainingSaver:
    """
    Handler that writes a checkpoint after every epoch, every few minutes within one, and when a signal ends the run; and
    ``model.pt`` (with ``model.json``) whenever the evaluator's key metric reaches a new best value.

    A checkpoint is written to a temporary file, flushed to the disk and renamed before old ones are removed: a kill, a full
    disk or a power failure never destroys a complete checkpoint.

    Args:
        ckpt_dir: folder for the checkpoints.
        state: state of the run; the weights of its evaluator's network are ``model.pt``.
        minutes: age of the last checkpoint at which another one is written within an epoch.
        keep: number of checkpoints that are kept, besides that of the best epoch.
        describe: function that gives the entries of ``model.json`` besides the network's arguments and how long it was
            trained.
    """

    ckpt_dir: str
    state: RunState
    minutes: float = 10.0
    keep: int = 2
    describe: Callable[[], dict[str, Any]] = dict

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"`keep` is {self.keep!r}; at least 1 checkpoint must be kept.")

    def attach(self, engine: ResumableTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_if_due)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_checkpoint)
        engine.add_event_handler(Events.TERMINATE, self.save_checkpoint)
        self.state.evaluator.add_event_handler(Events.COMPLETED, self._save_best, engine)

    def _start(self, trainer: ResumableTrainer) -> None:
        Path(self.ckpt_dir).mkdir(parents=True, exist_ok=True)
        if trainer.state.iteration == 0:  # those of a run that is overwritten could be taken for newer ones
            for path in find_checkpoints(self.ckpt_dir):
                path.unlink()
        self.saved_at = time.monotonic()

    def _save_best(self, evaluator: Any, trainer: ResumableTrainer) -> None:
        measured, trained = evaluator.state, trainer.state
        is_best = measured.best_metric_epoch == measured.epoch and not math.isnan(measured.best_metric)
        if is_best and trained.iteration > 0:
            best = float(measured.best_metric)
            done = {"iteration": trained.iteration, "epoch": trained.epoch, "best_metric": best}
            save_weights(evaluator.network, Path(self.ckpt_dir, WEIGHTS), {**self.describe(), "trained": done})

    def _save_if_due(self, trainer: ResumableTrainer) -> None:
        # not at an epoch's last iteration: the checkpoint after its validation follows
        due = time.monotonic() - self.saved_at > 60 * self.minutes
        if due and trainer.step_is_complete and trainer.state.iteration % trainer.state.epoch_length:
            self.save_checkpoint(trainer)

    def save_checkpoint(self, trainer: ResumableTrainer) -> None:
        write_atomically(serialise(self.state.state_dict(trainer)), self._path(trainer.state.iteration))
        self.saved_at = time.monotonic()
        best = self._path(self.state.evaluator.state.best_metric_epoch * trainer.state.epoch_length)
        for path in find_checkpoints(self.ckpt_dir)[self.keep :]:
            if path != best:
                path.unlink(missing_ok=True)

    def _path(self, iteration: int) -> Path:
        return Path(self.ckpt_dir, f"checkpoint_{iteration:08d}.pt")
