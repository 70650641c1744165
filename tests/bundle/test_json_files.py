"""Files that are read are checked: an error names the file, the field and what to do."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.json_files import PositiveInt, Sha256, checked, read_dataclass
from scripts.bundle.weights import load_weights, save_weights


@dataclass(frozen=True)
class Size:
    voxels: tuple[int, int]
    unit: Literal["mm", "voxels"] = "mm"


@dataclass(frozen=True)
class Volume:
    sizes: list[PositiveInt]
    share: float = 1.0
    flag: bool = False
    code: int | None = None
    label: float | str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    size: Size | None = None
    hash: Sha256 | None = None

    def __post_init__(self) -> None:
        if self.code == 7:
            raise ValueError("`code` is 7, which is not used.")


@pytest.fixture
def file(tmp_path):
    def written(content) -> Path:
        path = tmp_path / "a.json"
        path.write_text(json.dumps(content))
        return path

    return written


@pytest.mark.parametrize(
    "content, words",
    [
        ([], "the content is []; it must be an object."),
        ({}, "`sizes` is missing."),
        ({"sizes": 3}, "`sizes` is 3; it must be a list."),
        ({"sizes": [3, -1]}, "`sizes[1]` is -1; it must be a positive integer."),
        ({"sizes": [True]}, "`sizes[0]` is True; it must be a positive integer."),
        ({"sizes": [2.0]}, "`sizes[0]` is 2.0; it must be a positive integer."),
        ({"sizes": [2**63]}, "`sizes[0]` is 9223372036854775808; it must be a positive integer."),
        ({"sizes": [1], "share": float("nan")}, "`share` is nan; it must be a finite number."),
        ({"sizes": [1], "share": float("inf")}, "`share` is inf; it must be a finite number."),
        ({"sizes": [1], "share": 10**400}, "`share` is 1000"),
        ({"sizes": [1], "share": False}, "`share` is False; it must be a finite number."),
        ({"sizes": [1], "flag": 1}, "`flag` is 1; it must be true or false."),
        ({"sizes": [1], "flag": None}, "`flag` is None; it must be true or false."),
        ({"sizes": [1], "code": "1"}, "`code` is '1'; it must be an integer or null."),
        ({"sizes": [1], "code": 7}, "`code` is 7, which is not used."),
        ({"sizes": [1], "label": []}, "`label` is []; it must be a finite number or text."),
        ({"sizes": [1], "numbers": {"a": "1"}}, "`numbers.a` is '1'; it must be a finite number."),
        ({"sizes": [1], "size": {}}, "`size.voxels` is missing."),
        ({"sizes": [1], "size": {"voxels": [1]}}, "`size.voxels` is [1]; it must be a list of 2."),
        ({"sizes": [1], "size": {"voxels": [1, 2], "unit": "m"}}, "`size.unit` is 'm'; it must be 'mm' or 'voxels'."),
        ({"sizes": [1], "hash": "abc"}, "`hash` is 'abc'; it must be a SHA-256 in hexadecimal or null."),
    ],
)
def test_file_that_is_not_what_the_dataclass_says_is_refused_with_its_field(file, content, words):
    with pytest.raises(ValueError, match=re.escape(f"a.json: {words}")):
        read_dataclass(file(content), Volume)


def test_file_that_is_what_the_dataclass_says_is_read(file):
    content = {"sizes": [1, 2], "share": 1, "label": "x", "numbers": {"a": 2}, "size": {"voxels": [3, 4]}, "hash": "0" * 64}
    found = read_dataclass(file({**content, "code": None, "a key of another version": {}}), Volume)
    assert found == Volume([1, 2], 1.0, label="x", numbers={"a": 2.0}, size=Size((3, 4)), hash="0" * 64)
    assert isinstance(found.share, float)


def test_value_of_any_size_makes_a_short_error():
    for value in ("x" * 10**6, [[[[0] * 10**4] * 3] * 3] * 3, {str(i): i for i in range(10**4)}):
        with pytest.raises(ValueError) as error:
            checked(value, int, "size")
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[" * 10**5, b'{"sizes": ' + b"1" * 5000 + b"}", b" " * 2**20 + b"{}"]
)
def test_file_that_is_no_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_dataclass(tmp_path / "a.json", Volume)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sha256": 5}, "`sha256` is 5; it must be a SHA-256"),
        ({"network": []}, r"`network` is \[\]; it must be an object"),
    ],
)
def test_description_of_weights_is_checked(tmp_path, change, words):
    network = AutoencoderKL(3, channels=(4, 4), num_res_blocks=1, attention_levels=(False, False), norm_num_groups=2)
    save_weights(network, tmp_path / "model.pt")
    description = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**description, **change}))
    with pytest.raises(ValueError, match=rf"model\.json: {words}"):
        load_weights(network, tmp_path / "model.pt")


def test_weights_that_are_no_dictionary_are_refused(tmp_path):
    network = AutoencoderKL(3, channels=(4, 4), num_res_blocks=1, attention_levels=(False, False), norm_num_groups=2)
    torch.save([1, 2, 3], tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds no weights of an AutoencoderKL.*but list"):
        load_weights(network, tmp_path / "model.pt")
