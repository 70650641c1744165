"""After an error, the last line on the terminal is its reason, below MONAI's traceback."""

from __future__ import annotations

import sys

import pytest
from monai.bundle import ConfigParser

from scripts.bundle.errors import show_reason_last


@pytest.fixture
def printed(monkeypatch, capsys):
    """Ends a process with an error, as far as the terminal sees, and returns the last lines of stderr."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    show_reason_last()
    hook = sys.excepthook
    show_reason_last()
    assert sys.excepthook is hook  # once is enough

    def end(error: BaseException) -> list[str]:
        sys.excepthook(type(error), error, error.__traceback__)
        return capsys.readouterr().err.splitlines()

    return end


def error_of(expression: str) -> BaseException:
    parser = ConfigParser({"imports": ["$import scripts"], "inner": expression, "outer": "$[@inner]"})
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("outer")
    return caught.value


def test_reason_is_the_last_line_and_the_traceback_stays(printed):
    lines = printed(error_of("$scripts.data.volume_lists.find_images('nowhere', '*')"))
    assert lines[-1].startswith("FileNotFoundError: ") and "nowhere" in lines[-1]
    assert any(line.startswith("RuntimeError: Failed to evaluate") for line in lines[:-1])


def test_reason_is_what_the_bundle_says_about_an_error_below_it(printed, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no archive")
    lines = printed(error_of(f"$scripts.bundle.weights.read_weights({str(tmp_path / 'model.pt')!r})"))
    assert lines[-1].startswith(f"ValueError: {tmp_path / 'model.pt'} cannot be loaded")


def test_error_that_monai_did_not_wrap_is_printed_once(printed):
    assert "".join(printed(ValueError("plain"))).count("plain") == 1
