"""Everything that happens around the iterations of a training run, in the order in which it must."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ignite.distributed as idist
from monai.engines import Evaluator
from monai.handlers import ValidationHandler
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from scripts.training.checkpoints import TrainingSaver
from scripts.training.initial_weights import InitialWeights
from scripts.training.pretrained import load_pretrained
from scripts.training.repeatable_batches import RepeatableOrder
from scripts.training.resumable_trainer import ResumableTrainer
from scripts.training.run_log import BeforeAndAfter, Curves, Throughput, TrainingProgress
from scripts.training.run_state import RunState
from scripts.training.stop_on_signal import StopOnSignal

__all__ = ["RunHandlers"]


class RunHandlers:
    """
    The handlers of a training run: initial weights, order of the batches, validation and what it is compared with, progress,
    curves, checkpoints, and stopping on a signal.

    A metric that is NaN is never the best, and any other one is better.

    Args:
        network: network, not wrapped; its ``arguments`` are what it was made with.
        evaluator: validation engine.
        report: what is said of the validation before and after, or None.
        state: further objects with a ``state_dict`` that a checkpoint holds, by name; None stands for one that this run does
            not have.
        val_interval: number of epochs from one validation to the next.
        ckpt_dir: folder for the checkpoints.
        resume: whether to continue from the newest of them.
        overwrite: whether the curves of an earlier run are removed.
        average: average of the network's weights, or None.
        pretrained: path of weights to start from; empty for none.
        load: function of network and path that loads them.
        fit_shortcut: whether to fit the network's linear shortcut to the data.
        describe: function that gives further entries of ``model.json``.
        minutes: age of the last checkpoint at which another one is written within an epoch.
        keep: number of checkpoints that are kept, besides that of the best epoch.
        tensorboard: writer of the curves, or None.
        config: config of the run, as JSON has it; a resumed run says what changed.
        dataset_dir: folder from which validation volumes are named.
    """

    def __init__(
        self,
        network: Any,
        evaluator: Evaluator,
        report: BeforeAndAfter | None = None,
        *,
        state: dict[str, Any],
        val_interval: int,
        ckpt_dir: str,
        resume: bool = False,
        overwrite: bool = False,
        average: AveragedModel | None = None,
        pretrained: str | None = None,
        load: Callable[[Any, str], None] = load_pretrained,
        fit_shortcut: bool = False,
        describe: Callable[[], dict[str, Any]] = dict,
        minutes: float = 10.0,
        keep: int = 2,
        tensorboard: SummaryWriter | None = None,
        config: dict[str, Any] | None = None,
        dataset_dir: str = "",
    ) -> None:
        run = RunState(network, state, evaluator, config, dataset_dir)
        self.evaluator: Any = evaluator
        self.handlers: list[Any] = [
            InitialWeights(run, ckpt_dir, resume, average, pretrained, load, fit_shortcut),
            RepeatableOrder(),
            Throughput(),  # before validation, whose time is not that of training
            *([Curves(tensorboard, evaluator, overwrite)] if tensorboard else []),  # before the first validation
            ValidationHandler(interval=val_interval, validator=evaluator),
            *([report] if report else []),
            TrainingProgress(),
            *([TrainingSaver(ckpt_dir, run, minutes, keep, describe)] if idist.get_rank() == 0 else []),
            StopOnSignal(evaluator, ckpt_dir),  # names the checkpoint that was written before
        ]

        self.evaluator.metric_cmp_fn = _ignoring_nan(self.evaluator.metric_cmp_fn)

    def attach(self, engine: ResumableTrainer) -> None:
        for handler in self.handlers:
            handler.attach(engine)


def _ignoring_nan(better: Callable[[float, float], bool]) -> Callable[[float, float], bool]:
    return lambda current, best: not math.isnan(current) and (math.isnan(best) or better(current, best))
