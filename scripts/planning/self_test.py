"""Self-test: every preset, and every configuration that the documents name, runs on this machine."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT
from scripts.bundle.progress import ProgressBar
from scripts.planning.estimates import estimate_plan
from scripts.planning.plans import Plan, read_plan
from scripts.planning.saved_tensors import SavedTensors
from scripts.training.losses import kl_divergence

__all__ = ["CheckResult", "Configuration", "check_all", "check_configuration", "configurations"]

TOLERANCE = 0.02  # of the saved activations, between estimate and count
COMMAND = re.compile(r"^\s*(?:python|torchrun)\b.*-m monai\.bundle run (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Configuration:
    """A configuration of this bundle: config files relative to its root, and overrides."""

    files: tuple[str, ...]
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        files = " + ".join(file.removeprefix("configs/").removesuffix(".json") for file in self.files)
        return " ".join([files, *(f"--{key} {str(value).replace(' ', '')}" for key, value in self.overrides)])


@dataclass(frozen=True)
class CheckResult:
    """
    What became of a configuration. Memory is in bytes.

    Args:
        name: of the configuration.
        downsample_factor: total factor along each axis.
        latent_shape: of the volume that was tried, channels first.
        parameters: number of parameters.
        saved_estimated: estimated saved activations of a training step; None for a config that does not train.
        saved_counted: those of the real step.
        peak_estimated: estimated peak of the step.
        peak_counted: the real one; None where PyTorch does not count, which is on the CPU.
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
    """The default, every preset, and what README.md and docs/ name in their commands, as far as it shapes the network."""
    found = [Configuration(("configs/train.json",))]
    for preset in sorted((root / "configs" / "presets").glob("*.json")):
        found.append(Configuration(("configs/train.json", f"configs/presets/{preset.name}")))
    for document in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        found += _documented(document.read_text(), _network_keys(root))
    return list(dict.fromkeys(found))


def _network_keys(root: Path) -> set[str]:
    definition = ConfigParser.load_config_file(root / "configs" / "train.json")["network_def"]
    return {value[1:] for value in definition.values() if str(value).startswith("@")}


def _documented(text: str, keys: set[str]) -> Iterator[Configuration]:
    for command in COMMAND.findall(text.replace("\\\n", " ")):
        words = shlex.split(command, comments=True)
        options = {key[2:]: value for key, value in itertools.pairwise(words) if key.startswith("--")}
        files = _literal(options.pop("config_file", "()"))
        files = (files,) if isinstance(files, str) else tuple(files)
        if files and all(file.startswith("configs/") for file in files):  # others are the reader's own
            yield Configuration(files, tuple((k, _frozen(_literal(v))) for k, v in options.items() if k in keys))


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


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
        overrides = {key: _thawed(value) for key, value in configuration.overrides}
        plan = read_plan([str(root / file) for file in configuration.files], device=device, **overrides)
        return _run(configuration.name, plan, device)
    except Exception as error:  # a self-test goes on to the next configuration, and says of each what is wrong
        return CheckResult(configuration.name, error=f"{type(error).__name__}: {error}".splitlines()[0])


def _thawed(value: Any) -> Any:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


def _run(name: str, plan: Plan, device: str) -> CheckResult:
    size = tuple(2 * factor for factor in plan.network.total_downsample_factor)
    estimate = estimate_plan(plan, size, device=device)
    torch.manual_seed(0)
    network = plan.build().to(device)
    image = torch.rand(plan.batch_size, network.arguments["in_channels"], *size, device=device)
    _encode_and_decode(network, image, estimate.latent_shape)
    result = CheckResult(
        name=name,
        downsample_factor=estimate.downsample_factor,
        latent_shape=estimate.latent_shape,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )
    if estimate.training is None:
        return result
    saved, peak = _train(plan, network, image)
    expected = estimate.training
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
    """Two steps, so that the second has the optimizer's state: bytes that it saves, and the GPU's peak."""
    device_type = image.device.type
    optimizer = plan.optimizer(network.train().parameters())
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        if device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        saved = SavedTensors(list(network.parameters()))
        with saved:
            with torch.autocast(device_type, plan.amp_dtype, enabled=plan.amp_dtype is not None):
                reconstruction, z_mu, z_sigma = network(image)
            loss = plan.loss(reconstruction.float(), image) + 1e-8 * kl_divergence(z_mu, z_sigma)
        loss.backward()
        optimizer.step()
    if not all(torch.isfinite(parameter).all() for parameter in network.parameters()):
        raise ArithmeticError("a training step made weights that are not finite")
    return saved.nbytes, torch.cuda.max_memory_allocated() if device_type == "cuda" else None


@torch.no_grad()
def _encode_and_decode(network: AutoencoderKL, image: torch.Tensor, latent_shape: tuple[int, ...]) -> None:
    z_mu, _ = network.eval().encode(image)
    if z_mu.shape[1:] != latent_shape:
        raise ArithmeticError(f"the latent is {tuple(z_mu.shape[1:])}, which should be {latent_shape}")
    reconstruction = network.decode(z_mu)
    if reconstruction.shape != image.shape or not torch.isfinite(reconstruction).all():
        raise ArithmeticError(f"the reconstruction is {tuple(reconstruction.shape)}, or not finite")
