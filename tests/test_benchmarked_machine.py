"""Benchmarks say what they ran on."""

from __future__ import annotations

import platform

import pytest

from benchmarks.machine import described, instruction_set, processor

pytestmark = pytest.mark.precision


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ONEDNN_MAX_CPU_ISA is of x86 processors")
def test_instruction_set_is_the_one_that_onednn_is_limited_to():
    assert instruction_set(ONEDNN_MAX_CPU_ISA="SSE41") == "Intel SSE4.1"


def test_head_line_names_processor_instruction_set_and_precision(monkeypatch):
    monkeypatch.setattr("benchmarks.machine.instruction_set", lambda: "its instructions")
    line = described("cpu", "float32")
    assert processor() in line and "its instructions" in line and line.endswith("float32")
