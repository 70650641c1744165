"""How a training run stops on a signal: from Ctrl-C, or from a scheduler at its time limit."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events
from monai.engines import Evaluator

from scripts.bundle.signals import end_process
from scripts.training.checkpoints import find_checkpoints
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["StopOnSignal"]

logger = logging.getLogger(__name__)


class StopOnSignal:
    """
    Trainer handler: on SIGTERM or SIGINT within an epoch, the trainer finishes the step that it is in and terminates, and
    the process ends with the exit code that a shell gives to the signal, 143 or 130. ``TrainingSaver``, which must be
    attached before it, writes a checkpoint then. A validation is stopped as soon as the operation that it is in returns,
    and its metrics are discarded. Before the first epoch and after the last there is nothing to save, and
    :py:func:`scripts.bundle.end_on_signals` applies.

    All processes of a distributed run stop at the same step; a validation, of which each has a share, is finished first. A
    second SIGINT ends the process at once.

    Args:
        evaluator: validation engine.
        ckpt_dir: folder of the checkpoints, for the log.
    """

    def __init__(self, evaluator: Evaluator, ckpt_dir: str) -> None:
        self.evaluator: Any = evaluator
        self.ckpt_dir = ckpt_dir
        self.received: int | None = None
        self.validating = False
        self.previous: dict[int, Any] = {}

    def attach(self, engine: ResumableTrainer) -> None:
        self.engine = engine
        engine.add_event_handler(Events.EPOCH_STARTED, self._listen)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_within_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop)
        engine.add_event_handler(Events.TERMINATE, self._say_how_to_go_on)
        for event in (Events.EPOCH_COMPLETED, Events.TERMINATE):
            engine.add_event_handler(event, self._stop_listening)
        self.evaluator.add_event_handler(Events.GET_BATCH_STARTED, self._start_volume)
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._finish_volume)

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.validating:
            self._cut_validation_short()

    def _stop_within_epoch(self, engine: ResumableTrainer) -> None:
        # the end of an epoch is left to the event that follows its validation
        if engine.step_is_complete and engine.state.iteration % engine.state.epoch_length:
            self._stop(engine)

    def _stop(self, engine: ResumableTrainer) -> None:
        number = int(idist.all_reduce(self.received or 0, op="MAX"))
        if number:
            engine.exit_code = 128 + number
            engine.terminate(skip_completed=True)

    def _start_volume(self) -> None:
        # only while a volume is computed, not while metrics are averaged or the best weights are saved
        self.validating = idist.get_world_size() == 1
        if self.validating and self.received is not None:
            self._cut_validation_short()

    def _finish_volume(self) -> None:
        self.validating = False

    def _cut_validation_short(self) -> None:
        # A large volume takes minutes, so do not wait for its end. The epoch's steps are done and validation changes nothing
        # that a checkpoint holds; only the handlers remain to be called.
        assert self.received is not None
        self.validating = False
        self.engine.exit_code = 128 + self.received
        for engine in (self.evaluator, self.engine):
            engine.fire_event(Events.TERMINATE)
        end_process(self.received)

    def _say_how_to_go_on(self, engine: ResumableTrainer) -> None:
        if engine.exit_code and idist.get_rank() == 0:
            logger.warning(
                f"{signal.Signals(engine.exit_code - 128).name} after iteration {engine.state.iteration}: "
                f"{find_checkpoints(self.ckpt_dir)[0]} is written; go on with the same command and --resume true"
            )

    def _stop_listening(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()
