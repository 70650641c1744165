"""Progress bars on a terminal and in a file: they do not mix with the log."""

from __future__ import annotations

import io
import logging
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from tqdm.std import tqdm

from scripts.bundle import progress
from scripts.bundle.progress import ProgressBar, VolumeProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[io.StringIO, Terminal])
def output(request, monkeypatch):
    """The stream that bars and the log are written to."""
    stream = request.param()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "SECONDS_IN_FILE", 0.05)
    monkeypatch.setattr(tqdm, "_instances", weakref.WeakSet())  # bars that other tests left open move the cursor
    return stream


@pytest.mark.parametrize("output", [io.StringIO], indirect=True)
def test_in_a_file_bars_and_log_have_lines_of_their_own(output):
    logger = logging.getLogger("test_progress")
    logger.addHandler(logging.StreamHandler(output))
    with ProgressBar(total=3, desc="outer"), ProgressBar(total=3, desc="inner", leave=False) as inner:
        logger.warning("a line of the log")
        for _ in range(3):
            time.sleep(0.06)
            inner.update()
    lines = output.getvalue().splitlines()
    assert "a line of the log" in lines
    assert any(line.startswith("inner: 100%") for line in lines)
    assert all(line.startswith(("outer: ", "inner: ", "a line")) for line in lines)
    assert not {"\r", "\x1b"} & set(output.getvalue())


@pytest.mark.parametrize("output", [Terminal], indirect=True)
def test_on_a_terminal_the_log_stands_above_the_bar(output, monkeypatch):
    monkeypatch.setattr("sys.stdout", output)
    console = logging.StreamHandler(output)
    monkeypatch.setattr(logging.getLogger(), "handlers", [console])
    with ProgressBar(total=1, desc="validation"):
        logging.warning("a line of the log")
        before, after = output.getvalue().split("a line of the log\n")
        assert before.endswith("\r")  # the bar was removed
        assert "validation:   0%" in after  # and drawn again below
    assert logging.getLogger().handlers == [console]


SCAN = MetaTensor(torch.zeros(1, 1, 6, 7, 8), meta={"filename_or_obj": ["/data/scan.nii.gz"]})


@pytest.mark.parametrize(
    "batch, words",
    [
        ({"image": SCAN}, "scan.nii.gz 6x7x8"),
        ({"image": torch.zeros(1, 1, 6, 7, 8), "path": ["/out/sample_0.nii.gz"]}, "sample_0.nii.gz"),  # of another size
    ],
)
@pytest.mark.parametrize("output", [Terminal], indirect=True)
def test_volumes_are_named_with_their_sizes_while_they_are_worked_on(output, batch, words):
    def inferer(inputs, network):
        assert words in output.getvalue()
        return inputs

    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{**batch, "label": torch.zeros(1)}],
        network=torch.nn.Identity(),
        inferer=inferer,
        decollate=False,
        val_handlers=[VolumeProgress()],
    ).run()
    assert "volumes: 100%" in output.getvalue()
    assert ("6x7x8" in words) == ("6x7x8" in output.getvalue())


def test_file_that_cannot_be_read_does_not_stop_the_bar(output):
    handler = VolumeProgress()
    engine = SupervisedEvaluator(torch.device("cpu"), [{"path": ["bad.nii"]}], torch.nn.Identity(), val_handlers=[handler])
    engine._process_function = lambda engine, batch: {}
    engine.run()
    assert handler.bar.n == 1


def test_a_bar_that_is_disabled_writes_nothing(output):
    with ProgressBar(range(3), disable=True) as bar:
        assert list(bar) == [0, 1, 2]
    assert output.getvalue() == ""


def test_a_bar_that_a_signal_ended_before_it_was_made_closes_in_silence():
    ProgressBar.__new__(ProgressBar).close()
