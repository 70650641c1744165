"""What a run prints of errors: the reason of an error of the user's in one line, the stack of any other."""

from __future__ import annotations

import builtins
import inspect
import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from types import TracebackType

import nibabel as nib
from monai.apps import get_logger

__all__ = ["SHOW_STACK", "is_of_user", "reason", "short_messages"]

SHOW_STACK = "BUNDLE_TRACEBACK"  # environment variable; 1 shows the stack of every error
SCRIPTS, MONAI = f"{Path(__file__).parent.parent}{os.sep}", f"{os.sep}monai{os.sep}"
IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")
CHAINED = re.compile(r"\n\n(?:The above exception was the direct cause|During handling of the above exception).*:\n\n")
RAISED = re.compile(r'  File "(?P<file>[^"\n]+)", line.*\n(?:    .*\n)*(?P<kind>[\w.]+)(?:: (?P<message>[\s\S]*))?\s*\Z')
STATS_HANDLER = "monai.handlers.StatsHandler"
NVIMGCODEC = "monai.data.nvimgcodec_pydicom_plugin"


def short_messages() -> None:
    """
    From now on, an error of the user's that ends the process prints its reason alone (see :py:func:`is_of_user`), and any
    other its stack, once; what MONAI and PyTorch say of decoders and APIs that this bundle does not choose is left out; and
    a warning of nibabel's has the name of its file. To be called from a config's ``initialize``.
    """
    sys.excepthook = _print_error
    for handler in (*logging.getLogger().handlers, logging.lastResort):
        if handler is not None:
            handler.addFilter(_is_no_copy_of_an_error)
    get_logger(STATS_HANDLER).addFilter(_is_no_copy_of_an_error)
    logging.getLogger(NVIMGCODEC).setLevel(logging.ERROR)
    for message in ("NvImgCodecPydicomReader", "`torch.jit"):
        warnings.filterwarnings("ignore", message)
    nibabel = logging.getLogger("nibabel.global")
    nibabel.handlers.clear()  # it would print what the root logger prints as well
    nibabel.addFilter(_named_once)


def is_of_user(error: BaseException) -> bool:
    """Whether an error says what the user can change: a ValueError or ImportError of this bundle's own, or any OSError."""
    kind, _, file = _origin(error)
    return issubclass(kind, OSError) or (issubclass(kind, (ValueError, ImportError)) and file.startswith(SCRIPTS))


def reason(error: BaseException) -> BaseException:
    """The first error of a chain that MONAI did not raise from another one."""
    while error.__cause__ is not None and MONAI in _file(error):
        error = error.__cause__
    return error


def _file(error: BaseException) -> str:
    """Path of the code that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _origin(error: BaseException) -> tuple[type[BaseException], str, str]:
    """Type, message and path of the code of the reason of an error, also of one in a loader's worker, which is text."""
    error = reason(error)
    if IN_WORKER.match(str(error)):
        chain = [found for found in map(RAISED.search, CHAINED.split(str(error))) if found]
        for found in reversed(chain):
            if MONAI not in found["file"] or found is chain[0]:
                kind = getattr(builtins, found["kind"].rpartition(".")[2], Exception)
                return kind, (found["message"] or "").strip(), found["file"]
    return type(error), str(error), _file(error)


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    origin, message, _ = _origin(error)
    line = f"{origin.__name__}: {' '.join(message.split())}"
    if is_of_user(error) and os.environ.get(SHOW_STACK, "0") == "0":
        print(f"\n{line}\n({SHOW_STACK}=1 shows where this was raised)", file=sys.stderr)
        return
    sys.__excepthook__(kind, error, trace)
    if reason(error) is not error:
        print(f"\n{line}", file=sys.stderr)


def _is_no_copy_of_an_error(record: logging.LogRecord) -> bool:
    """Ignite and MONAI log an error, each with its stack, from every engine that it passes on its way."""
    by_ignite = record.name.startswith("ignite.engine") and "terminating due to exception" in record.getMessage()
    return not (by_ignite or (record.name == STATS_HANDLER and record.levelno >= logging.ERROR))


def _named_once(record: logging.LogRecord) -> bool:
    """Put the file that nibabel reads before its warning, which comes each time that the header is read."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not nib.load.__code__:
        frame = frame.f_back
    message = f"{frame.f_locals['filename']}: {record.getMessage()}" if frame is not None else record.getMessage()
    known = message in _warned
    _warned.add(message)
    record.msg, record.args = message, ()
    record.levelno, record.levelname = logging.WARNING, "WARNING"
    return not known


_warned: set[str] = set()
