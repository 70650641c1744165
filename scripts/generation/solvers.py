"""From noise to a latent, along the velocity that a network predicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

__all__ = ["SOLVERS", "draw_noise", "integrate"]

SOLVERS = ("midpoint", "euler")
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
            of the clean latent does not tell the velocity.
        after_step: called after each step.

    Returns:
        the state at time 0.

    Raises:
        ValueError: for another solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"`solver` is {solver!r}; it must be one of {', '.join(SOLVERS)}.")
    state = noise.float()
    for start, end in itertools.pairwise(times):
        step = start - end
        change = velocity(state, start).float()
        if solver == "midpoint":
            change = velocity(state + step / 2 * change, start - step / 2).float()
        state = state + step * change
        after_step()
    return state
