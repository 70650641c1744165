"""What a run does when it is told to stop: by Ctrl-C, or by a scheduler at the end of its time."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events

from scripts.trainer import AutoencoderTrainer

__all__ = ["StopOnSignal"]

logger = logging.getLogger(__name__)


class StopOnSignal:
    """
    Trainer handler: on SIGTERM or SIGINT the trainer finishes the step (or the validation) that it is in and terminates, and
    the process ends with the exit code that a shell gives to the signal, 143 or 130. ``TrainingSaver`` writes a checkpoint
    then. All processes of a distributed run stop at the same step. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def attach(self, engine: AutoencoderTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self._listen)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_within_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop)
        for event in (Events.COMPLETED, Events.TERMINATE):
            engine.add_event_handler(event, self._stop_listening)

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets nobody else listen
        for number in (signal.SIGTERM, signal.SIGINT):
            # workers of the loader inherit it, so a signal to all processes does not end them under the trainer's hands
            self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def _stop_within_epoch(self, engine: AutoencoderTrainer) -> None:
        # the end of an epoch is left to the event that follows its validation
        if engine.step_is_complete and engine.state.iteration % engine.state.epoch_length:
            self._stop(engine)

    def _stop(self, engine: AutoencoderTrainer) -> None:
        number = int(idist.all_reduce(self.received or 0, op="MAX"))
        if number:
            logger.warning(f"{signal.Signals(number).name}: stopping after iteration {engine.state.iteration}")
            engine.exit_code = 128 + number
            engine.terminate(skip_completed=True)

    def _stop_listening(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
