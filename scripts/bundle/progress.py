"""Progress bars of long operations, which do not mix with the log."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, TextIO

import ignite.distributed as idist
from ignite.engine import Events
from monai.data import MetaTensor
from monai.engines import Evaluator
from monai.utils import ImageMetaKey, ensure_tuple
from monai.utils.enums import CommonKeys as Keys
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from scripts.layers.factors import by

SECONDS_IN_FILE = 30.0  # between two lines about a bar, where the output goes to a file


class ProgressBar(tqdm):
    """
    tqdm's bar, shown by the first process of a distributed run. On a terminal, lines of the log appear above it; where the
    output goes to a file, the bar writes a line every half a minute. Arguments are those of ``tqdm``.
    """

    _above = contextlib.ExitStack()  # for a bar that a signal ended before it was made

    def __init__(self, *args: Any, disable: bool = False, **kwargs: Any) -> None:
        self._above = contextlib.ExitStack()
        on_terminal = sys.stderr.isatty()
        if on_terminal:
            kwargs |= {"file": sys.stderr, "dynamic_ncols": True}
        else:
            kwargs |= {"file": _Lines(sys.stderr), "ncols": 100, "mininterval": SECONDS_IN_FILE}
        super().__init__(*args, disable=disable or idist.get_rank() > 0, **kwargs)  # type: ignore[call-overload]
        if on_terminal and not self.disable:
            self._above.enter_context(logging_redirect_tqdm())

    def close(self) -> None:
        super().close()
        self._above.close()


class _Lines:
    """A file for tqdm, in which each state of a bar is a line."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        state = text.strip()
        if state and text.startswith("\r"):  # the rest moves the cursor
            self.file.write(f"{state}\n")

    def flush(self) -> None:
        self.file.flush()


class VolumeProgress:
    """
    Evaluator handler that shows a progress bar over the volumes, with the name and, where it is read from a file, the size
    of the current one. ``desc`` stands before the bar, which stays when it is full if ``leave`` is set.
    """

    def __init__(self, desc: str = "volumes", leave: bool = True) -> None:
        self.desc, self.leave = desc, leave

    def attach(self, engine: Evaluator) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._name)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.bar.update())
        engine.add_event_handler(Events.EPOCH_COMPLETED | Events.TERMINATE, lambda: self.bar.close())

    def _start(self, engine: Evaluator) -> None:
        self.bar = ProgressBar(total=engine.state.epoch_length, desc=self.desc, unit="volume", leave=self.leave)

    def _name(self, engine: Evaluator) -> None:
        batch: Any = engine.state.batch
        image = batch.get(Keys.IMAGE)  # none where a file cannot be read
        size = f" {by(image.shape[2:])}" if isinstance(image, MetaTensor) else ""  # the noise of a sample has another size
        names = getattr(image, "meta", {}).get(ImageMetaKey.FILENAME_OR_OBJ) or batch.get("path", "")
        self.bar.set_postfix_str(f"{Path(ensure_tuple(names)[0]).name}{size}", refresh=sys.stderr.isatty())
