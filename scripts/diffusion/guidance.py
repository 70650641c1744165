"""Guidance: a prediction is taken further away from a worse one of the same latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from scripts.bundle.weights import what_differs
from scripts.diffusion.conditions import LEAST_DEVIATION
from scripts.diffusion.generator import Generator, load_generator
from scripts.diffusion.latent_space import LatentSpace

__all__ = ["Guidance", "load_guide"]

SAME = 0.05  # of a deviation: statistics of other volumes of the same kind agree as well as that
Predict = Callable[..., torch.Tensor]


class Guidance:
    """
    What a generator predicts, and by how much more it differs from a worse prediction: the same network's when it is told
    nothing (Ho and Salimans, https://arxiv.org/abs/2207.12598), which exaggerates the conditions; or that of a guide, a
    smaller or less trained generator that is told the same (Karras et al., https://arxiv.org/abs/2406.02507), which mends
    what both get wrong and the guide more so.

    Args:
        generator: that makes the samples.
        scale: 1 for no guidance; more takes the prediction further away, less nearer.
        interval: lowest and highest time at which there is guidance (Kynkäänniemi et al., https://arxiv.org/abs/2404.07724),
            from 0, the latent, to 1, noise.
        guide: the worse generator; None to compare with the generator itself.

    Raises:
        ValueError: for a scale below 0 or an interval that is none, for a generator that was never told nothing, and for a
            guide or an interval without a scale that would use it.
    """

    def __init__(
        self,
        generator: Generator,
        scale: float = 1.0,
        interval: Sequence[float] = (0.0, 1.0),
        guide: Generator | None = None,
    ) -> None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < math.inf:
            raise ValueError(f"`guidance_scale` is {scale!r}; it must be a number from 0 on.")
        if not _is_interval(interval):
            raise ValueError(
                f"`guidance_interval` is {interval!r}; it must be two times from 0 to 1, the lower one first, such as "
                "[0, 0.6]."
            )
        if scale == 1 and guide is not None:
            raise ValueError(
                "`guidance_scale` is 1, with which a `guide` has no influence. Set it to 1.5, or leave out the guide."
            )
        if scale == 1 and tuple(interval) != (0, 1):
            raise ValueError(
                "`guidance_scale` is 1, with which `guidance_interval` has no influence. Set it to 1.5, or leave out the "
                "interval."
            )
        if scale != 1 and guide is None and generator.condition_dropout == 0:
            raise ValueError(
                f"`guidance_scale` is {scale}, which compares with what the generator makes when it is told nothing; "
                "it was trained with `condition_dropout` 0 and knows no such case. Set it to 1, or give a `guide`."
            )
        self.generator, self.scale, self.interval, self.guide = generator, float(scale), tuple(map(float, interval)), guide

    @property
    def networks(self) -> list[torch.nn.Module]:
        """All that are asked."""
        return [each.network for each in (self.generator, self.guide) if each is not None]

    @property
    def settings(self) -> dict[str, Any]:
        """What samples depend on, for the files beside them."""
        return {
            "guidance_scale": self.scale,
            "guidance_interval": list(self.interval),
            "guide_sha256": self.guide.sha256 if self.guide is not None else None,
        }

    def clean(self, predict: Predict, network: Any, state: torch.Tensor, time: float, context: torch.Tensor) -> torch.Tensor:
        """
        The clean latent.

        Args:
            predict: gives what a network makes of ``(states, network, context)`` at this time.
            network: of the generator.
            state: noisy latent, ``1xCxHxWxD``.
            time: of the state, above 0.
            context: vector of conditions, ``1xK``.
        """
        flow, (low, high) = self.generator.flow, self.interval
        if self.scale == 1 or not low <= time <= high:
            return flow.clean(predict(state, network, context), state, time)
        if self.guide is not None:
            told = flow.clean(predict(state, network, context), state, time)
            worse = self.guide.flow.clean(predict(state, self.guide.network, context), state, time)
        else:  # the network is asked for both at once, which takes no longer for a small latent
            nothing = self.generator.space.conditions.nothing()[None].to(context.device)
            both = predict(state.expand(2, *state.shape[1:]), network, torch.cat([context, nothing]))
            told, worse = flow.clean(both, state, time).chunk(2)
        return worse + self.scale * (told - worse)


def load_guide(path: str | None, generator: Generator, device: Any, memory_format: torch.memory_format) -> Generator | None:
    """
    Read a worse generator of the same latents, to guide another one.

    Args:
        path: of its weights, with the JSON file beside them; None for no guide.
        generator: that it is to guide.
        device: of its network.
        memory_format: of its network's weights.

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
        raise ValueError(f"`guide` is {path}, which has the weights that it is to guide. It must be a worse generator.")
    differing = _differing(guide, generator)
    if differing:
        details = what_differs(_settings(guide.space), _settings(generator.space))
        raise ValueError(
            f"{path} cannot guide this generator: {', '.join(differing)} differ{f' ({details})' * bool(details)}. Train a "
            "guide on the same latents, with the same `latent_gamma` and `condition_keys`, for a shorter time or with a "
            "smaller network."
        )
    guide.network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    return guide


def _differing(guide: Generator, generator: Generator) -> list[str]:
    """What a guide must have in common, for one noisy latent and one vector of conditions to say the same to both."""
    there, here = guide.space, generator.space
    if there.description["autoencoder"]["sha256"] != here.description["autoencoder"]["sha256"]:
        return ["the autoencoders that made the latents"]
    found = {
        "statistics of the latents' channels": _statistics_agree(there, here),
        "conditions": _entries_agree(there.conditions.entries, here.conditions.entries),
        "multiples of the latents' sizes": generator.network.multiple % guide.network.multiple == 0,
    }
    return [name for name, agree in found.items() if not agree]


def _settings(space: LatentSpace) -> dict[str, Any]:
    """What a user has set in a training, which may be why something differs."""
    return {"latent_gamma": space.description["latent_gamma"], "condition_keys": space.conditions.keys}


def _statistics_agree(there: LatentSpace, here: LatentSpace) -> bool:
    """Whether both normalise latents alike."""
    names = ("channel_mean", "channel_deviation", "channel_amplitude")
    means, deviations, amplitudes = (np.array([each.description[name] for each in (there, here)]) for name in names)
    scales = amplitudes / deviations
    return bool((abs(means[0] - means[1]) <= SAME * deviations[1]).all() and (abs(scales[0] / scales[1] - 1) <= SAME).all())


def _entries_agree(there: Sequence[tuple[Any, ...]], here: Sequence[tuple[Any, ...]]) -> bool:
    """Whether each number of the vector of conditions says the same: the names, and nearly the same mean and deviation."""
    return len(there) == len(here) and all(map(_entry_agrees, there, here))


def _entry_agrees(there: tuple[Any, ...], here: tuple[Any, ...]) -> bool:
    (name, *found), (expected, *standard) = there, here
    if name != expected or len(found) != len(standard) or len(standard) < 2:  # a class, or whether a number is known
        return there == here
    return bool(np.allclose(found, standard, rtol=0, atol=max(SAME * standard[1], LEAST_DEVIATION)))


def _is_interval(interval: Any) -> bool:
    """Two numbers from 0 to 1, the lower one first."""
    if not isinstance(interval, (list, tuple)) or len(interval) != 2:
        return False
    numbers = all(isinstance(time, (int, float)) and not isinstance(time, bool) for time in interval)
    return numbers and 0 <= interval[0] < interval[1] <= 1
