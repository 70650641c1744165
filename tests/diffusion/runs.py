"""Latents, trainings and samples for tests: tiny, each training in a fresh process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from monai.bundle import ConfigWorkflow

from scripts.autoencoderkl import Reconstructor
from scripts.bundle.weights import save_weights
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.generator import describe
from tests.conftest import ROOT
from tests.training_run import train

AUTOENCODER = {"channels": [4, 8], "downsample_factors": [2], "latent_channels": 8, "device": "cpu", "num_workers": 0}
AUTOENCODER |= {"amp": False}
KEYS = {
    "channels": [8, 16],
    "norm_num_groups": 4,
    "num_head_channels": 8,
    "num_workers": 0,
    "epochs": 2,
    "val_interval": 2,
    "val_fraction": 0.25,
    "train#saver#minutes": 0,  # at every step
    "amp": False,
}


def workflow(config: str | Sequence[str], run_id: str, workflow_type: str, **keys) -> ConfigWorkflow:
    found = ConfigWorkflow(
        [str(ROOT / "configs" / name) for name in ([config] if isinstance(config, str) else config)],
        workflow_type=workflow_type,
        run_id=run_id,
        logging_file=False,
        bundle_root=str(ROOT),
        **{key: str(value) if isinstance(value, Path) else value for key, value in keys.items()},
    )
    found.initialize()
    return found


def make_weights(folder: Path, seed: int = 0) -> Path:
    """Weights of an autoencoder that has seen nothing; its linear shortcut makes a fair reconstruction."""
    flow = workflow("inference.json", "evaluating", "infer", dataset_dir=folder, output_dir=folder, **AUTOENCODER)
    torch.manual_seed(seed)
    network = flow.parser.get_parsed_content("network_def")
    assert isinstance(network, Reconstructor)
    save_weights(network, folder / "model.pt")
    return folder / "model.pt"


def leave_start(network: torch.nn.Module) -> None:
    """Give weights to the layers that start as zero, without which neither time nor conditions change what comes out."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def encode(volumes: Path, latents: Path, weights: Path, **keys) -> Path:
    keys = {**AUTOENCODER, "ckpt_dir": weights.parent, **keys}
    workflow("inference.json", "encoding", "infer", dataset_dir=volumes, output_dir=latents, **keys).run()
    return latents


def save_untrained_generator(latents: Path, folder: Path, **keys) -> Path:
    """Save a generator of latents that has learned nothing, and return the folder of its weights."""
    keys = {**{name: KEYS[name] for name in ("channels", "norm_num_groups", "num_head_channels")}, "prediction": "x", **keys}
    flow = workflow("train_diffusion.json", "training", "train", dataset_dir=latents, device="cpu", **keys)
    torch.manual_seed(0)
    network, statistics = (flow.parser.get_parsed_content(name) for name in ("network_def", "statistics"))
    leave_start(network)
    save_weights(network, folder / "checkpoints" / "model.pt", describe(statistics, RectifiedFlow(), 0.1))
    return folder / "checkpoints"


def train_generator(latents: Path, output_dir: Path, prepare: Callable | None = None, num_processes: int = 1, **keys) -> int:
    """Train, and return the exit code of the first process."""
    return train(latents, output_dir, prepare, num_processes, config="train_diffusion.json", **{**KEYS, **keys})


def generate(generator: Path, weights: Path, output_dir: Path, **keys) -> ConfigWorkflow:
    """Make samples in this process."""
    keys = {"device": "cpu", "amp": False, "num_samples": 2, "num_inference_steps": 3, **keys}
    paths = {"ckpt_dir": generator, "autoencoder": weights, "output_dir": output_dir}
    flow = workflow("generate.json", "generating", "infer", **paths, **keys)
    flow.run()
    return flow
