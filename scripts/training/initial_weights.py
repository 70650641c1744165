"""The weights that a run starts with."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from scripts.layers.linear_shortcut import LinearShortcut
from scripts.training.checkpoints import newest_checkpoint
from scripts.training.pretrained import load_pretrained
from scripts.training.repeatable_batches import RepeatableBatchSampler, training_patches
from scripts.training.resumable_trainer import ResumableTrainer
from scripts.training.run_state import RunState

__all__ = ["InitialWeights", "fit_shortcut"]

CODE_PATCHES, NEIGHBOUR_PATCHES = 64, 128  # that the code is fitted to, and then its decoder with neighbours
logger = logging.getLogger(__name__)


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

    def __init__(
        self,
        state: RunState,
        ckpt_dir: str,
        resume: bool = False,
        average: AveragedModel | None = None,
        pretrained: str | None = None,
        load: Callable[[Any, str], None] = load_pretrained,
        fit_shortcut: bool = False,
    ) -> None:
        self.state = state
        self.ckpt_dir = ckpt_dir
        self.resume = resume
        self.average = average
        self.pretrained = pretrained
        self.load = load
        self.fit_shortcut = fit_shortcut

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
    silent = idist.get_rank() > 0
    bar = iter(tqdm(patches, "fitting the shortcut", total, leave=False, unit="patch", disable=silent))
    with torch.random.fork_rng():  # the same code in one process and in many
        torch.manual_seed(sampler.seed)
        number = shortcut.fit(itertools.islice(bar, CODE_PATCHES))
        shortcut.fit_neighbours(bar)
    if idist.get_world_size() > 1:
        for tensor in shortcut.state_dict().values():
            idist.broadcast(tensor, src=0)
    components, *block = shortcut.outer.analysis.shape
    scarce = "; larger patches would give it more blocks" if number < math.prod(block) else ""
    logger.info(f"linear shortcut: {components} principal components of {number} blocks{scarce}")
