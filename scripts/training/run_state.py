"""What a checkpoint holds, and how a run goes on from it."""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.engines import Evaluator
from monai.utils.enums import CommonKeys as Keys
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from scripts.bundle.json_files import Count, PositiveInt, checked
from scripts.bundle.precision import dtype_name
from scripts.bundle.weights import check_arguments, what_differs
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["Checkpoint", "RunState"]

NEW_IN_EACH_PART = ("resume", "overwrite")  # keys of the config
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a run is."""

    iteration: Count
    epoch: Count
    epoch_length: PositiveInt


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds besides the state of its objects, which have keys of their own."""

    arguments: dict[str, Any]
    network: dict[str, Any]
    scaler: dict[str, Any]
    trainer: Position
    evaluator: dict[str, Any]
    config: dict[str, Any]
    validation: list[str]


class RunState:
    """
    All that a run needs to be continued exactly: weights, optimizers, schedules, position, best metric.

    The settings of a resumed run are its own: learning rate, weight decay, length of the schedule and weights of losses are
    those of its config, and one line of the log names the keys that changed. With the same config, it goes on bit for bit.

    Args:
        network: network, not wrapped; its ``arguments`` are what it was made with.
        items: further objects with a ``state_dict``, by name; None stands for one that this run does not have. Those with
            ``must_match``, a function of their state, cannot change in what it returns.
        evaluator: validation engine. If its volumes are not those of the checkpoint, the best metric starts anew.
        config: config of the run, as JSON has it.
        dataset_dir: folder from which validation volumes are named, so that it may be moved.
    """

    def __init__(
        self,
        network: Any,
        items: dict[str, Any],
        evaluator: Evaluator,
        config: dict[str, Any] | None = None,
        dataset_dir: str | Path = "",
    ) -> None:
        self.network = network
        self.items = {name: item for name, item in items.items() if item is not None}
        self.evaluator: Any = evaluator
        self.config = config or {}
        self.dataset_dir = dataset_dir or "."

    def state_dict(self, trainer: ResumableTrainer) -> dict[str, Any]:
        """The content of a checkpoint: tensors, numbers, text, lists and dictionaries."""
        measured = self.evaluator.state
        numbers = {"best_metric": float(measured.best_metric), "best_metric_epoch": measured.best_metric_epoch}
        if hasattr(measured, "metric_before"):
            numbers["metric_before"] = float(measured.metric_before)
        return {
            "arguments": self.network.arguments,
            "network": self.network.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "precision": {"amp": trainer.autocast["enabled"], "amp_dtype": dtype_name(trainer.autocast["dtype"])},
            "trainer": {name: getattr(trainer.state, name) for name in ("iteration", "epoch", "epoch_length")},
            "evaluator": numbers,
            "config": json.loads(json.dumps(self.config, default=str)),
            "validation": self._validation_volumes(),
            **{name: item.state_dict() for name, item in self.items.items()},
        }

    def load(self, trainer: ResumableTrainer, content: dict[str, Any], path: Path) -> None:
        """
        Go on from a checkpoint.

        Args:
            trainer: trainer that is starting.
            content: content of the checkpoint.
            path: path of the checkpoint, for log and errors.

        Raises:
            ValueError: when it is of another network or of other settings that must stay.
        """
        checkpoint = checked(content, Checkpoint)
        self._refuse_other_settings(content, path)  # first: on conditions the network's arguments depend
        check_arguments(checkpoint.arguments, self.network.arguments, path)
        self.network.load_state_dict(content["network"])
        for name, item in self.items.items():
            if name not in content:
                logger.warning(f"{path} has no `{name}`, which this run has: the run starts with a new one")
            elif isinstance(item, Optimizer):
                _load_optimizer(item, content[name])
            elif isinstance(item, LRScheduler):
                _load_schedule(item, content[name])
            else:
                item.load_state_dict(content[name])
        if checkpoint.scaler:  # empty when the run so far had no scaler
            trainer.scaler.load_state_dict(checkpoint.scaler)
        if self._has_the_validation_volumes_of(checkpoint, path):
            for name, value in checkpoint.evaluator.items():
                setattr(self.evaluator.state, name, value)
        _set_position(trainer, checkpoint.trainer)
        logger.info(f"resumed {path} after iteration {trainer.state.iteration}, epoch {trainer.state.epoch} complete")
        changes = what_differs(_settings(checkpoint.config), _settings(json.loads(json.dumps(self.config, default=str))))
        if changes:
            logger.info(f"settings that changed since {path} was written: {changes}")
        if trainer.state.epoch >= trainer.state.max_epochs:
            logger.info(f"all {trainer.state.max_epochs} epochs are done; set `epochs` higher to train on")

    def _refuse_other_settings(self, content: dict[str, Any], path: Path) -> None:
        for name, item in self.items.items():
            if name in content and hasattr(item, "must_match"):
                saved = item.must_match(content[name])
                here = {key: value for key, value in item.must_match(item.state_dict()).items() if key in saved}
                details = what_differs(saved, here)
                if details:
                    raise ValueError(
                        f"{path} cannot be resumed: {details}. Go on with what was there, or start a run in another "
                        "`output_dir` (from these weights, with `pretrained`)."
                    )

    def _validation_volumes(self) -> list[str]:
        items = getattr(self.evaluator.data_loader.dataset, "data", [])
        return sorted(os.path.relpath(str(item[Keys.IMAGE]), self.dataset_dir) for item in items)

    def _has_the_validation_volumes_of(self, checkpoint: Checkpoint, path: Path) -> bool:
        before, now = set(checkpoint.validation), set(self._validation_volumes())
        if before == now:
            return True
        came, went = (", ".join(sorted(names)) or "none" for names in (now - before, before - now))
        logger.warning(
            f"the validation volumes are not those of {path}: new are {came}; gone are {went}. The best metric starts anew, "
            "because metrics of different volumes cannot be compared."
        )
        return False


def _settings(config: dict[str, Any], place: str = "") -> dict[str, Any]:
    """The values of a config by their id, such as ``optimizer#lr``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _settings(value, f"{place}{key}#")
        elif key not in NEW_IN_EACH_PART:
            found[f"{place}{key}"] = value
    return found


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """The moments of the checkpoint, and the settings of this run. A rate that a schedule has lowered keeps its share."""
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, own):
        rate, base = group["lr"], group.get("initial_lr")
        group.update(settings)
        if base == settings.get("initial_lr") is not None:
            group["lr"] = rate
        elif base:
            group["lr"] = settings["initial_lr"] * (rate / base)


def _load_schedule(schedule: LRScheduler, saved: dict[str, Any]) -> None:
    """The position of the checkpoint in the schedule of this run, whose base rate and length may be others."""
    if not isinstance(schedule, LambdaLR):  # its settings cannot be told from its position
        schedule.load_state_dict({**saved, "base_lrs": schedule.base_lrs})
        return
    schedule.load_state_dict({**schedule.state_dict(), **{key: saved[key] for key in ("last_epoch", "_step_count")}})
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a rate is asked for outside of a step
        rates = schedule.get_lr()
    schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates):
        group["lr"] = rate


def _set_position(trainer: ResumableTrainer, saved: Position) -> None:
    iteration, complete = saved.iteration, saved.iteration // saved.epoch_length
    if saved.epoch_length != trainer.state.epoch_length:
        logger.warning(
            f"an epoch has {trainer.state.epoch_length} batches and had {saved.epoch_length}: going on after epoch "
            f"{complete}"
        )
        iteration = complete * trainer.state.epoch_length
    trainer.state.iteration, trainer.state.epoch = iteration, complete
