"""An error of the user's is one line; any other keeps its stack; warnings say which file they are about."""

from __future__ import annotations

import json
import sys

import pytest
from monai.bundle import ConfigParser

from scripts.bundle.errors import SHOW_STACK, short_messages
from tests.conftest import SMALL
from tests.processes import bundle_run


@pytest.fixture
def printed(monkeypatch, capsys):
    """Ends a process with an error, as far as the terminal sees, and returns the lines of stderr."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    short_messages()

    def end(error: BaseException) -> list[str]:
        sys.excepthook(type(error), error, error.__traceback__)
        return [line for line in capsys.readouterr().err.splitlines() if line]

    return end


def error_of(expression: str) -> BaseException:
    parser = ConfigParser({"imports": ["$import scripts"], "inner": expression, "outer": "$[@inner]"})
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("outer")
    return caught.value


MISSING = "$scripts.data.volume_lists.find_images('nowhere', '*')"


def test_error_of_the_users_is_its_reason_alone(printed):
    first, hint = printed(error_of(MISSING))
    assert first == "FileNotFoundError: `dataset_dir` is 'nowhere', which is not a folder."
    assert SHOW_STACK in hint


def test_stack_is_shown_on_request(printed, monkeypatch):
    monkeypatch.setenv(SHOW_STACK, "1")
    lines = printed(error_of(MISSING))
    assert lines[0].startswith("Traceback") and lines[-1].startswith("FileNotFoundError: `dataset_dir` is 'nowhere'")


def test_reason_is_what_the_bundle_says_about_an_error_below_it(printed, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no archive")
    lines = printed(error_of(f"$scripts.bundle.weights.read_weights({str(tmp_path / 'model.pt')!r})"))
    assert lines[0].startswith(f"ValueError: {tmp_path / 'model.pt'} cannot be loaded")


@pytest.mark.parametrize(
    "expression",
    [
        "$scripts.data.find_images_of('nowhere')",  # a name that does not exist
        "$scripts.bundle.load_weights(3, 'models/model.pt')",  # an AttributeError within the bundle
        "$__import__('torch').zeros(2).reshape(3)",  # an error of a library
    ],
)
def test_stack_of_an_error_in_the_code_stays_above_its_reason(printed, expression):
    lines = printed(error_of(expression))
    assert lines[0].startswith("Traceback") and "RuntimeError: Failed to evaluate" not in lines[-1]


NOWHERE = {"dataset_dir": "/nowhere"}
VERBS = {
    "training": ("training", ["train.json"], NOWHERE, "`dataset_dir` is '/nowhere'"),
    "evaluating a run": ("evaluating", ["train.json", "evaluate.json"], NOWHERE, "`dataset_dir` is '/nowhere'"),
    "evaluating": ("evaluating", ["inference.json"], NOWHERE, "`dataset_dir` is '/nowhere'"),
    "encoding": ("encoding", ["inference.json"], NOWHERE, "`dataset_dir` is '/nowhere'"),
    "decoding": ("decoding", ["inference.json"], NOWHERE, "`dataset_dir`"),
    "generating": ("generating", ["generate.json"], {"ckpt_dir": "/nowhere"}, "/nowhere/model.pt"),
    "training a generator": ("training", ["train_diffusion.json"], NOWHERE, "`dataset_dir`"),
    "a misspelt key": ("encoding", ["inference.json"], {"dataset_dirs": "/nowhere"}, "the nearest one is 'dataset_dir'"),
}


@pytest.mark.parametrize("run_id, files, keys, words", VERBS.values(), ids=list(VERBS))
def test_verb_tells_a_wrong_path_in_one_line(tmp_path, run_id, files, keys, words):
    run = bundle_run(run_id, *files, check=False, output_dir=str(tmp_path / "out"), device="cpu", **keys)
    lines = run.stdout.strip().splitlines()
    assert run.returncode == 1
    assert words in lines[-2] and "Error: " in lines[-2] and SHOW_STACK in lines[-1]
    assert "Traceback" not in run.stdout and run.stdout.count(words) == 1


def test_error_while_training_is_printed_once_and_nothing_that_no_user_can_act_on(volumes, tmp_path):
    """It passes two engines, whose handlers log it; MONAI's readers warn of decoders."""
    overlay = tmp_path / "overlay.json"
    transforms = [{"_target_": "LoadImaged", "keys": "image"}, f"$lambda _: {MISSING[1:]}"]
    overlay.write_text(json.dumps({"train#deterministic_transforms": transforms, "cache_rate": 0.0, "fit_shortcut": False}))
    keys = {**SMALL, "dataset_dir": str(volumes), "output_dir": str(tmp_path), "fast_dev_run": "true"}
    run = bundle_run("training", "train.json", str(overlay), check=False, **keys)
    assert run.returncode == 1
    assert run.stdout.count("which is not a folder") == 1 and "Traceback" not in run.stdout
    assert "nvImageCodec" not in run.stdout
