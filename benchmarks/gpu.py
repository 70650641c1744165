"""Everything that this bundle claims of GPUs, run and measured on the one that is there: ``make gpu``.

    python -m benchmarks.gpu [--output_dir eval/gpu] [--parts "[planning,streaming]"] [--minutes 10] [--device cpu]

Each part (:py:mod:`benchmarks.gpu_parts`) is a process of its own with a time limit: one that fails or hangs ends no other,
and what it had measured by then is kept. The folder then holds ``gpu.json`` with all numbers, the log of each part, and
``gpu.zip`` with all of these, to attach to a bug report. With ``--device cpu`` the same runs small. No network is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import torch

from benchmarks.tables import print_table

ROOT = Path(__file__).resolve().parent.parent
VERSION = 1  # of what gpu.json holds
# in the order in which they run: what fails at once comes first
PARTS = (
    "tests",
    "planning",
    "cost",
    "reconstruction",
    "whole_volume",
    "streaming",
    "data_wait",
    "runs",
    "generator",
    "compiled",
)


def main(
    device: str = "cuda", output_dir: str = "eval/gpu", parts: Sequence[str] | None = None, minutes: float = 10.0
) -> None:
    """
    Run the parts and print a table of them. The exit code is 1 when one of them did not pass.

    Args:
        device: ``cuda``, or ``cpu`` to run small.
        output_dir: folder of the report; an earlier one in it is replaced.
        parts: which to run; all, unless given.
        minutes: that a part may take.
    """
    names = [parts] if isinstance(parts, str) else list(parts or PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise SystemExit(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here. `python -m benchmarks.gpu --device cpu` runs the same small.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = run_parts({name: command(name, device) for name in names}, folder, 60 * minutes, described(device))
    if any(part["status"] != "passed" for part in report["parts"].values()):
        raise SystemExit(1)


def command(name: str, device: str) -> list[str]:
    """The command of a part; the path of its rows is to follow."""
    return [sys.executable, "-m", "benchmarks.gpu_parts", name, device]


def described(device: str) -> dict[str, Any]:
    """Machine, card, driver and versions, found by a process of its own: this one must not take memory of the card."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "described"
        subprocess.run([*command("described", device), str(path)], check=True, cwd=ROOT)
        return json.loads(path.read_text())


def run_parts(
    commands: Mapping[str, Sequence[str]], folder: Path, seconds: float, described: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Run parts one after the other, and write the report after each.

    Args:
        commands: of each part, by its name. A part gets the path of a file as a last argument, into which it writes a JSON
            object per line for each row; its exit code is 0 when it passes.
        folder: where report and logs go.
        seconds: that a part may take.
        described: what the report says first.

    Returns:
        what ``gpu.json`` holds.
    """
    report: dict[str, Any] = {"version": VERSION, **described, "parts": {}}
    for number, (name, words) in enumerate(commands.items(), start=1):
        print(f"\n{name} ({number} of {len(commands)}, at most {seconds / 60:g} minutes)", flush=True)
        part = report["parts"][name] = run_part(words, folder / f"{name}.log", seconds)
        (folder / "gpu.json").write_text(json.dumps(report, indent=1))
        print_rows(part["rows"])
        print(outcome(part), flush=True)
    print()
    header = ["part", "outcome", "seconds", "rows"]
    print_table(
        header, ([name, outcome(p), f"{p['seconds']:.0f}", str(len(p["rows"]))] for name, p in report["parts"].items())
    )
    print(f"\nnumbers: {folder / 'gpu.json'}\nfor a bug report: {packed(folder, list(commands))}")
    return report


def run_part(words: Sequence[str], log: Path, seconds: float) -> dict[str, Any]:
    """Run a part to its end or to its time limit: its status, seconds, rows, and the error if there is one."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(log, "wb") as output:
        rows = Path(folder) / "rows"
        process = subprocess.Popen(
            [*words, str(rows)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
        found = complete_rows(rows)
    status = {0: "passed", None: "timed out"}.get(code, "failed")
    error = None if status == "passed" else f"no end after {seconds:g} s" if code is None else last_line(log, code)
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "rows": found, "error": error}


def complete_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that were written to their end."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_line(log: Path, code: int) -> str:
    """What a log ends with, which for Python is the exception."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    end = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{end}: {lines[-1][:500] if lines else 'without a word'}"


def outcome(part: Mapping[str, Any]) -> str:
    """Status and error in one line."""
    return part["status"] if part["error"] is None else f"{part['status']} ({part['error']})"


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a Markdown table, whose columns are all keys that a row has."""
    if rows:
        header = list(dict.fromkeys(key for row in rows for key in row))
        print_table([key.replace("_", " ") for key in header], ([shown(row.get(key)) for key in header] for row in rows))


def shown(value: Any) -> str:
    """A value of a row as text."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ").replace("|", "/")


def packed(folder: Path, names: Sequence[str]) -> Path:
    """The report and the logs of its parts in one file."""
    with tempfile.TemporaryDirectory() as temporary:
        for file in ("gpu.json", *(f"{name}.log" for name in names)):
            shutil.copy(folder / file, temporary)
        return Path(shutil.make_archive(str(folder / "gpu"), "zip", temporary))


if __name__ == "__main__":
    fire.Fire(main)
