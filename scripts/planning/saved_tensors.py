"""What a forward pass keeps for the backward pass, and which level of the network keeps it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.utils import IterationEvents

from scripts.planning.costs import LevelCost

__all__ = ["LevelListener", "SavedTensors"]


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """
    Counts what a forward pass inside it keeps for the backward pass, on any device, fake or not.

    ``places`` has the bytes of each place in the network, and ``place`` is set from outside, as by
    :py:class:`LevelListener`. A storage counts once, at the first place that keeps it.

    Args:
        apart: tensors that are not counted, such as parameters.
    """

    def __init__(self, apart: Sequence[torch.Tensor] = ()) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        self.place: Any = None
        self.places: dict[Any, dict[int, int]] = {}
        self.counting = True
        self.known = {tensor.untyped_storage()._cdata for tensor in apart}

    def attach(self, trainer: Trainer) -> None:
        """Count only what forward pass and loss of the last iteration of the first epoch keep."""
        self.counting = False
        trainer.add_event_handler(Events.ITERATION_STARTED, self._start)
        trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, self._stop)

    @property
    def nbytes(self) -> int:
        """Bytes of all places."""
        return sum(sum(storages.values()) for storages in self.places.values())

    def _start(self, trainer: Trainer) -> None:
        self.counting = trainer.state.iteration == trainer.state.epoch_length

    def _stop(self) -> None:
        self.counting = False

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if self.counting and storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.places.setdefault(self.place, {})[storage._cdata] = storage.nbytes()
        return tensor


class LevelListener:
    """
    Tells :py:class:`SavedTensors` which level of encoder or decoder is running. A level is a sequence of blocks with the
    same finest grid; that of a block is the finer one of its input's and its result's.

    Args:
        network: with ``encoder.blocks`` and ``decoder.blocks``, as MONAI's ``AutoencoderKL``.
        saved: whose ``place`` is set.
    """

    def __init__(self, network: nn.Module, saved: SavedTensors) -> None:
        self.network = network
        self.saved = saved
        self.grids: dict[Any, tuple[int, ...]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the network inside."""
        with ExitStack() as hooks:
            for part in ("encoder", "decoder"):
                for i, block in enumerate(getattr(self.network, part).blocks):
                    hooks.callback(block.register_forward_pre_hook(partial(self._enter, (part, i))).remove)
                    hooks.callback(block.register_forward_hook(partial(self._leave, (part, i))).remove)
            yield

    def costs(self) -> tuple[LevelCost, ...]:
        """What each level keeps, in the order of the forward pass, and the rest."""
        costs = []
        nbytes = {place: sum(storages.values()) for place, storages in self.saved.places.items()}
        for (part, grid), places in itertools.groupby(self.grids, key=lambda place: (place[0], self.grids[place])):
            costs.append(LevelCost(part, grid, sum(nbytes.pop(place, 0) for place in places)))
        return (*costs, LevelCost("other", (), sum(nbytes.values())))

    def _enter(self, place: Any, *_: Any) -> None:
        self.saved.place = place

    def _leave(self, place: Any, block: nn.Module, args: Any, result: torch.Tensor) -> None:
        self.saved.place = None
        self.grids[place] = tuple(max(sizes) for sizes in zip(args[0].shape[2:], result.shape[2:]))
