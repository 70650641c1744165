"""Benchmarks say what they ran on, and what they could not finish."""

from __future__ import annotations

import platform

import pytest

from benchmarks import precision
from benchmarks.machine import described, instruction_set, processor

pytestmark = pytest.mark.precision


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ONEDNN_MAX_CPU_ISA is of x86 processors")
def test_instruction_set_is_the_one_that_onednn_is_limited_to():
    assert instruction_set(ONEDNN_MAX_CPU_ISA="SSE41") == "Intel SSE4.1"


def test_head_line_names_processor_instruction_set_and_precision(monkeypatch):
    monkeypatch.setattr("benchmarks.machine.instruction_set", lambda: "its instructions")
    line = described("cpu", "float32")
    assert processor() in line and "its instructions" in line and line.endswith("float32")


def test_each_instruction_set_is_measured_once(monkeypatch):
    """A processor that lacks one acts as the next smaller one."""
    monkeypatch.setattr(precision, "instruction_set", lambda ONEDNN_MAX_CPU_ISA, **_: ONEDNN_MAX_CPU_ISA[:6])
    found = precision.available()
    assert {name: environment["ONEDNN_MAX_CPU_ISA"] for name, environment in found.items()} == {
        "AVX2": "AVX2",
        "AVX512": "AVX512_CORE",
    }


def test_what_takes_too_long_is_measured_on_less_and_says_so(monkeypatch):
    found = {"": None, "slow": (24, 6.0, 0.02), "fast": (96, 2.0, 3.0)}
    monkeypatch.setattr(precision, "in_a_process", lambda operation, name, *rest: found[name])
    assert precision.cell("training", "fast", 5.0, {}) == "2 s"
    assert precision.cell("training", "slow", 5.0, {}) == "6 s on 24³, where float32 takes 0.02 s"
    assert precision.cell("training", "", 5.0, {}) == "more than 5 s on 24³"


@pytest.mark.parametrize("operation, smallest", [("training", 24), ("reconstruction", 32)])
def test_a_larger_size_is_left_out_when_it_would_take_longer_than_the_limit(operation, smallest):
    size, seconds, in_float32 = precision.in_a_process(operation, "float32", 1e-3, {"OMP_NUM_THREADS": "1"})
    assert size == smallest and seconds == in_float32 > 0
