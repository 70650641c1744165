"""Fits the linear shortcut to the training data, before the first step."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import ignite.distributed as idist
import torch
from tqdm.auto import tqdm

from scripts.layers.linear_shortcut import LinearShortcut
from scripts.training.repeatable_batches import RepeatableBatchSampler, training_patches

__all__ = ["fit_shortcut"]

CODE_PATCHES, NEIGHBOUR_PATCHES = 64, 128  # that the code is fitted to, and then its decoder with neighbours
logger = logging.getLogger(__name__)


def fit_shortcut(shortcut: LinearShortcut | None, dataset: Any, sampler: RepeatableBatchSampler) -> None:
    """
    Fit a network's linear shortcut to training patches, by :py:meth:`scripts.layers.LinearShortcut.fit` and
    :py:meth:`~scripts.layers.LinearShortcut.fit_neighbours`; all processes get the same result. Nothing happens if there is
    no shortcut, or if it is not as it was built: fitted already, trained, or loaded.

    Args:
        shortcut: of a :py:class:`scripts.autoencoderkl.AutoencoderKL`.
        dataset: the :py:class:`scripts.training.RepeatableDataset` of the trainer.
        sampler: of its loader.
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
