"""`make gpu`, on the CPU: a command that fails or hangs ends no other, and the report is complete."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest

from benchmarks import gpu
from tests.conftest import ROOT
from tests.processes import bundle_command


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_command_that_raises_hangs_or_dies_ends_no_other(tmp_path, capsys):
    commands = {
        "raises": python("print('measured'); raise MemoryError('no room for it')"),
        "hangs": python("import time; print('begun', flush=True); time.sleep(600)"),
        "dies": python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        "passes": python("print('12.3 GiB')"),
    }
    runs = gpu.run_all(commands, tmp_path, 3)
    assert {name: (run["status"], run["last_line"]) for name, run in runs.items()} == {
        "raises": ("failed (1)", "MemoryError: no room for it"),
        "hangs": ("timed out", "begun"),
        "dies": ("failed (-11)", ""),
        "passes": ("passed", "12.3 GiB"),
    }
    assert json.loads((tmp_path / "gpu.json").read_text()) == runs
    with zipfile.ZipFile(tmp_path / "gpu.zip") as file:
        assert set(file.namelist()) == {"gpu.json", *(f"{name}.log" for name in commands)}


def test_commands_that_use_each_others_results_run_small_on_the_cpu(tmp_path):
    commands = dict(gpu.commands("runs", "cpu", tmp_path / "work"))
    steps = [name.split("_", 2)[2] for name in commands]
    assert steps == ["train", "encode", "decode", "evaluate", "train_diffusion", "generate"]
    for words in commands.values():
        assert words[:3] == [sys.executable, "-m", "monai.bundle"]
        bundle_command(words[3:])
    assert list((tmp_path / "work").rglob("samples/*.nii.gz"))


def test_command_runs_every_part_and_refuses_others(monkeypatch, tmp_path):
    names = [name for part in gpu.PARTS for name, _ in gpu.commands(part, "cpu", tmp_path)]
    assert len(names) == len(set(names)) >= len(gpu.PARTS)
    with pytest.raises(SystemExit, match="no part speed; there are machine, tests, cost"):
        gpu.main("cpu", parts=["speed"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no GPU.*--device cpu"):
        gpu.main()
    assert "python -m benchmarks.gpu $(ARGS)" in (ROOT / "Makefile").read_text().replace("$(BIN)/", "")
