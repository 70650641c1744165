"""From noise to a latent, along the velocity that a network predicts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from scripts.training.repeatable_batches import derive_seed

__all__ = ["SOLVERS", "draw_noise", "integrate"]

SOLVERS = ("midpoint", "stochastic", "euler")
RENEWED = 1.5  # by how much the odds of noise grow before a stochastic step
Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def draw_noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    """
    Noise that depends on nothing but its shape and the seed, the same on every machine: it is drawn on the CPU.

    Args:
        shape: of the noise.
        seed: below 2^63.
    """
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
        times: where the steps begin and end, falling to 0.
        solver: ``"euler"`` asks for the velocity once per step, ``"midpoint"`` (the explicit midpoint method, of second
            order) twice: at the step's beginning and in its middle. Heun's method would ask at time 0, where a prediction
            of the clean latent does not tell the velocity. ``"stochastic"`` first adds noise to the state and goes back in
            time by as much, then takes a longer midpoint step to the same end, as in algorithm 2 of Karras et al.
            (https://arxiv.org/abs/2206.00364): errors of earlier steps are covered by noise and made good.
        seed: of the noise that ``"stochastic"`` adds.
        after_step: called after each step.

    Returns:
        the state at time 0.

    Raises:
        ValueError: for another solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"`solver` is {solver!r}; it must be one of {', '.join(SOLVERS)}.")
    state = noise.float()
    for number, (start, end) in enumerate(itertools.pairwise(times)):
        if solver == "stochastic" and number > 0:
            state, start = _renewed(state, start, draw_noise(state.shape, derive_seed(seed, number)).to(state.device))
        step = start - end
        change = velocity(state, start).float()
        if solver != "euler":
            change = velocity(state + step / 2 * change, start - step / 2).float()
        state = state + step * change
        after_step()
    return state


def _renewed(state: torch.Tensor, time: float, noise: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The state with so much more noise that its odds, t / (1 - t), have grown, and the time to which it belongs."""
    odds = time / (1 - time)
    more = RENEWED * odds
    later = more / (1 + more)
    return (1 - later) * (state / (1 - time) + math.sqrt(more**2 - odds**2) * noise), later
