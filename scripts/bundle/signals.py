"""How a run ends that is told to end, by Ctrl-C or by a scheduler at the end of its time."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import NoReturn

from monai.data.utils import worker_init_fn

__all__ = ["end_on_signals", "end_process", "leave_signals_to_main"]

logger = logging.getLogger(__name__)


def end_on_signals() -> None:
    """
    From now on, SIGTERM and SIGINT end the process as soon as the operation that it is in returns, with a line of the log
    and the exit code that a shell gives to the signal, 143 or 130. A second SIGINT ends it at once. To be called from a
    config's ``initialize``. Where a program or a shell (``nohup``) has said already what a signal does, that stays.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Python lets nobody else listen
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logger.warning(f"{signal.Signals(number).name}: the run ends here; each file that it has written is whole")
    end_process(number)


def end_process(number: int) -> NoReturn:
    """
    Raises:
        SystemExit: with the exit code that a shell gives to a signal.
    """
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it logs an exit as an error, and MONAI's handlers a traceback
    raise SystemExit(128 + number)


def leave_signals_to_main(worker_id: int) -> None:
    """
    ``worker_init_fn`` of a loader. Terminals and schedulers send SIGINT and SIGTERM to the whole process group; the workers
    leave it, because the main process needs their batches until it has stopped. It still ends them by a SIGTERM to each.
    """
    worker_init_fn(worker_id)  # MONAI's default
    if hasattr(os, "setsid"):  # Windows has no groups
        os.setsid()
