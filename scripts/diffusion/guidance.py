"""Classifier-free guidance and autoguidance are in ``sampler``; here a guide is read, a lesser generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from scripts.bundle.weights import what_differs
from scripts.diffusion.conditions import LEAST_DEVIATION
from scripts.diffusion.generator import Generator
from scripts.diffusion.loading import load_generator
from scripts.diffusion.statistics import LatentStatistics

__all__ = ["load_guide"]

SAME = 0.05  # of a deviation: statistics of other volumes of the same kind agree as well as that


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
    wanted = f"`guide` is {path}; it must be a file of weights, such as eval/guide/checkpoints/model.pt."
    guide = load_generator(path, wanted)
    if guide.sha256 == generator.sha256:
        raise ValueError(f"`guide` is {path}, which has the weights that it is to guide. It must be a lesser generator.")
    if differing := _differing(guide, generator):
        details = what_differs(_settings(guide.statistics), _settings(generator.statistics))
        raise ValueError(
            f"{path} cannot guide this generator: {', '.join(differing)} differ{f' ({details})' * bool(details)}. Train a "
            "guide on the same latents, with the same `latent_gamma` and `condition_keys`."
        )
    guide.network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    return guide


def _differing(guide: Generator, generator: Generator) -> list[str]:
    """What a guide must have in common, for one noisy latent and one vector of conditions to say the same to both."""
    there, here = guide.statistics, generator.statistics
    if there.autoencoder.sha256 != here.autoencoder.sha256:
        return ["the autoencoders that made the latents"]
    entries = there.conditions.entries, here.conditions.entries
    found = {
        "statistics of the latents' channels": _statistics_agree(there, here),
        "conditions": len(entries[0]) == len(entries[1]) and all(map(_entry_agrees, *entries)),
        "spatial conditions": not there.spatial or not here.spatial or there.spatial == here.spatial,
        "multiples of the latents' sizes": generator.network.multiple % guide.network.multiple == 0,
    }
    return [name for name, agree in found.items() if not agree]


def _settings(statistics: LatentStatistics) -> dict[str, Any]:
    """What a user has set in a training, which may be why something differs."""
    keys = {"condition_keys": list(statistics.conditions.keys), "spatial_keys": list(statistics.spatial)}
    return {"latent_gamma": statistics.latent_gamma, **keys}


def _statistics_agree(there: LatentStatistics, here: LatentStatistics) -> bool:
    """Whether both normalise latents alike."""
    means = np.subtract(there.channel_mean, here.channel_mean) / here.channel_deviation
    scales = [np.divide(each.channel_amplitude, each.channel_deviation) for each in (there, here)]
    return bool((abs(means) <= SAME).all() and (abs(scales[0] / scales[1] - 1) <= SAME).all())


def _entry_agrees(there: tuple[Any, ...], here: tuple[Any, ...]) -> bool:
    """Whether an entry of the vectors of conditions says the same: the name, and nearly the same mean and deviation."""
    (name, *found), (expected, *standard) = there, here
    if name != expected or len(found) != len(standard) or len(standard) < 2:  # a class, or whether a number is known
        return there == here
    return bool(np.allclose(found, standard, rtol=0, atol=max(SAME * standard[1], LEAST_DEVIATION)))
