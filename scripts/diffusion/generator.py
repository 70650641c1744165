"""Trained generators and the JSON file beside their weights: read to sample from, to guide, and to train further."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.autoencoderkl import Reconstructor
from scripts.bundle.files import file_hash
from scripts.bundle.json_files import PositiveFloat, PositiveInt, Sha256, Share, read_dataclass
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
class Trained:
    """How long weights were trained, and their validation loss."""

    iteration: PositiveInt
    epoch: PositiveInt
    best_metric: float


@dataclass(frozen=True)
class GeneratorDescription:
    """The JSON file beside a generator's weights."""

    network: dict[str, Any]
    latents: LatentStatistics
    timestep_shift: PositiveFloat | None
    condition_dropout: Share
    sha256: Sha256
    sha256_before: Sha256 | None = None
    trained: Trained | None = None


def describe(statistics: LatentStatistics, flow: RectifiedFlow, condition_dropout: float) -> dict[str, Any]:
    """What the JSON file beside a generator's weights says besides the arguments of its network."""
    return {"latents": asdict(statistics), **flow.state_dict(), "condition_dropout": condition_dropout}


def load_generator(path: str) -> Generator:
    """
    Read a generator.

    Args:
        path: path of its weights; the rest is in the JSON file beside them.

    Raises:
        FileNotFoundError: when there are no weights, or nothing beside them.
        ValueError: when a file is damaged, or the two do not belong together.
    """
    content, _ = read_weights(path)
    description = read_dataclass(Path(path).with_suffix(".json"), GeneratorDescription)
    arguments, statistics = description.network, description.latents
    check_arguments(arguments, {**arguments, **statistics.network_arguments}, path)
    try:
        with torch.device("meta"):  # sizes in an untrusted file take no memory
            network = Denoiser(**arguments)
        network.load_state_dict({name: value.float() for name, value in content.items()}, assign=True)
    except Exception as error:  # whatever is in the files
        raise ValueError(f"{path} cannot be loaded into the network that its JSON file describes: {error}") from error
    logger.info(f"loaded the generator {path}: {statistics.summary()}")
    flow, dropout = RectifiedFlow(description.timestep_shift), description.condition_dropout
    return Generator(network.eval(), statistics, flow, dropout, file_hash(path))


def load_autoencoder(path: str, statistics: LatentStatistics) -> Reconstructor:
    """
    Load the autoencoder that made a generator's training latents.

    Args:
        path: path of its weights.
        statistics: statistics of the latents.

    Raises:
        ValueError: for other weights.
    """
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
        FileNotFoundError: when there are no weights, or nothing beside them.
        ValueError: when a file is damaged, the guide is the generator itself, or it sees latents or conditions in another
            way.
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
        path: path of the weights of a run, with the JSON file beside them.
        statistics: statistics of the training latents, changed in place.

    Raises:
        FileNotFoundError: when there is no such file, or no JSON file beside it.
        ValueError: when it is damaged, of another network or prediction, or of the latents of another autoencoder.
    """
    generator = load_generator(path)
    before = generator.statistics
    check_arguments({**generator.network.arguments, **statistics.network_arguments}, network.arguments, path)
    _refuse_another(f"the autoencoder of {path}", before.autoencoder.sha256, statistics.autoencoder.sha256)
    if statistics.latent_gamma != before.latent_gamma:
        logger.warning(f"`latent_gamma` is {statistics.latent_gamma:g}; {path} keeps its {before.latent_gamma:g}")
    statistics.inherit_normalisation(before)
    state = generator.network.state_dict()
    vectors = before.conditions.entries, statistics.conditions.entries
    spatial = before.spatial_entries, statistics.spatial_entries
    state[READS_CONDITIONS] = _for_entries(state[READS_CONDITIONS], *vectors)
    others, reads = state[READS_LATENTS].tensor_split([state[READS_LATENTS].shape[1] - len(spatial[0])], 1)
    state[READS_LATENTS] = torch.cat([others, _for_entries(reads, *spatial)], 1)
    if READS_SPATIAL in state:
        state[READS_SPATIAL] = _for_entries(state[READS_SPATIAL], *spatial)
    expected = network.state_dict()  # with layers that only one of the two has
    network.load_state_dict({**expected, **{name: state[name] for name in expected if name in state}})
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
    entries = there.conditions.entries, here.conditions.entries
    agree = {
        "`latent_gamma`": there.latent_gamma == here.latent_gamma,
        "`channel_mean`": _close(there.channel_mean, here.channel_mean, here.channel_deviation),
        "`channel_deviation`": _close(there.channel_deviation, here.channel_deviation, here.channel_deviation),
        "`channel_amplitude`": _close(there.channel_amplitude, here.channel_amplitude, here.channel_amplitude),
        "the conditions": len(entries[0]) == len(entries[1]) and all(map(_entries_agree, *entries)),
        "the spatial conditions": not there.spatial or not here.spatial or there.spatial == here.spatial,
    }
    return [name for name, same in agree.items() if not same]


def _entries_agree(there: tuple[Any, ...], here: tuple[Any, ...]) -> bool:
    """Whether an entry is of the same name, and a number standardised alike."""
    if len(here) != 3 or len(there) != 3 or there[0] != here[0]:  # no number with mean and deviation
        return there == here
    return _close(there[1:], here[1:], [max(here[2], LEAST_DEVIATION)] * 2)


def _close(values: Sequence[float], others: Sequence[float], units: Sequence[float]) -> bool:
    return all(abs(value - other) <= SAME * unit for value, other, unit in zip(values, others, units))


def _for_entries(weight: Tensor, then: Sequence[Any], here: Sequence[Any]) -> Tensor:
    """The weight of a layer, an input of which is one of ``then``, for the inputs ``here``: zeros for those that are new."""
    columns = dict(zip(then, weight.unbind(1)))
    new = weight.new_zeros(weight.shape[0], *weight.shape[2:])
    return torch.stack([columns.get(entry, new) for entry in here], 1) if here else weight[:, :0]
