"""Checkpoints of a training run: ``checkpoint.pt``, from which it goes on, and ``model.pt``, the best weights so far."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from scripts.autoencoderkl import AutoencoderKL
from scripts.trainer import AutoencoderTrainer
from scripts.weights import check_arguments, save_weights, serialise, write_atomically

__all__ = ["TrainingResumer", "TrainingSaver", "claim_ckpt_dir"]

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "model.pt"
logger = logging.getLogger(__name__)


def claim_ckpt_dir(ckpt_dir: str, resume: bool, overwrite: bool) -> None:
    """
    Refuse to start a new run where another one keeps its checkpoints.

    Args:
        ckpt_dir: folder for the checkpoints.
        resume: the run goes on from what lies there.
        overwrite: the run may replace what lies there.

    Raises:
        FileExistsError: when the folder holds checkpoints and neither is set.
    """
    present = [name for name in (CHECKPOINT, WEIGHTS) if (Path(ckpt_dir) / name).exists()]
    if present and not resume and not overwrite:
        raise FileExistsError(
            f"`ckpt_dir` {ckpt_dir!r} holds {' and '.join(present)} of another run. Go on with it (`--resume true`), "
            "replace it (`--overwrite true`), or choose another `ckpt_dir` or `output_dir`."
        )


class TrainingSaver:
    """
    Handler that writes ``checkpoint.pt`` after every epoch, and ``model.pt`` (with ``model.json``) whenever the
    evaluator's key metric is better than ever. Each file is replaced in one step, so a kill never costs the old one.

    Args:
        ckpt_dir: folder for the checkpoints, made if necessary.
        network: the network whose weights are saved.
        to_save: further objects with a ``state_dict``, by name: optimizer, scheduler.
        evaluator: the validation engine.
    """

    def __init__(self, ckpt_dir: str, network: AutoencoderKL, to_save: dict[str, Any], evaluator: Evaluator) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.network = network
        self.to_save = to_save
        self.evaluator = evaluator
        self.saved_metric: float | None = None

    def attach(self, engine: AutoencoderTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_checkpoint)
        self.evaluator.add_event_handler(Events.COMPLETED, lambda: self.save_best(engine))

    def _start(self) -> None:
        self.ckpt_dir.mkdir(parents=True, exist_ok=True)
        self.saved_metric = _best(self.evaluator)

    def save_best(self, trainer: AutoencoderTrainer) -> None:
        if trainer.state.epoch > 0 and _best(self.evaluator) not in (None, self.saved_metric):
            save_weights(self.network, self.ckpt_dir / WEIGHTS)
            self.saved_metric = _best(self.evaluator)

    def save_checkpoint(self, trainer: AutoencoderTrainer) -> None:
        content = {
            "arguments": self.network.arguments,
            "network": self.network.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "trainer": {"epoch": trainer.state.epoch, "iteration": trainer.state.iteration},
            "evaluator": {
                "best_metric": self.evaluator.state.best_metric,
                "best_metric_epoch": self.evaluator.state.best_metric_epoch,
            },
            **{name: item.state_dict() for name, item in self.to_save.items()},
        }
        write_atomically(serialise(content), self.ckpt_dir / CHECKPOINT)


class TrainingResumer:
    """
    Handler that goes on from ``checkpoint.pt``, if ``resume`` is set and there is one. It must come first in the list.

    Args:
        ckpt_dir: folder of the checkpoint.
        resume: whether to go on; if False the handler does nothing.
        network: the network to load.
        to_load: further objects, by name, as in :py:class:`TrainingSaver`.
        evaluator: the validation engine, which gets back its best metric.

    Raises:
        ValueError: when training starts from a checkpoint that is damaged or of another network.
    """

    def __init__(
        self, ckpt_dir: str, resume: bool, network: AutoencoderKL, to_load: dict[str, Any], evaluator: Evaluator
    ) -> None:
        self.path = Path(ckpt_dir) / CHECKPOINT
        self.resume = resume
        self.network = network
        self.to_load = to_load
        self.evaluator = evaluator

    def attach(self, engine: Engine) -> None:
        if self.resume:
            engine.add_event_handler(Events.STARTED, self)

    def __call__(self, trainer: AutoencoderTrainer) -> None:
        if not self.path.is_file():
            logger.info(f"nothing to resume at {self.path}: training starts from the beginning")
            return
        try:
            content = torch.load(io.BytesIO(self.path.read_bytes()), map_location=trainer.state.device, weights_only=True)
        except Exception as error:  # damaged archives raise whatever the unpickler stumbles over
            raise ValueError(f"{self.path} is damaged ({error}); remove it to start again.") from error
        check_arguments(content["arguments"], self.network.arguments, self.path)
        self.network.load_state_dict(content["network"])
        if content["scaler"]:  # empty when the run so far had no scaler
            trainer.scaler.load_state_dict(content["scaler"])
        for name, item in self.to_load.items():
            item.load_state_dict(content[name])
        for engine, name in ((trainer, "trainer"), (self.evaluator, "evaluator")):
            for attribute, value in content[name].items():
                setattr(engine.state, attribute, value)
        logger.info(f"resumed {self.path} after epoch {trainer.state.epoch}")
        if trainer.state.epoch >= trainer.state.max_epochs:
            logger.info(f"all {trainer.state.max_epochs} epochs are done; set `epochs` higher to train on")


def _best(evaluator: Evaluator) -> float | None:
    return evaluator.state.best_metric if evaluator.state.best_metric_epoch != -1 else None
