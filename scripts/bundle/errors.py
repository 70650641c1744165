"""What a run prints of errors: the reason of an error of the user's in one line, the stack of any other."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import TracebackType

from monai.apps import get_logger

SHOW_STACK = "BUNDLE_TRACEBACK"  # environment variable; 1 shows the stack of every error
SCRIPTS, MONAI = f"{Path(__file__).parent.parent}{os.sep}", f"{os.sep}monai{os.sep}"
STATS_HANDLER = "monai.handlers.StatsHandler"
NVIMGCODEC = "monai.data.nvimgcodec_pydicom_plugin"


def short_messages() -> None:
    """
    From now on, an error of the user's that ends the process prints its reason alone (see :py:func:`is_of_user`), any other
    its stack, once. Warnings of MONAI and PyTorch of what this bundle does not choose are left out. To be called from a
    config's ``initialize``.
    """
    sys.excepthook = _print_error
    for handler in (*logging.getLogger().handlers, logging.lastResort):
        if handler is not None:
            handler.addFilter(_is_no_copy_of_an_error)
    get_logger(STATS_HANDLER).addFilter(_is_no_copy_of_an_error)
    logging.getLogger(NVIMGCODEC).setLevel(logging.ERROR)
    for message in ("NvImgCodecPydicomReader", "`torch.jit"):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("nibabel.global").handlers.clear()  # it would print what the root logger prints as well


def is_of_user(error: BaseException) -> bool:
    """Whether an error says what the user can change: a ValueError or ImportError of this bundle's own, or any OSError."""
    error = reason(error)
    own = isinstance(error, (ValueError, ImportError)) and _file(error).startswith(SCRIPTS)
    return own or isinstance(error, OSError)


def reason(error: BaseException) -> BaseException:
    """The first error of a chain that MONAI did not raise from another one."""
    while error.__cause__ is not None and MONAI in _file(error):
        error = error.__cause__
    return error


def _file(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    first = reason(error)
    line = f"{type(first).__name__}: {' '.join(str(first).split())}"
    if is_of_user(error) and os.environ.get(SHOW_STACK, "0") == "0":
        print(f"\n{line}\n({SHOW_STACK}=1 shows where this was raised)", file=sys.stderr)
        return
    sys.__excepthook__(kind, error, trace)
    if first is not error:
        print(f"\n{line}", file=sys.stderr)


def _is_no_copy_of_an_error(record: logging.LogRecord) -> bool:
    """Ignite and MONAI log an error, each with its stack, from every engine that it passes on its way."""
    by_ignite = record.name.startswith("ignite.engine") and "terminating due to exception" in record.getMessage()
    return not (by_ignite or (record.name == STATS_HANDLER and record.levelno >= logging.ERROR))
