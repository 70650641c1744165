"""A run that is killed and resumed ends with the weights of an uninterrupted one, bit for bit; no fault loses more than the
minutes since the last checkpoint. Every run is that of configs/train.json, in a separate process."""

from __future__ import annotations

import builtins
import errno
import functools
import importlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.engines.utils import IterationEvents

from tests.conftest import save_volume
from tests.training_run import final_state, log_of, train

EPOCH_LENGTH = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    for i, shape in enumerate([(18, 20, 24), (21, 16, 19), (16, 20, 17), (23, 18, 16)]):
        save_volume(folder / f"sub-{i}" / "T1w.nii.gz", shape, seed=i)
    return folder


def send_itself(number: int):
    os.kill(os.getpid(), number)


def kill_at(iteration: int, flow: ConfigWorkflow):
    """In the middle of a step: the forward pass is done, the weights are unchanged."""
    trainer = flow.trainer
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED,
        lambda: send_itself(signal.SIGKILL) if trainer.state.iteration == iteration else None,
    )


def kill_in_write(number: int, function: str, flow: ConfigWorkflow):
    """While the ``number``-th checkpoint is written: in ``os.fsync`` before it is complete on the disk, in ``os.replace``
    before it has its name."""
    original = getattr(os, function)
    folder = Path(flow.parser.get_parsed_content("ckpt_dir"))
    calls = []

    def killing(*args):
        unfinished = list(folder.glob("checkpoint_*.unfinished"))
        calls.extend(unfinished)
        if len(calls) == number:
            os.truncate(unfinished[0], unfinished[0].stat().st_size // 2) if function == "fsync" else None
            send_itself(signal.SIGKILL)
        return original(*args)

    setattr(os, function, killing)


def same(a, b) -> bool:
    """Equal bit for bit, at any depth."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> dict:
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "eval"
    assert train(data, output_dir) == 0, log_of(output_dir)
    return {**final_state(output_dir), "log": log_of(output_dir).splitlines()}


def test_the_run_that_is_compared_with_learns_and_augments(uninterrupted, data, tmp_path):
    """Otherwise the equality of two runs would prove nothing."""
    assert not any("not finite" in line for line in uninterrupted["log"])
    assert uninterrupted["trainer"] == {"iteration": 9, "epoch": 3, "epoch_length": EPOCH_LENGTH}
    assert train(data, tmp_path / "eval", seed=1) == 0
    assert not same(final_state(tmp_path / "eval")["network"], uninterrupted["network"])


KILLS = {
    "within an epoch": partial(kill_at, 5),
    "half a checkpoint": partial(kill_in_write, 4, "fsync"),
    "checkpoint without its name": partial(kill_in_write, 6, "replace"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_and_resumed_run_equals_an_uninterrupted_one(moment, data, tmp_path, uninterrupted):
    output_dir = tmp_path / "eval"
    assert train(data, output_dir, KILLS[moment]) == -signal.SIGKILL
    # MONAI's loader without workers draws a random number when it is made, which must change nothing
    assert train(data, output_dir, resume=True, num_workers=0) == 0, log_of(output_dir)
    assert "checkpoints: resumed" in log_of(output_dir)
    resumed = final_state(output_dir)
    assert {"average", "discriminator", "discriminator_optimizer", "discriminator_lr_scheduler"} < uninterrupted.keys()
    for part in uninterrupted.keys() - {"config", "log"}:
        assert same(resumed[part], uninterrupted[part]), part


# --- signals and faults ----------------------------------------------------------------------------------------------


def at_iteration(iteration: int, action: Callable, flow: ConfigWorkflow):
    """Do something in the middle of a step."""
    trainer = flow.trainer
    trainer.add_event_handler(
        IterationEvents.FORWARD_COMPLETED, lambda: action() if trainer.state.iteration == iteration else None
    )


def send_group(number: int):
    """To the process and its loader's workers, from outside, as a terminal or a scheduler does."""
    subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgid(0)}"], start_new_session=True, check=True)


def signal_in_step(number: int, iteration: int, flow: ConfigWorkflow):
    os.setpgid(0, 0)
    at_iteration(iteration, partial(send_group, number), flow)


def signal_in_validation(number: int, iteration: int, flow: ConfigWorkflow):
    os.setpgid(0, 0)
    trainer = flow.trainer
    flow.evaluator.add_event_handler(
        Events.ITERATION_STARTED, lambda: send_group(number) if trainer.state.iteration == iteration else None
    )


def signal_within_volume(number: int, iteration: int, flow: ConfigWorkflow):
    """Between two layers of the network; the volume must not be finished."""
    os.setpgid(0, 0)
    trainer, network = flow.trainer, flow.evaluator.network
    network.encoder.register_forward_hook(lambda *_: send_group(number) if trainer.state.iteration == iteration else None)
    network.decoder.register_forward_hook(lambda *_: os._exit(77) if trainer.state.iteration == iteration else None)


@pytest.mark.parametrize(
    "prepare, number, iteration",
    [
        (signal_in_step, signal.SIGTERM, 5),
        (signal_in_step, signal.SIGINT, 6),
        (signal_in_validation, signal.SIGTERM, 9),
    ],
)
def test_signal_to_all_processes_saves_and_gives_its_exit_code(prepare, number, iteration, data, tmp_path, uninterrupted):
    """Iteration 6 ends an epoch, which is finished as well; iteration 9 is the last, still to be validated."""
    output_dir = tmp_path / "eval"
    code = train(data, output_dir, partial(prepare, number, iteration), **{"train#saver#minutes": 60})
    assert code == 128 + number, log_of(output_dir)
    assert final_state(output_dir)["trainer"]["iteration"] == iteration
    assert final_state(output_dir)["evaluator"]["best_metric_epoch"] == -1  # nothing was measured to its end
    assert not (output_dir / "checkpoints" / "model.pt").exists()
    assert f"{number.name}: the run ends after iteration {iteration}; --resume true goes on" in log_of(output_dir)
    assert train(data, output_dir, resume=True) == 0
    assert same(final_state(output_dir)["network"], uninterrupted["network"])
    assert (output_dir / "checkpoints" / "model.pt").exists()


def signal_when_called(place: str, number: int, flow: ConfigWorkflow):
    """As soon as a function is called, given as ``module:name``; it does nothing else. Several threads may call it, but only
    one signal is sent, because a second SIGINT ends a run at once."""
    os.setpgid(0, 0)
    unsent = [number]
    module, name = place.split(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, lambda *_, **__: send_group(unsent.pop()) if unsent else None)


MOMENTS = {
    "validation": lambda number, flow: signal_within_volume(number, 0, flow),
    "volumes are checked": partial(signal_when_called, "scripts.data.volume_checks:find_problem"),
    "volumes are cached": partial(signal_when_called, "monai.data:CacheDataset._load_cache_item"),
    "shortcut is fitted": partial(signal_when_called, "scripts.layers.linear_shortcut:LinearShortcut.fit"),
}


def signal_before_first_step(moment: str, number: int, flow: ConfigWorkflow):
    MOMENTS[moment](number, flow)


@pytest.mark.parametrize(
    "moment, number",
    [
        ("validation", signal.SIGINT),
        ("volumes are checked", signal.SIGINT),
        ("volumes are cached", signal.SIGTERM),
        ("shortcut is fitted", signal.SIGTERM),
    ],
)
def test_signal_before_the_first_step_ends_with_a_message_and_its_exit_code(moment, number, data, tmp_path):
    output_dir = tmp_path / "eval"
    handlers = {"validate#handlers": [{"_target_": "StatsHandler", "iteration_log": False}]}  # it logs exceptions
    code = train(data, output_dir, partial(signal_before_first_step, moment, number), num_workers=1, **handlers)
    assert code == 128 + number, log_of(output_dir)
    assert f"{number.name}: the run ends here; each file that it has written is whole" in log_of(output_dir)
    assert "Traceback" not in log_of(output_dir) and "ERROR" not in log_of(output_dir)
    assert not list((output_dir / "checkpoints").glob("*"))


def signal_after_last_epoch(flow: ConfigWorkflow):
    os.setpgid(0, 0)
    flow.evaluator.network.encoder.register_forward_hook(lambda *_: send_group(signal.SIGTERM))


def test_signal_after_the_last_epoch_loses_nothing(data, tmp_path):
    """In the validation of a resumed run whose epochs were all done before."""
    output_dir = tmp_path / "eval"
    assert train(data, output_dir, epochs=1) == 0
    before = sorted((path.name, path.read_bytes()) for path in (output_dir / "checkpoints").iterdir())
    assert train(data, output_dir, signal_after_last_epoch, epochs=1, resume=True) == 128 + signal.SIGTERM
    assert "SIGTERM: the run ends here" in log_of(output_dir)
    assert sorted((path.name, path.read_bytes()) for path in (output_dir / "checkpoints").iterdir()) == before


def fill_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


def make_read_only():
    original = open

    def refusing(path, mode="r", *args, **kwargs):
        if "w" in mode and "checkpoint_" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return original(path, mode, *args, **kwargs)

    builtins.open = refusing


@pytest.mark.parametrize("fault, words", [(fill_disk, "File too large"), (make_read_only, "Read-only file system")])
def test_checkpoint_that_cannot_be_written_is_an_error_and_costs_no_other(fault, words, data, tmp_path):
    output_dir = tmp_path / "eval"
    assert train(data, output_dir, partial(at_iteration, 5, fault)) == 1
    assert "checkpoint_00000005.pt could not be written" in log_of(output_dir)
    assert words in log_of(output_dir)
    assert final_state(output_dir)["trainer"]["iteration"] == 4
    assert not list(output_dir.rglob("*.unfinished"))
    assert train(data, output_dir, resume=True, epochs=2) == 0
