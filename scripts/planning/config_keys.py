"""The config keys that the planner takes into account: network, patches, loss, optimizer and precision, read into a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT, check_parser
from scripts.bundle.errors import reason
from scripts.bundle.precision import Precision, autocast_dtype, choose_precision
from scripts.planning.request_checks import voxels, whole
from scripts.training.losses import LossTerm

__all__ = ["TRAIN", "Plan", "planned_precision", "read_configs", "read_plan"]

TRAIN = str(ROOT / "configs" / "train.json")


@dataclass(frozen=True)
class Plan:
    """
    What a config says about one training step.

    Args:
        build: makes the network; keyword arguments replace those of the config.
        network: what it makes, on the ``meta`` device.
        patch_size: spatial size of a training patch, voxels; None in a config that does not train.
        batch_size: patches per step.
        amp_dtype: data type of mixed precision, None for none.
        accumulates: whether an optimizer step uses the gradients of several batches.
        loss: of reconstruction and image.
        loss_terms: further terms of the loss, by name.
        optimizer: makes the optimizer from parameters.
        discriminator: on the ``meta`` device, where adversarial training is on.
        averaged: whether an average of the weights is kept.
    """

    build: Callable[..., AutoencoderKL]
    network: AutoencoderKL
    patch_size: tuple[int, ...] | None = None
    batch_size: int = 1
    amp_dtype: torch.dtype | None = None
    accumulates: bool = False
    loss: Any = torch.nn.functional.l1_loss
    loss_terms: dict[str, LossTerm] | None = None
    optimizer: Any = torch.optim.AdamW
    discriminator: torch.nn.Module | None = None
    averaged: bool = False

    def with_network(self, **arguments: Any) -> Plan:
        """The same plan with other arguments of the network."""
        build = partial(self.build, **arguments)
        with torch.device("meta"):
            return replace(self, build=build, network=build())


def read_plan(config_file: str | Sequence[str] = TRAIN, *, device: str = "cuda", **overrides: Any) -> Plan:
    """
    Read a config as ``monai.bundle run`` does, and build its network on the ``meta`` device.

    Args:
        config_file: a config, or a list of a config and its overlays.
        device: that is planned for. Where the config does not set the precision, it is bfloat16 for ``"cuda"``, which need
            not be present, and this machine's default for ``"cpu"``.
        overrides: further config keys.

    Raises:
        ValueError: for a config of another network, an unknown key, or a value that the network refuses.
        FileNotFoundError: for a config that does not exist.
    """
    parser = ConfigParser(read_configs(config_file))
    parser.update(pairs=overrides)
    parser["precision"] = planned_precision(device)
    for key in ("network_def", "optimizer"):  # as callables: networks are made several times, optimizers on fake parameters
        if isinstance(parser.get(key), dict):
            parser[key] = {**{k: v for k, v in parser[key].items() if k != "params"}, "_mode_": "callable"}
    parser.parse()
    try:
        check_parser(parser)
        build = _network_builder(parser, _names(config_file))
        with torch.device("meta"):
            network = build()
        amp = parser.get_parsed_content("amp")
        amp_dtype = autocast_dtype(parser.get_parsed_content("amp_dtype")) if amp else None
        if "patch_size" not in parser:
            return Plan(build, network, amp_dtype=amp_dtype)
        return Plan(build, network, amp_dtype=amp_dtype, **_training_settings(parser, network))
    except (RuntimeError, TypeError) as error:  # MONAI wraps what a component raises; `--channels 8` has no length
        raise ValueError(f"{_names(config_file)} cannot be used: {reason(error)}") from error


def planned_precision(device: str) -> Precision:
    """The precision of a config that does not set it: bfloat16 on a GPU, this machine's default on the CPU."""
    if device == "cpu":
        return choose_precision(device)
    return Precision(device, True, "bfloat16", "the GPU that is planned for is assumed to have units for it")


def read_configs(config_file: str | Sequence[str]) -> dict[str, Any]:
    """The content of a config and its overlays, merged."""
    files = [config_file] if isinstance(config_file, str) else list(config_file)
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no config {file}.")
    try:
        return ConfigParser.load_config_files(files)
    except ValueError as error:
        raise ValueError(f"{_names(config_file)} cannot be read: {error}") from error


def _network_builder(parser: ConfigParser, names: str) -> Callable[..., AutoencoderKL]:
    if "network_def" not in parser:
        raise ValueError(f"{names} has no `network_def`.")
    build = parser.get_parsed_content("network_def")
    made = build.func if isinstance(build, partial) else build
    if not (isinstance(made, type) and issubclass(made, AutoencoderKL)):
        name = getattr(made, "__name__", type(made).__name__)
        raise ValueError(f"`network_def` of {names} is {name}; the planner is for scripts.autoencoderkl.AutoencoderKL.")
    return build


def _names(config_file: str | Sequence[str]) -> str:
    return config_file if isinstance(config_file, str) else ", ".join(config_file)


def _training_settings(parser: ConfigParser, network: AutoencoderKL) -> dict[str, Any]:
    adversarial = float(parser.get_parsed_content("adv_weight")) > 0 if "adv_weight" in parser else False
    with torch.device("meta"):
        discriminator = parser.get_parsed_content("discriminator_def") if adversarial else None
    steps = whole("gradient_accumulation_steps", parser.get_parsed_content("gradient_accumulation_steps"))
    return {
        "patch_size": voxels("patch_size", parser.get_parsed_content("patch_size"), network.arguments["spatial_dims"]),
        "batch_size": whole("batch_size", parser.get_parsed_content("batch_size")),
        "accumulates": steps > 1,
        "loss": parser.get_parsed_content("loss"),
        "loss_terms": parser.get_parsed_content("loss_terms") if "loss_terms" in parser else None,
        "optimizer": parser.get_parsed_content("optimizer"),
        "discriminator": discriminator,
        "averaged": "average" in parser,
    }
