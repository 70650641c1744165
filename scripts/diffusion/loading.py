"""Reads generators: to sample from, and to train further."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scripts.autoencoderkl import Reconstructor
from scripts.bundle.files import file_hash
from scripts.bundle.json_files import read_dataclass
from scripts.bundle.weights import check_arguments, load_weights, read_weights
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.generator import Generator, GeneratorDescription
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.statistics import LatentStatistics

__all__ = ["load_autoencoder", "load_generator", "load_pretrained_generator"]

FOLDER = "models/generator"  # of the generator that the bundle carries
READS_CONDITIONS = "unet.class_embedding.0.weight"  # of the layer that sees the vector of conditions
READS_LATENTS = "unet.conv_in.conv.weight"  # of the layer that sees the noisy latent, and then the spatial conditions
READS_SPATIAL = "from_spatial.conv.weight"
logger = logging.getLogger(__name__)


def load_generator(path: str, wanted: str = "") -> Generator:
    """
    Read a generator.

    Args:
        path: path of its weights; the rest is in the JSON file beside them.
        wanted: see :py:func:`scripts.bundle.weights.read_weights`.

    Raises:
        FileNotFoundError: when there are no weights, or nothing beside them.
        ValueError: when a file is damaged, or the two do not belong together.
    """
    beside = Path(path).with_suffix(".json")
    if not Path(path).is_file() and Path(path).parent.as_posix().endswith(FOLDER):
        raise FileNotFoundError(
            f"there are no weights at {path}: this bundle carries no generator. Train one (docs/generation.md), or set "
            "`ckpt_dir` or `pretrained` to another."
        )
    if Path(path).is_file() and not beside.is_file():
        raise FileNotFoundError(f"{path} has no {beside.name} beside it, without which it is useless.")
    content, _ = read_weights(path, GeneratorDescription, wanted)
    description = read_dataclass(beside, GeneratorDescription)
    network, statistics = Denoiser(**asdict(description.network)), description.latents
    try:
        network.load_state_dict(content)
    except Exception as error:  # whatever is in the file
        raise ValueError(f"{path} cannot be loaded into the network that its JSON file describes: {error}") from error
    network.eval()
    logger.info(f"loaded the generator {path}: {statistics.summary()}")
    flow = RectifiedFlow(description.timestep_shift)
    dropout, trained = description.condition_dropout, description.trained
    return Generator(network, statistics, flow, dropout, file_hash(path), trained)


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
    if Path(path).is_file() and file_hash(path) != expected.sha256:
        raise ValueError(
            f"the autoencoder {path} is not the one that the generator was trained with: the SHA-256 of its weights begins "
            f"with {file_hash(path)[:12]} instead of {expected.sha256[:12]}. Set `autoencoder` to the weights that encoded "
            "the training volumes."
        )
    autoencoder = Reconstructor(**expected.network)
    load_weights(autoencoder, path)
    return autoencoder.eval()


def load_pretrained_generator(network: Denoiser, path: str, statistics: LatentStatistics) -> None:
    """
    Take over the weights of a generator and what they were trained with: how latents are normalised, and how numbers among
    the conditions are standardised. Conditions, spatial ones too, may differ: the weights of those that both have are taken
    over, and a condition that is new has no influence before the first step, as if nothing were known of it.

    Args:
        network: network, changed in place.
        path: path of the weights of a run, with the JSON file beside them.
        statistics: statistics of the training latents, changed in place.

    Raises:
        FileNotFoundError: when there is no such file, or no JSON file beside it.
        ValueError: when it is damaged, of another network or prediction, or of the latents of another autoencoder.
    """
    generator = load_generator(path)
    check_arguments(_compared(generator.network), _compared(network), path)
    before = generator.statistics
    there, here = before.autoencoder.sha256, statistics.autoencoder.sha256
    if there != here:
        raise ValueError(
            f"{path} was trained on latents of another autoencoder than those here: the SHA-256 of its weights begins with "
            f"{there[:12]} there and {here[:12]} here. Encode the volumes with that autoencoder."
        )
    if statistics.latent_gamma != before.latent_gamma:
        logger.warning(
            f"`latent_gamma` is {statistics.latent_gamma:g}; the weights {path} keep the {before.latent_gamma:g} that they "
            "were trained with"
        )
    statistics.inherit_normalisation(before)
    state = generator.network.state_dict()
    entries = before.conditions.entries, statistics.conditions.entries
    state[READS_CONDITIONS] = _for_entries(state[READS_CONDITIONS], *entries)
    _log_differences("condition_keys", *entries)
    spatial = before.spatial_entries, statistics.spatial_entries
    split = len(state[READS_LATENTS][0]) - len(spatial[0])
    others, reads = state[READS_LATENTS].tensor_split([split], 1)
    state[READS_LATENTS] = torch.cat([others, _for_entries(reads, *spatial)], 1)
    if READS_SPATIAL in state:
        state[READS_SPATIAL] = _for_entries(state[READS_SPATIAL], *spatial)
    _log_differences("spatial_keys", before.spatial, statistics.spatial)
    expected = network.state_dict()  # with layers that only one of the two has
    network.load_state_dict({**expected, **{name: state[name] for name in expected if name in state}})
    logger.info(f"training starts from {path}: {statistics.summary()}")


def _compared(network: Denoiser) -> dict[str, Any]:
    """What must be the same. How many conditions there are may differ."""
    return {name: value for name, value in network.arguments.items() if name not in ("condition_size", "spatial_channels")}


def _for_entries(weight: torch.Tensor, then: Sequence[Any], here: Sequence[Any]) -> torch.Tensor:
    """The weight of a layer, an input of which is one of ``then``, for the inputs ``here``: zeros for those that are new."""
    columns = dict(zip(then, weight.unbind(1)))
    new = weight.new_zeros(weight.shape[0], *weight.shape[2:])
    return torch.stack([columns.get(entry, new) for entry in here], 1) if here else weight[:, :0]


def _log_differences(key: str, then: Iterable[Any], here: Iterable[Any]) -> None:
    _log(logging.INFO, "conditions that have no influence yet", set(here) - set(then))
    lost = f"conditions of the weights that are lost, because `{key}` or the latents here do not have them"
    _log(logging.WARNING, lost, set(then) - set(here))


def _log(level: int, words: str, entries: set[Any]) -> None:
    names = {each if isinstance(each, str) else " ".join(each) if len(each) == 2 else each[0] for each in entries}
    if names:
        logger.log(level, f"{words}: {', '.join(sorted(names))}")
