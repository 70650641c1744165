"""What a generator's config needs in memory and operations: for a training step, for sampling and for decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from monai.inferers import SimpleInferer
from monai.utils import ensure_tuple
from monai.utils.enums import CommonKeys as Keys

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT
from scripts.bundle.json_files import PositiveInt, checked
from scripts.data.spatial_kinds import SpatialKind
from scripts.diffusion.conditions import Conditions, Volume
from scripts.diffusion.sampler import Generator, Sampler
from scripts.diffusion.statistics import Geometry, LatentAutoencoder, LatentStatistics
from scripts.layers.factors import padded_size, per_axis
from scripts.planning.autoencoder_estimates import TRAIN, Plan, read_config, read_plan
from scripts.planning.estimates import Cost, Estimate
from scripts.planning.fake_tensors import AllocationTracker, casting_rules, fake_copy, fake_tensors, nbytes_of
from scripts.planning.inference_costs import inference_cost
from scripts.planning.training_costs import step_cost
from scripts.training.trainer import ResumableTrainer

TRAIN_DIFFUSION = str(ROOT / "configs" / "train_diffusion.json")
LABEL = Keys.LABEL.value


@dataclass(frozen=True)
class GeneratorPlan(Plan):
    """
    The config of a generator that has been read, and the latents that it is trained on. The network is its denoiser.

    Args:
        statistics: statistics of the latents.
        autoencoder: network that makes the latents, on the ``meta`` device.
        volume: the largest volume along each axis.
    """

    statistics: LatentStatistics
    autoencoder: AutoencoderKL
    volume: Volume

    @property
    def padded_size(self) -> tuple[int, ...]:
        """Size of the volume, padded to what the autoencoder divides, voxels."""
        return padded_size(self.volume.size, self.autoencoder.total_downsample_factor)

    @property
    def precision(self) -> dict[str, Any]:
        """``amp`` and ``amp_dtype``."""
        return {"amp": self.get("amp"), "amp_dtype": self.get("amp_dtype")}


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
    spatial conditions, is read from the training latents in ``dataset_dir``, unless ``spatial_size`` is given.

    Args:
        config_file: a config, or a list of a config and its overlays.
        spatial_size: size of the volumes, voxels; None for the largest of the latents'.
        autoencoder: its config or preset, or a list of them, or the network; None for ``train.json``.
        num_classes: classes, without the background, of the label map ``label``; other spatial keys are images.
        device: device that is planned for, ``"cuda"`` or ``"cpu"``.
        overrides: further config keys.

    Raises:
        OSError: where there are no latents.
        ValueError: for a size that is missing, or a label map whose number of classes is.
    """
    parser = read_config(config_file, device, ("optimizer",), **overrides)
    get = parser.get_parsed_content
    if spatial_size is not None:
        files = [TRAIN, *ensure_tuple(autoencoder or ())]
        network = autoencoder if isinstance(autoencoder, AutoencoderKL) else read_plan(files, device=device).network
        conditions, spatial = ensure_tuple(get("condition_keys")), ensure_tuple(get("spatial_keys"))
        parser["statistics"] = _statistics(spatial_size, network, conditions, spatial, num_classes)
    elif autoencoder is not None or num_classes is not None:
        raise ValueError("`autoencoder` and `num_classes` need `spatial_size`, the size of the volumes in voxels.")
    with torch.device("meta"):
        statistics, network = get("statistics"), get("network_def")
        autoencoder = AutoencoderKL(**statistics.autoencoder.network)
    size = tuple(map(max, zip(*(each.size for each in statistics.geometries))))
    return GeneratorPlan(parser, device, network, statistics, autoencoder, Volume(size, [1.0] * len(size)))


def estimate_generator(plan: GeneratorPlan) -> Estimate:
    """What a generator needs, found by running its trainer's step, its sampler and the autoencoder on fake tensors."""
    precision: Any = {"amp_dtype": plan.amp_dtype, "device": plan.device}
    once = partial(inference_cost, plan.autoencoder, plan.padded_size, others=[plan.network], in_slabs=True, **precision)
    with fake_tensors():
        batch, batches = latent_batch(plan), min(2, plan.get("gradient_accumulation_steps"))
        trainer = step_trainer(plan, fake_copy(plan.network), [batch] * batches, accumulation_steps=batches)
        costs = {"training": step_cost(trainer, batch, plan.device, averaged=True)}
    costs["sampling"] = _sampling_cost(plan)
    if plan.statistics.spatial:
        costs["encoding"] = once(operation="encode")  # a plane at a time
    costs["decoding"] = once(operation="decode")
    size, batch_size = plan.volume.size, plan.get("batch_size")
    return Estimate.of(plan.network, plan.autoencoder, size, volume_size=size, batch_size=batch_size, costs=costs)


def step_trainer(
    plan: GeneratorPlan, network: nn.Module, batches: Sequence[Mapping[str, Any]], **kwargs: Any
) -> ResumableTrainer:
    """The trainer of ``train_diffusion.json`` for one epoch of given batches, see :py:func:`latent_batch`, without the data
    and handlers of a run. The network is on the CPU; ``kwargs`` are further arguments of the trainer."""

    def prepare(batchdata: Mapping[str, Any], device: torch.device, *_: Any, **__: Any) -> Any:
        return plan.get("prepare_batch").at_time(batchdata, 0.5, device)  # a drawn time would depend on the mask's values

    return ResumableTrainer(
        max_epochs=1,
        device=torch.device("cpu"),
        train_data_loader=batches,
        network=network,
        optimizer=plan.get("optimizer")(network.parameters()),
        loss_function=plan.get("flow").loss,
        prepare_batch=prepare,
        inferer=SimpleInferer(),
        **plan.precision,
        **kwargs,
    )


def latent_batch(plan: GeneratorPlan) -> dict[str, Any]:
    """A batch of latents of the planned size, whose values do not count."""
    shape = plan.autoencoder.latent_shape(plan.padded_size)
    spatial, given = plan.statistics.stacked({}, shape[1:])
    item = {Keys.IMAGE: torch.zeros(shape), "volume": plan.volume, "seed": 0, "file": ""}
    return plan.get("collate")([{**item, "spatial": spatial, "given": given}] * plan.get("batch_size"))


def _sampling_cost(plan: GeneratorPlan) -> Cost:
    """A step of the solver with classifier-free guidance, beside the autoencoder."""
    tracker = AllocationTracker(plan.device)
    with fake_tensors(), torch.no_grad():
        network: Any = fake_copy(plan.network).eval()
        weights = [network.state_dict(), fake_copy(plan.autoencoder).state_dict()]
        generator = Generator(network, plan.statistics, plan.get("flow"), condition_dropout=0.1, sha256="")
        sampler = Sampler(generator, num_inference_steps=1, guidance_scale=1.5, **plan.precision)
        start = sampler.start(plan.volume, 0)
        with tracker, casting_rules(plan.device):
            tracker.track(weights, start["noise"], start["context"])
            sampler(**start)
    return Cost.counted(tracker, nbytes_of(weights))


def _statistics(
    spatial_size: Any,
    network: AutoencoderKL,
    condition_keys: Sequence[str],
    spatial_keys: Sequence[str],
    num_classes: int | None,
) -> LatentStatistics:
    """Statistics of the latent of a volume, as far as they count for memory."""
    if (LABEL in spatial_keys) != (num_classes is not None):
        raise ValueError(
            f"`spatial_keys` is {list(spatial_keys)} and `num_classes` is {num_classes}: the label map {LABEL!r} needs a "
            "number of classes, and no other key has one."
        )
    size = per_axis("spatial_size", spatial_size, network.arguments["spatial_dims"])
    spacing, channels = [1.0] * len(size), network.arguments["latent_channels"]
    spatial = dict.fromkeys(spatial_keys, SpatialKind())
    if num_classes is not None:
        spatial[LABEL] = SpatialKind(tuple(range(1, 1 + checked(num_classes, PositiveInt, "num_classes"))))
    ones = [1.0] * channels
    return LatentStatistics(
        autoencoder=LatentAutoencoder(network.arguments, ""),
        volumes=1,
        latent_gamma=0.0,
        channel_mean=ones,
        channel_deviation=ones,
        channel_amplitude=ones,
        conditions=Conditions.learn(condition_keys, [Volume(size, spacing, dict.fromkeys(condition_keys, 0.0))]),
        geometries=[Geometry(list(size), spacing, 1)],
        spatial=spatial,
        intensity_low=[0.0],
        intensity_high=[1.0],
    )
