"""Commands as a user types them, each in a new process that does not repeat the imports.

The processes come from a fork server that has imported everything and computed nothing: forking a process in which autograd
or OpenMP threads have run leaves the child with their locks and without their threads.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import monai.bundle  # noqa: F401  imported once, in the server
import pytest
import torch.utils.tensorboard  # noqa: F401  ditto

from tests.conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


def act_as_from_a_terminal() -> None:
    """Loader workers are forked and Ctrl-C is heard, however the tests were started: a background job ignores it."""
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def bundle_run(run_id: str, *config_files: str, cwd: Path = ROOT, check: bool = True, **overrides: str) -> SimpleNamespace:
    """``python -m monai.bundle run``; the result has its ``returncode``, and all that it printed in ``stdout``."""
    root = ROOT if cwd != ROOT else Path(".")
    files = [str(root / "configs" / name) for name in config_files]
    command = ["run", run_id, "--config_file", str(files)]
    command += ["--meta_file", str(root / "configs/metadata.json"), "--logging_file", str(root / "configs/logging.conf")]
    command += [word for key, value in overrides.items() for word in (f"--{key}", value)]
    return bundle_command(command, cwd, check)


def bundle_command(command: list[str], cwd: Path = ROOT, check: bool = True) -> SimpleNamespace:
    """The same for the words that follow ``python -m monai.bundle``."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = SERVER.Process(target=_run_bundle, args=(command, cwd, log))
        process.start()
        process.join(300)
        printed = log.read_text()
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"monai.bundle {' '.join(command)}\nhangs:\n{printed[-5000:]}")
    if check and process.exitcode != 0:
        pytest.fail(f"monai.bundle {' '.join(command)}\nended with {process.exitcode}:\n{printed[-5000:]}")
    return SimpleNamespace(returncode=process.exitcode, stdout=printed)


def _run_bundle(arguments: list[str], cwd: Path, log: Path) -> None:
    act_as_from_a_terminal()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.chdir(cwd)
    sys.argv = ["monai.bundle", *arguments]
    try:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
