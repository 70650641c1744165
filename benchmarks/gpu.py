"""Everything that this bundle claims of GPUs, run and measured on the one that is there: ``make gpu``.

    python -m benchmarks.gpu [--output_dir eval/gpu] [--parts "[tests,cost]"] [--minutes 10] [--device cpu]

A part is a few commands: what PyTorch knows of the machine, the tests that need CUDA, the benchmarks on the GPU, and the
commands of the README with two batches. Each is a process of its own with a time limit: one that hangs ends no other.
The folder then holds ``gpu.json``, a log for each command with what it printed, and ``gpu.zip`` with all of these, to attach
to a bug report. With ``--device cpu`` the same runs small. No network is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import fire
import torch

from benchmarks.loop import save_volumes
from benchmarks.tables import print_table
from scripts.bundle.config import ROOT
from scripts.bundle.precision import choose_precision

PARTS = ("machine", "tests", "cost", "planning", "loop", "runs", "compiled", "whole_volume", "distributed")
META = ("--meta_file", "configs/metadata.json", "--logging_file", "configs/logging.conf")
SMALL = {"channels": "[4,8,8]", "latent_channels": 8, "num_workers": 0}
PATCH = {"patch_size": "[16,16,16]"}
SMALL_GENERATOR = {"channels": "[8,16]", "norm_num_groups": 4, "num_head_channels": 8, "num_workers": 0}


def main(
    device: str = "cuda", output_dir: str = "eval/gpu", parts: Sequence[str] | None = None, minutes: float = 10.0
) -> None:
    """
    Run the parts and print a table of them. The exit code is 1 when a command did not pass.

    Args:
        device: ``cuda``, or ``cpu`` to run small.
        output_dir: folder of the report; an earlier one in it is replaced.
        parts: names of the parts to run; all, unless given.
        minutes: time limit of a command.
    """
    names = [parts] if isinstance(parts, str) else list(parts or PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise SystemExit(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here. `python -m benchmarks.gpu --device cpu` runs the same small.")
    folder = Path(output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        todo = {name: words for part in names for name, words in commands(part, device, Path(work))}
        runs = run_all(todo, folder, 60 * minutes)
    if any(run["status"] != "passed" for run in runs.values()):
        raise SystemExit(1)


def commands(part: str, device: str, work: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands of one of ``PARTS``, each with its name; volumes and results of the runs are below ``work``."""
    small, volumes = device == "cpu", work / "volumes"
    modules = {
        "machine": ["torch.utils.collect_env"],
        "tests": ["pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests"],
        "cost": ["benchmarks.cost", "--device", device, *["--size", "32", "--inference_size", "32"] * small],
        "planning": ["benchmarks.planning", "--device", device],
        "loop": ["benchmarks.loop", "--device", device, *["--patch_size", "16", "--epochs", "2"] * small],
    }
    if part in modules:
        yield part, python(*modules[part])
        return
    if not volumes.exists():
        save_volumes(volumes, 3 + 2 * torch.cuda.device_count(), 16 if small else 128)
    keys = {"dataset_dir": volumes, "output_dir": work / part, "fast_dev_run": True, **(SMALL | PATCH if small else {})}
    if part == "whole_volume":
        keys = {"patch_size": "[512,512,512]", **keys, "device": device}
        yield part, bundle("training", "['configs/train.json','configs/presets/16x_lean.json']", **keys)
    elif part == "distributed":  # a process for each GPU with nccl, one with gloo without
        processes = max(1, torch.cuda.device_count())
        files = "['configs/train.json','configs/multi_gpu_train.json']"
        run = bundle("training", files, **keys, fast_dev_run_batches=2 * processes)
        yield part, [*python("torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"), *run[1:]]
    else:
        best = choose_precision(device).name
        precisions = ("bfloat16", "float16") if best == "bfloat16" and device == "cuda" else (best,)
        for precision, channels_last in product(precisions, (False,) if small else (False, True)):
            name = f"{part}_{precision}" + "_channels_last" * channels_last
            common = {"device": device, "channels_last": channels_last, "amp": precision != "float32"}
            common |= {"amp_dtype": precision} if common["amp"] else {}
            steps = chain(work / name, volumes, common, compiled=part == "compiled", small=small)
            yield from ((f"{name}_{step}", words) for step, words in steps)


def chain(home: Path, volumes: Path, common: dict[str, Any], compiled: bool, small: bool) -> Iterator[tuple[str, list[str]]]:
    """Commands that use each other's results, in the folder ``home``. Only a training is compiled."""
    network, patch, generator = (SMALL, PATCH, SMALL_GENERATOR) if small else ({}, {}, {})
    weights, latents, trained = home / "eval/fast_dev_run/checkpoints", home / "latents", home / "fast_dev_run/checkpoints"
    training = {**common, **network, **patch, "dataset_dir": volumes, "output_dir": home / "eval"}
    yield "train", bundle("training", "configs/train.json", **training, fast_dev_run=True, compile=compiled)
    if compiled:
        return
    of_volumes = {**common, **network, "ckpt_dir": weights, "dataset_dir": volumes}
    yield "encode", bundle("encoding", "configs/inference.json", **of_volumes, output_dir=latents)
    of_latents = {**of_volumes, "dataset_dir": latents}
    yield "decode", bundle("decoding", "configs/inference.json", **of_latents, output_dir=home / "decoded")
    files = "['configs/train.json','configs/evaluate.json']"
    yield "evaluate", bundle("evaluating", files, **of_volumes, output_dir=home / "eval")
    training = {**common, **generator, "dataset_dir": latents, "output_dir": home}
    yield "train_diffusion", bundle("training", "configs/train_diffusion.json", **training, fast_dev_run=True)
    sampling = {**common, "ckpt_dir": trained, "autoencoder": weights / "model.pt", "output_dir": home / "samples"}
    yield "generate", bundle("generating", "configs/generate.json", **sampling, num_samples=1, num_inference_steps=2)


def python(module: str, *words: str) -> list[str]:
    """The command that runs a module."""
    return [sys.executable, "-m", module, *words]


def bundle(run_id: str, config: str, **keys: Any) -> list[str]:
    """The command that runs a config."""
    options = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return python("monai.bundle", "run", run_id, "--config_file", config, *META, *options)


def run_all(commands: Mapping[str, Sequence[str]], folder: Path, seconds: float) -> dict[str, Any]:
    """Run the commands, each for at most some seconds, print a table, and write and return the report."""
    runs: dict[str, Any] = {}
    for number, (name, words) in enumerate(commands.items(), start=1):
        print(f"{name} ({number} of {len(commands)})", flush=True)
        run = runs[name] = run_command(words, folder / f"{name}.log", seconds)
        (folder / "gpu.json").write_text(json.dumps(runs, indent=1))
        print(f"  {run['status']} after {run['seconds']:.0f} s: {run['last_line']}", flush=True)
    print()
    print_table(["command", "outcome", "seconds"], ([n, r["status"], f"{r['seconds']:.0f}"] for n, r in runs.items()))
    with zipfile.ZipFile(folder / "gpu.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("gpu.json", *(f"{name}.log" for name in commands)):
            file.write(folder / name, name)
    print(f"\nwhat each printed: {folder}\nfor a bug report: {folder / 'gpu.zip'}")
    return runs


def run_command(words: Sequence[str], log: Path, seconds: float) -> dict[str, Any]:
    """Run a command to its end or to its time limit: its status, seconds, words, and the last line of its log."""
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    status = "timed out" if code is None else "passed" if code == 0 else f"failed ({code})"
    lines = log.read_text(errors="replace").split("\n")
    last_line = next((line.strip()[:500] for line in reversed(lines) if line.strip()), "")
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "command": list(words), "last_line": last_line}


if __name__ == "__main__":
    fire.Fire(main)
