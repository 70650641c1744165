"""Fine-tuning of a generator: a run on other volumes, with other conditions, that starts from the weights of another run."""

from __future__ import annotations

import logging
from typing import Any

import torch

from scripts.bundle.weights import check_arguments
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.generator import Generator, load_generator
from scripts.diffusion.latent_space import LatentSpace
from scripts.diffusion.latent_unet import LatentUNet

__all__ = ["load_pretrained_generator"]

READS_CONDITIONS = "unet.class_embedding.0.weight"  # of the layer that sees the vector of conditions
logger = logging.getLogger(__name__)


def load_pretrained_generator(network: LatentUNet, path: str, space: LatentSpace, flow: RectifiedFlow) -> None:
    """
    Take over the weights of a generator and what they were trained with: how latents are normalised, and how numbers among
    the conditions are standardised. Conditions may differ: the weights of those that both have are taken over, and a
    condition that is new has no influence before the first step, as if nothing were known of it.

    Args:
        network: the network, changed in place.
        path: of the weights of a run, with the JSON file beside them.
        space: what is known of the training latents, changed in place.
        flow: that is learned; its ``prediction`` must be the generator's, its ``timestep_shift`` may be another.

    Raises:
        FileNotFoundError: when there is no such file, or no JSON file beside it.
        ValueError: when it is damaged, of another network or ``prediction``, or of the latents of another autoencoder.
    """
    generator = load_generator(path)
    check_arguments(_compared(generator.network, generator.flow), _compared(network, flow), path)
    _refuse_other_autoencoder(path, generator.space, space)
    if space.description["latent_gamma"] != generator.space.description["latent_gamma"]:
        logger.warning(
            f"`latent_gamma` is {space.description['latent_gamma']:g}; the weights {path} keep the "
            f"{generator.space.description['latent_gamma']:g} that they were trained with"
        )
    space.go_on_from(generator.space)
    network.load_state_dict(_for_conditions(generator, space))
    logger.info(f"training starts from {path}: {space.summary()}")


def _compared(network: LatentUNet, flow: RectifiedFlow) -> dict[str, Any]:
    """What must be the same. How many conditions there are may differ."""
    arguments = {name: value for name, value in network.arguments.items() if name != "condition_size"}
    return {**arguments, "prediction": flow.prediction}


def _refuse_other_autoencoder(path: str, before: LatentSpace, now: LatentSpace) -> None:
    there, here = (each.description["autoencoder"]["sha256"] for each in (before, now))
    if there != here:
        raise ValueError(
            f"{path} was trained on latents of another autoencoder than those here: the SHA-256 of its weights begins with "
            f"{there[:12]} there and {here[:12]} here. Encode the volumes with that autoencoder."
        )


def _for_conditions(generator: Generator, space: LatentSpace) -> dict[str, torch.Tensor]:
    """The generator's weights, for another vector of conditions."""
    state = generator.network.state_dict()
    before, now = generator.space.conditions.entries, space.conditions.entries
    columns = state[READS_CONDITIONS]
    none = torch.zeros_like(columns[:, 0])
    state[READS_CONDITIONS] = torch.stack([columns[:, before.index(each)] if each in before else none for each in now], 1)
    _log(logging.INFO, "conditions that have no influence yet", set(now) - set(before))
    lost = "conditions of the weights that are lost, because `condition_keys` or the latents here do not have them"
    _log(logging.WARNING, lost, set(before) - set(now))
    return state


def _log(level: int, words: str, entries: set[tuple[Any, ...]]) -> None:
    names = {" ".join(entry) if len(entry) == 2 else entry[0] for entry in entries}  # with its class
    if names:
        logger.log(level, f"{words}: {', '.join(sorted(names))}")
