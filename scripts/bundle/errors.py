"""Prints the reason of an error, rather than the error that MONAI raises from it, in the last line of the output."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

__all__ = ["reason", "show_reason_last"]


def show_reason_last() -> None:
    """
    From now on, an error that ends the process prints its reason as one more line below the traceback, when MONAI has raised
    an error of its own from it (``Failed to evaluate ConfigExpression``). To be called from a config's ``initialize``.
    """
    if not isinstance(sys.excepthook, _ReasonLast):
        sys.excepthook = _ReasonLast(sys.excepthook)


class _ReasonLast:
    def __init__(self, previous: Any) -> None:
        self.previous = previous

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.previous(kind, error, trace)
        cause = reason(error)
        if cause is not error:
            print(f"\n{type(cause).__name__}: {' '.join(str(cause).split())}", file=sys.stderr)


def reason(error: BaseException) -> BaseException:
    """The first error of a chain that MONAI did not raise from another one."""
    while error.__cause__ is not None and _raised_by_monai(error):
        error = error.__cause__
    return error


def _raised_by_monai(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("monai.")
