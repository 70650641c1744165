"""The planner: what a configuration needs in memory before it runs, and which factors suit a volume and a GPU."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from tqdm.auto import tqdm

from scripts.autoencoderkl import AutoencoderKL
from scripts.candidates import Candidate, candidates, padded_size
from scripts.config import check_parser
from scripts.factors import per_axis
from scripts.inferer import autocast_dtype
from scripts.memory import InferenceCost, TrainingCost, inference_cost, training_cost
from scripts.weights import write_atomically

__all__ = [
    "Change",
    "Estimate",
    "Plan",
    "Recommendation",
    "estimate_memory",
    "estimate_plan",
    "leanest",
    "log_estimate",
    "positive",
    "read_plan",
    "recommend_downsample_factors",
    "what_would_fit",
    "write_overlay",
]

ROOT = Path(__file__).resolve().parent.parent
TRAIN = str(ROOT / "configs" / "train.json")
GIB = 2**30
CONTEXT = {"cuda": 0.6, "cpu": 0.5}  # GiB: CUDA's context and libraries; the process before the first step
FRAGMENTATION = 0.08  # of the peak: what an allocator holds and cannot use
MAX_INITIAL, LAST_RESORT_INITIAL = 4, 8
MAX_LATENT_CHANNELS = 256
FACTOR_KEYS = ("initial_downsample_factor", "downsample_factors", "latent_channels")
logger = logging.getLogger(__name__)


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
        accumulates: whether several batches make one optimizer step.
        loss: of reconstruction and image.
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
    optimizer: Any = torch.optim.AdamW
    discriminator: torch.nn.Module | None = None
    averaged: bool = False

    def with_network(self, **arguments: Any) -> Plan:
        """The same plan with other arguments of the network."""
        build = partial(self.build, **arguments)
        with torch.device("meta"):
            return replace(self, build=build, network=build())


@dataclass(frozen=True)
class Estimate:
    """
    What a configuration needs.

    Args:
        spatial_size: of the training patch, voxels.
        volume_size: of the volume that is reconstructed, voxels.
        batch_size: patches per training step.
        downsample_factor: total factor along each axis.
        latent_shape: of one patch, channels first.
        voxels_per_latent: voxels (times image channels) for each number of the latent.
        training: cost of a step; None for a config that does not train.
        inference: cost of reconstructing a volume.
        device: ``"cuda"`` or ``"cpu"``.
    """

    spatial_size: tuple[int, ...]
    volume_size: tuple[int, ...]
    batch_size: int
    downsample_factor: tuple[int, ...]
    latent_shape: tuple[int, ...]
    voxels_per_latent: float
    training: TrainingCost | None
    inference: InferenceCost
    device: str

    @property
    def training_bytes(self) -> int:
        """Memory that training needs: the peak, and the margin for context, allocator and convolution workspace."""
        return 0 if self.training is None else _with_margin(self.training, self.device)

    @property
    def inference_bytes(self) -> int:
        """Memory that reconstruction needs, the same margin included."""
        return _with_margin(self.inference, self.device)

    def fits(self, memory_gb: float) -> bool:
        """Whether training and reconstruction both fit into ``memory_gb`` GiB."""
        return max(self.training_bytes, self.inference_bytes) <= memory_gb * GIB


@dataclass(frozen=True)
class Change:
    """Something to do about a lack of memory: ``what``, and the bytes that training or reconstruction then needs."""

    what: str
    nbytes: int


@dataclass(frozen=True)
class Recommendation:
    """
    A configuration that suits a request.

    Args:
        estimate: what it needs.
        initial_downsample_factor: one factor per axis.
        downsample_factors: one factor per axis for each step between levels.
        padded_size: the size to train at, which the total factor divides; the volume's own if that already does.
        latent_spacing: edges of a latent voxel, in mm where the spacing is known, otherwise in voxels.
        score: octaves by which it misses the request, less is better.
        reason: why it ranks where it does.
        overlay: the config keys that make it, an overlay of ``train.json``.
    """

    estimate: Estimate
    initial_downsample_factor: tuple[int, ...]
    downsample_factors: tuple[tuple[int, ...], ...]
    padded_size: tuple[int, ...]
    latent_spacing: tuple[float, ...]
    score: float
    reason: str
    overlay: dict[str, Any]


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
    What a configuration needs in memory and operations, for a training step and for reconstructing a volume. The real
    network runs on fake tensors: nothing is allocated, no GPU is needed, and it takes a second or two at any size.

    Args:
        spatial_size: of the training patch, voxels; one number for a cube. None takes the config's ``patch_size``.
        channels: feature channels of each level; None, as below, takes the config's.
        downsample_factors: the shrink between two levels, each an integer or one integer per axis.
        batch_size: patches per step.
        config_file: a config, or a list of a config and its overlays, as ``monai.bundle run`` takes them.
        volume_size: of the volume that is reconstructed, voxels; None is ``spatial_size``.
        device: ``"cuda"`` or ``"cpu"``: whose rules of mixed precision, optimizer and allocator apply.
        overrides: further config keys, such as ``initial_downsample_factor``, ``amp`` or ``gradient_accumulation_steps``.

    Raises:
        ValueError: for sizes that do not fit the network, unknown keys, and configs of another network.
        FileNotFoundError: for a config that does not exist.
    """
    given = {"channels": channels, "downsample_factors": downsample_factors, "batch_size": batch_size}
    overrides.update({key: value for key, value in given.items() if value is not None})
    return estimate_plan(read_plan(config_file, **overrides), spatial_size, volume_size, device)


def read_plan(config_file: str | Sequence[str] = TRAIN, **overrides: Any) -> Plan:
    """
    Read a config as ``monai.bundle run`` does, and build its network on the ``meta`` device.

    Raises:
        ValueError: for a config of another network, an unknown key, or a value that the network refuses.
        FileNotFoundError: for a config that does not exist.
    """
    parser = ConfigParser(_read_configs(config_file))
    parser.update(pairs=overrides)
    for key in ("network_def", "optimizer"):  # as callables: the one is made more than once, the other for fake parameters
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
        raise ValueError(f"{_names(config_file)} cannot be used: {_root_cause(error)}") from error


def _read_configs(config_file: str | Sequence[str]) -> dict[str, Any]:
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


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _training_settings(parser: ConfigParser, network: AutoencoderKL) -> dict[str, Any]:
    adversarial = float(parser.get_parsed_content("adv_weight")) > 0 if "adv_weight" in parser else False
    with torch.device("meta"):
        discriminator = parser.get_parsed_content("discriminator_def") if adversarial else None
    terms = parser.get_parsed_content("loss_terms") if "loss_terms" in parser else None
    steps = _whole("gradient_accumulation_steps", parser.get_parsed_content("gradient_accumulation_steps"))
    return {
        "patch_size": _size("patch_size", parser.get_parsed_content("patch_size"), network),
        "batch_size": _whole("batch_size", parser.get_parsed_content("batch_size")),
        "accumulates": steps > 1,
        "loss": total_loss(parser.get_parsed_content("loss"), terms),
        "optimizer": parser.get_parsed_content("optimizer"),
        "discriminator": discriminator,
        "averaged": "average" in parser,
    }


def total_loss(loss: Any, terms: dict[str, Any] | None) -> Any:
    """
    The loss that is trained on.

    Args:
        loss: of reconstruction and image.
        terms: what is added to it, by name: objects with a ``function`` of the same arguments and a ``weight``.
    """
    if not terms:
        return loss
    return lambda pred, target: sum(
        (term.weight * term.function(pred, target) for term in terms.values()), start=loss(pred, target)
    )


def estimate_plan(
    plan: Plan,
    spatial_size: int | Sequence[int] | None = None,
    volume_size: int | Sequence[int] | None = None,
    device: str = "cuda",
) -> Estimate:
    """:py:func:`estimate_memory` of a :py:class:`Plan`."""
    network = plan.network
    if spatial_size is None:
        spatial_size = plan.patch_size if plan.patch_size is not None else volume_size
    if spatial_size is None:
        raise ValueError("this config does not train, so it has no `patch_size`: set `spatial_size`.")
    size = _size("spatial_size", spatial_size, network)
    volume = size if volume_size is None else _size("volume_size", volume_size, network)
    latent = network.latent_shape(
        size if plan.patch_size is not None else padded_size(size, network.total_downsample_factor)
    )
    return Estimate(
        spatial_size=size,
        volume_size=volume,
        batch_size=plan.batch_size,
        downsample_factor=network.total_downsample_factor,
        latent_shape=latent,
        voxels_per_latent=math.prod(network.total_downsample_factor) * network.arguments["in_channels"] / latent[0],
        training=None if plan.patch_size is None else _training_cost(plan, size, device),
        inference=inference_cost(network, volume, amp_dtype=plan.amp_dtype, device=device),
        device=device,
    )


def _training_cost(plan: Plan, size: Sequence[int], device: str) -> TrainingCost:
    return training_cost(
        plan.network,
        size,
        batch_size=plan.batch_size,
        amp_dtype=plan.amp_dtype,
        device=device,
        loss=plan.loss,
        optimizer=plan.optimizer,
        accumulates=plan.accumulates,
        discriminator=plan.discriminator,
        averaged=plan.averaged,
    )


def _size(name: str, size: Any, network: AutoencoderKL) -> tuple[int, ...]:
    try:
        return per_axis(name, size, len(network.total_downsample_factor))
    except ValueError as error:
        dims = len(network.total_downsample_factor)
        raise ValueError(f"`{name}` is {size!r}; it needs {dims} whole numbers of voxels, each at least 1.") from error


def positive(name: str, value: Any) -> Any:
    """Return ``value`` if it is a number above 0, or raise a ``ValueError`` that names ``name``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` is {value!r}; it must be a number above 0.")
    return value


def _whole(name: str, value: Any) -> int:
    if positive(name, value) != int(value):
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number.")
    return int(value)


def _with_margin(cost: TrainingCost | InferenceCost, device: str) -> int:
    """
    Peak and margin. The margin is for what PyTorch does not allocate itself (``CONTEXT``), for what its allocator cannot use
    (``FRAGMENTATION``), and on CUDA for one convolution's workspace, which is not in the peak there.
    """
    workspace = cost.convolution if device == "cuda" else 0
    return int(cost.peak * (1 + FRAGMENTATION)) + workspace + int(CONTEXT[device] * GIB)


def what_would_fit(
    plan: Plan, spatial_size: Sequence[int], volume_size: Sequence[int], memory_gb: float, device: str = "cuda"
) -> list[Change]:
    """
    Changes of a plan that needs too much memory, each estimated.

    Args:
        plan: the plan.
        spatial_size: of the training patch, voxels.
        volume_size: of the volume that is reconstructed, voxels.
        memory_gb: the budget, GiB.
        device: ``"cuda"`` or ``"cpu"``.

    Returns:
        the changes that fit, or if none does, those that help, least memory first.
    """
    changes = []
    for what, changed, patch in _changes(plan, tuple(spatial_size)):
        estimate = estimate_plan(changed, patch, volume_size, device)
        changes.append(Change(what, max(estimate.training_bytes, estimate.inference_bytes)))
    fitting = [change for change in changes if change.nbytes <= memory_gb * GIB]
    return fitting or sorted(changes, key=lambda change: change.nbytes)


def _changes(plan: Plan, size: tuple[int, ...]) -> Iterator[tuple[str, Plan, tuple[int, ...]]]:
    if plan.patch_size is not None:
        if plan.batch_size > 1:
            yield (
                f"batch_size 1 with gradient_accumulation_steps {plan.batch_size}",
                replace(plan, batch_size=1, accumulates=True),
                size,
            )
        if not plan.network.use_checkpoint:
            yield "activation checkpointing (network_def#use_checkpoint true)", plan.with_network(use_checkpoint=True), size
        for divisor in (2, 4):
            factors = plan.network.total_downsample_factor
            patch = tuple(max(n // divisor // f, 1) * f for n, f in zip(size, factors))
            yield f"patch_size {list(patch)}", plan, patch
    initial = [min(2 * f, LAST_RESORT_INITIAL) for f in plan.network.initial_downsample_factor]
    if max(initial) > max(plan.network.initial_downsample_factor):
        larger = plan.with_network(initial_downsample_factor=initial)
        yield f"initial_downsample_factor {initial}", larger, padded_size(size, larger.network.total_downsample_factor)


def recommend_downsample_factors(
    spatial_size: int | Sequence[int],
    target_latent_size: int = 32,
    memory_gb: float | None = None,
    *,
    spacing: Sequence[float] | None = None,
    voxels_per_latent: float | None = None,
    count: int = 5,
    device: str = "cuda",
    **overrides: Any,
) -> list[Recommendation]:
    """
    The configurations that suit a volume best.

    Candidates have factors that are powers of two, an initial one of at most 4 (8 if nothing else fits), and along each axis
    the share of them that brings the latent nearest to isotropic in millimetres. They rank by how far they miss the
    request, in octaves: the longest axis of the latent against ``target_latent_size``, its anisotropy, the padding, and a
    little for an initial factor away from 2 and for steps of 4.

    Args:
        spatial_size: of the volumes, voxels; one number for a cube. Training on whole volumes is what is planned.
        target_latent_size: wanted size of the latent along its longest axis.
        memory_gb: GiB that training and reconstruction may need, the margin included; None for no limit.
        spacing: of the volumes, mm per voxel along each axis; None is isotropic.
        voxels_per_latent: wanted voxels for each number of the latent, which gives ``latent_channels``; None is as in the
            preset with the nearest factors.
        count: how many to return at most.
        device: ``"cuda"`` or ``"cpu"``.
        overrides: further config keys, such as ``channels`` or ``batch_size``, which the overlays repeat.

    Returns:
        the best first; empty when nothing fits.

    Raises:
        ValueError: as :py:func:`estimate_memory`.
    """
    plan = read_plan(**overrides)
    size = _size("spatial_size", spatial_size, plan.network)
    wanted = {"target_latent_size": target_latent_size, "memory_gb": memory_gb, "voxels_per_latent": voxels_per_latent}
    for name, value in wanted.items():
        if value is not None:
            positive(name, value)
    count = _whole("count", count)
    mm = _spacing(spacing, len(size))
    ranked = candidates(size, mm, len(plan.network.downsample_factors), target_latent_size)
    usual = [candidate for candidate in ranked if max(candidate.initial) <= MAX_INITIAL]
    last_resort = [candidate for candidate in ranked if max(candidate.initial) > MAX_INITIAL]
    found: list[Recommendation] = []
    for candidate in tqdm(usual + last_resort, desc="candidates", leave=False):
        if len(found) == count or (found and candidate in last_resort):
            break
        recommendation = _recommendation(candidate, plan, voxels_per_latent, device, overrides)
        if memory_gb is None or recommendation.estimate.fits(memory_gb):
            found.append(recommendation)
    return found


def leanest(
    spatial_size: int | Sequence[int], memory_gb: float, device: str = "cuda", **overrides: Any
) -> tuple[Recommendation, list[Change]]:
    """
    For a request that nothing fits: of the configurations with an initial factor of 4 or more the one that needs least, and
    :py:func:`what_would_fit` for it.

    The arguments are those of :py:func:`recommend_downsample_factors`.
    """
    plan = read_plan(**overrides)
    ranked = candidates(_size("spatial_size", spatial_size, plan.network), None, len(plan.network.downsample_factors), 1)
    ranked = [candidate for candidate in ranked if max(candidate.initial) >= MAX_INITIAL]
    bar = tqdm(ranked, desc="looking for the leanest", leave=False)
    lean = [_recommendation(candidate, plan, None, device, overrides) for candidate in bar]
    least = min(lean, key=lambda item: max(item.estimate.training_bytes, item.estimate.inference_bytes))
    factors = {key: least.overlay[key] for key in FACTOR_KEYS}
    size = least.padded_size
    return least, what_would_fit(plan.with_network(**factors), size, size, memory_gb, device)


def write_overlay(recommendation: Recommendation, path: str | Path) -> None:
    """Write a recommendation as an overlay of ``train.json``, and replace what is at ``path``."""
    content = {"_desc_": recommendation.reason, **recommendation.overlay}
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_atomically(f"{{\n{lines}\n}}\n".encode(), Path(path))


def _spacing(spacing: Any, dims: int) -> tuple[float, ...] | None:
    if spacing is None:
        return None
    values = list(spacing) if isinstance(spacing, (list, tuple)) else [spacing] * dims
    if len(values) != dims:
        raise ValueError(f"`spacing` is {spacing!r}; it needs one value in mm per axis of {dims}.")
    return tuple(float(positive("spacing", value)) for value in values)


def _latent_channels(totals: Sequence[int], image_channels: int, voxels_per_latent: float | None) -> int:
    block = math.prod(totals) * image_channels
    if voxels_per_latent is not None:
        return max(1, min(block, round(block / voxels_per_latent)))
    nearest = min(_known_latents(), key=lambda known: abs(math.log2(math.prod(totals) / known[0])))
    return max(1, min(MAX_LATENT_CHANNELS, round(math.prod(totals) * nearest[1] / nearest[0]) * image_channels))


def _known_latents() -> list[tuple[int, int]]:
    """Voxels and latent channels of one latent position, in the default config and in the presets."""
    default = json.loads(Path(TRAIN).read_text())
    overlays = [json.loads(path.read_text()) for path in sorted((ROOT / "configs" / "presets").glob("*.json"))]
    known = []
    for config in [default, *({**default, **overlay} for overlay in overlays)]:
        factors = [config["initial_downsample_factor"], *config["downsample_factors"]]
        voxels = math.prod(math.prod(per_axis("factor", factor, config["spatial_dims"])) for factor in factors)
        known.append((voxels, config["latent_channels"]))
    return known


def _short(factor: tuple[int, ...]) -> int | list[int]:
    return factor[0] if len(set(factor)) == 1 else list(factor)


def _recommendation(
    candidate: Candidate, plan: Plan, voxels_per_latent: float | None, device: str, overrides: dict[str, Any]
) -> Recommendation:
    latent_channels = _latent_channels(candidate.totals, plan.network.arguments["in_channels"], voxels_per_latent)
    factors: dict[str, Any] = {
        "initial_downsample_factor": _short(candidate.initial),
        "downsample_factors": [_short(level) for level in candidate.levels],
        "latent_channels": latent_channels,
    }
    estimate = estimate_plan(plan.with_network(**factors), candidate.padded, device=device)
    return Recommendation(
        estimate=estimate,
        initial_downsample_factor=candidate.initial,
        downsample_factors=candidate.levels,
        padded_size=candidate.padded,
        latent_spacing=candidate.latent_spacing,
        score=candidate.score,
        reason="; ".join(candidate.reasons),
        overlay={**overrides, "patch_size": list(candidate.padded), **factors},
    )


def log_estimate(
    network: AutoencoderKL,
    patch_size: Sequence[int],
    batch_size: int,
    amp_dtype: str | None,
    accumulation_steps: int,
    loss: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    loss_terms: dict[str, Any] | None = None,
    **further: Any,
) -> None:
    """
    Log in one line what a training step will need, and warn when the device has less.

    Args:
        network: the network.
        patch_size: spatial size of a training patch, voxels.
        batch_size: patches per step.
        amp_dtype: ``"bfloat16"`` or ``"float16"``, None without mixed precision.
        accumulation_steps: batches per optimizer step.
        loss: of reconstruction and image.
        optimizer: its kind and settings are used, not its state.
        device: where training will run.
        loss_terms: what is added to the loss, see :py:func:`total_loss`.
        further: arguments of :py:func:`scripts.memory.training_cost`, such as ``discriminator``.
    """
    device = torch.device(device)
    rules = "cpu" if device.type == "cpu" else "cuda"
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    try:
        cost = training_cost(
            network,
            patch_size,
            batch_size=batch_size,
            amp_dtype=None if amp_dtype is None else autocast_dtype(amp_dtype),
            device=rules,
            loss=total_loss(loss, loss_terms),
            optimizer=partial(type(optimizer), **settings),
            accumulates=accumulation_steps > 1,
            **further,
        )
    except Exception as error:  # whatever private parts of PyTorch raise: a week of training is worth more than its forecast
        logger.warning(f"no estimate of the memory: {type(error).__name__}: {error}")
        return
    needed = _with_margin(cost, rules)
    logger.info(
        f"estimate for one training step: {needed / GIB:.2f} GiB with margin, {cost.peak / GIB:.3g} GiB without, of which "
        f"saved activations {cost.saved_activations / GIB:.3g} GiB; {cost.flops / 1e12:.3g} TFLOP"
    )
    available = device_memory(device)
    if available is not None and needed > available:
        logger.warning(
            f"{device} has {available / GIB:.1f} GiB, and training is estimated to need {needed / GIB:.1f} GiB. Ask "
            f"`python -m scripts estimate --memory_gb {available / GIB:.0f}` with this configuration what would fit."
        )


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory that a device has; None if nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
