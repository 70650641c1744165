"""The handlers of a training run, in the order in which they must be; and the weights that it starts with."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.handlers import ValidationHandler
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from scripts.bundle.progress import ProgressBar
from scripts.layers.linear_shortcut import LinearShortcut
from scripts.training.checkpoints import TrainingSaver, newest_checkpoint
from scripts.training.pretrained import load_pretrained
from scripts.training.repeatable_batches import RepeatableBatchSampler, RepeatableOrder, training_patches
from scripts.training.resumable_trainer import ResumableTrainer
from scripts.training.resume import RunState
from scripts.training.run_log import BeforeAndAfter, Curves, TrainingProgress
from scripts.training.stop_on_signal import StopOnSignal

__all__ = ["InitialWeights", "RunHandlers", "fit_shortcut"]

CODE_PATCHES, NEIGHBOUR_PATCHES = 64, 128  # that the code is fitted to, and then its decoder with neighbours
logger = logging.getLogger(__name__)


class RunHandlers:
    """
    The handlers of a training run: initial weights, order of the batches, progress, curves, validation and what it is
    compared with, checkpoints, and stopping on a signal.

    A metric that is NaN is never the best, and any other one is better.

    Args:
        start: initial weights.
        saver: checkpoints; only the first process writes them.
        val_interval: number of epochs from one validation to the next.
        report: what is said of the validation before and after, or None.
        tensorboard: writer of the curves, or None.
        overwrite: whether the curves of an earlier run are removed.
    """

    def __init__(
        self,
        start: InitialWeights,
        saver: TrainingSaver,
        val_interval: int,
        report: BeforeAndAfter | None = None,
        tensorboard: SummaryWriter | None = None,
        overwrite: bool = False,
    ) -> None:
        evaluator = saver.state.evaluator
        evaluator.metric_cmp_fn = _ignoring_nan(evaluator.metric_cmp_fn)
        self.handlers: list[Any] = [
            start,
            RepeatableOrder(),
            TrainingProgress(),  # before validation, whose time is not that of training
            *([Curves(tensorboard, evaluator, overwrite)] if tensorboard else []),  # before the first validation
            ValidationHandler(interval=val_interval, validator=evaluator),
            *([report] if report else []),
            *([saver] if idist.get_rank() == 0 else []),
            StopOnSignal(evaluator, saver.ckpt_dir),  # names the checkpoint that was written before
        ]

    def attach(self, engine: ResumableTrainer) -> None:
        for handler in self.handlers:
            handler.attach(engine)


def _ignoring_nan(better: Callable[[float, float], bool]) -> Callable[[float, float], bool]:
    return lambda current, best: not math.isnan(current) and (math.isnan(best) or better(current, best))


@dataclass(eq=False)
class InitialWeights:
    """
    Trainer handler that sets the network's weights before the first step. It loads the newest checkpoint, if ``resume`` is
    set and there is one. Otherwise it loads ``pretrained``, if that is given; fits the linear shortcut to the training data,
    if ``fit_shortcut`` is set and the shortcut is as it was built; and sets the average to the result.

    Args:
        state: state of the run.
        ckpt_dir: folder of the checkpoints to resume.
        resume: whether to continue from the newest of them.
        average: average of the network's weights, or None.
        pretrained: path of weights; empty for none.
        load: function of network and path that loads ``pretrained``; by default for an
            :py:class:`scripts.autoencoderkl.AutoencoderKL`.
        fit_shortcut: whether to fit the shortcut of such a network.

    Raises:
        ValueError: when training starts, for checkpoints or weights that cannot be used.
        FileNotFoundError: when training starts and there is no ``pretrained``.
    """

    state: RunState
    ckpt_dir: str
    resume: bool = False
    average: AveragedModel | None = None
    pretrained: str | None = None
    load: Callable[[Any, str], None] = load_pretrained
    fit_shortcut: bool = False

    def attach(self, engine: ResumableTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: ResumableTrainer) -> None:
        if self.resume and self._resume(engine):
            return
        network = self.state.network
        if self.pretrained:
            self.load(network, self.pretrained)
        if self.fit_shortcut:
            loader: Any = engine.state.dataloader
            fit_shortcut(network.shortcut, loader.dataset, loader.batch_sampler)
        if self.average is not None:
            self.average.module.load_state_dict(network.state_dict())

    def _resume(self, engine: ResumableTrainer) -> bool:
        found = newest_checkpoint(self.ckpt_dir)
        iterations = idist.all_gather(found[1]["trainer"]["iteration"] if found else 0)
        if isinstance(iterations, list) and len(set(iterations)) > 1:
            raise ValueError(
                f"the processes found checkpoints of different iterations in {self.ckpt_dir}: {sorted(set(iterations))}. "
                "All machines must see the same `ckpt_dir`."
            )
        if found is None:
            logger.info(f"nothing to resume in {self.ckpt_dir}: training starts from the beginning")
            return False
        path, content = found
        self.state.load(engine, content, path)
        return True


def fit_shortcut(shortcut: LinearShortcut | None, dataset: Any, sampler: RepeatableBatchSampler) -> None:
    """
    Fit a network's linear shortcut to training patches, by :py:meth:`scripts.layers.LinearShortcut.fit` and
    :py:meth:`~scripts.layers.LinearShortcut.fit_neighbours`; all processes get the same result. Nothing happens if there is
    no shortcut, or if it is not as it was built: fitted already, trained, or loaded.

    Args:
        shortcut: shortcut of a :py:class:`scripts.autoencoderkl.AutoencoderKL`.
        dataset: the trainer's :py:class:`scripts.training.RepeatableDataset`.
        sampler: batch sampler of its loader.
    """
    if shortcut is None or not shortcut.is_as_built():
        return
    total = CODE_PATCHES + NEIGHBOUR_PATCHES
    patches = itertools.islice(training_patches(dataset, sampler), total)
    bar = iter(ProgressBar(patches, "fitting the shortcut", total, leave=False, unit="patch"))
    with torch.random.fork_rng():  # the same code in one process and in many
        torch.manual_seed(sampler.seed)
        number = shortcut.fit(itertools.islice(bar, CODE_PATCHES))
        shortcut.fit_neighbours(bar)
    if idist.get_world_size() > 1:
        for tensor in shortcut.state_dict().values():
            idist.broadcast(tensor, src=0)
    logger.info(f"linear shortcut: {len(shortcut.outer.analysis)} principal components of {number} blocks")
