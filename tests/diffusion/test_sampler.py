"""The flow and the solvers: samples have the right distribution, and steps sum to exactly one."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from scripts.diffusion.flow import BASE_VALUES, FlowTarget, RectifiedFlow, draw_noise
from scripts.diffusion.sampler import integrate

MEAN, DEVIATION = 0.4, 0.6


def gaussian_velocity(state: torch.Tensor, time: float) -> torch.Tensor:
    """The exact velocity towards a Gaussian: the mean of `clean - noise`, given what is seen at a time."""
    variance = (1 - time) ** 2 * DEVIATION**2 + time**2
    slope = ((1 - time) * DEVIATION**2 - time) / variance
    return MEAN + slope * (state - (1 - time) * MEAN)


@pytest.mark.parametrize("solver", ["stochastic", "midpoint"])
@pytest.mark.parametrize("num_steps", [10, 30, 1000])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samples_of_a_gaussian_have_its_mean_and_deviation(num_steps, shift, solver):
    flow = RectifiedFlow(shift)
    noise = draw_noise((1_000_000 if solver == "stochastic" and num_steps < 1000 else 100_000,), seed=0)
    noise = (noise - noise.mean()) / noise.std()  # no error but the solver's
    sample = integrate(gaussian_velocity, noise, flow.sampling_times(num_steps, 1), solver)
    assert sample.mean().item() == pytest.approx(MEAN, rel=0.01)
    assert sample.std().item() == pytest.approx(DEVIATION, rel=0.01)


def test_euler_needs_a_thousand_steps_for_that():
    noise = draw_noise((100_000,), seed=0)
    noise = (noise - noise.mean()) / noise.std()
    deviations = {}
    for num_steps in (10, 1000):
        times = RectifiedFlow(1.0).sampling_times(num_steps, 1)
        deviations[num_steps] = integrate(gaussian_velocity, noise, times, "euler").std().item()
    assert deviations[1000] == pytest.approx(DEVIATION, rel=0.01)
    assert deviations[10] < 0.95 * DEVIATION


@pytest.mark.parametrize("num_steps", [1, 10, 30, 300, 1000])
@pytest.mark.parametrize("shift", [1.0, 2.7, 22.6])
def test_steps_sum_to_exactly_one(num_steps, shift):
    times = RectifiedFlow(shift).sampling_times(num_steps, 1)
    assert times[0] == 1 and times[-1] == 0 and len(times) == num_steps + 1
    steps = [Fraction(start) - Fraction(end) for start, end in itertools.pairwise(times)]
    assert all(step > 0 for step in steps) and sum(steps) == 1
    state = integrate(lambda state, time: torch.ones_like(state), torch.zeros(1), times, "euler")
    assert state.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_a_perfect_estimate_leads_to_the_latent(solver):
    clean, noise = draw_noise((1, 4, 6, 6, 6), 1), draw_noise((1, 4, 6, 6, 6), 2)
    times = RectifiedFlow().sampling_times(7, clean.numel())
    sample = integrate(lambda state, time: (clean - state) / time, noise, times, solver)
    assert torch.allclose(sample, clean, atol=1e-5)


def test_noise_that_a_stochastic_step_adds_depends_on_the_seed_and_goes_away():
    clean, noise = draw_noise((1, 4, 6, 6, 6), 1), draw_noise((1, 4, 6, 6, 6), 2)
    times, seen = RectifiedFlow().sampling_times(7, clean.numel()), []
    for seed in (0, 0, 1):
        states = {}

        def velocity(state, time, states=states):
            states[time] = state
            deviation = ((state - (1 - time) * clean) / time).std().item()
            assert deviation == pytest.approx(noise.std().item(), rel=0.05)  # as much noise as the time says
            return (clean - state) / time

        sample = integrate(velocity, noise, times, "stochastic", seed)
        assert torch.allclose(sample, clean, atol=1e-5)
        seen.append(states[min(states)])
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2], atol=1e-3)


# --- training ---------------------------------------------------------------------------------------------------------


def target_of(time: float) -> FlowTarget:
    mask = torch.ones(2, 1, 4, 4, 4)
    mask[0, ..., 3:] = 0
    return FlowTarget(draw_noise((2, 3, 4, 4, 4), 1), torch.tensor([time, time]), mask)


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_loss_is_the_square_error_of_the_velocity(time):
    target, flow = target_of(time), RectifiedFlow()
    noise = draw_noise((2, 3, 4, 4, 4), 2)
    noisy = flow.add_noise(target.clean, noise, target.times)
    velocity = target.clean - noise + 0.3  # wrong by so much
    assert flow.loss(noisy + time * velocity, target).item() == pytest.approx(0.3**2, rel=1e-4)
    assert flow.loss(target.clean + 0.3, target).item() == pytest.approx((0.3 / time) ** 2, rel=1e-4)


def test_padding_does_not_count():
    flow, target = RectifiedFlow(), target_of(0.5)
    wrong = target.clean.clone()
    wrong[0, ..., 3:] = 100
    assert flow.loss(wrong, target).item() == 0
    wrong[0, ..., 2] += 1
    assert flow.loss(wrong, target).item() > 0


def test_larger_latents_see_more_noise():
    flow = RectifiedFlow()
    assert flow.shift(BASE_VALUES) == 1 and flow.shift(BASE_VALUES / 2) == 1 and flow.shift(4 * BASE_VALUES) == 2
    medians = [np.median([flow.draw_time(n, np.random.default_rng(i)) for i in range(999)]) for n in (4096, 65536)]
    assert medians[0] == pytest.approx(0.5, abs=0.03)
    assert medians[1] == pytest.approx(0.8, abs=0.03)  # odds of 4
