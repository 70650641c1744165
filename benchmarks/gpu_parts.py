"""The parts of ``make gpu``, each of which :py:mod:`benchmarks.gpu` runs in a process of its own.

    python -m benchmarks.gpu_parts planning cuda rows

A part is a function that yields rows as it measures them, and they are written at once. A row with an ``error`` lets the
part go on, and fail at its end. Sizes follow the card's memory; on the CPU the same lines run small. Bytes are in GiB.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fire
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser

from benchmarks.cost import RECONSTRUCTED, SWITCHED, SWITCHES, mixed_precision, saved_activations, training_step
from benchmarks.inference_peak import peak_bytes, restart_peak
from benchmarks.loop import Stopwatch, save_volumes, training
from benchmarks.machine import processor
from benchmarks.networks import FACTORS, MONAI, build, total_factors
from benchmarks.planning import ROWS
from benchmarks.planning_step import saved_in_a_step
from scripts.bundle.errors import reason
from scripts.bundle.machine import GIB, total_memory
from scripts.bundle.precision import autocast_dtype, choose_precision
from scripts.inference.streaming import StreamingInferer
from scripts.planning.config_keys import read_plan
from scripts.planning.estimates import with_margin
from scripts.planning.inference_costs import inference_cost
from scripts.planning.training_costs import training_cost
from scripts.training.autoencoder_trainer import AutoencoderTrainer

Row = dict[str, Any]
META = ("--meta_file", "configs/metadata.json", "--logging_file", "configs/logging.conf")
SMALL = {"channels": "[4,8,8]", "latent_channels": "8", "patch_size": "[16,16,16]", "num_workers": "0"}
SMALL_GENERATOR = {"channels": "[8,16]", "norm_num_groups": "4", "num_head_channels": "8", "num_workers": "0"}
STREAMED_GB = 4.0  # what slabs of 512³ may take
LARGEST_DIFFERENCE = 0.02  # between slabs and one pass, of the result's range


@dataclass(frozen=True)
class Machine:
    """
    The device that the parts run on.

    Args:
        device: ``"cuda"`` or ``"cpu"``; on the CPU all is small.
    """

    device: str

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    @property
    def memory(self) -> int:
        """Bytes that the device has."""
        return total_memory(self.device) or 8 * GIB

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Of the mixed precision that pays, None where none does."""
        precision = choose_precision(self.device)
        return autocast_dtype(precision.amp_dtype) if precision.amp else None

    @property
    def precisions(self) -> tuple[str, ...]:
        """What runs are tried in: both lower ones on a GPU that has units for both."""
        best = choose_precision(self.device).name
        return ("bfloat16", "float16") if best == "bfloat16" and not self.small else (best,)

    def size(self, on_gpu: int, on_cpu: int) -> int:
        """The edge of a cube."""
        return on_cpu if self.small else on_gpu


def main(name: str, device: str, path: str) -> None:
    """
    Run a part, and write its rows, one JSON object per line. The exit code is 1 when a row has an error.

    Args:
        name: of a function in ``PARTS``; ``described`` writes what there is to say of machine and card instead.
        device: ``cuda`` or ``cpu``.
        path: of the file.
    """
    machine = Machine(device)
    if name == "described":
        Path(path).write_text(json.dumps(described(machine)))
        return
    failed = []
    with open(path, "a") as file:
        for row in PARTS[name](machine):
            print(row, flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
            failed += [row["error"]] if "error" in row else []
    if failed:
        raise SystemExit(f"{len(failed)} rows failed, the first with: {failed[0]}")


def described(machine: Machine) -> Row:
    """Machine, card, driver, versions, and settings that change results."""
    packages = ("torch", "monai", "pytorch-ignite", "numpy", "nibabel")
    versions = {name: importlib.metadata.version(name) for name in packages}
    found: Row = {
        "device": machine.device,
        "precision": choose_precision(machine.device).name,
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory": in_gib(total_memory("cpu") or 0),
        },
        "card": None,
        "driver": None,
        "versions": {"python": platform.python_version(), **versions},
        "settings": {key: value for key, value in os.environ.items() if key.startswith(("PYTORCH_", "CUDNN_", "CUBLAS_"))},
    }
    if machine.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        capability = f"{card.major}.{card.minor}"
        found["card"] = {"name": card.name, "capability": capability, "memory": in_gib(card.total_memory)}
        found["driver"] = asked_of_driver("driver_version")
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["settings"]["cudnn.benchmark"] = torch.backends.cudnn.benchmark
    return found


def asked_of_driver(field: str) -> str | None:
    """A field of ``nvidia-smi`` for the first card, None where there is no such program."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def in_gib(nbytes: int) -> float:
    return round(nbytes / GIB, 3)


def tried(row: Row, measure: Callable[[], Row], may_fail: bool = False) -> Row:
    """
    A row with what was measured, or with why it was not: a ``result`` where that is one, as of a network that this bundle is
    compared with, otherwise an ``error``.
    """
    try:
        return {**row, **measure()}
    except Exception as error:
        traceback.print_exc()
        lacks_memory = isinstance(error, torch.OutOfMemoryError)
        return {**row, "result" if may_fail else "error": "out of memory" if lacks_memory else str(reason(error))}
    finally:
        gc.collect()  # a trainer and its handlers hold each other, and with them the network
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Watch:
    """
    A context that measures ``seconds``, and ``peak``: the most that PyTorch had allocated on a GPU at one time inside, or by
    how many bytes this process grew (Linux).
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> Watch:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before = restart_peak() if self.device == "cpu" else 0
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds = round(time.perf_counter() - self.start, 3)
        self.peak = peak_bytes(self.device) - self.before


# --- parts ---------------------------------------------------------------------------------------------------------------


def tests(machine: Machine) -> Iterator[Row]:
    """The tests that need CUDA; without a GPU they are skipped."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        pytest.main(["-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={path}", "tests"])
        for case in ElementTree.parse(path).iter("testcase"):
            problems = [found for kind in ("failure", "error") for found in case.findall(kind)]
            skipped = case.find("skipped")
            row = {"test": case.get("name"), "outcome": "failed" if problems else "passed" if skipped is None else "skipped"}
            yield {**row, "error": problems[0].get("message", "")[:500]} if problems else row


def planning(machine: Machine) -> Iterator[Row]:
    """The planner's peak of a training step beside the real one, for the rows of docs/planning.md, each in a new process."""
    for name in list(ROWS)[: 2 if machine.small else None]:
        yield tried({"row": name}, partial(in_a_process, planned_step, name, machine))


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def planned_step(name: str, machine: Machine) -> Row:
    """
    One row of ``planning``. On a card with room for it, the step is on twice the edge.

    ``allocated`` and ``reserved`` are what PyTorch's allocator says, ``driver`` by how much the used memory of the whole
    card grew, CUDA's context and libraries included: that is what the planner's margin has to cover.
    """
    before = None if machine.small else asked_of_driver("memory.used")  # in MiB, before this process has a context
    row = ROWS[name]
    amp_dtype = machine.amp_dtype if row.amp else None
    size = tuple(2 * f for f in row.factors) if machine.small else row.size

    def cost(size: tuple[int, ...]) -> Any:
        return training_cost(row.build(), size, batch_size=row.batch_size, amp_dtype=amp_dtype, device=machine.device)

    estimate, twice = cost(size), tuple(2 * n for n in size)
    if not machine.small and with_margin(larger := cost(twice), machine.device) < 0.7 * machine.memory:
        size, estimate = twice, larger
    with Watch(machine.device) as watch:
        saved = saved_in_a_step(row.build(), size, row.batch_size, amp_dtype, machine.device)
    found = {
        "size": "x".join(map(str, size)),
        "batch": row.batch_size,
        "saved_estimated": in_gib(estimate.saved_activations),
        "saved": in_gib(saved),
        "peak_estimated": in_gib(estimate.peak),
        "allocated": in_gib(watch.peak),
        "with_margin": in_gib(with_margin(estimate, machine.device)),
    }
    if machine.small:
        return found
    free, total = torch.cuda.mem_get_info()
    used = None if before is None else in_gib(total - free - int(before.split()[0]) * 2**20)
    return {**found, "reserved": in_gib(torch.cuda.max_memory_reserved()), "driver": used}


def cost(machine: Machine) -> Iterator[Row]:
    """The cost tables of docs/results/cost.md: a training step of each network, and of one with the config's switches."""
    size = machine.size(96, 16)
    networks = [MONAI, "initial 2, [2,2]"] if machine.small else [MONAI, *FACTORS]
    switches = {"channels_last": SWITCHES["channels_last"]} if machine.small else SWITCHES
    cases = [(name, "", {}) for name in networks] + [(SWITCHED, name, switch) for name, switch in switches.items()]
    for name, switch, arguments in cases:

        def measure(name: str = name, arguments: Row = arguments) -> Row:
            saved = saved_activations(name, size, machine.device, **arguments)
            return {"saved": in_gib(saved), "seconds": round(training_step(name, size, machine.device, **arguments), 4)}

        yield tried({"network": name, "switches": switch, "size": size}, measure, may_fail=name == MONAI)


def reconstruction(machine: Machine) -> Iterator[Row]:
    """Reconstruction of whole volumes in the precision that pays; out of memory is a result of MONAI's network."""
    for size, name in product((32,) if machine.small else (256, 512), (MONAI, *RECONSTRUCTED)):

        def measure(size: int = size, name: str = name) -> Row:
            network: Any = build(name).eval()
            estimate = inference_cost(network, (size,) * 3, amp_dtype=machine.amp_dtype, device=machine.device).peak
            network = network.to(machine.device)
            with torch.no_grad(), mixed_precision(machine.device):
                network.reconstruct(torch.rand(1, 1, *(4 * f for f in total_factors(network)), device=machine.device))
                with Watch(machine.device) as watch:
                    network.reconstruct(torch.rand(1, 1, size, size, size, device=machine.device))
            return {"estimated": in_gib(estimate), "allocated": in_gib(watch.peak), "seconds": watch.seconds}

        yield tried({"network": name, "size": size}, measure, may_fail=name == MONAI)


def whole_volume(machine: Machine) -> Iterator[Row]:
    """Training on one whole volume with the preset 16x_lean, the largest up to 512³ that fits by the planner."""
    plan = read_plan(["configs/train.json", "configs/presets/16x_lean.json"], device=machine.device)

    def estimated(size: int) -> Any:
        return training_cost(
            plan.network,
            (size,) * 3,
            amp_dtype=machine.amp_dtype,
            device=machine.device,
            loss=plan.loss,
            loss_terms=plan.loss_terms,
            optimizer=plan.optimizer,
        )

    sizes = (32,) if machine.small else (512, 448, 384, 320, 256)
    size, estimate = next(
        (size, found)
        for size in sizes
        if with_margin(found := estimated(size), machine.device) <= machine.memory or size == sizes[-1]
    )

    def measure() -> Row:
        network = plan.build().to(machine.device)
        images = [torch.rand(1, 1, size, size, size, device=machine.device)] * 3
        optimizer, clock = plan.optimizer(network.parameters()), Stopwatch(machine.device)
        terms = {"loss_function": plan.loss, "loss_terms": plan.loss_terms}
        trainer = AutoencoderTrainer.of_images(images, network, optimizer, amp_dtype=machine.amp_dtype, **terms)
        trainer.add_event_handler(Events.ITERATION_STARTED, clock.start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, clock.stop)
        with Watch(machine.device) as watch:
            trainer.run()
        if trainer.nonfinite_steps:
            raise ArithmeticError("a step was not finite")
        return {"allocated": in_gib(watch.peak), "seconds": round(clock.seconds[-1], 3)}

    row = {"preset": "16x_lean", "size": size, "peak_estimated": in_gib(estimate.peak)}
    yield tried({**row, "with_margin": in_gib(with_margin(estimate, machine.device))}, measure)


def streaming(machine: Machine) -> Iterator[Row]:
    """A volume on the host, in slabs within a budget and in one pass (or in larger slabs), with the shipped weights."""
    parser = ConfigParser(ConfigParser.load_config_file("configs/inference.json"))
    parser.update({"device": machine.device})
    network = parser.get_parsed_content("network").eval()
    network.load_state_dict(torch.load("models/model.pt", weights_only=True))
    size = machine.size(512, 48)
    precision = choose_precision(machine.device)
    cost = inference_cost(network, (size,) * 3, amp_dtype=machine.amp_dtype, device=machine.device)
    whole = cost.peak + cost.convolution
    budgets = [whole / 4 / GIB if machine.small else STREAMED_GB]
    budgets.append(1.1 * whole / GIB if 1.2 * whole < machine.memory else 2 * budgets[0])
    image = smooth_volume(size)
    StreamingInferer(precision.amp, precision.amp_dtype, 1.0)(image[..., :32, :32, :32], network)  # loads the libraries
    results = []
    for budget in budgets:

        def measure(budget: float = budget) -> Row:
            with Watch(machine.device) as watch:
                results.append(StreamingInferer(precision.amp, precision.amp_dtype, budget)(image, network))
            return {"allocated": in_gib(watch.peak), "seconds": watch.seconds}

        row = tried({"size": size, "budget": round(budget, 3)}, measure)
        if not machine.small and row.get("allocated", 0) > budget:  # a small process grows by more than its maps
            row["error"] = "more than the budget"
        yield row
    if len(results) == 2:
        difference = ((results[0] - results[1]).abs().max() / (results[1].max() - results[1].min())).item()
        row = {"size": size, "difference": difference}
        yield row if difference <= LARGEST_DIFFERENCE else {**row, "error": f"more than {LARGEST_DIFFERENCE}"}


def smooth_volume(size: int) -> torch.Tensor:
    """A volume with structure at every scale, ``1x1xNxNxN`` in [0, 1], on the host."""
    generator = torch.Generator().manual_seed(0)
    volume = torch.zeros(1, 1, size, size, size)
    for cells in (4, 16, min(64, size)):
        noise = torch.rand(1, 1, cells, cells, cells, generator=generator)
        volume += torch.nn.functional.interpolate(noise, size=(size,) * 3, mode="trilinear")
    return volume / 3


def data_wait(machine: Machine) -> Iterator[Row]:
    """The share of the time in which the device only waits for data, with volumes in memory and read each time."""
    for cached in (True, False):

        def measure(cached: bool = cached) -> Row:
            with tempfile.TemporaryDirectory() as folder:
                keys = {"network_def#channels": [4, 8, 8], "num_workers": 0} if machine.small else {"num_workers": workers()}
                keys |= {"cache_rate": float(cached), "validate#handlers": []}
                flow = training(Path(folder), 3, machine.size(96, 16), machine.device, machine.size(256, 24), **keys)
                step, data = Stopwatch(machine.device), Stopwatch(machine.device)  # which let the device finish first
                flow.trainer.add_event_handler(Events.GET_BATCH_STARTED, data.start)
                flow.trainer.add_event_handler(Events.GET_BATCH_COMPLETED, data.stop)
                flow.trainer.add_event_handler(Events.GET_BATCH_COMPLETED, step.start)
                flow.trainer.add_event_handler(Events.ITERATION_COMPLETED, step.stop)
                flow.run()
            waited, computed = sum(data.seconds[1:]), sum(step.seconds[1:])
            return {
                "steps": len(step.seconds) - 1,
                "seconds": round(waited + computed, 3),
                "waiting": waited / (waited + computed),
            }

        yield tried({"volumes": "in memory" if cached else "read each time", "patch": machine.size(96, 16)}, measure)


def workers() -> int:
    """What train.json takes."""
    return min(4, (os.cpu_count() or 2) // 2)


def runs(machine: Machine) -> Iterator[Row]:
    """Commands of the README, with two batches: train, evaluate, encode, decode, and train under ``torchrun``."""
    for precision, channels_last in product(machine.precisions, (False,) if machine.small else (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            for run in (train, evaluate, encode, decode):
                yield run(Commands(Path(folder), machine, precision, channels_last))
    with tempfile.TemporaryDirectory() as folder:
        yield distribute(Commands(Path(folder), machine, machine.precisions[0], False))


def generator(machine: Machine) -> Iterator[Row]:
    """The commands of the generator, with two batches: train on latents, and generate."""
    for precision in machine.precisions:
        with tempfile.TemporaryDirectory() as folder:
            for run in (train, encode, train_generator, generate):
                yield run(Commands(Path(folder), machine, precision, False))


def compiled(machine: Machine) -> Iterator[Row]:
    """Training that is compiled, with two batches."""
    for precision, channels_last in product(machine.precisions, (False,) if machine.small else (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            yield train(Commands(Path(folder), machine, precision, channels_last, compiled=True))


# --- commands of the bundle ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Commands:
    """Commands of the bundle as a user types them, each in a fresh process, whose files are in one folder."""

    folder: Path
    machine: Machine
    precision: str
    channels_last: bool
    compiled: bool = False

    def __call__(self, run_id: str, config: str, processes: int = 0, **keys: Any) -> Row:
        """
        Run one, under ``torchrun`` with so many processes if there are any; its row has the seconds, and the last line that
        it printed if it fails.
        """
        amp = self.precision != "float32"
        keys = {"amp": amp, "channels_last": self.channels_last, **keys}
        keys |= {"amp_dtype": self.precision} if amp else {}
        keys |= {} if processes else {"device": self.machine.device}
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
        command = [sys.executable, *torchrun, "-m", "monai.bundle", "run", run_id, "--config_file", config, *META]
        command += [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        print(done.stdout, flush=True)
        row = {"run": f"{run_id}, {config}", "precision": self.precision, "channels_last": self.channels_last}
        row |= {"compiled": self.compiled, "seconds": round(time.perf_counter() - start, 1)}
        return row if done.returncode == 0 else {**row, "error": (done.stdout.strip().splitlines() or ["no word"])[-1][:500]}

    @property
    def network(self) -> dict[str, str]:
        return {key: value for key, value in SMALL.items() if key != "patch_size"} if self.machine.small else {}

    @property
    def weights(self) -> Path:
        return self.folder / "eval/fast_dev_run/checkpoints"

    @property
    def volumes(self) -> Path:
        folder = self.folder / "volumes"
        if not folder.exists():
            save_volumes(folder, 3 + 2 * torch.cuda.device_count(), self.machine.size(128, 16))
        return folder


def train(run: Commands) -> Row:
    keys = {**(SMALL if run.machine.small else {}), "fast_dev_run": True, "compile": run.compiled}
    return run("training", "configs/train.json", dataset_dir=run.volumes, output_dir=run.folder / "eval", **keys)


def distribute(run: Commands) -> Row:
    """Train with a process for each GPU (nccl), one on the CPU (gloo)."""
    processes = 1 if run.machine.small else torch.cuda.device_count()
    keys = {**(SMALL if run.machine.small else {}), "fast_dev_run": True, "fast_dev_run_batches": 2 * processes}
    keys |= {"dataset_dir": run.volumes, "output_dir": run.folder / "eval"}
    return run("training", "['configs/train.json','configs/multi_gpu_train.json']", processes, **keys)


def evaluate(run: Commands) -> Row:
    keys = {**run.network, "dataset_dir": run.volumes, "output_dir": run.folder / "eval", "ckpt_dir": run.weights}
    return run("evaluating", "['configs/train.json','configs/evaluate.json']", **keys)


def encode(run: Commands) -> Row:
    paths = {"dataset_dir": run.volumes, "output_dir": run.folder / "latents", "ckpt_dir": run.weights}
    return run("encoding", "configs/inference.json", **paths, **run.network)


def decode(run: Commands) -> Row:
    paths = {"dataset_dir": run.folder / "latents", "output_dir": run.folder / "decoded", "ckpt_dir": run.weights}
    return run("decoding", "configs/inference.json", **paths, **run.network)


def train_generator(run: Commands) -> Row:
    keys = {**(SMALL_GENERATOR if run.machine.small else {}), "fast_dev_run": True, "output_dir": run.folder / "diffusion"}
    return run("training", "configs/train_diffusion.json", dataset_dir=run.folder / "latents", **keys)


def generate(run: Commands) -> Row:
    paths = {"ckpt_dir": run.folder / "diffusion/fast_dev_run/checkpoints", "autoencoder": run.weights / "model.pt"}
    steps = {"num_samples": 1, "num_inference_steps": 2}
    return run("generating", "configs/generate.json", output_dir=run.folder / "samples", **paths, **steps)


PARTS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    part.__name__: part
    for part in (tests, planning, cost, reconstruction, whole_volume, streaming, data_wait, runs, generator, compiled)
}

if __name__ == "__main__":
    fire.Fire(main)
