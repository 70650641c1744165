"""Trained generators and the JSON file beside their weights: read to sample from, to guide, and to train further."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.autoencoderkl import Reconstructor
from scripts.bundle.files import file_hash
from scripts.bundle.json_files import PositiveFloat, Sha256, Share, read_dataclass
from scripts.bundle.weights import check_arguments, load_weights, read_weights
from scripts.diffusion.conditions import LEAST_DEVIATION
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.sampler import Generator
from scripts.diffusion.statistics import LatentStatistics

FOLDER = "models/generator"  # of the generator that the bundle carries
READS_CONDITIONS = "unet.class_embedding.0.weight"  # of the layer that sees the vector of conditions
READS_LATENTS = "unet.conv_in.conv.weight"  # of the layer that sees the noisy latent, and then the spatial conditions
READS_SPATIAL = "from_spatial.conv.weight"
SAME = 0.05  # of a deviation: difference of the statistics of latents that a guide may have
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratorDescription:
    """The JSON file beside a generator's weights, as far as loading needs it."""

    network: dict[str, Any]
    latents: LatentStatistics
    timestep_shift: PositiveFloat | None
    condition_dropout: Share
    sha256: Sha256


def describe(statistics: LatentStatistics, flow: RectifiedFlow, condition_dropout: float) -> dict[str, Any]:
    """The JSON file beside a generator's weights, without the arguments of its network."""
    return {"latents": asdict(statistics), **flow.state_dict(), "condition_dropout": condition_dropout}


def load_generator(path: str) -> Generator:
    """
    Read a generator.

    Args:
        path: path of its weights, with the JSON file beside them.

    Raises:
        FileNotFoundError: when there are no weights, or nothing beside them.
        ValueError: when a file is damaged, or the two do not belong together.
    """
    content, _ = read_weights(path)
    description = read_dataclass(Path(path).with_suffix(".json"), GeneratorDescription)
    statistics, flow = description.latents, RectifiedFlow(description.timestep_shift)
    try:
        with torch.device("meta"):  # sizes in an untrusted file take no memory
            network = Denoiser(**description.network)
        network.load_state_dict({name: value.float() for name, value in content.items()}, assign=True)
    except Exception as error:  # whatever is in the files
        raise ValueError(f"{path} cannot be loaded into the network that its JSON file describes: {error}") from error
    logger.info(f"loaded the generator {path}: {statistics.summary()}")
    return Generator(network.eval(), statistics, flow, description.condition_dropout, file_hash(path))


def load_autoencoder(path: str, statistics: LatentStatistics) -> Reconstructor:
    """Load the autoencoder that made a generator's training latents; a ValueError for the weights of another one."""
    expected = statistics.autoencoder
    if Path(path).is_file():
        _refuse_another(f"`autoencoder` {path}", file_hash(path), expected.sha256)
    autoencoder = Reconstructor(**expected.network)
    load_weights(autoencoder, path)
    return autoencoder.eval()


def load_guide(path: str | None, generator: Generator, device: Any, memory_format: torch.memory_format) -> Generator | None:
    """
    Read a generator of the same latents for autoguidance.

    Args:
        path: path of its weights, with the JSON file beside them; None for no guide.
        generator: generator that it is to guide.
        device: device of its network.
        memory_format: memory format of its network's weights.

    Raises:
        FileNotFoundError: as :py:func:`load_generator`.
        ValueError: too, and for the generator itself and one that sees latents or conditions in another way.
    """
    if path is None:
        return None
    guide = load_generator(path)
    if guide.sha256 == generator.sha256:
        raise ValueError(f"`guide` is {path}, which has the weights that it is to guide. It must be a lesser generator.")
    if differing := _differing(guide.statistics, generator.statistics):
        raise ValueError(f"{path} cannot guide this generator; others are {', '.join(differing)}.")
    guide.network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    return guide


def load_pretrained_generator(network: Denoiser, path: str, statistics: LatentStatistics) -> None:
    """
    Take over the weights of a generator and what they were trained with: how latents are normalised, and how numbers among
    the conditions are standardised. Conditions, spatial ones too, may differ: the weights of those that both have are taken
    over, and a condition that is new has no influence before the first step.

    Args:
        network: network, changed in place.
        path: path of the weights, with the JSON file beside them.
        statistics: statistics of the training latents, changed in place.

    Raises:
        FileNotFoundError: as :py:func:`load_generator`.
        ValueError: too, and for another network or prediction and the latents of another autoencoder.
    """
    generator = load_generator(path)
    before = generator.statistics
    may_differ = {name: network.arguments[name] for name in ("condition_size", "spatial_channels")}
    check_arguments({**generator.network.arguments, **may_differ}, network.arguments, path)
    _refuse_another(f"the autoencoder of {path}", before.autoencoder.sha256, statistics.autoencoder.sha256)
    if statistics.latent_gamma != before.latent_gamma:
        logger.warning(f"`latent_gamma` is {statistics.latent_gamma:g}; {path} keeps its {before.latent_gamma:g}")
    statistics.inherit_normalisation(before)
    state, spatial = generator.network.state_dict(), (before.spatial_entries, statistics.spatial_entries)
    latents = list(range(state[READS_LATENTS].shape[1] - before.spatial_channels))
    inputs: dict[str, Any] = {
        READS_CONDITIONS: (before.conditions.entries.items(), statistics.conditions.entries.items()),
        READS_LATENTS: ([*latents, *spatial[0]], [*latents, *spatial[1]]),
        READS_SPATIAL: spatial,
    }
    for name in inputs.keys() & state.keys() & network.state_dict().keys():
        state[name] = _for_inputs(state[name], *inputs[name])
    network.load_state_dict(state, strict=False)  # one of the two may have no layer for spatial conditions
    logger.info(f"training starts from {path}: {before.summary()}; here: {statistics.summary()}")
    lost = {*before.conditions.keys, *before.spatial} - {*statistics.conditions.keys, *statistics.spatial}
    if lost:
        logger.warning(f"conditions of {path} that are lost: {', '.join(sorted(lost))}")


def _refuse_another(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{what} is not that of the latents: its SHA-256 begins with {found[:12]} instead of {expected[:12]}."
        )


def _differing(there: LatentStatistics, here: LatentStatistics) -> list[str]:
    """What must agree, for one noisy latent and its conditions to say the same to both; one may lack spatial conditions."""
    if there.autoencoder.sha256 != here.autoencoder.sha256:
        return ["the autoencoder's weights"]
    (names_there, scales_there), (names, scales) = (zip(*each.conditions.entries.items()) for each in (there, here))
    agree = {
        "`latent_gamma`": there.latent_gamma == here.latent_gamma,
        "`channel_mean`": _close(there.channel_mean, here.channel_mean, here.channel_deviation),
        "`channel_deviation`": _close(there.channel_deviation, here.channel_deviation, here.channel_deviation),
        "`channel_amplitude`": _close(there.channel_amplitude, here.channel_amplitude, here.channel_amplitude),
        "the conditions": names_there == names and _close(scales_there, scales, np.maximum(scales, LEAST_DEVIATION)[:, 1:]),
        "the spatial conditions": not there.spatial or not here.spatial or there.spatial == here.spatial,
    }
    return [name for name, same in agree.items() if not same]


def _close(values: Any, others: Any, units: Any) -> bool:
    return bool((np.abs(np.subtract(values, others)) <= np.multiply(SAME, units)).all())


def _for_inputs(weight: Tensor, before: Iterable[Any], now: Iterable[Any]) -> Tensor:
    """The weight of a layer that had other inputs before, for those that it has now: zeros for the new ones."""
    columns, new = dict(zip(before, weight.unbind(1))), torch.zeros_like(weight[:, 0])
    return torch.stack([columns.get(each, new) for each in now], 1)
