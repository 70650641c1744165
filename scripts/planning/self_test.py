"""Self-test: the default configuration and every preset run on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch.optim.swa_utils import AveragedModel

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT
from scripts.bundle.errors import reason
from scripts.bundle.progress import ProgressBar
from scripts.layers.factors import by
from scripts.planning.autoencoder_estimates import Plan, estimate_memory, read_plan
from scripts.planning.estimates import Estimate
from scripts.planning.fake_tensors import SavedTensors
from scripts.training.trainer import AutoencoderTrainer

TOLERANCE = 0.02  # of the saved activations, between estimate and count


@dataclass(frozen=True)
class CheckResult:
    """
    The result of checking a configuration. Memory is in bytes.

    Args:
        name: names of its files.
        estimate: estimate for the volume that was tried; None where the check failed.
        saved: saved activations of the real training step; None for a config that does not train.
        peak: peak of the real step; None on the CPU, where PyTorch does not count.
        error: what failed, or None.
    """

    name: str
    estimate: Estimate | None = None
    saved: int | None = None
    peak: int | None = None
    error: str | None = None


def configurations(root: Path = ROOT) -> list[list[str]]:
    """Files, relative to the bundle's root, of the default and of every preset."""
    presets = sorted(path.relative_to(root).as_posix() for path in root.glob("configs/presets/*.json"))
    return [["configs/train.json"], *(["configs/train.json", preset] for preset in presets)]


def check_all(root: Path = ROOT, **overrides: Any) -> list[CheckResult]:
    """Check all :py:func:`configurations` with further config keys, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = ProgressBar(configurations(root), desc="checking", unit="configuration")
    return [check_configuration(files, root, device, **overrides) for files in found]


def check_configuration(files: Sequence[str], root: Path = ROOT, device: str = "cpu", **overrides: Any) -> CheckResult:
    """Build the network of a config and its overlays, files relative to ``root``, encode and decode a volume of two latents
    along each axis, and train two steps on it; ``overrides`` are further config keys."""
    name = " + ".join(file.removeprefix("configs/").removesuffix(".json") for file in files)
    try:
        return CheckResult(name, *_run(config_file=[str(root / file) for file in files], device=device, **overrides))
    except Exception as error:  # a self-test reports every configuration
        why = reason(error)
        return CheckResult(name, error=f"{type(why).__name__}: {why}".splitlines()[0])


def _run(device: str, **config: Any) -> tuple[Estimate, int | None, int | None]:
    plan = read_plan(device=device, **config)
    size = tuple(2 * factor for factor in plan.network.total_downsample_factor)
    estimate = estimate_memory(size, device=device, **config)
    torch.manual_seed(0)
    network = plan.get("network_def")().to(device)
    image = torch.rand(estimate.batch_size, network.arguments["in_channels"], *size, device=device)
    with torch.no_grad():
        z_mu, _ = network.eval().encode(image)
        reconstruction = network.decode(z_mu)
    if z_mu.shape[1:] != estimate.latent_shape or reconstruction.shape != image.shape:
        raise ArithmeticError(f"the latent is {by(z_mu.shape)}, the reconstruction {by(reconstruction.shape)}")
    if not torch.isfinite(reconstruction).all():
        raise ArithmeticError("the reconstruction is not finite")
    if "training" not in estimate.costs:
        return estimate, None, None
    saved, peak = _train(plan, network, image)
    expected = estimate.costs["training"].saved_activations
    if abs(saved - expected) > TOLERANCE * saved:
        raise ArithmeticError(f"{saved} bytes of activations were saved, {expected} were estimated")
    return estimate, saved, peak


def _train(plan: Plan, network: AutoencoderKL, image: torch.Tensor) -> tuple[int, int | None]:
    """Train two steps, so that the optimizer has its state in the second: bytes that this one saves, and the GPU's peak."""
    trainer = AutoencoderTrainer.of_images(
        [image, image],
        network,
        plan.get("optimizer")(network.parameters()),
        amp_dtype=plan.amp_dtype,
        loss_function=plan.get("loss"),
        loss_terms=plan.get("train#loss_terms"),
        average=AveragedModel(network) if "train#average" in plan.config else None,
    )
    on_gpu = image.device.type == "cuda"
    if on_gpu:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: torch.cuda.reset_peak_memory_stats())
    saved = SavedTensors(list(network.parameters()))
    saved.attach(trainer)
    with saved:
        trainer.run()
    if trainer.nonfinite_steps or not all(torch.isfinite(parameter).all() for parameter in network.parameters()):
        raise ArithmeticError("a training step was not finite")
    return saved.nbytes, torch.cuda.max_memory_allocated() if on_gpu else None
