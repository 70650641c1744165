"""From noise to a latent: the denoiser with guidance, and the solvers of the flow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from scripts.bundle.json_files import Must, checked
from scripts.bundle.precision import autocast_dtype
from scripts.bundle.progress import ProgressBar
from scripts.diffusion.conditions import Volume
from scripts.diffusion.flow import RectifiedFlow, draw_noise
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.statistics import LatentStatistics
from scripts.layers.factors import padded_size
from scripts.layers.resampling import pad_at_end
from scripts.training.repeatable_batches import derive_seed

Solver = Literal["midpoint", "stochastic", "euler"]
RENEWED = 1.5  # by how much the odds of noise grow before a stochastic step
Velocity = Callable[[Tensor, float], Tensor]
Interval = Annotated[
    tuple[float, float], Must("two times from 0 to 1, the lower one first", lambda times: 0 <= times[0] < times[1] <= 1)
]


@dataclass(frozen=True)
class Generator:
    """
    A trained network with the statistics of its training latents, the flow that it has learned, the share of steps without
    conditions, and the hash of its weights.
    """

    network: Denoiser
    statistics: LatentStatistics
    flow: RectifiedFlow
    condition_dropout: float
    sha256: str


@dataclass(eq=False)
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
        guide: generator for autoguidance, smaller or less trained (Karras et al., https://arxiv.org/abs/2406.02507); None
            for classifier-free guidance (Ho and Salimans, https://arxiv.org/abs/2207.12598).
        amp: whether the networks use mixed precision. The latent is float32 in any case.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.
        progress: whether to show a bar over the steps of each sample.

    Raises:
        ValueError: for an unknown solver, an invalid interval, and guidance without influence or a second estimate.
    """

    generator: Generator
    num_inference_steps: int = 30
    solver: str = "midpoint"
    guidance_scale: float = 1.0
    guidance_interval: Sequence[float] = (0.0, 1.0)
    guide: Generator | None = None
    amp: bool = False
    amp_dtype: str = "bfloat16"
    progress: bool = False

    def __post_init__(self) -> None:
        checked(self.solver, Solver, "solver")
        self.guidance_interval = list(checked(self.guidance_interval, Interval, "guidance_interval"))
        self.dtype = autocast_dtype(self.amp_dtype)
        scale = self.guidance_scale
        if scale == 1 and (self.guide is not None or self.guidance_interval != [0, 1]):
            raise ValueError("`guidance_scale` is 1, with which `guide` and `guidance_interval` have no influence.")
        if scale != 1 and self.guide is None and self.generator.condition_dropout == 0:
            raise ValueError(f"`guidance_scale` is {scale}; a generator without `condition_dropout` needs 1, or a `guide`.")

    @property
    def settings(self) -> dict[str, Any]:
        """What a sample depends on, for the file beside it."""
        names = "num_inference_steps", "solver", "guidance_scale", "guidance_interval"
        networks = {"guide_sha256": self.guide and self.guide.sha256, "amp_dtype": self.amp_dtype if self.amp else None}
        return {**{name: getattr(self, name) for name in names}, **networks}

    @property
    def networks(self) -> list[torch.nn.Module]:
        """Those of the generator and the guide."""
        return [each.network for each in (self.generator, self.guide) if each is not None]

    def start(self, volume: Volume, seed: int) -> dict[str, Any]:
        """The arguments of a call for a sample of a volume. Its noise is padded at its end to what the network divides."""
        statistics = self.generator.statistics
        latent_size = [-(-n // factor) for n, factor in zip(volume.size, statistics.factors)]
        size = padded_size(latent_size, [self.generator.network.multiple] * len(latent_size))
        noise, context = draw_noise((1, statistics.latent_channels, *size), seed), statistics.conditions.vector(volume)[None]
        return {"noise": noise, "context": context, "latent_size": latent_size, "seed": seed}

    @torch.no_grad()
    def __call__(
        self,
        noise: Tensor,
        context: Tensor,
        latent_size: Sequence[int],
        seed: int,
        spatial: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """
        Follow the flow from noise to a latent. In training the padding repeats the last voxels, and the loss leaves it out:
        what is estimated of it is arbitrary, so it is filled again at each step.

        Args:
            noise: ``1xCxHxWxD``, see :py:meth:`start`.
            context: vector of conditions, ``1xK``.
            latent_size: size of the latent without padding.
            seed: seed of the noise that the stochastic solver adds.
            spatial: latents of the spatial conditions that are given, each ``1x(planes * C)xHxWxD`` without padding.

        Returns:
            the latent as the autoencoder makes it, without padding, on the network's device.
        """
        statistics, device = self.generator.statistics, next(self.generator.network.parameters()).device
        noise, context = noise.to(device), context.to(device)
        padded = noise.shape[2:]
        inside: Any = (..., *(slice(n) for n in latent_size))
        extent = torch.tensor([[n / whole for n, whole in zip(latent_size, padded)]], device=device)
        conditions = None
        if statistics.spatial:
            stacked, given = statistics.stacked({key: z[0].cpu() for key, z in (spatial or {}).items()}, latent_size)
            conditions = statistics.spatial_input(pad_at_end(stacked[None], padded).to(device), given[None].to(device))

        def velocity(x: Tensor, time: float) -> Tensor:
            clean = self.denoise(x, time, context, extent, conditions)[inside]
            return (pad_at_end(clean, padded) - x) / time

        times = self.generator.flow.sampling_times(self.num_inference_steps, noise.shape[1] * math.prod(latent_size))
        x = integrate(velocity, noise, times, self.solver, seed, self.progress)
        return statistics.denormalised(x[inside])

    def denoise(
        self, x: Tensor, time: float, context: Tensor, extent: Tensor | None = None, spatial: Tensor | None = None
    ) -> Tensor:
        """
        The clean latent, with guidance, from a noisy one at a time above 0; the other arguments are the network's. Without
        ``spatial``, a network with spatial conditions gets zeros.
        """

        def estimate(generator: Generator, x: Tensor, context: Tensor, spatial: Tensor | None) -> Tensor:
            times = torch.full((len(x),), time, device=x.device)
            if not generator.statistics.spatial:
                spatial = None
            elif spatial is None:
                spatial = x.new_zeros(len(x), generator.statistics.spatial_channels, *x.shape[2:])
            with torch.autocast(x.device.type, self.dtype, enabled=self.amp):
                return generator.network(x, times, context, extent, spatial).float()

        (low, high), scale = self.guidance_interval, self.guidance_scale
        if scale == 1 or not low <= time <= high:
            return estimate(self.generator, x, context, spatial)
        if self.guide is not None:
            cond, other = (estimate(each, x, context, spatial) for each in (self.generator, self.guide))
        else:  # both at once, which takes no longer for a small latent
            contexts = torch.cat([context, torch.zeros_like(context)])
            both = None if spatial is None else torch.cat([spatial, torch.zeros_like(spatial)])
            cond, other = estimate(self.generator, x.expand(2, *x.shape[1:]), contexts, both).chunk(2)
        return other.lerp(cond, scale)


def integrate(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    solver: str = "midpoint",
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """
    Follow a velocity from noise to a sample. The state is float32, and the steps sum to exactly one.

    Args:
        velocity: function of the state and its time (above 0); the change of the state per unit of time, towards 0.
        noise: state at ``times[0]``, which is 1.
        times: times between which the steps lead, falling to 0.
        solver: ``"euler"`` asks for the velocity once per step, ``"midpoint"`` (of second order) at the step's beginning
            and in its middle: Heun's method would ask at time 0, where an estimate of the clean latent does not determine
            it. ``"stochastic"`` first adds noise and goes back in time by as much, as in algorithm 2 of Karras et al.
            (https://arxiv.org/abs/2206.00364): errors of earlier steps are covered by noise and made good.
        seed: seed of the noise that ``"stochastic"`` adds.
        progress: whether to show a bar over the steps.

    Returns:
        the state at time 0.
    """
    x, steps = noise.float(), list(enumerate(itertools.pairwise(times)))
    for number, (start, end) in ProgressBar(steps, desc="sampling", unit="step", leave=False, disable=not progress):
        if solver == "stochastic" and number > 0:
            x, start = _renewed(x, start, draw_noise(x.shape, derive_seed(seed, number)).to(x.device))
        step = start - end
        change = velocity(x, start).float()
        if solver != "euler":
            change = velocity(x + step / 2 * change, start - step / 2).float()
        x = x + step * change
    return x


def _renewed(x: Tensor, time: float, noise: Tensor) -> tuple[Tensor, float]:
    """The state with so much more noise that its odds, t / (1 - t), have grown, and the time to which it belongs."""
    odds = time / (1 - time)
    more = RENEWED * odds
    later = more / (1 + more)
    return (1 - later) * (x / (1 - time) + math.sqrt(more**2 - odds**2) * noise), later
