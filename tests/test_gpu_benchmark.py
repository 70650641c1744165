"""`make gpu`, small and on the CPU: a part that fails or hangs ends no other, and the report is complete."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest

from benchmarks import gpu, gpu_parts
from scripts.bundle.json_files import problem_of_content
from scripts.bundle.precision import choose_precision
from tests.conftest import ROOT

TEXT, NUMBER = {"type": "string", "minLength": 1}, {"type": "number", "minimum": 0}
PART = {
    "type": "object",
    "required": ["status", "seconds", "rows", "error"],
    "additionalProperties": False,
    "properties": {
        "status": {"enum": ["passed", "failed", "timed out"]},
        "seconds": NUMBER,
        "rows": {"type": "array", "items": {"type": "object"}},
        "error": {"type": ["string", "null"]},
    },
}
REPORT = {
    "type": "object",
    "required": ["version", "device", "precision", "machine", "card", "driver", "versions", "settings", "parts"],
    "additionalProperties": False,
    "properties": {
        "version": {"const": 1},
        "device": TEXT,
        "precision": TEXT,
        "machine": {"type": "object", "required": ["system", "processor", "cores", "memory"]},
        "card": {"type": ["object", "null"]},
        "driver": {"type": ["string", "null"]},
        "versions": {"type": "object", "required": ["python", "torch", "monai"], "additionalProperties": TEXT},
        "settings": {"type": "object"},
        "parts": {"type": "object", "additionalProperties": PART},
    },
}
ROWS = "import json, pathlib, sys, time; rows = pathlib.Path(sys.argv[1]); "


def python(code: str) -> list[str]:
    return [sys.executable, "-c", ROWS + code]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A part of each fate between two that are real: (its folder, its report)."""
    folder = tmp_path_factory.mktemp("gpu")
    commands = {
        "raises": python("rows.write_text('{\"size\": 1}\\n'); raise MemoryError('no room for it')"),
        "hangs": python('rows.write_text(\'{"size": 2}\\n{"size"\'); time.sleep(600)'),
        "dies": python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        "streaming": gpu.command("streaming", "cpu"),
    }
    limits = {"raises": 60, "hangs": 3, "dies": 60}
    with pytest.MonkeyPatch.context() as patch:
        run_part = gpu.run_part
        patch.setattr(gpu, "run_part", lambda words, log, _: run_part(words, log, limits.get(log.stem, 300)))
        report = gpu.run_parts(commands, folder, 300, gpu.described("cpu"))
    return folder, report


def test_part_that_raises_hangs_or_dies_ends_no_other(run):
    parts = run[1]["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "raises": "failed",
        "hangs": "timed out",
        "dies": "failed",
        "streaming": "passed",
    }
    assert parts["raises"]["error"] == "exit code 1: MemoryError: no room for it"
    assert parts["hangs"]["error"] == "no end after 3 s"
    assert parts["dies"]["error"] == "signal 11: without a word"


def test_rows_that_were_measured_before_the_end_are_kept(run):
    parts = run[1]["parts"]
    assert parts["raises"]["rows"] == [{"size": 1}]
    assert parts["hangs"]["rows"] == [{"size": 2}]  # without the one that was being written


def test_report_is_complete_and_packed_with_the_logs(run):
    folder, report = run
    assert json.loads((folder / "gpu.json").read_text()) == report
    assert problem_of_content(report, REPORT) is None
    with zipfile.ZipFile(folder / "gpu.zip") as file:
        assert set(file.namelist()) - {"./"} == {"gpu.json", "raises.log", "hangs.log", "dies.log", "streaming.log"}
        assert json.loads(file.read("gpu.json")) == report


def test_slabs_and_one_pass_are_compared(run):
    slabs, whole, both = run[1]["parts"]["streaming"]["rows"]
    assert slabs["budget"] < whole["budget"]
    assert both["difference"] < (gpu_parts.LARGEST_DIFFERENCE if choose_precision("cpu").amp else 1e-4)


@pytest.mark.parametrize("name", ["cost", "reconstruction", "whole_volume", "data_wait"])
def test_part_runs_small_on_the_cpu(name):
    rows = list(gpu_parts.PARTS[name](gpu_parts.Machine("cpu")))
    assert rows
    for row in rows:
        assert "error" not in row and "result" not in row
        assert row["seconds"] > 0


def test_planner_is_compared_with_a_step():
    rows = list(gpu_parts.planning(gpu_parts.Machine("cpu")))
    assert [row["row"] for row in rows] == ["MONAI's network", "4x"]
    for row in rows:
        assert row["saved"] == pytest.approx(row["saved_estimated"], rel=0.05, abs=1e-3)
        assert row["allocated"] > 0


def test_part_goes_on_after_a_row_that_fails_and_fails_at_its_end(monkeypatch, tmp_path, capsys):
    def part(machine):
        yield gpu_parts.tried({"size": 1}, lambda: 1 / 0)
        yield gpu_parts.tried({"size": 2}, lambda: 1 / 0, may_fail=True)
        yield gpu_parts.tried({"size": 3}, lambda: {"seconds": 1.0})

    monkeypatch.setitem(gpu_parts.PARTS, "cost", part)
    with pytest.raises(SystemExit, match="1 rows failed, the first with: .*division by zero"):
        gpu_parts.main("cost", "cpu", str(tmp_path / "rows"))
    failed, result, good = gpu.complete_rows(tmp_path / "rows")
    assert "division by zero" in failed["error"] and "division by zero" in result["result"]
    assert good == {"size": 3, "seconds": 1.0}


def test_command_runs_every_part_and_refuses_others(monkeypatch):
    assert set(gpu.PARTS) == set(gpu_parts.PARTS)
    with pytest.raises(SystemExit, match="no part speed; there are tests, planning"):
        gpu.main("cpu", parts=["speed"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no GPU.*--device cpu"):
        gpu.main()
    assert "python -m benchmarks.gpu $(ARGS)" in (ROOT / "Makefile").read_text().replace("$(BIN)/", "")
