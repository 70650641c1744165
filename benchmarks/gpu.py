"""Everything that this bundle claims of GPUs, run and measured on the one that is there: ``make gpu``.

    python -m benchmarks.gpu [--output_dir eval/gpu] [--parts "[tests,cost]"] [--minutes 10] [--device cpu]

A part is a few commands: the tests that need CUDA, the benchmarks on the GPU, and the commands of the README with two
batches. Each is a process of its own with a time limit, so that one which fails or hangs ends no other. The folder then
holds ``gpu.json``, a log for each command with what it printed, and ``gpu.zip`` with all of these, to attach to a bug
report. With ``--device cpu`` the same runs small. No network is needed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import fire
import torch

from benchmarks.loop import ROOT, save_volumes
from benchmarks.machine import processor
from benchmarks.tables import print_table
from scripts.bundle.machine import GIB, total_memory
from scripts.bundle.precision import choose_precision

PARTS = ("tests", "cost", "planning", "loop", "runs", "generator", "compiled", "whole_volume", "distributed")
META = ("--meta_file", "configs/metadata.json", "--logging_file", "configs/logging.conf")
SMALL = {"channels": "[4,8,8]", "latent_channels": 8, "num_workers": 0}
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
        report = run_all(todo, folder, 60 * minutes, described(device))
    if any(run["status"] != "passed" for run in report["runs"].values()):
        raise SystemExit(1)


def commands(part: str, device: str, work: Path) -> Iterator[tuple[str, list[str]]]:
    """
    The commands of a part, each with its name.

    Args:
        part: name, one of ``PARTS``.
        device: ``cuda`` or ``cpu``.
        work: folder for volumes and results of the runs.
    """
    small = device == "cpu"
    volumes = work / "volumes"
    if not volumes.exists():
        save_volumes(volumes, 3 + 2 * torch.cuda.device_count(), 16 if small else 128)
    network, generator = (SMALL, SMALL_GENERATOR) if small else ({}, {})
    training = {**network, "patch_size": "[16,16,16]"} if small else {}

    def python(*words: str) -> list[str]:
        return [sys.executable, *words]

    def bundle(run_id: str, config: str, **keys: Any) -> list[str]:
        options = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        return python("-m", "monai.bundle", "run", run_id, "--config_file", config, *META, *options)

    if part == "tests":
        yield part, python("-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests")
    elif part == "cost":
        sizes = ("--size", "16", "--inference_size", "32") if small else ()
        yield part, python("-m", "benchmarks.cost", "--device", device, *sizes)
    elif part == "planning":
        yield part, python("-m", "benchmarks.planning", "--device", device)
    elif part == "loop":
        sizes = ("--patch_size", "16", "--epochs", "2") if small else ()
        yield part, python("-m", "benchmarks.loop", "--device", device, *sizes)
    elif part == "whole_volume":
        sizes = {"patch_size": "[16,16,16]"} if small else {"patch_size": "[512,512,512]"}
        keys = {
            **network,
            **sizes,
            "dataset_dir": volumes,
            "output_dir": work / part,
            "fast_dev_run": True,
            "device": device,
        }
        yield part, bundle("training", "['configs/train.json','configs/presets/16x_lean.json']", **keys)
    elif part == "distributed":  # a process for each GPU with nccl, one with gloo without
        processes = max(1, torch.cuda.device_count())
        files = "['configs/train.json','configs/multi_gpu_train.json']"
        keys = {**training, "fast_dev_run_batches": 2 * processes, "dataset_dir": volumes, "output_dir": work / part}
        torchrun = python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
        yield part, [*torchrun, *bundle("training", files, fast_dev_run=True, **keys)[1:]]
    else:
        for precision, channels_last in product(precisions(device), (False,) if small else (False, True)):
            name = f"{part}_{precision}" + "_channels_last" * channels_last
            home = work / name
            common = {"device": device, "channels_last": channels_last, "amp": precision != "float32"}
            common |= {"amp_dtype": precision} if common["amp"] else {}
            weights = home / "eval/fast_dev_run/checkpoints"
            keys = {**training, **common, "dataset_dir": volumes, "output_dir": home / "eval", "fast_dev_run": True}
            yield f"{name}_train", bundle("training", "configs/train.json", **keys, compile=part == "compiled")
            if part == "compiled":
                continue
            keys = {**network, **common, "ckpt_dir": weights}
            encoding = {"dataset_dir": volumes, "output_dir": home / "latents"}
            yield f"{name}_encode", bundle("encoding", "configs/inference.json", **encoding, **keys)
            if part == "runs":
                decoding = {"dataset_dir": home / "latents", "output_dir": home / "decoded"}
                yield f"{name}_decode", bundle("decoding", "configs/inference.json", **decoding, **keys)
                files = "['configs/train.json','configs/evaluate.json']"
                evaluating = {"dataset_dir": volumes, "output_dir": home / "eval"}
                yield f"{name}_evaluate", bundle("evaluating", files, **evaluating, **keys)
                continue
            keys = {**generator, **common, "dataset_dir": home / "latents", "output_dir": home, "fast_dev_run": True}
            yield f"{name}_train_diffusion", bundle("training", "configs/train_diffusion.json", **keys)
            keys = {"ckpt_dir": home / "fast_dev_run/checkpoints", "autoencoder": weights / "model.pt", **common}
            keys |= {"output_dir": home / "samples", "num_samples": 1, "num_inference_steps": 2}
            yield f"{name}_generate", bundle("generating", "configs/generate.json", **keys)


def precisions(device: str) -> tuple[str, ...]:
    """The precisions that runs are tried in: both lower ones on a GPU that has units for both."""
    best = choose_precision(device).name
    return ("bfloat16", "float16") if best == "bfloat16" and device == "cuda" else (best,)


def described(device: str) -> dict[str, Any]:
    """Machine, card, driver, versions, and settings that change results."""
    packages = ("torch", "monai", "pytorch-ignite", "numpy", "nibabel")
    found: dict[str, Any] = {
        "device": device,
        "machine": {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()},
        "memory_gb": round((total_memory("cpu") or 0) / GIB, 1),
        "card": None,
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}},
        "settings": {key: value for key, value in os.environ.items() if key.startswith(("PYTORCH_", "CUDNN_", "CUBLAS_"))},
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found["driver"] = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
        found["card"] = {"name": card.name, "capability": f"{card.major}.{card.minor}", "memory": card.total_memory / GIB}
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def run_all(
    commands: Mapping[str, Sequence[str]], folder: Path, seconds: float, described: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Run commands one after the other, and write the report after each.

    Args:
        commands: words of each command, by its name.
        folder: folder of report and logs.
        seconds: time limit of a command.
        described: what the report says first.

    Returns:
        the content of ``gpu.json``.
    """
    report: dict[str, Any] = {**described, "runs": {}}
    for number, (name, words) in enumerate(commands.items(), start=1):
        print(f"{name} ({number} of {len(commands)})", flush=True)
        run = report["runs"][name] = run_command(words, folder / f"{name}.log", seconds)
        (folder / "gpu.json").write_text(json.dumps(report, indent=1))
        print(f"  {run['status']} after {run['seconds']:.0f} s: {run['last_line']}", flush=True)
    print()
    print_table(
        ["command", "outcome", "seconds"], ([n, r["status"], f"{r['seconds']:.0f}"] for n, r in report["runs"].items())
    )
    print(f"\nwhat each printed: {folder}\nfor a bug report: {packed(folder, list(commands))}")
    return report


def run_command(words: Sequence[str], log: Path, seconds: float) -> dict[str, Any]:
    """Run a command to its end or to its time limit: its status, seconds, words, and the last line of its log."""
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    status = "timed out" if code is None else "passed" if code == 0 else f"failed ({code})"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last_line = lines[-1][:500] if lines else ""
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "command": list(words), "last_line": last_line}


def packed(folder: Path, names: Sequence[str]) -> Path:
    """The report and the logs in one file."""
    with tempfile.TemporaryDirectory() as temporary:
        for file in ("gpu.json", *(f"{name}.log" for name in names)):
            shutil.copy(folder / file, temporary)
        return Path(shutil.make_archive(str(folder / "gpu"), "zip", temporary))


if __name__ == "__main__":
    fire.Fire(main)
