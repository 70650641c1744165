"""Progress over volumes."""

from __future__ import annotations

import ignite.distributed as idist
from ignite.engine import Events
from monai.engines import Evaluator
from tqdm.auto import tqdm

__all__ = ["VolumeProgress"]


class VolumeProgress:
    """
    Evaluator handler that shows a progress bar over the volumes (time left), from the first one on, where Ignite's waits for
    the second. The first process of a distributed run shows its own share.

    Args:
        desc: what stands before the bar.
        leave: whether the bar stays when it is full.
    """

    def __init__(self, desc: str = "volumes", leave: bool = True) -> None:
        self.desc, self.leave = desc, leave

    def attach(self, engine: Evaluator) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.bar.update())
        engine.add_event_handler(Events.EPOCH_COMPLETED | Events.TERMINATE, lambda: self.bar.close())

    def _start(self, engine: Evaluator) -> None:
        self.bar = tqdm(
            total=engine.state.epoch_length,
            desc=self.desc,
            unit="volume",
            leave=self.leave,
            dynamic_ncols=True,
            disable=idist.get_rank() > 0,
        )
