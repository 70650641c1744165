"""Batches whose volumes and augmentation depend only on the seed, the epoch and the position in the epoch. So a run can be
resumed in the middle of an epoch, with any number of workers or processes, and see the same data."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.utils.enums import CommonKeys as Keys
from torch.utils.data import ConcatDataset, Dataset, Sampler


class Draw(NamedTuple):
    """One item of a batch: the number of its volume, and the seed of its random transforms."""

    item: int
    seed: int


def derive_seed(*parts: int) -> int:
    """A seed below 2^32 from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class RepeatableBatchSampler(Sampler[list[Draw]]):
    """
    Shuffled batches that depend on the seed, the epoch and the position alone. Several processes divide each batch: two with
    batch size 1 see what one sees with batch size 2. The last batch of an epoch is filled up with the epoch's first items.

    Args:
        num_items: number of items in the dataset.
        batch_size: number of items in a batch of one process.
        seed: seed of the run.

    Attributes:
        epoch: number of the epoch, from 1 as ignite counts.
        start: number of batches of the epoch to skip, when a run is resumed in its middle; ``len()`` counts them.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.num_processes = idist.get_rank(), idist.get_world_size()
        self.epoch = 1
        self.start = 0

    def __len__(self) -> int:
        return -(-self.num_items // (self.batch_size * self.num_processes))

    def draws(self, epoch: int) -> list[Draw]:
        """The draws of a whole epoch, of all processes."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_items)
        count = len(self) * self.batch_size * self.num_processes
        return [Draw(int(order[i % self.num_items]), derive_seed(self.seed, epoch, i)) for i in range(count)]

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = self.draws(self.epoch)
        for batch in range(self.start, len(self)):
            first = (batch * self.num_processes + self.rank) * self.batch_size
            yield draws[first : first + self.batch_size]


class RepeatableDataset(Dataset):
    """
    A MONAI dataset whose random transforms are seeded by an item's :py:class:`Draw`, and whose items have its ``file`` and
    the ``seed`` of the draw too.

    Args:
        dataset: dataset with ``data`` (``[{"image": path}, ...]``) and a ``transform`` that is a ``Compose``:
            ``CacheDataset``, ``PersistentDataset``, ``Dataset``; or a ``ConcatDataset`` of such.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> list[dict[str, Any]]:
        dataset, item = _part_of(self.dataset, draw.item)
        dataset.transform.set_random_state(seed=draw.seed)
        samples = dataset[item]
        file = str(dataset.data[item]["image"])
        # transforms that crop return a list, which MONAI's collate function flattens
        return [
            {**sample, "file": file, "seed": draw.seed} for sample in (samples if isinstance(samples, list) else [samples])
        ]


def _part_of(dataset: Any, item: int) -> tuple[Any, int]:
    if not isinstance(dataset, ConcatDataset):
        return dataset, item
    part = bisect.bisect_right(dataset.cumulative_sizes, item)
    return dataset.datasets[part], item - (dataset.cumulative_sizes[part - 1] if part else 0)


class RepeatableOrder:
    """
    Trainer handler that sets the loader's :py:class:`RepeatableBatchSampler` to the position of the run, and reseeds
    PyTorch, NumPy and Python before every iteration by its number, so that its noise does not depend on what came before.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._set_position)
        engine.add_event_handler(Events.ITERATION_STARTED, self._reseed)

    def _set_position(self, engine: Engine) -> None:
        # ignite makes the loader's iterator after this event
        sampler = _sampler_of(engine)
        sampler.epoch = engine.state.epoch
        sampler.start = engine.state.iteration - (engine.state.epoch - 1) * len(sampler)

    def _reseed(self, engine: Engine) -> None:
        seed = derive_seed(_sampler_of(engine).seed, engine.state.iteration, idist.get_rank())
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)


def _sampler_of(engine: Engine) -> RepeatableBatchSampler:
    loader: Any = engine.state.dataloader
    return loader.batch_sampler


def training_patches(dataset: Any, sampler: RepeatableBatchSampler) -> Iterator[torch.Tensor]:
    """
    Patches as training sees them, ``1xCxHxWxD``, without end: in the order and with the augmentation that they have there.

    Args:
        dataset: a :py:class:`RepeatableDataset`, and ``sampler`` the batch sampler of its loader.
    """
    for epoch in itertools.count(1):
        for draw in sampler.draws(epoch):
            for sample in dataset[draw]:
                image = sample[Keys.IMAGE]
                yield (image.as_tensor() if isinstance(image, MetaTensor) else image)[None]
