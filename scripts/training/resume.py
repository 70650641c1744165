"""What a checkpoint holds, and how a run goes on from it."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.utils.enums import CommonKeys as Keys
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from scripts.bundle.weights import check_arguments, what_differs
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["RunState"]

METRICS = ("best_metric", "metric_before")  # of the evaluator
NEW_IN_EACH_PART = ("resume", "overwrite")  # keys of the config
logger = logging.getLogger(__name__)


@dataclass(eq=False)
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

    network: Any
    items: dict[str, Any]
    evaluator: Any
    config: dict[str, Any] = field(default_factory=dict)
    dataset_dir: str | Path = ""

    def __post_init__(self) -> None:
        self.items = {name: item for name, item in self.items.items() if item is not None}

    def state_dict(self, trainer: ResumableTrainer) -> dict[str, Any]:
        """The content of a checkpoint: tensors, numbers, text, lists and dictionaries."""
        measured = self.evaluator.state
        metrics = {name: float(getattr(measured, name)) for name in METRICS if hasattr(measured, name)}
        return {
            "arguments": self.network.arguments,
            "network": self.network.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "precision": trainer.precision,
            "trainer": {name: getattr(trainer.state, name) for name in ("iteration", "epoch", "epoch_length")},
            "evaluator": {**metrics, "best_metric_epoch": measured.best_metric_epoch},
            "config": self.config,
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
        self._refuse_other_settings(content, path)  # first: on conditions the network's arguments depend
        check_arguments(content["arguments"], self.network.arguments, path)
        self.network.load_state_dict(content["network"])
        for name, item in self.items.items():
            if name not in content:
                logger.warning(f"{path} has no `{name}`, which this run has: the run starts with a new one")
            elif isinstance(item, Optimizer):  # the settings are those of this run
                item.load_state_dict({**item.state_dict(), "state": content[name]["state"]})
            elif isinstance(item, LRScheduler):
                _load_schedule(item, content[name])
            else:
                item.load_state_dict(content[name])
        if content["scaler"]:  # empty when the run so far had no scaler
            trainer.scaler.load_state_dict(content["scaler"])
        if self._has_the_validation_volumes(content["validation"], path):
            for name, value in content["evaluator"].items():
                setattr(self.evaluator.state, name, value)
        _set_position(trainer, **content["trainer"])
        logger.info(f"resumed {path} after iteration {trainer.state.iteration}, epoch {trainer.state.epoch} complete")
        changes = what_differs(_settings(content["config"]), _settings(self.config))
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

    def _has_the_validation_volumes(self, volumes: list[str], path: Path) -> bool:
        before, now = set(volumes), set(self._validation_volumes())
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


def _load_schedule(schedule: LRScheduler, saved: dict[str, Any]) -> None:
    """The position of the checkpoint in the schedule of this run, whose base rate and length may be others."""
    if isinstance(schedule, LambdaLR):
        schedule.last_epoch, schedule._step_count = saved["last_epoch"] - 1, saved["_step_count"] - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the optimizer has not stepped
            schedule.step()
        return
    # the settings of any other one do not follow from its position; its rate keeps its share of the base rate
    schedule.load_state_dict({**saved, "base_lrs": schedule.base_lrs})
    bases = zip(saved["base_lrs"], schedule.base_lrs)
    for group, rate, (before, now) in zip(schedule.optimizer.param_groups, saved["_last_lr"], bases):
        group["lr"] = rate if before == now else now * (rate / before)


def _set_position(trainer: ResumableTrainer, iteration: int, epoch: int, epoch_length: int) -> None:
    complete = iteration // epoch_length
    if epoch_length != trainer.state.epoch_length:
        logger.warning(
            f"an epoch has {trainer.state.epoch_length} batches and had {epoch_length}: going on after epoch {complete}"
        )
        iteration = complete * trainer.state.epoch_length
    trainer.state.iteration, trainer.state.epoch = iteration, complete
