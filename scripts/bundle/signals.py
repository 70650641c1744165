"""How a run ends on a signal: from Ctrl-C, or from a scheduler at its time limit."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType
from typing import Any, NoReturn

import ignite.distributed as idist
from ignite.engine import Events
from monai.data.utils import worker_init_fn
from monai.engines import Evaluator

logger = logging.getLogger(__name__)


def end_on_signals() -> None:
    """
    From now on, SIGTERM and SIGINT end the process as soon as the operation that it is in returns, with a line of the log
    and the exit code that a shell gives to the signal, 143 or 130. A second SIGINT ends it at once. To be called from a
    config's ``initialize``. A signal that a program or a shell (``nohup``) already handles or ignores is left as it is.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logger.warning(f"{signal.Signals(number).name}: the run ends here; each file that it has written is whole")
    logging.disable(logging.ERROR)  # Ignite logs an exit as an error, and MONAI's handlers log a traceback
    raise SystemExit(128 + number)


def leave_signals_to_main(worker_id: int) -> None:
    """
    ``worker_init_fn`` of a loader. Terminals and schedulers send SIGINT and SIGTERM to the whole process group. The workers
    leave that group, because the main process needs their batches until it has stopped; it then sends each a SIGTERM.
    """
    worker_init_fn(worker_id)  # MONAI's default
    if hasattr(os, "setsid"):  # Windows has no groups
        os.setsid()


class StopOnSignal:
    """
    Trainer handler: on SIGTERM or SIGINT within an epoch, the trainer finishes its step and terminates, and the process ends
    with the exit code 143 or 130. ``TrainingSaver``, which must be attached before it, writes a checkpoint then. A
    validation is stopped after the volume that it is at, and its metrics are discarded. Before the first epoch and after the
    last there is nothing to save, and :py:func:`end_on_signals` applies.

    All processes of a distributed run stop at the same step; a validation, of which each has a share, is finished first. A
    second SIGINT ends the process at once.

    Args:
        evaluator: validation engine.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator: Any = evaluator
        self.received = 0
        self.previous: dict[int, Any] = {}

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._listen)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_within_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop)
        engine.add_event_handler(Events.EPOCH_COMPLETED | Events.TERMINATE, self._stop_listening)
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._stop_validation)

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def _stop_within_epoch(self, engine: Any) -> None:
        # the end of an epoch is left to the event that follows its validation
        if engine.step_is_complete and engine.state.iteration % engine.state.epoch_length:
            self._stop(engine)

    def _stop(self, engine: Any) -> None:
        number = int(idist.all_reduce(self.received, op="MAX"))
        if number:
            name, iteration = signal.Signals(number).name, engine.state.iteration
            logger.warning(f"{name}: the run ends after iteration {iteration}; --resume true goes on from there")
            engine.exit_code = 128 + number
            engine.terminate(skip_completed=True)

    def _stop_validation(self) -> None:
        if self.received and idist.get_world_size() == 1:
            self.evaluator.terminate(skip_completed=True)

    def _stop_listening(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()
