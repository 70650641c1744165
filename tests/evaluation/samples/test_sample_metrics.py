"""Numbers about sets of volumes, on data where the right answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scripts.evaluation.samples.features import (
    channel_statistics,
    coarse_latent,
    local_statistics,
    share_obeyed,
    standardised,
)
from scripts.evaluation.samples.sample_metrics import kernel_mmd, pairwise_ms_ssim, power_spectrum, shrunk
from scripts.evaluation.samples.sample_sets import CovarianceGaussian, plain_gaussian


def normal(count: int, seed: int, features: int = 6) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def test_two_samples_of_one_distribution_have_no_discrepancy_and_every_p():
    found = [kernel_mmd(normal(12, 2 * seed), normal(16, 2 * seed + 1), 3.0) for seed in range(60)]
    distances, ps = np.array(found).T
    assert abs(distances.mean()) < 3 * distances.std() / np.sqrt(60) and (distances < 0).any()
    for share in (0.25, 0.5, 0.75):
        assert (ps < share).mean() == pytest.approx(share, abs=0.2)


def test_discrepancy_sees_a_shift_and_what_a_linear_kernel_does_not_a_collapse():
    real = normal(24, 0)
    bandwidth = float(torch.pdist(real).median())
    centred = normal(24, 1) - normal(24, 1).mean(0) + real.mean(0)
    for other in (normal(24, 1) + 1, 0.1 * centred + 0.9 * real.mean(0), real.mean(0).expand(24, -1)):
        distance, p = kernel_mmd(other, real, bandwidth)
        assert p < 0.01 and distance > 5 * abs(kernel_mmd(normal(24, 1), real, bandwidth)[0])


def test_discrepancy_of_two_pairs_is_the_mean_of_its_kernels():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    kernel = [np.exp(-(d**2) / 2) for d in range(4)]
    expected = 2 * kernel[1] - 2 * (kernel[2] + kernel[3] + kernel[1] + kernel[2]) / 4
    assert kernel_mmd(x, y, 1.0)[0] == pytest.approx(expected)


def smooth(seed: int, shape: tuple[int, ...] = (24, 20, 22)) -> torch.Tensor:
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    phases = 6 * torch.rand(len(shape), generator=torch.Generator().manual_seed(seed))
    return (0.5 + sum(torch.sin(5 * a + phase) for a, phase in zip(axes, phases)) / 6)[None]


def test_copies_are_as_alike_as_can_be_and_pairs_of_different_sizes_do_not_count():
    varied, other_size = [smooth(seed) for seed in range(4)], smooth(0, (30, 20, 22))
    assert pairwise_ms_ssim([varied[0]] * 3) == pytest.approx(1)
    found = pairwise_ms_ssim(varied)
    assert found < 0.9
    assert pairwise_ms_ssim([*varied, other_size]) == found
    assert math.isnan(pairwise_ms_ssim([varied[0], other_size]))
    assert math.isnan(pairwise_ms_ssim([smooth(0, (24, 19, 22)), smooth(1, (24, 19, 22))]))  # too small


def test_large_volumes_are_shrunk_before_they_are_compared():
    assert shrunk(torch.ones(1, 130, 20, 64)).shape == (1, 64, 20, 64)
    assert torch.equal(shrunk(torch.full((1, 128, 4, 4), 2.0)), torch.ones(1, 64, 4, 4))  # as samples are written


def test_spectrum_has_a_wave_where_it_belongs_and_its_energy():
    wave = torch.cos(2 * torch.pi * 0.25 * torch.arange(32))[None, :, None, None].expand(1, 32, 16, 16)
    spectrum = power_spectrum(0.1 * wave + 7)
    assert spectrum[8] > -10 and torch.cat([spectrum[1:8], spectrum[9:]]).max() < -100
    assert spectrum[0].isnan()  # too small for such a wave; the mean does not count
    noise = 0.1 * torch.randn(1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(power_spectrum(noise)[2:], torch.full((14,), -20.0, dtype=torch.float64), atol=1.5)


def test_spectrum_of_a_small_volume_is_not_defined_where_it_has_no_frequency():
    spectrum = power_spectrum(torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert spectrum.isnan().any() and spectrum.isfinite().sum() >= 2


def test_gaussian_with_covariance_has_mean_and_covariance_of_the_latents():
    random = torch.Generator().manual_seed(0)
    shape = (2, 1, 1, 2)
    mixing = torch.randn(4, 4, generator=random)
    latents = [(mixing @ torch.randn(4, generator=random) + 3).reshape(shape) for _ in range(12)]
    gaussian = CovarianceGaussian([shape] * 4000, [tuple(z.shape) for z in latents], seed=0)
    for z in latents:
        gaussian.add(z)
    real, found = (torch.stack(each).flatten(1).double() for each in (latents, [sample.z for sample in gaussian.samples]))
    assert torch.allclose(found.mean(0), real.mean(0), atol=0.2)
    assert torch.allclose(found.t().cov(), real.t().cov(), rtol=0.15, atol=0.3)


def test_gaussian_with_covariance_keeps_sizes_apart():
    one, other, single = (2, 1, 1, 2), (2, 1, 2, 2), (2, 3, 1, 1)
    gaussian = CovarianceGaussian([one, single, other], [one, other, one, single, other], seed=0)
    for i, shape in enumerate([one, other, one, single, other]):
        gaussian.add(torch.full(shape, float(i)))
    assert [tuple(sample.z.shape) for sample in gaussian.samples] == [one, other]
    assert all(len(sample.z.unique()) == 1 for sample in gaussian.samples)  # sums of constants are constant


def test_plain_gaussian_has_the_deviation_of_each_channel():
    ((sample, *_),) = plain_gaussian([(2, 20, 20, 20)], torch.tensor([0.1, 2.0]), seed=0)
    assert torch.allclose(sample.flatten(1).std(1), torch.tensor([0.1, 2.0]), rtol=0.05)
    assert torch.allclose(sample.flatten(1).mean(1), torch.zeros(2), atol=0.1)


def test_features_say_where_and_how_rough_and_do_not_depend_on_the_size():
    volume = torch.zeros(1, 16, 16, 16)
    volume[:, :4, :4, :4] = torch.tensor([0.0, 1.0]).repeat(32).reshape(1, 4, 4, 4)
    mean, deviation, edges = local_statistics(volume).chunk(3)
    assert mean[0] == deviation[0] == 0.5 and edges[0] > 0.3
    assert mean[1:].abs().max() == deviation[1:].max() == 0
    assert len(local_statistics(torch.rand(1, 9, 30, 11))) == len(local_statistics(volume)) == 3 * 64
    assert len(coarse_latent(torch.rand(24, 3, 5, 4))) == 4 * 64


def test_channel_statistics_are_in_units_of_the_channels():
    z = torch.stack([torch.tensor([1.0, 5.0]), torch.tensor([-20.0, 20.0])]).reshape(2, 2, 1, 1)
    assert channel_statistics(z, torch.tensor([1.0, 10.0])).tolist() == [3, 0, 2, 2]


def test_features_are_standardised_and_constant_ones_do_not_explode():
    real = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert torch.equal(standardised(real, real), torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
    assert float(standardised(torch.tensor([[2.0, 5.1]]), real)[0, 1]) == pytest.approx(1, rel=1e-4)


def test_class_of_a_volume_is_that_of_the_nearest_mean():
    training = torch.tensor([[x, 0.0] for x in (0.0, 1.0, 5.0, 6.0)])
    labels, queries = ["a", "a", "b", "b"], torch.tensor([[x, 0.0] for x in (-9.0, 2.0, 4.0, 9.0)])
    for asked, share in ((["a", "a", "b", "b"], 1), (["b", "a", "a", "b"], 0.5), (["c", "", "a", "b"], 0.5)):
        assert share_obeyed(queries, asked, training, labels, ["a", "b"]) == share
    assert math.isnan(share_obeyed(queries, [""] * 4, training, labels, ["a", "b"]))
