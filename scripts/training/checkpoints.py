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
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.utils.enums import CommonKeys as Keys
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scripts.bundle.files import UNFINISHED, serialise, write_atomically
from scripts.bundle.precision import Precision, choose_precision
from scripts.bundle.weights import check_arguments, save_weights, what_differs
from scripts.training.trainer import ResumableTrainer

CHECKPOINT = re.compile(r"checkpoint_(\d+)\.pt")  # the number is that of the last iteration
WEIGHTS = "model.pt"
NEW_IN_EACH_PART = ("resume", "overwrite")  # keys of the config
logger = logging.getLogger(__name__)


def find_checkpoints(ckpt_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [(int(match[1]), path) for path in Path(ckpt_dir).glob("*.pt") if (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(ckpt_dir: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """
    The newest checkpoint in a folder that is not damaged, and its content; None without a checkpoint. No code in it is run.

    Raises:
        ValueError: when all are damaged.
    """
    paths = find_checkpoints(ckpt_dir)
    for path in paths:
        with contextlib.suppress(Exception):  # damaged archives raise errors of any type
            content = io.BytesIO(path.read_bytes())
            if zipfile.ZipFile(content).testzip() is None:  # torch does not check the checksums in the archive
                content.seek(0)
                return path, torch.load(content, map_location="cpu", weights_only=True)
        logger.warning(f"{path} is damaged, or holds code, which was not run. Trying the one before.")
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {ckpt_dir} can be used.")
    return None


def resumed_precision(ckpt_dir: str, device: str | torch.device) -> Precision:
    """
    The precision of the newest checkpoint in ``ckpt_dir``, so that a run continues as it began, on another processor too.
    Without a checkpoint, the default of ``device``.
    """
    if found := newest_checkpoint(ckpt_dir):
        return Precision(str(device), **found[1]["precision"], reason=f"that of {found[0]}, from which the run is resumed")
    return choose_precision(device)


def claim_ckpt_dir(ckpt_dir: str, resume: bool, overwrite: bool) -> None:
    """
    Make the folder for a run's checkpoints, and refuse one that holds those of an earlier run or cannot be written to.

    Raises:
        FileExistsError: when the folder holds checkpoints and neither ``resume`` nor ``overwrite`` is set, or weights
            without a checkpoint and ``overwrite`` is not.
        OSError: when the folder cannot be made or written to.
    """
    folder = Path(ckpt_dir)
    checkpoints = find_checkpoints(folder)
    present = [path.name for path in (*checkpoints, folder / WEIGHTS) if path.exists()]
    if present and not overwrite and not (resume and checkpoints):
        raise FileExistsError(
            f"`ckpt_dir` {ckpt_dir!r} holds {' and '.join(present)} of an earlier run: set `resume` (which needs a "
            "checkpoint), `overwrite`, or another `output_dir`."
        )
    if idist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"`ckpt_dir` {ckpt_dir!r} cannot be written to.")
        for path in folder.glob(f"*{UNFINISHED}"):  # of a run that was killed while it wrote
            path.unlink()


@dataclass(eq=False)
class TrainingSaver:
    """
    Handler that writes a checkpoint after every epoch, every few minutes within one, and when a signal ends the run; and
    ``model.pt`` (with ``model.json``) whenever the evaluator's key metric reaches a new best value. A checkpoint holds all
    that a run needs to be continued exactly, and is complete on the disk before old ones are removed.

    Args:
        ckpt_dir: folder for the checkpoints.
        network: network, not wrapped; its ``arguments`` are what it was made with.
        items: further objects with a ``state_dict``, by name; None stands for one that this run does not have. What
            ``must_match``, if an item has it, returns of its state must stay.
        evaluator: validation engine; the weights of its network are ``model.pt``.
        config: config of the run, as JSON has it.
        dataset_dir: folder from which validation volumes are named, so that it may be moved.
        minutes: age of the last checkpoint at which another one is written within an epoch.
        keep: number of checkpoints that are kept, besides that of the best epoch.
        describe: function that gives further entries of ``model.json``.
    """

    ckpt_dir: str
    network: Any
    items: dict[str, Any]
    evaluator: Any
    config: dict[str, Any] = field(default_factory=dict)
    dataset_dir: str | Path = ""
    minutes: float = 10.0
    keep: int = 2
    describe: Callable[[], dict[str, Any]] = dict

    def __post_init__(self) -> None:
        self.items = {name: item for name, item in self.items.items() if item is not None}

    def attach(self, engine: ResumableTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_if_due)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_checkpoint)
        engine.add_event_handler(Events.TERMINATE, self.save_checkpoint)
        self.evaluator.add_event_handler(Events.COMPLETED, self._save_best, engine)

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
        """Write a checkpoint, and remove those that are too many."""
        write_atomically(serialise(self.state_dict(trainer)), self._path(trainer.state.iteration))
        self.saved_at = time.monotonic()
        best = self._path(self.evaluator.state.best_metric_epoch * trainer.state.epoch_length)
        for path in find_checkpoints(self.ckpt_dir)[self.keep :]:
            if path != best:
                path.unlink(missing_ok=True)

    def _path(self, iteration: int) -> Path:
        return Path(self.ckpt_dir, f"checkpoint_{iteration:08d}.pt")

    def state_dict(self, trainer: ResumableTrainer) -> dict[str, Any]:
        """The content of a checkpoint: tensors, numbers, text, lists and dictionaries."""
        measured = self.evaluator.state
        return {
            "arguments": self.network.arguments,
            "network": self.network.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "precision": trainer.precision,
            "trainer": {name: getattr(trainer.state, name) for name in ("iteration", "epoch", "epoch_length")},
            "evaluator": {
                "best_metric": float(measured.best_metric),
                "metric_before": float(getattr(measured, "metric_before", math.nan)),
                "best_metric_epoch": measured.best_metric_epoch,
            },
            "config": self.config,
            "validation": self._validation_volumes(),
            **{name: item.state_dict() for name, item in self.items.items()},
        }

    def _validation_volumes(self) -> list[str]:
        items = getattr(self.evaluator.data_loader.dataset, "data", [])
        return sorted(os.path.relpath(str(item[Keys.IMAGE]), self.dataset_dir) for item in items)

    def resume(self, trainer: ResumableTrainer) -> bool:
        """
        Go on from the newest checkpoint, with the settings of this run's config: learning rate, weight decay, length of the
        schedule, weights of losses. With the same config, it goes on bit for bit.

        Args:
            trainer: trainer that is starting.

        Returns:
            whether there is a checkpoint.

        Raises:
            ValueError: when it is of another network or of other settings that must stay, or not the same in all processes.
        """
        found = newest_checkpoint(self.ckpt_dir)
        iterations: Any = idist.all_gather(found[1]["trainer"]["iteration"] if found else 0)
        if len(set(iterations)) > 1:
            raise ValueError(f"the processes found checkpoints of different iterations in {self.ckpt_dir}: {iterations}.")
        if found is None:
            logger.info(f"nothing to resume in {self.ckpt_dir}: training starts from the beginning")
            return False
        path, content = found
        for name, item in self.items.items():  # first: on conditions the network's arguments depend
            if name in content and hasattr(item, "must_match"):
                saved, here = item.must_match(content[name]), item.must_match(item.state_dict())
                if details := what_differs(saved, {key: value for key, value in here.items() if key in saved}):
                    raise ValueError(f"{path} cannot be resumed: {details}.")
        check_arguments(content["arguments"], self.network.arguments, path)
        self._load(trainer, content, path)
        logger.info(f"resumed {path} after iteration {trainer.state.iteration}, epoch {trainer.state.epoch} complete")
        before, now = ({k: v for k, v in c.items() if k not in NEW_IN_EACH_PART} for c in (content["config"], self.config))
        if changes := what_differs(before, now):
            logger.info(f"settings that changed since {path} was written: {changes}")
        return True

    def _load(self, trainer: ResumableTrainer, content: dict[str, Any], path: Path) -> None:
        self.network.load_state_dict(content["network"])
        for name, item in self.items.items():
            if name not in content:
                logger.warning(f"{path} has no `{name}`, which this run has: the run starts with a new one")
            elif isinstance(item, Optimizer):  # the settings are those of this run
                item.load_state_dict({**item.state_dict(), "state": content[name]["state"]})
            elif isinstance(item, LRScheduler):  # the rate is that of this run's schedule at the same step
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that the optimizer has not stepped
                    for _ in range(content[name]["last_epoch"]):
                        item.step()
            else:
                item.load_state_dict(content[name])
        if content["scaler"]:  # empty when the run so far had no scaler
            trainer.scaler.load_state_dict(content["scaler"])
        if content["validation"] == self._validation_volumes():
            for name, value in content["evaluator"].items():
                setattr(self.evaluator.state, name, value)
        else:
            logger.warning(f"the validation volumes are not those of {path}: the best metric starts anew")
        iteration, before = content["trainer"]["iteration"], content["trainer"]["epoch_length"]
        epoch, now = iteration // before, trainer.state.epoch_length
        if before != now:
            logger.warning(f"an epoch has {now} batches and had {before}: going on after epoch {epoch}")
            iteration = epoch * now
        trainer.state.epoch, trainer.state.iteration = epoch, iteration
