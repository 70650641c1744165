"""The config keys that the planner takes into account: network, patches, loss, optimizer and precision, read into a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT, check_parser
from scripts.bundle.errors import reason
from scripts.bundle.precision import Precision, autocast_dtype, choose_precision
from scripts.layers.factors import per_axis

__all__ = [
    "TRAIN",
    "Plan",
    "amp_dtype_of",
    "is_generator",
    "parse",
    "positive",
    "read_config",
    "read_plan",
    "voxels",
    "whole",
]

TRAIN = str(ROOT / "configs" / "train.json")


@dataclass(frozen=True)
class Plan:
    """
    What a config says about an autoencoder.

    Args:
        build: makes the network; keyword arguments replace those of the config.
        network: what it makes, on the ``meta`` device.
        amp_dtype: data type of mixed precision, None for none.
        patch_size: spatial size of a training patch, voxels; None in a config that does not train.
        training: further arguments of :py:func:`scripts.planning.training_costs.training_cost`; empty without training.
    """

    build: Callable[..., AutoencoderKL]
    network: AutoencoderKL
    amp_dtype: torch.dtype | None
    patch_size: tuple[int, ...] | None = None
    training: dict[str, Any] = field(default_factory=dict)

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
        device: device that is planned for. Where the config does not set the precision, it is bfloat16 for ``"cuda"``, which
            need not be present, and this machine's default for ``"cpu"``.
        overrides: further config keys.

    Raises:
        ValueError: for a config of another network, an unknown key, or a value that the network refuses.
        FileNotFoundError: for a config that does not exist.
    """
    parser = read_config(config_file, device, overrides, callables=("network_def", "optimizer"))
    try:
        parse(parser)
        build = _network_builder(parser, config_file)
        with torch.device("meta"):
            network = build()
        plan = Plan(build, network, amp_dtype_of(parser))
        return replace(plan, **_training_keys(parser, network)) if "patch_size" in parser else plan
    except (RuntimeError, TypeError) as error:  # MONAI wraps what a component raises; `--channels 8` has no length
        raise ValueError(f"{config_file} cannot be used: {reason(error)}") from error


def read_config(
    config_file: str | Sequence[str], device: str, overrides: dict[str, Any], callables: Sequence[str]
) -> ConfigParser:
    """
    The config and its overlays, merged, for :py:func:`parse`.

    Args:
        config_file: see :py:func:`read_plan`.
        device: ditto.
        overrides: ditto.
        callables: keys of components that are made several times, or of fake parameters.
    """
    parser = ConfigParser(_content(config_file))
    parser.update(pairs=overrides)
    parser["precision"] = (
        choose_precision(device)
        if device == "cpu"
        else Precision(device, True, "bfloat16", "the GPU that is planned for is assumed to have units for it")
    )
    for key in callables:
        if isinstance(parser.get(key), dict):
            parser[key] = {**{k: v for k, v in parser[key].items() if k != "params"}, "_mode_": "callable"}
    return parser


def is_generator(config_file: str | Sequence[str]) -> bool:
    """Whether a config, or one of a list, trains a generator."""
    return "flow" in _content(config_file)


def _content(config_file: str | Sequence[str]) -> dict[str, Any]:
    files = [config_file] if isinstance(config_file, str) else list(config_file)
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no config {file}.")
    try:
        return ConfigParser.load_config_files(files)
    except ValueError as error:
        raise ValueError(f"{config_file} cannot be read: {error}") from error


def parse(parser: ConfigParser) -> None:
    """Parse a config, and refuse unknown keys."""
    parser.parse(reset=True)
    check_parser(parser)


def amp_dtype_of(parser: ConfigParser) -> torch.dtype | None:
    """Data type of a config's mixed precision, None for none."""
    return autocast_dtype(parser.get_parsed_content("amp_dtype")) if parser.get_parsed_content("amp") else None


def _network_builder(parser: ConfigParser, config_file: str | Sequence[str]) -> Callable[..., AutoencoderKL]:
    if "network_def" not in parser:
        raise ValueError(f"{config_file} has no `network_def`.")
    build = parser.get_parsed_content("network_def")
    made = build.func if isinstance(build, partial) else build
    if not (isinstance(made, type) and issubclass(made, AutoencoderKL)):
        name = getattr(made, "__name__", type(made).__name__)
        raise ValueError(f"`network_def` of {config_file} is {name}; the planner needs scripts.autoencoderkl.AutoencoderKL.")
    return build


def _training_keys(parser: ConfigParser, network: AutoencoderKL) -> dict[str, Any]:
    get = parser.get_parsed_content
    with torch.device("meta"):
        discriminator = get("discriminator_def") if "adv_weight" in parser and float(get("adv_weight")) > 0 else None
    return {
        "patch_size": voxels("patch_size", get("patch_size"), network.arguments["spatial_dims"]),
        "training": {
            "batch_size": whole("batch_size", get("batch_size")),
            "accumulates": whole("gradient_accumulation_steps", get("gradient_accumulation_steps")) > 1,
            "loss": get("loss"),
            "loss_terms": get("loss_terms") if "loss_terms" in parser else None,
            "optimizer": get("optimizer"),
            "discriminator": discriminator,
            "averaged": "average" in parser,
        },
    }


def positive(name: str, value: Any) -> Any:
    """A number above 0, or a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` is {value!r}; it must be a number above 0.")
    return value


def whole(name: str, value: Any) -> int:
    """A whole number of at least 1, or a ValueError that names it."""
    if positive(name, value) != int(value):
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number.")
    return int(value)


def voxels(name: str, size: Any, spatial_dims: int) -> tuple[int, ...]:
    """A spatial size, one number of voxels per axis; one number is a cube. Anything else is a ValueError."""
    try:
        return per_axis(name, size, spatial_dims)
    except ValueError as error:
        needed = f"{spatial_dims} whole numbers of voxels, each at least 1"
        raise ValueError(f"`{name}` is {size!r}; it needs {needed}.") from error
