"""Precision follows the hardware, and the log names the choice."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from monai.bundle import ConfigParser

from scripts.bundle import precision as module
from scripts.bundle.config import check_parser
from scripts.bundle.precision import Precision, choose_precision
from tests.conftest import ROOT

pytestmark = pytest.mark.precision


@pytest.fixture
def hardware(monkeypatch):
    """Replaces what PyTorch reports of the machine."""

    def replace(capability=(8, 0), supported=()):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(module, "has_convolutions", lambda name: name in supported)

    return replace


@pytest.mark.parametrize("capability, dtype", [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16")])
def test_a_gpu_has_bfloat16_where_it_has_units_for_it_and_float16_before(hardware, capability, dtype):
    hardware(capability=capability)
    found = choose_precision("cuda:1")
    assert (found.device, found.amp, found.amp_dtype) == ("cuda:1", True, dtype)
    assert f"compute capability {capability[0]}.{capability[1]}" in found.reason


@pytest.mark.parametrize("supported, name", [((), "float32"), (("bfloat16",), "bfloat16")])
def test_a_cpu_has_bfloat16_only_where_its_convolutions_are_fast(hardware, supported, name):
    hardware(supported=supported)
    assert choose_precision(torch.device("cpu")).name == name


def test_an_unknown_device_has_float32():
    assert choose_precision("mps").name == "float32"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ONEDNN_MAX_CPU_ISA is of x86 processors")
def test_the_choice_follows_the_instruction_set_that_onednn_is_limited_to():
    """The processor's flags would not follow it."""
    command = "from scripts.bundle import choose_precision; print(choose_precision('cpu').name)"
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env={**os.environ, **limits}, capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == ["float32"], done.stderr


@pytest.mark.parametrize(
    "others, name", [(["bfloat16"], "bfloat16"), (["bfloat16", "float16"], "float16"), (["float16", "float32"], "float32")]
)
def test_processes_agree_on_what_is_fast_on_each_of_them(hardware, monkeypatch, others, name):
    hardware()
    monkeypatch.setattr(module.idist, "all_gather", lambda own: [own, *map(module.PREFERENCE.index, others)])
    found = choose_precision("cuda")
    assert found.name == name
    assert (name == "bfloat16") == ("every process" not in found.reason)


def log_of(caplog, precision: Precision, amp: bool, amp_dtype: str) -> list[tuple[str, str]]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        precision.log(amp, amp_dtype)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_one_line_of_the_log_says_what_was_chosen_and_why(hardware, caplog):
    hardware(capability=(7, 0))
    for device, expected in (("cuda:0", "float16"), ("cpu", "float32")):
        precision = choose_precision(device)
        lines = log_of(caplog, precision, precision.amp, precision.amp_dtype)
        assert lines == [("INFO", f"precision: {expected} on {device}: {precision.reason}")]


@pytest.mark.parametrize(
    "device, amp_dtype, machine, words",
    [
        ("cpu", "bfloat16", {}, "bfloat16 is slow on cpu.*several hundred times"),
        ("cpu", "float16", {}, "float16 is slow on cpu.*several hundred times"),
        ("cpu", "float16", {"supported": ("bfloat16", "float16")}, "float16.*20 times"),
        ("cuda", "bfloat16", {"capability": (7, 5)}, "bfloat16.*no units for it.*--amp_dtype float16"),
    ],
)
def test_a_choice_that_is_slow_is_used_with_a_warning_that_names_the_cost(
    hardware, caplog, device, amp_dtype, machine, words
):
    hardware(**machine)
    chosen, warning = log_of(caplog, choose_precision(device), True, amp_dtype)
    assert chosen[0] == "INFO" and chosen[1].startswith(f"precision: {amp_dtype} on {device}, as configured")
    assert warning[0] == "WARNING" and re.search(words, warning[1])


def test_float32_is_taken_without_a_warning(hardware, caplog):
    hardware()
    assert [level for level, _ in log_of(caplog, choose_precision("cuda"), False, "bfloat16")] == ["INFO"]


@pytest.mark.parametrize("files", [["train.json"], ["train.json", "evaluate.json"], ["inference.json"]])
@pytest.mark.parametrize("supported, amp", [((), False), (("bfloat16",), True)])
def test_configs_use_the_precision_of_the_hardware_and_record_it(hardware, files, supported, amp):
    hardware(supported=supported)
    parser = ConfigParser(ConfigParser.load_config_files([str(ROOT / "configs" / name) for name in files]))
    parser.update({"device": "cpu"})
    assert parser.get_parsed_content("amp") is amp and parser.get_parsed_content("amp_dtype") == "bfloat16"
    inferer = parser.get_parsed_content("inferer" if files == ["inference.json"] else "validate#inferer")
    assert inferer.amp is amp
    if files == ["inference.json"]:
        recorded = parser.get_parsed_content("settings")
        assert json.loads(json.dumps(recorded))["amp"] is amp and recorded["amp_dtype"] == "bfloat16"
    if "evaluate.json" in files:
        saver = parser.get("validate#handlers")[-1]
        assert saver["settings"] == "@settings"
        assert parser["settings"]["amp"] == "@amp" and parser["settings"]["amp_dtype"] == "@amp_dtype"


@pytest.mark.parametrize("text, amp", [("false", False), ("True", True)])
def test_amp_of_the_command_line_is_a_flag(text, amp):
    parser = ConfigParser(ConfigParser.load_config_file(str(ROOT / "configs/train.json")))
    parser.update({"amp": text})
    parser.parse()
    check_parser(parser)
    assert parser.get_parsed_content("amp") is amp
