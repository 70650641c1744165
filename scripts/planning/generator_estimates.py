"""What a generator needs in memory and operations: for a training step, for sampling and for decoding, on fake tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
from monai.bundle import ConfigParser
from monai.inferers import SimpleInferer
from monai.utils import ensure_tuple
from monai.utils.enums import CommonKeys as Keys

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import check_parser
from scripts.bundle.errors import reason
from scripts.bundle.machine import GIB
from scripts.bundle.precision import autocast_dtype, dtype_name
from scripts.data.latents import read_description
from scripts.diffusion.conditions import Volume
from scripts.diffusion.flow import RectifiedFlow, draw_noise
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.prepare_batch import FlowPrepareBatch
from scripts.diffusion.sampler import integrate
from scripts.diffusion.statistics import LatentStatistics
from scripts.diffusion.training_data import LatentCollate, latent_lists
from scripts.layers.factors import padded_size
from scripts.planning.allocations import AllocationTracker, nbytes_of
from scripts.planning.config_keys import TRAIN, planned_precision, read_configs, read_plan
from scripts.planning.cuda_casting import autocast, casting_rules
from scripts.planning.estimates import with_margin
from scripts.planning.fake_tensors import fake_copy, fake_tensors
from scripts.planning.inference_costs import InferenceCost, inference_cost
from scripts.planning.request_checks import voxels, whole
from scripts.planning.training_costs import FakeStep, TrainingCost, step_cost
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["GeneratorEstimate", "GeneratorPlan", "estimate_generator", "is_generator", "plan_generator"]

NOTHING = {"intensity_low": [0.0], "intensity_high": [1.0], "data_type": "<f4", "scl_slope": 1.0, "scl_inter": 0.0}


@dataclass(frozen=True)
class GeneratorPlan:
    """
    What a config says of a generator and of the latents that it is trained on.

    Args:
        autoencoder: that makes the latents, on the ``meta`` device.
        spatial_size: of the volumes, voxels.
        network: of the generator, on the ``meta`` device.
        flow: that it learns.
        prepare_batch: makes of a batch what the network sees.
        collate: makes a batch.
        optimizer: makes the optimizer from parameters.
        batch_size: latents per step.
        accumulates: whether an optimizer step uses the gradients of several batches.
        amp_dtype: data type of mixed precision, None for none.
    """

    autoencoder: AutoencoderKL
    spatial_size: tuple[int, ...]
    network: Denoiser
    flow: RectifiedFlow
    prepare_batch: FlowPrepareBatch
    collate: LatentCollate
    optimizer: Any
    batch_size: int
    accumulates: bool
    amp_dtype: torch.dtype | None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one volume, channels first."""
        return self.autoencoder.latent_shape(padded_size(self.spatial_size, self.autoencoder.total_downsample_factor))


@dataclass(frozen=True)
class GeneratorEstimate:
    """
    What a generator needs.

    Args:
        spatial_size: of the volumes, voxels.
        latent_shape: of one volume, channels first.
        batch_size: latents per training step.
        parameters: of its network, as a number.
        training: cost of a step.
        sampling: cost of a step of the solver for one sample with guidance, beside the autoencoder.
        decoding: cost of decoding the sample in one pass, beside the generator's network.
        device: ``"cuda"`` or ``"cpu"``.
    """

    spatial_size: tuple[int, ...]
    latent_shape: tuple[int, ...]
    batch_size: int
    parameters: int
    training: TrainingCost
    sampling: InferenceCost
    decoding: InferenceCost
    device: str

    @property
    def training_bytes(self) -> int:
        """Memory that training needs, margin included."""
        return with_margin(self.training, self.device)

    @property
    def sampling_bytes(self) -> int:
        """Memory that sampling needs, margin included."""
        return with_margin(self.sampling, self.device)

    @property
    def decoding_bytes(self) -> int:
        """Memory that decoding in one pass needs, margin included. With less, decoding works in slabs."""
        return with_margin(self.decoding, self.device)

    def fits(self, memory_gb: float) -> bool:
        """Whether training and sampling fit into ``memory_gb`` GiB."""
        return max(self.training_bytes, self.sampling_bytes) <= memory_gb * GIB


def is_generator(config_file: str | Sequence[str]) -> bool:
    """Whether a config, or one of a list, trains a generator."""
    return "flow" in read_configs(config_file)


def plan_generator(
    config_file: str | Sequence[str],
    spatial_size: int | Sequence[int] | None = None,
    autoencoder: str | Sequence[str] | AutoencoderKL | None = None,
    *,
    device: str = "cuda",
    **overrides: Any,
) -> GeneratorPlan:
    """
    Read the config of a generator's training. Which autoencoder makes the latents, and of volumes of which size, is read
    from the latents in ``dataset_dir``, if there are any and nothing else is asked for.

    Args:
        config_file: a config, or a list of a config and its overlays.
        spatial_size: of the volumes, voxels; None for the largest of the latents'.
        autoencoder: its config, or a list of a config and its overlays, or the network; None for that of the latents, or for
            ``train.json`` if ``spatial_size`` is given.
        device: that is planned for, ``"cuda"`` or ``"cpu"``.
        overrides: further config keys.

    Raises:
        ValueError: for a value that the network refuses, or a size that is missing.
        FileNotFoundError: for a config that does not exist, or where there are no latents.
    """
    parser = ConfigParser(read_configs(config_file))
    parser.update(pairs=overrides)
    parser["precision"] = planned_precision(device)
    parser["optimizer"] = {**{k: v for k, v in parser["optimizer"].items() if k != "params"}, "_mode_": "callable"}
    try:
        _parse(parser)
        network, size = _volumes(parser, spatial_size, autoencoder, device)
        keys = ensure_tuple(parser.get_parsed_content("condition_keys"))
        description: Any = SimpleNamespace(**_description(network, size, keys))
        parser["statistics"] = LatentStatistics.learn([description], parser.get_parsed_content("latent_gamma"), keys)
        _parse(parser)
        with torch.device("meta"):
            unet = parser.get_parsed_content("network_def")
        amp = parser.get_parsed_content("amp")
        return GeneratorPlan(
            autoencoder=network,
            spatial_size=size,
            network=unet,
            flow=parser.get_parsed_content("flow"),
            prepare_batch=parser.get_parsed_content("prepare_batch"),
            collate=LatentCollate(unet.multiple),
            optimizer=parser.get_parsed_content("optimizer"),
            batch_size=whole("batch_size", parser.get_parsed_content("batch_size")),
            accumulates=whole("steps", parser.get_parsed_content("gradient_accumulation_steps")) > 1,
            amp_dtype=autocast_dtype(parser.get_parsed_content("amp_dtype")) if amp else None,
        )
    except (RuntimeError, TypeError) as error:  # MONAI wraps what a component raises
        raise ValueError(f"{config_file} cannot be used: {reason(error)}") from error


def estimate_generator(plan: GeneratorPlan, device: str = "cuda") -> GeneratorEstimate:
    """
    What a generator needs, found by running its network, its trainer's step and the autoencoder's decoder on fake tensors.

    Args:
        plan: see :py:func:`plan_generator`.
        device: ``"cuda"`` or ``"cpu"``: whose rules of mixed precision, optimizer and allocator apply.
    """
    return GeneratorEstimate(
        spatial_size=plan.spatial_size,
        latent_shape=plan.latent_shape,
        batch_size=plan.batch_size,
        parameters=sum(parameter.numel() for parameter in plan.network.parameters()),
        training=_training_cost(plan, device),
        sampling=_sampling_cost(plan, device),
        decoding=inference_cost(
            plan.autoencoder,
            padded_size(plan.spatial_size, plan.autoencoder.total_downsample_factor),
            amp_dtype=plan.amp_dtype,
            device=device,
            operation="decode",
            others=[plan.network],
        ),
        device=device,
    )


def step_trainer(
    kind: type[ResumableTrainer], plan: GeneratorPlan, network: nn.Module, batches: Sequence[Mapping[str, Any]]
) -> Any:
    """
    The trainer of ``train_diffusion.json`` for given batches, without the data and handlers of a run.

    Args:
        kind: of trainer.
        plan: see :py:func:`plan_generator`.
        network: of the generator, on the CPU.
        batches: of its only epoch, as ``plan.collate`` makes them.
    """

    def prepare(batchdata: Mapping[str, Any], device: torch.device, *_: Any, **__: Any) -> Any:
        return plan.prepare_batch.at_time(batchdata, 0.5, device)  # a drawn time would depend on values of the mask

    return kind(
        max_epochs=1,
        device=torch.device("cpu"),
        train_data_loader=batches,
        network=network,
        optimizer=plan.optimizer(network.parameters()),
        loss_function=plan.flow.loss,
        prepare_batch=prepare,
        inferer=SimpleInferer(),
        amp=plan.amp_dtype is not None,
        amp_dtype=dtype_name(plan.amp_dtype or torch.bfloat16),
        accumulation_steps=2 if plan.accumulates else 1,
    )


def latent_batch(plan: GeneratorPlan) -> dict[str, Any]:
    """A batch of latents of the planned size, whose values do not count."""
    volume = Volume(plan.spatial_size, [1.0] * len(plan.spatial_size))
    item = {Keys.IMAGE: torch.zeros(plan.latent_shape), "volume": volume, "seed": 0, "file": ""}
    return plan.collate([item] * plan.batch_size)


def _training_cost(plan: GeneratorPlan, device: str) -> TrainingCost:
    with fake_tensors():
        batch = latent_batch(plan)
        batches = [batch] * (2 if plan.accumulates else 1)
        return step_cost(step_trainer(FakeStep, plan, fake_copy(plan.network), batches), batch, device, averaged=True)


def _sampling_cost(plan: GeneratorPlan, device: str) -> InferenceCost:
    tracker = AllocationTracker(device)
    size = padded_size(plan.latent_shape[1:], [plan.network.multiple] * (len(plan.latent_shape) - 1))
    with fake_tensors(), torch.no_grad():
        network = fake_copy(plan.network).eval()
        weights = [network.state_dict(), fake_copy(plan.autoencoder).state_dict()]
        noise = draw_noise((1, plan.latent_shape[0], *size), 0)
        context = torch.stack([plan.prepare_batch.statistics.conditions.null_vector()] * 2)

        def velocity(state: torch.Tensor, time: float) -> torch.Tensor:
            with autocast(plan.amp_dtype):
                estimate = network(state.expand(2, *state.shape[1:]), torch.full((2,), time), context)
            cond, uncond = estimate.float().chunk(2)
            return (uncond.lerp(cond, 1.5) - state) / time

        with tracker, casting_rules(device):
            tracker.track(*weights, noise)
            integrate(velocity, noise, [1.0, 0.0])
    return InferenceCost(nbytes_of(weights), tracker.peak, tracker.convolution, tracker.flops)


def _volumes(
    parser: ConfigParser, spatial_size: Any, autoencoder: Any, device: str
) -> tuple[AutoencoderKL, tuple[int, ...]]:
    """The autoencoder and the size of the volumes."""
    if autoencoder is None and spatial_size is None:
        return _of_latents(parser)
    if spatial_size is None:
        raise ValueError("`autoencoder` is set: set `spatial_size` too, the size of the volumes in voxels.")
    if isinstance(autoencoder, AutoencoderKL):
        network = autoencoder
    else:
        network = read_plan(_configs(autoencoder), device=device).network
    return network, voxels("spatial_size", spatial_size, network.arguments["spatial_dims"])


def _configs(autoencoder: str | Sequence[str] | None) -> list[str]:
    """The autoencoder's config and overlays; ``train.json`` comes before overlays alone."""
    files = [TRAIN] if autoencoder is None else [autoencoder] if isinstance(autoencoder, str) else list(autoencoder)
    return files if any("network_def" in json.loads(Path(file).read_text()) for file in files) else [TRAIN, *files]


def _of_latents(parser: ConfigParser) -> tuple[AutoencoderKL, tuple[int, ...]]:
    folder = parser.get_parsed_content("dataset_dir")
    try:
        items = latent_lists(folder, 0.5, 0)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} An estimate before `encoding` needs `spatial_size`, the size of the volumes in voxels, and "
            "`autoencoder`, its config or preset, such as configs/presets/16x.json."
        ) from error
    descriptions = [vars(read_description(Path(item["image"]))) for part in items.values() for item in part]
    with torch.device("meta"):
        network = AutoencoderKL(**descriptions[0]["network"])
    largest = tuple(max(along) for along in zip(*(each["preprocessed_shape"] for each in descriptions)))
    return network, largest


def _parse(parser: ConfigParser) -> None:
    parser.parse(reset=True)
    check_parser(parser)


def _description(network: AutoencoderKL, size: Sequence[int], condition_keys: Sequence[str]) -> dict[str, Any]:
    """What would stand beside a latent, as far as it counts for memory."""
    channels = network.latent_shape(padded_size(size, network.total_downsample_factor))[0]
    axes = len(size)
    return {
        **NOTHING,
        "network": network.arguments,
        "weights_sha256": "",
        "preprocessed_shape": list(size),
        "preprocessed_affine": [[float(row == column) for column in range(axes + 1)] for row in range(axes + 1)],
        "conditions": dict.fromkeys(condition_keys, 0.0),
        "count": 1,
        "channel_mean": [0.0] * channels,
        "channel_mean_square": [1.0] * channels,
        "image_scale": [1.0] * channels,
    }
