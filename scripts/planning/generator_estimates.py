"""What a generator needs in memory and operations: for a training step, for sampling and for decoding."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from monai.bundle import ConfigParser
from monai.inferers import SimpleInferer
from monai.utils import ensure_tuple
from monai.utils.enums import CommonKeys as Keys

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT
from scripts.bundle.errors import reason
from scripts.bundle.precision import dtype_name
from scripts.data.latents import all_latents
from scripts.data.spatial_kinds import SpatialKind
from scripts.diffusion.conditions import Conditions, Volume
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.sampler import Generator, Sampler
from scripts.diffusion.statistics import Geometry, LatentAutoencoder, LatentStatistics
from scripts.layers.factors import padded_size
from scripts.planning.allocations import AllocationTracker, nbytes_of
from scripts.planning.costs import Cost, Estimate
from scripts.planning.fake_tensors import casting_rules, fake_copy, fake_tensors
from scripts.planning.inference_costs import inference_cost
from scripts.planning.plans import TRAIN, amp_dtype_of, parse, read_config, read_plan, voxels, whole
from scripts.planning.training_costs import FakeStep, step_cost
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["TRAIN_DIFFUSION", "GeneratorPlan", "estimate_generator", "plan_generator", "step_trainer"]

TRAIN_DIFFUSION = str(ROOT / "configs" / "train_diffusion.json")
LABEL = Keys.LABEL.value


@dataclass(frozen=True)
class GeneratorPlan:
    """
    What a config says of a generator and of the latents that it is trained on.

    Args:
        config: parsed config, with statistics of latents of the right shape.
        network: denoiser, on the ``meta`` device.
        autoencoder: network that makes the latents, on the ``meta`` device.
    """

    config: ConfigParser
    network: Denoiser
    autoencoder: AutoencoderKL

    @property
    def statistics(self) -> LatentStatistics:
        """Statistics of the latents."""
        return self.get("statistics")

    @property
    def spatial_size(self) -> tuple[int, ...]:
        """Size of the largest volume along each axis, voxels."""
        return tuple(map(max, zip(*(each.size for each in self.statistics.geometries))))

    @property
    def padded_size(self) -> tuple[int, ...]:
        """Size of the volumes, padded to what the autoencoder divides."""
        return padded_size(self.spatial_size, self.autoencoder.total_downsample_factor)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latent of one volume, channels first."""
        return self.autoencoder.latent_shape(self.padded_size)

    def get(self, key: str) -> Any:
        """A component or value of the config."""
        return self.config.get_parsed_content(key)

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Data type of mixed precision, None for none."""
        return amp_dtype_of(self.config)

    @property
    def accumulation_steps(self) -> int:
        """2 where an optimizer step uses the gradients of several batches, 1 otherwise."""
        return min(2, whole("gradient_accumulation_steps", self.get("gradient_accumulation_steps")))


def plan_generator(
    config_file: str | Sequence[str] = TRAIN_DIFFUSION,
    spatial_size: int | Sequence[int] | None = None,
    autoencoder: str | Sequence[str] | AutoencoderKL | None = None,
    num_classes: int | None = None,
    *,
    device: str = "cuda",
    **overrides: Any,
) -> GeneratorPlan:
    """
    Read the config of a generator's training. Which autoencoder makes the latents, of volumes of which size and with which
    spatial conditions, is read from the training latents in ``dataset_dir``, if nothing of it is asked for.

    Args:
        config_file: a config, or a list of a config and its overlays.
        spatial_size: size of the volumes, voxels; None for the largest of the latents'.
        autoencoder: its config, or a list of a config and its overlays, or the network; None for that of the latents, or for
            ``train.json`` if ``spatial_size`` is given.
        num_classes: number of classes, without the background, of the label map ``label``, where ``spatial_keys`` names it
            and ``spatial_size`` is given. Other spatial keys then are images.
        device: device that is planned for, ``"cuda"`` or ``"cpu"``.
        overrides: further config keys.

    Raises:
        ValueError: for a value that the network refuses, a size that is missing, or a label map whose number of classes is.
        FileNotFoundError: for a config that does not exist, or where there are no latents.
    """
    parser = read_config(config_file, device, overrides, callables=("optimizer",))
    get = parser.get_parsed_content
    try:
        parse(parser)
        if spatial_size is None:
            _refuse_without_size(get("dataset_dir"), autoencoder=autoencoder, num_classes=num_classes)
        else:
            conditions, spatial = (ensure_tuple(get(name)) for name in ("condition_keys", "spatial_keys"))
            network = _network(autoencoder, device)
            parser["statistics"] = _statistics(spatial_size, network, conditions, spatial, num_classes)
            parse(parser)
        with torch.device("meta"):
            network = AutoencoderKL(**get("statistics").autoencoder.network)
            denoiser = get("network_def")
        whole("batch_size", get("batch_size"))
        return GeneratorPlan(parser, denoiser, network)
    except (RuntimeError, TypeError) as error:  # MONAI wraps what a component raises
        raise ValueError(f"{config_file} cannot be used: {reason(error)}") from error


def estimate_generator(plan: GeneratorPlan, device: str = "cuda") -> Estimate:
    """
    What a generator needs, found by running its trainer's step, its sampler and the autoencoder on fake tensors.

    Args:
        plan: see :py:func:`plan_generator`.
        device: ``"cuda"`` or ``"cpu"``: whose rules of mixed precision, optimizer and allocator apply.
    """
    autoencoder = plan.autoencoder
    voxels_of_latent = math.prod(autoencoder.total_downsample_factor) * autoencoder.arguments["in_channels"]
    once = partial(
        inference_cost,
        autoencoder,
        plan.padded_size,
        amp_dtype=plan.amp_dtype,
        device=device,
        others=[plan.network],
        in_slabs=True,
    )
    return Estimate(
        spatial_size=plan.spatial_size,
        volume_size=plan.spatial_size,
        batch_size=plan.get("batch_size"),
        downsample_factor=autoencoder.total_downsample_factor,
        latent_shape=plan.latent_shape,
        voxels_per_latent=voxels_of_latent / plan.latent_shape[0],
        parameters=sum(parameter.numel() for parameter in plan.network.parameters()),
        costs={
            "training": _training_cost(plan, device),
            "sampling": _sampling_cost(plan, device),
            **({"encoding": once(operation="encode")} if plan.statistics.spatial else {}),  # a plane at a time
            "decoding": once(operation="decode"),
        },
    )


def step_trainer(
    kind: type[ResumableTrainer], plan: GeneratorPlan, network: nn.Module, batches: Sequence[Mapping[str, Any]]
) -> Any:
    """
    The trainer of ``train_diffusion.json`` for given batches, without the data and handlers of a run.

    Args:
        kind: class of the trainer.
        plan: see :py:func:`plan_generator`.
        network: denoiser, on the CPU.
        batches: batches of its only epoch, as :py:func:`latent_batch` makes them.
    """

    def prepare(batchdata: Mapping[str, Any], device: torch.device, *_: Any, **__: Any) -> Any:
        return plan.get("prepare_batch").at_time(batchdata, 0.5, device)  # a drawn time would depend on the mask's values

    return kind(
        max_epochs=1,
        device=torch.device("cpu"),
        train_data_loader=batches,
        network=network,
        optimizer=plan.get("optimizer")(network.parameters()),
        loss_function=plan.get("flow").loss,
        prepare_batch=prepare,
        inferer=SimpleInferer(),
        amp=plan.amp_dtype is not None,
        amp_dtype=dtype_name(plan.amp_dtype or torch.bfloat16),
        accumulation_steps=plan.accumulation_steps,
    )


def latent_batch(plan: GeneratorPlan) -> dict[str, Any]:
    """A batch of latents of the planned size, whose values do not count."""
    spatial, given = plan.statistics.stacked({}, plan.latent_shape[1:])
    item = {Keys.IMAGE: torch.zeros(plan.latent_shape), "volume": _volume(plan), "seed": 0, "file": ""}
    return plan.get("collate")([{**item, "spatial": spatial, "given": given}] * plan.get("batch_size"))


def _volume(plan: GeneratorPlan) -> Volume:
    return Volume(plan.spatial_size, [1.0] * len(plan.spatial_size))


def _training_cost(plan: GeneratorPlan, device: str) -> Cost:
    with fake_tensors():
        batch = latent_batch(plan)
        trainer = step_trainer(FakeStep, plan, fake_copy(plan.network), [batch] * plan.accumulation_steps)
        return step_cost(trainer, batch, device, averaged=True)


def _sampling_cost(plan: GeneratorPlan, device: str) -> Cost:
    """A step of the solver with classifier-free guidance, beside the autoencoder."""
    tracker, dtype = AllocationTracker(device), plan.amp_dtype
    with fake_tensors(), torch.no_grad():
        network: Any = fake_copy(plan.network).eval()
        weights = [network.state_dict(), fake_copy(plan.autoencoder).state_dict()]
        generator = Generator(network, plan.statistics, plan.get("flow"), condition_dropout=0.1, sha256="")
        precision: dict[str, Any] = {"amp": dtype is not None, "amp_dtype": dtype_name(dtype or torch.bfloat16)}
        sampler = Sampler(generator, num_inference_steps=1, guidance_scale=1.5, **precision)
        start = sampler.start(_volume(plan), 0)
        with tracker, casting_rules(device):
            tracker.track(*weights, start["noise"], start["context"])
            sampler(**start)
    return tracker.cost(nbytes_of(weights))


def _refuse_without_size(dataset_dir: str, **given: Any) -> None:
    """Without a size there must be latents, which say all else."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"`{name}` is set: set `spatial_size` too, the size of the volumes in voxels.")
    try:
        all_latents(dataset_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} An estimate before `encoding` needs `spatial_size`, the size of the volumes in voxels, and "
            "`autoencoder`, its config or preset, such as configs/presets/16x.json."
        ) from error


def _network(autoencoder: str | Sequence[str] | AutoencoderKL | None, device: str) -> AutoencoderKL:
    if isinstance(autoencoder, AutoencoderKL):
        return autoencoder
    files = [TRAIN] if autoencoder is None else [autoencoder] if isinstance(autoencoder, str) else list(autoencoder)
    overlays_alone = not any("network_def" in json.loads(Path(file).read_text()) for file in files)
    return read_plan([TRAIN, *files] if overlays_alone else files, device=device).network


def _statistics(
    spatial_size: Any,
    network: AutoencoderKL,
    condition_keys: Sequence[str],
    spatial_keys: Sequence[str],
    num_classes: int | None,
) -> LatentStatistics:
    """Statistics of the latent of a volume, as far as they count for memory."""
    size = voxels("spatial_size", spatial_size, network.arguments["spatial_dims"])
    channels = network.arguments["latent_channels"]
    volume = Volume(size, [1.0] * len(size), dict.fromkeys(condition_keys, 0.0))
    return LatentStatistics(
        autoencoder=LatentAutoencoder(network.arguments, ""),
        volumes=1,
        latent_gamma=0.0,
        channel_mean=[0.0] * channels,
        channel_deviation=[1.0] * channels,
        channel_amplitude=[1.0] * channels,
        conditions=Conditions.learn(condition_keys, [volume]),
        geometries=[Geometry(list(volume.size), list(volume.spacing), 1)],
        intensity_low=[0.0],
        intensity_high=[1.0],
        data_type="<f4",
        scl_slope=1.0,
        scl_inter=0.0,
        spatial=_kinds(spatial_keys, num_classes),
    )


def _kinds(spatial_keys: Sequence[str], num_classes: int | None) -> dict[str, SpatialKind]:
    """Of the spatial conditions, before there are latents of them."""
    if (LABEL in spatial_keys) != (num_classes is not None):
        raise ValueError(
            f"`spatial_keys` is {list(spatial_keys)} and `num_classes` is {num_classes}: before `encoding`, the label map "
            f"{LABEL!r} needs a number of classes, and no other key has one."
        )
    kinds = dict.fromkeys(spatial_keys, SpatialKind())
    if num_classes is not None:
        kinds[LABEL] = SpatialKind(tuple(range(1, 1 + whole("num_classes", num_classes))))
    return kinds
