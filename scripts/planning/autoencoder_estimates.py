"""What an autoencoder's config needs in memory and operations, and which changes would need less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.bundle import ConfigParser

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT, check_parser
from scripts.bundle.precision import Precision, autocast_dtype, choose_precision
from scripts.layers.factors import padded_size, per_axis
from scripts.planning.estimates import Estimate
from scripts.planning.inference_costs import inference_cost
from scripts.planning.training_costs import training_cost

TRAIN = str(ROOT / "configs" / "train.json")
LARGEST_INITIAL = 8


@dataclass(frozen=True)
class Plan:
    """
    A config that has been read.

    Args:
        config: parsed config.
        device: device that is planned for, ``"cuda"`` or ``"cpu"``.
        network: network of the config, on the ``meta`` device.
    """

    config: ConfigParser
    device: str
    network: Any

    def get(self, key: str) -> Any:
        """A component or value of the config."""
        return self.config.get_parsed_content(key)

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Data type of mixed precision, None for none."""
        return autocast_dtype(self.get("amp_dtype")) if self.get("amp") else None


def read_config(config_file: str | Sequence[str], device: str, later: Sequence[str], **overrides: Any) -> ConfigParser:
    """
    Read a config as ``monai.bundle run`` does, and check it.

    Args:
        config_file: a config, or a list of a config and its overlays.
        device: device that is planned for. Where the config does not set the precision, it is bfloat16 for ``"cuda"``, which
            need not be present, and this machine's default for ``"cpu"``.
        later: keys of components of which the parser is to return what makes them.
        overrides: further config keys.

    Raises:
        OSError: for a file that is missing.
        ValueError: for a damaged file, an unknown key, or a value that makes no sense.
    """
    try:
        parser = ConfigParser(ConfigParser.load_config_files(config_file))
    except ValueError as error:
        raise ValueError(f"{config_file} cannot be read: {error}") from error
    parser.update(pairs=overrides)
    on_gpu = Precision(device, True, "bfloat16", "the GPU that is planned for is assumed to have units for it")
    parser["precision"] = choose_precision(device) if device == "cpu" else on_gpu
    for key in later:
        if key in parser:
            parser[key] = {**{k: v for k, v in parser[key].items() if k != "params"}, "_mode_": "callable"}
    parser.parse(reset=True)
    check_parser(parser)
    return parser


def read_plan(config_file: str | Sequence[str] = TRAIN, *, device: str = "cuda", **overrides: Any) -> Plan:
    """
    Read the config of an autoencoder as :py:func:`read_config` does. ``network_def`` and ``optimizer`` are what makes them.

    Raises:
        ValueError: for a config of another network.
        RuntimeError: MONAI's, for a value that a component refuses.
    """
    parser = read_config(config_file, device, ("network_def", "optimizer"), **overrides)
    if "network_def" not in parser:
        raise ValueError(f"{config_file} has no `network_def`; a preset goes after a config, in a list.")
    build = parser.get_parsed_content("network_def")
    if not issubclass(made := getattr(build, "func", build), AutoencoderKL):
        raise ValueError(f"`network_def` is {made.__name__}; the planner needs scripts.autoencoderkl.AutoencoderKL.")
    with torch.device("meta"):
        return Plan(parser, device, build())


def estimate_memory(
    spatial_size: int | Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    downsample_factors: Sequence[Any] | None = None,
    batch_size: int | None = None,
    *,
    config_file: str | Sequence[str] = TRAIN,
    volume_size: int | Sequence[int] | None = None,
    device: str = "cuda",
    **overrides: Any,
) -> Estimate:
    """
    What an autoencoder needs in memory and operations, for a training step and for reconstructing a volume. The real
    network runs on fake tensors: nothing is allocated, no GPU is needed, and it takes a few seconds at any size.

    Args:
        spatial_size: size of the training patch, voxels; one number for a cube. None takes the config's ``patch_size``.
        channels: feature channels of each level; None, as below, takes the config's.
        downsample_factors: the shrink between two levels, each an integer or one integer per axis.
        batch_size: patches per step.
        config_file: a config, or a list of a config and its overlays, as ``monai.bundle run`` takes them.
        volume_size: size of the volume that is reconstructed, voxels; None is ``spatial_size``.
        device: ``"cuda"`` or ``"cpu"``: whose rules of mixed precision, optimizer and allocator apply.
        overrides: further config keys, such as ``initial_downsample_factor``, ``amp`` or ``gradient_accumulation_steps``.

    Raises:
        OSError: for a file that is missing.
        ValueError: for a damaged file, an unknown key, a value that makes no sense, or sizes that do not fit the network.
        RuntimeError: MONAI's, for a value that a component refuses.
    """
    given = {"channels": channels, "downsample_factors": downsample_factors, "batch_size": batch_size}
    overrides.update({key: value for key, value in given.items() if value is not None})
    plan = read_plan(config_file, device=device, **overrides)
    network, get, trains = plan.network, plan.get, "patch_size" in plan.config
    axes = network.arguments["spatial_dims"]
    if spatial_size is None and trains:
        size = per_axis("patch_size", get("patch_size"), axes)
    elif spatial_size is None and volume_size is None:
        raise ValueError("this config does not train, so it has no `patch_size`: set `spatial_size`.")
    else:
        size = per_axis("spatial_size", volume_size if spatial_size is None else spatial_size, axes)
    volume = size if volume_size is None else per_axis("volume_size", volume_size, axes)
    precision: dict[str, Any] = {"amp_dtype": plan.amp_dtype, "device": device}
    costs = {}
    if trains:
        with torch.device("meta"):
            discriminator = get("adversary#discriminator") if get("adv_weight") > 0 else None
        costs["training"] = training_cost(
            network,
            size,
            batch_size=get("batch_size"),
            optimizer=get("optimizer"),
            accumulation_steps=get("gradient_accumulation_steps"),
            discriminator=discriminator,
            averaged="train#average" in plan.config,
            loss_function=get("loss"),
            loss_terms=get("train#loss_terms"),
            **precision,
        )
    costs["reconstruction"] = inference_cost(network, volume, in_slabs=not trains, **precision)
    batches = get("batch_size") if trains else 1
    return Estimate.of(network, network, size, volume_size=volume, batch_size=batches, costs=costs)


def estimate_changes(
    estimate: Estimate, config_file: str | Sequence[str] = TRAIN, *, device: str = "cuda", **overrides: Any
) -> dict[str, int]:
    """
    Options of the command line with which a training needs less memory than ``estimate``, which :py:func:`estimate_memory`
    has made of the other arguments, and the bytes that are needed with each.
    """
    size, factors = estimate.spatial_size, estimate.downsample_factor
    initial = read_plan(config_file, device=device, **overrides).network.initial_downsample_factor
    larger = [min(2 * factor, LARGEST_INITIAL) for factor in initial]
    multiples = [factor * after // before for factor, before, after in zip(factors, initial, larger)]
    changes: list[dict[str, Any]] = [
        {"batch_size": 1, "gradient_accumulation_steps": estimate.batch_size},
        {"use_checkpoint": True},
        *({"patch_size": [max(n // divisor // f, 1) * f for n, f in zip(size, factors)]} for divisor in (2, 4)),
        {"initial_downsample_factor": larger, "patch_size": list(padded_size(size, multiples))},
    ]
    found = {}
    for change in changes:
        keys = {**overrides, "patch_size": list(size), **change}
        changed = estimate_memory(config_file=config_file, volume_size=estimate.volume_size, device=device, **keys)
        if changed.needed < estimate.needed:
            options = (f"--{key} {value}".replace(", ", ",") for key, value in change.items())
            found[" ".join(options)] = changed.needed
    return found
