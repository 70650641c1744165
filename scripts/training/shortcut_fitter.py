"""Training starts with a linear shortcut that is fitted to the training data."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from scripts.bundle.progress import ProgressBar
from scripts.training.repeatable_batches import RepeatableBatchSampler, training_patches

__all__ = ["ShortcutFitter"]

CODE_PATCHES, NEIGHBOUR_PATCHES = 64, 128  # that a code is fitted to, and then what it decodes from neighbours
logger = logging.getLogger(__name__)


class ShortcutFitter:
    """
    Trainer handler that fits a network's linear shortcut to the training data before the first step of a new run, by
    :py:meth:`scripts.layers.LinearShortcut.fit` and :py:meth:`~scripts.layers.LinearShortcut.fit_neighbours`. Without a
    shortcut, with one that was taken over from other weights, and in a run that is resumed, it does nothing.

    Args:
        network: a :py:class:`scripts.autoencoderkl.AutoencoderKL`, not wrapped.
        sampler: batch sampler of the trainer's loader.
    """

    def __init__(self, network: Any, sampler: RepeatableBatchSampler) -> None:
        self.network = network
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, behind the handlers that resume and that load weights."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        shortcut = self.network.shortcut
        if shortcut is None or engine.state.iteration > 0 or not shortcut.is_as_built():
            return
        total = CODE_PATCHES + NEIGHBOUR_PATCHES
        loader: Any = engine.state.dataloader
        patches = itertools.islice(training_patches(loader.dataset, self.sampler), total)
        bar = iter(ProgressBar(patches, "fitting the shortcut", total, leave=False, unit="patch"))
        with torch.random.fork_rng():  # the same code in one process and in many
            torch.manual_seed(self.sampler.seed)
            number = shortcut.fit(itertools.islice(bar, CODE_PATCHES))
            shortcut.fit_neighbours(bar)
        if idist.get_world_size() > 1:
            for tensor in shortcut.state_dict().values():
                idist.broadcast(tensor, src=0)
        components, *block = shortcut.outer.analysis.shape
        scarce = "; larger patches would tell it more" if number < math.prod(block) else ""
        logger.info(f"linear shortcut: {components} principal components of {number} blocks{scarce}")
