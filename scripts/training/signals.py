"""What a run does when it is told to stop: by Ctrl-C, or by a scheduler at the end of its time."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events
from monai.data.utils import worker_init_fn
from monai.engines import Evaluator

from scripts.training.checkpoints import find_checkpoints
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["StopOnSignal", "leave_signals_to_main"]

logger = logging.getLogger(__name__)


class StopOnSignal:
    """
    Trainer handler: on SIGTERM or SIGINT the trainer finishes the step that it is in (or validation its volume) and
    terminates, and the process ends with the exit code that a shell gives to the signal, 143 or 130. ``TrainingSaver``,
    which must come before it in the list, writes a checkpoint then. A validation that is cut short counts for nothing.

    All processes of a distributed run stop at the same step; validation, of which each has another share, is finished there.
    A second SIGINT ends the process at once.

    Args:
        evaluator: the validation engine.
        ckpt_dir: folder of the checkpoints, to tell where to go on from.
    """

    def __init__(self, evaluator: Evaluator, ckpt_dir: str) -> None:
        self.evaluator: Any = evaluator
        self.ckpt_dir = ckpt_dir
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def attach(self, engine: ResumableTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self._listen)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_within_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop)
        engine.add_event_handler(Events.TERMINATE, self._say_how_to_go_on)
        for event in (Events.COMPLETED, Events.TERMINATE):
            engine.add_event_handler(event, self._stop_listening)
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: self._stop_validation(engine))

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets nobody else listen
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def _stop_within_epoch(self, engine: ResumableTrainer) -> None:
        # the end of an epoch is left to the event that follows its validation
        if engine.step_is_complete and engine.state.iteration % engine.state.epoch_length:
            self._stop(engine)

    def _stop(self, engine: ResumableTrainer) -> None:
        number = int(idist.all_reduce(self.received or 0, op="MAX"))
        if number:
            engine.exit_code = 128 + number
            engine.terminate(skip_completed=True)

    def _stop_validation(self, engine: ResumableTrainer) -> None:
        if self.received is None or idist.get_world_size() > 1:
            return
        if engine.last_event_name != Events.EPOCH_COMPLETED:  # before the first step or after the last: nothing to save
            logger.warning(f"{signal.Signals(self.received).name} during validation: no step is lost")
            raise SystemExit(128 + self.received)
        self.evaluator.terminate(skip_completed=True)  # before its metrics are made of half the volumes

    def _say_how_to_go_on(self, engine: ResumableTrainer) -> None:
        if engine.exit_code and idist.get_rank() == 0:
            logger.warning(
                f"{signal.Signals(engine.exit_code - 128).name} after iteration {engine.state.iteration}: "
                f"{find_checkpoints(self.ckpt_dir)[0]} is written; go on with the same command and --resume true"
            )

    def _stop_listening(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def leave_signals_to_main(worker_id: int) -> None:
    """
    ``worker_init_fn`` of a loader. Terminals and schedulers send SIGINT and SIGTERM to all processes; the workers leave them
    to the main process, which needs their batches until it has stopped. It still ends them by a SIGTERM of its own.
    """
    worker_init_fn(worker_id)  # MONAI's default
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        # Blocked rather than ignored, because only a signal that is waited for tells who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
