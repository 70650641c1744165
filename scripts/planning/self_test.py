"""Self-test: the default configuration and every preset run on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch.optim.swa_utils import AveragedModel

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT
from scripts.bundle.progress import ProgressBar
from scripts.planning.estimates import estimate_plan
from scripts.planning.plans import Plan, read_plan
from scripts.planning.saved_tensors import SavedTensors
from scripts.training.autoencoder_trainer import AutoencoderTrainer

__all__ = ["CheckResult", "Configuration", "check_all", "check_configuration", "configurations"]

TOLERANCE = 0.02  # of the saved activations, between estimate and count


@dataclass(frozen=True)
class Configuration:
    """A configuration of this bundle: config files relative to its root, and overrides."""

    files: tuple[str, ...]
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        files = " + ".join(file.removeprefix("configs/").removesuffix(".json") for file in self.files)
        return " ".join([files, *(f"--{key} {str(value).replace(' ', '')}" for key, value in self.overrides.items())])


@dataclass(frozen=True)
class CheckResult:
    """
    The result of checking a configuration. Memory is in bytes.

    Args:
        name: of the configuration.
        downsample_factor: total factor along each axis.
        latent_shape: of the volume that was tried, channels first.
        parameters: number of parameters.
        saved_estimated: estimated saved activations of a training step; None for a config that does not train.
        saved_counted: those of the real step.
        peak_estimated: estimated peak of the step.
        peak_counted: that of the real step; None on the CPU, where PyTorch does not count.
        error: what failed; None if nothing did.
    """

    name: str
    downsample_factor: tuple[int, ...] = ()
    latent_shape: tuple[int, ...] = ()
    parameters: int = 0
    saved_estimated: int | None = None
    saved_counted: int | None = None
    peak_estimated: int | None = None
    peak_counted: int | None = None
    error: str | None = None


def configurations(root: Path = ROOT) -> list[Configuration]:
    """The default and every preset."""
    presets = sorted(path.name for path in (root / "configs" / "presets").glob("*.json"))
    default = "configs/train.json"
    return [Configuration((default,)), *(Configuration((default, f"configs/presets/{name}")) for name in presets)]


def check_all(root: Path = ROOT) -> list[CheckResult]:
    """Check all :py:func:`configurations`, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = ProgressBar(configurations(root), desc="checking", unit="configuration")
    return [check_configuration(configuration, root, device) for configuration in found]


def check_configuration(configuration: Configuration, root: Path = ROOT, device: str = "cpu") -> CheckResult:
    """
    Build a configuration, train a step on a volume of two latents along each axis, encode and decode it.

    Args:
        configuration: the configuration.
        root: of the bundle.
        device: where to run.
    """
    try:
        files = [str(root / file) for file in configuration.files]
        plan = read_plan(files, device=device, **configuration.overrides)
        return _run(configuration.name, plan, device)
    except Exception as error:  # a self-test reports every configuration
        return CheckResult(configuration.name, error=f"{type(error).__name__}: {error}".splitlines()[0])


def _run(name: str, plan: Plan, device: str) -> CheckResult:
    size = tuple(2 * factor for factor in plan.network.total_downsample_factor)
    estimate = estimate_plan(plan, size, device=device)
    torch.manual_seed(0)
    network = plan.build().to(device)
    image = torch.rand(estimate.batch_size, network.arguments["in_channels"], *size, device=device)
    _encode_and_decode(network, image, estimate.latent_shape)
    result = CheckResult(
        name=name,
        downsample_factor=estimate.downsample_factor,
        latent_shape=estimate.latent_shape,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )
    if "training" not in estimate.costs:
        return result
    saved, peak = _train(plan, network, image)
    expected = estimate.costs["training"]
    if abs(saved - expected.saved_activations) > TOLERANCE * saved:
        raise ArithmeticError(f"{saved} bytes of activations were saved, {expected.saved_activations} were estimated")
    return replace(
        result,
        saved_estimated=expected.saved_activations,
        saved_counted=saved,
        peak_estimated=expected.peak,
        peak_counted=peak,
    )


def _train(plan: Plan, network: AutoencoderKL, image: torch.Tensor) -> tuple[int, int | None]:
    """Train two steps, so that the optimizer has its state in the second: bytes that this one saves, and the GPU's peak."""
    trainer = AutoencoderTrainer.of_images(
        [image, image],
        network,
        plan.training["optimizer"](network.parameters()),
        amp_dtype=plan.amp_dtype,
        loss_function=plan.training["loss"],
        loss_terms=plan.training["loss_terms"],
    )
    on_gpu = image.device.type == "cuda"
    if on_gpu:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: torch.cuda.reset_peak_memory_stats())
    average = AveragedModel(network) if plan.training["averaged"] else None  # noqa: F841  takes memory during training
    saved = SavedTensors(list(network.parameters()))
    saved.attach(trainer)
    with saved:
        trainer.run()
    if trainer.nonfinite_steps or not all(torch.isfinite(parameter).all() for parameter in network.parameters()):
        raise ArithmeticError("a training step was not finite")
    return saved.nbytes, torch.cuda.max_memory_allocated() if on_gpu else None


@torch.no_grad()
def _encode_and_decode(network: AutoencoderKL, image: torch.Tensor, latent_shape: tuple[int, ...]) -> None:
    z_mu, _ = network.eval().encode(image)
    if z_mu.shape[1:] != latent_shape:
        raise ArithmeticError(f"the latent has the shape {tuple(z_mu.shape[1:])}; {latent_shape} is expected")
    reconstruction = network.decode(z_mu)
    if reconstruction.shape != image.shape or not torch.isfinite(reconstruction).all():
        raise ArithmeticError(f"the reconstruction has the shape {tuple(reconstruction.shape)}, or is not finite")
