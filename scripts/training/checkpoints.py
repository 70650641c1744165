"""Checkpoints of a training run: ``checkpoint_*.pt``, from each of which it can be resumed bit for bit, and ``model.pt``,
the best weights so far."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Evaluator

from scripts.bundle.files import UNFINISHED, serialise, write_atomically
from scripts.bundle.precision import dtype_name
from scripts.bundle.weights import save_weights
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["TrainingSaver", "claim_ckpt_dir", "find_checkpoints", "set_random_states"]

CHECKPOINT = re.compile(r"checkpoint_(\d+)\.pt")  # the number is that of the last iteration
WEIGHTS = "model.pt"
EVALUATOR_STATE: dict[str, type] = {"best_metric": float, "best_metric_epoch": int, "metric_before": float}


def find_checkpoints(ckpt_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [(int(match[1]), path) for path in Path(ckpt_dir).glob("*.pt") if (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def claim_ckpt_dir(ckpt_dir: str, resume: bool, overwrite: bool) -> None:
    """
    Refuse to start a new run in a folder with checkpoints of another one, or in a folder that cannot be written to.

    Args:
        ckpt_dir: folder for the checkpoints, made if necessary.
        resume: the run continues from the checkpoints in it.
        overwrite: the run may replace the checkpoints in it.

    Raises:
        FileExistsError: when the folder holds checkpoints and neither is set.
        OSError: when the folder cannot be made or written to.
    """
    folder = Path(ckpt_dir)
    present = find_checkpoints(folder)
    names = [path.name for path in (*present, folder / WEIGHTS) if path.exists()]
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


class TrainingSaver:
    """
    Handler that writes a checkpoint after every epoch, every few minutes within one, and when a signal ends the run; and
    ``model.pt`` (with ``model.json``) whenever the evaluator's key metric reaches a new best value.

    A checkpoint holds everything that :py:func:`scripts.training.resume.resume_run` needs to continue the run exactly. It is
    written to a temporary file, flushed to the disk and renamed before old ones are removed: a kill, a full disk or a power
    failure never destroys a complete checkpoint.

    Args:
        ckpt_dir: folder for the checkpoints.
        network: the network whose weights are saved, not wrapped; its ``arguments`` are what it was made with.
        to_save: further objects with a ``state_dict``, by name; None stands for one that this run does not have.
        evaluator: the validation engine; the weights of its network are ``model.pt``.
        minutes: write a checkpoint within an epoch when the last one is older.
        keep: how many to keep, besides that of the best epoch.
        describe: gives the entries of ``model.json`` besides the network's arguments and how long it was trained.
    """

    def __init__(
        self,
        ckpt_dir: str,
        network: Any,
        to_save: dict[str, Any],
        evaluator: Evaluator,
        minutes: float = 10.0,
        keep: int = 2,
        describe: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        if keep < 1:
            raise ValueError(f"`keep` is {keep!r}; at least 1 checkpoint must be kept.")
        self.ckpt_dir = Path(ckpt_dir)
        self.network = network
        self.to_save = {name: item for name, item in to_save.items() if item is not None}
        self.evaluator: Any = evaluator
        self.minutes = minutes
        self.keep = keep
        self.describe = describe
        self.saved_metric: float | None = None

    def attach(self, engine: ResumableTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_if_due)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_checkpoint)
        engine.add_event_handler(Events.TERMINATE, self._save_unless_saved)
        self.evaluator.add_event_handler(Events.COMPLETED, lambda: self.save_best(engine))

    def _start(self, trainer: ResumableTrainer) -> None:
        self.ckpt_dir.mkdir(parents=True, exist_ok=True)
        if trainer.state.iteration == 0:  # those of a run that is overwritten could be taken for newer ones
            for path in find_checkpoints(self.ckpt_dir):
                path.unlink()
        self.saved_metric = _best(self.evaluator)
        self.saved_at, self.saved_iteration = time.monotonic(), trainer.state.iteration

    def save_best(self, trainer: ResumableTrainer) -> None:
        if trainer.state.iteration > 0 and _best(self.evaluator) not in (None, self.saved_metric):
            self.saved_metric = _best(self.evaluator)
            done = {"iteration": trainer.state.iteration, "epoch": trainer.state.epoch, "best_metric": self.saved_metric}
            save_weights(self.evaluator.network, self.ckpt_dir / WEIGHTS, {**self.describe(), "trained": done})

    def _save_if_due(self, trainer: ResumableTrainer) -> None:
        # not at an epoch's last iteration: the checkpoint after its validation follows
        due = time.monotonic() - self.saved_at > 60 * self.minutes
        if due and trainer.step_is_complete and trainer.state.iteration % trainer.state.epoch_length:
            self.save_checkpoint(trainer)

    def _save_unless_saved(self, trainer: ResumableTrainer) -> None:
        if self.saved_iteration != trainer.state.iteration:
            self.save_checkpoint(trainer)

    def save_checkpoint(self, trainer: ResumableTrainer) -> None:
        content = {
            "arguments": self.network.arguments,
            "network": self.network.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "precision": {"amp": trainer.autocast["enabled"], "amp_dtype": dtype_name(trainer.autocast["dtype"])},
            "trainer": {name: getattr(trainer.state, name) for name in ("iteration", "epoch", "epoch_length")},
            "evaluator": {
                name: kind(getattr(self.evaluator.state, name))
                for name, kind in EVALUATOR_STATE.items()
                if hasattr(self.evaluator.state, name)
            },
            "random": _random_states(),
            **{name: item.state_dict() for name, item in self.to_save.items()},
        }
        write_atomically(serialise(content), self.ckpt_dir / f"checkpoint_{trainer.state.iteration:08d}.pt")
        self.saved_at, self.saved_iteration = time.monotonic(), trainer.state.iteration
        self._prune(best=self.evaluator.state.best_metric_epoch * trainer.state.epoch_length)

    def _prune(self, best: int) -> None:
        for path in find_checkpoints(self.ckpt_dir)[self.keep :]:
            match = CHECKPOINT.fullmatch(path.name)
            if match and int(match[1]) != best:
                path.unlink(missing_ok=True)


def _best(evaluator: Evaluator) -> float | None:
    return float(evaluator.state.best_metric) if evaluator.state.best_metric_epoch != -1 else None


def _random_states() -> dict[str, Any]:
    name, key, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(key).tolist(), *rest],  # arrays are not loaded with `weights_only`
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, key, *rest = states["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
