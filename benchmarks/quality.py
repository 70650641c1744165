"""Quality of reconstructions after equal training time from scratch, on volumes that were not trained on.

    python -m benchmarks.quality rows
    python -m benchmarks.quality train --network 8x --data sample --minutes 20
    python -m benchmarks.quality tables
    python -m benchmarks.quality plot
    python -m benchmarks.quality linear --network 8x --data clinical

`train` writes a row, the weights and a picture per volume to eval/quality; `rows` does so for all rows of quality_rows.json
that have no result yet; `tables` prints the rows in Markdown, beside two methods without training: the block-wise cosine
transform with as many numbers, and trilinear shrinking; `plot` draws them against the memory of training; `linear` measures
the linear shortcut alone. Training time is the processor time of the training process divided by the number of its threads,
so that other load on the machine does not count; on a GPU it is wall-clock time.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.metrics import MAEMetric, PSNRMetric, SSIMMetric
from monai.utils import set_determinism

from benchmarks.networks import total_factors
from benchmarks.tables import described, print_table
from scripts.bundle.config import ROOT, check_parser
from scripts.bundle.machine import GIB
from scripts.bundle.precision import computing_dtype
from scripts.evaluation.codecs import BlockDCT
from scripts.evaluation.metrics import (
    EdgePSNRMetric,
    ForegroundPSNRMetric,
    SharpnessMetric,
    grid_energy,
    trilinear_reconstruction,
)
from scripts.evaluation.pictures import draw_reconstruction
from scripts.inference.inferers import ReconstructionInferer
from scripts.layers.resampling import pad_to_multiple
from scripts.planning.training_costs import training_cost
from scripts.training import InitialWeights, RepeatableOrder, TrainingSaver
from scripts.training.initial_weights import CODE_PATCHES, NEIGHBOUR_PATCHES
from scripts.training.repeatable_batches import training_patches

RESULTS = Path("eval/quality")
ROWS = Path(__file__).with_name("quality_rows.json")
NETWORKS = {path.stem: str(path) for path in Path(ROOT, "configs/presets").glob("*.json")}
NETWORKS["MONAI"] = str(ROWS.with_name("monai.json"))
PATCHES = {"sample": [64, 64, 64], "clinical": [96, 96, 32]}  # about as many voxels; the clinical volumes have few slices
METRICS = {
    "psnr": PSNRMetric(max_val=1.0),
    "foreground_psnr": ForegroundPSNRMetric(max_val=1.0),
    "edge_psnr": EdgePSNRMetric(max_val=1.0),
    "ssim": SSIMMetric(spatial_dims=3),
    "sharpness": SharpnessMetric(),
    "mae": MAEMetric(),
}
COLUMNS = {
    "network": "{network}",
    "minutes": "{minutes:g}",
    "steps": "{steps}",
    "voxels per number": "{share:.0f}",
    "PSNR": "**{psnr:.2f} dB**",
    "foreground": "{foreground_psnr:.2f} dB",
    "SSIM": "{ssim:.3f}",
    "block DCT": "{dct_psnr:.2f} dB",
    "trilinear": "{trilinear_psnr:.2f} dB",
    "grid: image, ours, DCT": "{image_grid:.3f}, {grid:.3f}, {dct_grid:.3f}",
}
MARKERS = {  # of the plot, with what it shows
    "psnr": ("o", "network"),
    "dct_psnr": ("_", "block DCT of equal size"),
    "trilinear_psnr": ("x", "trilinear shrinking"),
}


def train(
    network: str, data: str = "sample", minutes: float = 12.0, device: str = "cpu", name: str | None = None, **overrides: Any
) -> None:
    """
    Train from scratch and evaluate.

    Args:
        network: name of a preset, or ``MONAI``.
        data: ``sample`` or ``clinical``, folders below ``data``.
        minutes: of training.
        device: where to run.
        name: of the row; None is the network's.
        overrides: keys of ``configs/train.json``, for another recipe.
    """
    parser = read_recipe(network, data, device, **overrides)
    parser.update({"train#handlers": [], "validate#handlers": []})
    get = parser.get_parsed_content
    set_determinism(seed=get("seed"))
    trainer = get("train#trainer")
    saver = TrainingSaver("", get("network_def"), {}, evaluator=None)
    has_shortcut = hasattr(get("network_def"), "shortcut")  # not MONAI's network
    InitialWeights(saver, average=get("train#average"), fit_shortcut=has_shortcut).attach(trainer)
    RepeatableOrder().attach(trainer)
    Budget(60 * minutes, device).attach(trainer)
    trainer.run()

    path = result_path({"network": network, "data": data, "name": name})
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = get("train#average").module.eval()
    torch.save(trained.state_dict(), path.with_suffix(".pt"))
    row = {
        "network": str(name or network),
        "data": data,
        "machine": described(device, computing_dtype(get("amp"), get("amp_dtype"))),
        "minutes": minutes,
        "steps": trainer.state.iteration,
        "factors": list(total_factors(trained)),
        "latent_channels": get("network_def#latent_channels"),
        "volumes": dict(measure_volumes(parser, trained, f"{path.with_suffix('')}-")),
    }
    path.write_text(json.dumps(row, indent=2))
    print(json.dumps(row), flush=True)


def train_rows(jobs: int = 1) -> None:
    """
    Train every row of ``quality_rows.json`` that has no result yet, each by one thread in a separate process.

    Args:
        jobs: rows that are trained at the same time.
    """

    def train_apart(row: dict[str, Any]) -> None:
        command = [sys.executable, "-m", __spec__.name, "train", *(f"--{key}={value!r}" for key, value in row.items())]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train_apart, [row for row in json.loads(ROWS.read_text()) if not result_path(row).exists()]))


def result_path(row: dict[str, Any]) -> Path:
    """The file of a row's numbers."""
    return RESULTS / f"{row['data']}-{row.get('name') or row['network']}.json"


def read_recipe(network: str, data: str, device: str = "cpu", **overrides: Any) -> ConfigParser:
    """The recipe of ``configs/train.json`` without a limit of epochs; the arguments are those of :py:func:`train`."""
    parser = ConfigParser(ConfigParser.load_config_files([str(ROOT / "configs/train.json"), NETWORKS[network]]))
    settings = {
        "dataset_dir": f"data/{data}",
        "patch_size": PATCHES[data],
        "device": device,
        "channels_last": device == "cpu",
        "epochs": 10**6,
        "num_workers": 0,
    }
    parser.update({**settings, **overrides})
    parser.parse()
    check_parser(parser)
    return parser


class Budget:
    """Ends a training after a number of seconds; the rate warms up from the first step on and falls to 0 along a cosine."""

    WARM_UP = 0.02  # of the time

    def __init__(self, seconds: float, device: str) -> None:
        self.seconds, self.on_cpu = seconds, device == "cpu"

    def attach(self, engine: Engine) -> None:
        """Start the time, and register with a trainer."""
        self.start = self.now()
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def now(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.process_time() / torch.get_num_threads() if self.on_cpu else time.perf_counter()

    def __call__(self, engine: Any) -> None:
        spent = (self.now() - self.start) / self.seconds
        if engine.state.iteration == 1:
            self.rate = engine.optimizer.param_groups[0]["initial_lr"]  # a scheduler has set "lr" to that of its first step
            self.first = spent
        if spent >= 1:
            engine.terminate()
        warm_up = min(1.0, (spent - self.first) / self.WARM_UP)
        for group in engine.optimizer.param_groups:
            group["lr"] = self.rate * warm_up * 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))
        if engine.state.iteration % 100 == 0:
            print(f"{spent:.1%} of the time, {engine.state.iteration} steps", flush=True)


def measure_volumes(parser: ConfigParser, network: Any, pictures: str | None) -> Iterator[tuple[str, dict[str, float]]]:
    """
    The name of each file of the validation, and all numbers of its reconstruction; those of the block cosine transform start
    with ``dct_``. Pictures have paths that start with ``pictures``; None for no pictures.
    """
    factors, get = list(total_factors(network)), parser.get_parsed_content
    reconstruct = partial(ReconstructionInferer(get("amp"), get("amp_dtype")), network=network)
    for name, item in validation_volumes(get):
        image = item.as_tensor()[None]
        with torch.no_grad():
            reconstruction = at_any_size(reconstruct, image.to(get("device")), factors).clamp(0, 1).cpu()
        if pictures is not None:
            figure = draw_reconstruction(image[0, 0], reconstruction[0, 0], item.pixdim.tolist())
            figure.savefig(f"{pictures}{name}.png", dpi=100)
        trilinear = float(METRICS["psnr"](trilinear_reconstruction(image, factors), image))
        found = {"trilinear_psnr": trilinear, "image_grid": grid_energy(image, factors)}
        dct = BlockDCT(factors, get("network_def#latent_channels")).reconstruct(image)
        for start, result in (("", reconstruction), ("dct_", dct)):
            found |= {f"{start}{key}": float(metric(result, image)) for key, metric in METRICS.items()}
            found[f"{start}grid"] = grid_energy(result, factors)
        yield name, found


def validation_volumes(get: Callable[[str], Any]) -> Iterator[tuple[str, MetaTensor]]:
    """The validation volumes of a config, ``CxHxWxD``, each with the name of its file."""
    for item in get("validate#dataset"):
        yield Path(item["image"].meta["filename_or_obj"]).name.removesuffix(".nii.gz"), item["image"]


def at_any_size(code: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, factors: list[int]) -> torch.Tensor:
    """The reconstruction of a volume of any size by a code that needs multiples of its factors, as MONAI's network does."""
    shape = image.shape[2:]
    return code(pad_to_multiple(image, factors))[..., : shape[0], : shape[1], : shape[2]]


@torch.no_grad()
def linear(network: str = "8x", data: str = "sample", **overrides: Any) -> dict[str, dict[str, float]]:
    """
    Print and return the PSNR of the linear shortcut alone, for each validation volume: as initialised, and after each of its
    two fits, which are those of a training. The first row is the block-wise cosine transform with as many numbers.

    Args:
        network: name of a preset with a linear shortcut.
        data: ``sample`` or ``clinical``, folders below ``data``.
        overrides: keys of ``configs/train.json``, such as ``latent_channels``.
    """
    get: Any = read_recipe(network, data, **overrides).get_parsed_content
    set_determinism(seed=get("seed"))
    autoencoder = get("network_def")
    shortcut, factors = autoencoder.shortcut, autoencoder.total_downsample_factor
    images = {name: item.as_tensor()[None] for name, item in validation_volumes(get)}
    patches = training_patches(get("train#dataloader").dataset, get("train#sampler"))

    def psnr(code: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        return {name: float(METRICS["psnr"](code(image).clamp(0, 1), image)) for name, image in images.items()}

    def code(image: torch.Tensor) -> torch.Tensor:
        return at_any_size(shortcut, image, factors)

    strongest = psnr(BlockDCT(factors, autoencoder.latent_channels).reconstruct)
    found = {"strongest frequencies of each volume": strongest, "lowest frequencies": psnr(code)}
    shortcut.fit(itertools.islice(patches, CODE_PATCHES))
    found["principal components"] = psnr(code)
    shortcut.fit_neighbours(itertools.islice(patches, NEIGHBOUR_PATCHES))
    found["and neighbours"] = psnr(code)
    rows = ([code_name, *(f"{value:.2f} dB" for value in by_volume.values())] for code_name, by_volume in found.items())
    print_table(["linear code", *images], rows)
    return found


def tables() -> None:
    """Print the rows that have been trained."""
    by_volume = defaultdict(list)
    for row in read_rows():
        share = math.prod(row["factors"]) / row["latent_channels"]
        for name, found in row["volumes"].items():
            by_volume[row["data"], name].append({**row, **found, "share": share})
    for (data, name), rows in sorted(by_volume.items(), reverse=True):
        print(f"\n`{name}`, trained on `data/{data}`, {' and '.join(sorted({row['machine'] for row in rows}))}:\n")
        print_table(COLUMNS, ([form.format(**row) for form in COLUMNS.values()] for row in rows))


def plot(path: str = "docs/quality.png") -> None:
    """Draw the rows' quality against the planner's memory of training on 256³, as a PNG file."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in read_rows() if row["network"] in NETWORKS]  # those of another recipe are left out
    volumes = sorted({name for row in rows for name in row["volumes"]})
    highest: dict[str, tuple[float, float]] = {}  # GiB and dB, where a network's name is written
    for row in rows:
        network = read_recipe(row["network"], row["data"]).get_parsed_content("network_def")
        memory = training_cost(network, (256, 256, 256)).peak / GIB
        for name, volume in row["volumes"].items():
            for key, (marker, _) in MARKERS.items():
                axes.scatter(memory, volume[key], marker=marker, color=f"C{volumes.index(name)}", s=60)
            position = memory, volume["psnr"]
            highest[row["network"]] = max(highest.get(row["network"], position), position)
    for name, position in highest.items():
        axes.annotate(name, position, xytext=(6, 4), textcoords="offset points", fontsize=8)
    for index, name in enumerate(volumes):
        axes.scatter([], [], marker="s", color=f"C{index}", label=name)
    for marker, label in MARKERS.values():
        axes.scatter([], [], marker=marker, color="gray", label=label)
    axes.set(xscale="log", xlabel="peak of training on 256³, GiB", ylabel="PSNR, dB")
    axes.set_xticks(ticks := [1, 2, 5, 10, 20, 50], ticks)
    axes.minorticks_off()
    axes.margins(x=0.15)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def read_rows() -> list[dict[str, Any]]:
    """The rows that `train` has written."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    commands = {"rows": train_rows, "train": train, "tables": tables, "plot": plot, "linear": linear}
    fire.Fire(commands, serialize=lambda result: None)
