"""From noise to a latent: solvers of the flow, and the denoiser with guidance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from scripts.bundle.precision import autocast_dtype
from scripts.diffusion.conditions import Volume
from scripts.diffusion.flow import draw_noise
from scripts.diffusion.generator import Generator
from scripts.layers.factors import padded_size
from scripts.layers.resampling import pad_at_end
from scripts.training.repeatable_batches import derive_seed

__all__ = ["SOLVERS", "Sampler", "integrate"]

SOLVERS = ("midpoint", "stochastic", "euler")
RENEWED = 1.5  # by how much the odds of noise grow before a stochastic step
Velocity = Callable[[torch.Tensor, float], torch.Tensor]


class Sampler:
    """
    Makes latents.

    Args:
        generator: generator that makes them.
        num_inference_steps: number of steps from noise to latent.
        solver: see :py:func:`integrate`.
        guidance_scale: 1 for no guidance; more takes the estimate further away from the one it is compared with.
        guidance_interval: lowest and highest time at which there is guidance (Kynkäänniemi et al.,
            https://arxiv.org/abs/2404.07724), from 0, the latent, to 1, noise.
        guide: generator for autoguidance, smaller or less trained (Karras et al., https://arxiv.org/abs/2406.02507), which
            mends what both get wrong and the guide more so; None for classifier-free guidance (Ho and Salimans,
            https://arxiv.org/abs/2207.12598), which exaggerates the conditions.
        amp: whether the networks use mixed precision. The latent is float32 in any case.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: for a value that cannot be.
    """

    def __init__(
        self,
        generator: Generator,
        num_inference_steps: int = 30,
        solver: str = "midpoint",
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide: Generator | None = None,
        amp: bool = False,
        amp_dtype: str = "bfloat16",
    ) -> None:
        if type(num_inference_steps) is not int or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; it must be a positive integer.")
        _check_guidance(generator, guidance_scale, guidance_interval, guide)
        check_solver(solver)
        self.generator, self.guide = generator, guide
        self.num_inference_steps, self.solver = num_inference_steps, solver
        self.scale, self.interval = float(guidance_scale), tuple(map(float, guidance_interval))
        self.amp, self.dtype = amp, autocast_dtype(amp_dtype)
        self.settings: dict[str, Any] = {  # what a sample depends on, for the file beside it
            "num_inference_steps": num_inference_steps,
            "solver": solver,
            "guidance_scale": self.scale,
            "guidance_interval": list(self.interval),
            "guide_sha256": guide.sha256 if guide is not None else None,
            "amp_dtype": amp_dtype if amp else None,
        }

    @property
    def networks(self) -> list[torch.nn.Module]:
        """The generator's network and the guide's."""
        return [each.network for each in (self.generator, self.guide) if each is not None]

    def start(self, volume: Volume, seed: int) -> dict[str, torch.Tensor]:
        """
        Noise ``CxHxWxD``, padded at its end to what the network divides; ``context``, the vector of conditions ``K``; and
        ``latent_size``, the size without padding.
        """
        statistics = self.generator.statistics
        latent_size = [-(-n // factor) for n, factor in zip(volume.size, statistics.factors)]
        size = padded_size(latent_size, [self.generator.network.multiple] * len(latent_size))
        return {
            "noise": draw_noise((statistics.latent_channels, *size), seed),
            "context": statistics.conditions.vector(volume),
            "latent_size": torch.tensor(latent_size),
        }

    def __call__(
        self,
        noise: torch.Tensor,
        context: torch.Tensor,
        latent_size: Sequence[int],
        seed: int,
        after_step: Callable[[], object] = lambda: None,
        spatial: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Follow the flow from noise to a latent. In training the padding repeats the last voxels, and the loss leaves it out:
        what is estimated of it is arbitrary, so it is filled again at each step.

        Args:
            noise: ``1xCxHxWxD``, see :py:meth:`start`.
            context: vector of conditions, ``1xK``.
            latent_size: size of the latent without padding.
            seed: seed of the noise that the stochastic solver adds.
            after_step: called after each step.
            spatial: latents of the spatial conditions that are given, each ``1x(planes * C)xHxWxD`` without padding.

        Returns:
            the latent as the autoencoder makes it, without padding, on the network's device.
        """
        device = next(self.generator.network.parameters()).device
        noise, context = noise.to(device), context.to(device)
        padded = noise.shape[2:]
        extent = torch.tensor([[n / whole for n, whole in zip(latent_size, padded)]], device=device)
        conditions = self._spatial_input(spatial or {}, latent_size, padded)

        def velocity(x: torch.Tensor, time: float) -> torch.Tensor:
            clean = _cropped(self.denoise(x, time, context, extent, conditions), latent_size)
            return (pad_at_end(clean, padded) - x) / time

        times = self.generator.flow.sampling_times(self.num_inference_steps, noise.shape[1] * math.prod(latent_size))
        x = integrate(velocity, noise, times, self.solver, seed, after_step)
        return self.generator.statistics.denormalised(_cropped(x, latent_size))

    def _spatial_input(
        self, latents: Mapping[str, torch.Tensor], size: Sequence[int], padded: Sequence[int]
    ) -> torch.Tensor | None:
        """What the networks see of spatial conditions, ``1xSxHxWxD``."""
        statistics, device = self.generator.statistics, next(self.generator.network.parameters()).device
        if not statistics.spatial:
            return None
        stacked, given = statistics.stacked({key: z[0].cpu() for key, z in latents.items()}, size)
        return statistics.spatial_input(pad_at_end(stacked[None], padded).to(device), given[None].to(device))

    @torch.no_grad()
    def denoise(
        self,
        x: torch.Tensor,
        time: float,
        context: torch.Tensor,
        extent: torch.Tensor | None = None,
        spatial: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The clean latent.

        Args:
            x: noisy latent, ``1xCxHxWxD``.
            time: time of the latent, above 0.
            context: vector of conditions, ``1xK``.
            extent: share of each axis that is volume, ``1x3``; None for all.
            spatial: spatial conditions, ``1xSxHxWxD``; None without.
        """

        def estimate(
            generator: Generator, x: torch.Tensor, context: torch.Tensor, spatial: torch.Tensor | None = spatial
        ) -> torch.Tensor:
            times = torch.full((len(x),), time, device=x.device)
            share = None if extent is None else extent.expand(len(x), -1)
            sees = None
            if generator.statistics.spatial:
                none = x.new_zeros(len(x), generator.statistics.spatial_channels, *x.shape[2:])
                sees = none if spatial is None else spatial
            with torch.autocast(x.device.type, self.dtype, enabled=self.amp):
                return generator.network(x, times, context, share, sees).float()

        low, high = self.interval
        if self.scale == 1 or not low <= time <= high:
            return estimate(self.generator, x, context)
        if self.guide is not None:
            guide = estimate(self.guide, x, context)
            return guide.lerp(estimate(self.generator, x, context), self.scale)
        # both at once, which takes no longer for a small latent
        null = self.generator.statistics.conditions.null_vector()[None].to(context.device)
        both = None if spatial is None else torch.cat([spatial, torch.zeros_like(spatial)])
        cond, uncond = estimate(self.generator, x.expand(2, *x.shape[1:]), torch.cat([context, null]), both).chunk(2)
        return uncond.lerp(cond, self.scale)


def _check_guidance(generator: Generator, scale: float, interval: Sequence[float], guide: Generator | None) -> None:
    """Refuse an invalid scale or interval, one without influence, and a scale with nothing to compare with."""
    if type(scale) not in (int, float) or not 0 <= scale < math.inf:
        raise ValueError(f"`guidance_scale` is {scale!r}; it must be a number from 0 on.")
    times = interval if isinstance(interval, (list, tuple)) else ()
    if [type(time) in (int, float) for time in times] != [True, True] or not 0 <= times[0] < times[1] <= 1:
        raise ValueError(
            f"`guidance_interval` is {interval!r}; it must be two times from 0 to 1, the lower one first, such as [0, 0.6]."
        )
    if scale == 1 and guide is not None:
        raise ValueError("`guidance_scale` is 1, with which a `guide` has no influence. Set it to 1.5.")
    if scale == 1 and tuple(times) != (0, 1):
        raise ValueError("`guidance_scale` is 1, with which `guidance_interval` has no influence. Set it to 1.5.")
    if scale != 1 and guide is None and generator.condition_dropout == 0:
        raise ValueError(
            f"`guidance_scale` is {scale}, but the generator was trained with `condition_dropout` 0 and has no "
            "unconditional estimate to compare with. Set it to 1, or give a `guide`."
        )


def check_solver(solver: str) -> None:
    """
    Raises:
        ValueError: for a solver that :py:func:`integrate` does not have.
    """
    if solver not in SOLVERS:
        raise ValueError(f"`solver` is {solver!r}; it must be one of {', '.join(SOLVERS)}.")


@torch.no_grad()
def integrate(
    velocity: Velocity,
    noise: torch.Tensor,
    times: Sequence[float],
    solver: str = "midpoint",
    seed: int = 0,
    after_step: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """
    Follow a velocity from noise to a sample. The state is float32, and the steps sum to exactly one.

    Args:
        velocity: function of the state and its time (above 0); the change of the state per unit of time, towards 0.
        noise: the state at ``times[0]``, which is 1.
        times: times between which the steps lead, falling to 0.
        solver: ``"euler"`` asks for the velocity once per step, ``"midpoint"`` (the explicit midpoint method, of second
            order) twice: at the step's beginning and in its middle. Heun's method would ask at time 0, where an estimate
            of the clean latent does not determine the velocity. ``"stochastic"`` first adds noise to the state and goes back
            in time by as much, then takes a longer midpoint step to the same end, as in algorithm 2 of Karras et al.
            (https://arxiv.org/abs/2206.00364): errors of earlier steps are covered by noise and made good.
        seed: seed of the noise that ``"stochastic"`` adds.
        after_step: called after each step.

    Returns:
        the state at time 0.

    Raises:
        ValueError: for another solver.
    """
    check_solver(solver)
    x = noise.float()
    for number, (start, end) in enumerate(itertools.pairwise(times)):
        if solver == "stochastic" and number > 0:
            x, start = _renewed(x, start, draw_noise(x.shape, derive_seed(seed, number)).to(x.device))
        step = start - end
        change = velocity(x, start).float()
        if solver != "euler":
            change = velocity(x + step / 2 * change, start - step / 2).float()
        x = x + step * change
        after_step()
    return x


def _renewed(x: torch.Tensor, time: float, noise: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The state with so much more noise that its odds, t / (1 - t), have grown, and the time to which it belongs."""
    odds = time / (1 - time)
    more = RENEWED * odds
    later = more / (1 + more)
    return (1 - later) * (x / (1 - time) + math.sqrt(more**2 - odds**2) * noise), later


def _cropped(z: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    for axis, n in enumerate(size, start=2):
        z = z.narrow(axis, 0, n)
    return z
