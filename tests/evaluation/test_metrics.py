"""Metrics: each measures what it is for, and equals MONAI's where MONAI has it."""

from __future__ import annotations

import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric

from scripts.evaluation.metrics import (
    EdgePSNRMetric,
    ForegroundPSNRMetric,
    GridEnergyMetric,
    LargeVolumeMSSSIMMetric,
    SharpnessMetric,
    grid_energy,
    trilinear_reconstruction,
)


def test_foreground_psnr_ignores_air():
    image = torch.zeros(1, 1, 4, 4, 4)
    image[..., :2] = 0.5
    pred = image.clone()
    pred[..., :2] += 0.1  # an error of 0.1 in the foreground
    metric = ForegroundPSNRMetric(max_val=1.0)
    metric(pred, image)
    assert metric.aggregate().item() == pytest.approx(20.0, abs=1e-4)
    metric.reset()
    metric(torch.cat([pred, image + 0.01]), torch.cat([image, image]))
    assert metric.get_buffer().flatten().tolist() == pytest.approx([20.0, 40.0], abs=1e-3)


def test_edge_psnr_looks_at_the_voxels_with_the_largest_gradients():
    image = torch.zeros(1, 1, 20, 5, 1)
    image[:, :, 10:] = 1  # an edge between two of twenty planes
    pred = image.clone()
    pred[:, :, 9:11] += 0.1
    metric = EdgePSNRMetric(max_val=1.0)
    metric(pred, image)
    assert metric.aggregate().item() == pytest.approx(20.0, abs=1e-4)


def test_sharpness_is_one_for_the_image_and_less_for_a_blurred_one():
    image = torch.rand(2, 1, 16, 16, 16)
    metric = SharpnessMetric()
    metric(torch.cat([image, trilinear_reconstruction(image, (4, 4, 4))]), torch.cat([image, image]))
    same, blurred = metric.get_buffer().flatten().split(2)
    assert torch.allclose(same, torch.ones(2)) and (blurred < 0.5).all()


def test_trilinear_reconstruction_keeps_the_shape_and_blurs():
    image = torch.rand(1, 1, 19, 16, 8)
    blurred = trilinear_reconstruction(image, (8, 8, 8))
    assert blurred.shape == image.shape
    assert blurred.std() < image.std() / 2


def test_ms_ssim_is_monais_for_volumes_that_are_large_enough():
    torch.manual_seed(0)
    image = torch.rand(1, 1, 12, 13, 14)
    arguments = {"spatial_dims": 3, "kernel_size": 3, "weights": (0.3, 0.3, 0.4)}
    ours, monais = LargeVolumeMSSSIMMetric(**arguments), MultiScaleSSIMMetric(**arguments)
    noisy = image + 0.1 * torch.rand_like(image)
    assert torch.equal(ours(noisy, image), monais(noisy, image))
    ours(noisy[..., :11], image[..., :11])
    assert torch.isnan(ours.get_buffer()).flatten().tolist() == [False, True]
    assert ours.aggregate() == monais.aggregate()


def test_grid_energy_sees_blocks_and_checkerboards_and_nothing_in_noise():
    torch.manual_seed(0)
    noise = torch.rand(1, 1, 65, 65, 65)
    blocks = noise[..., ::8, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    checkerboard = noise + 0.3 * (torch.arange(65) % 4 == 0)
    assert grid_energy(noise, [8, 8, 8]) < 0.05
    assert grid_energy(blocks + 0.1 * torch.rand_like(blocks), [8, 8, 8]) > 1
    assert grid_energy(checkerboard, [8, 8, 8]) > 0.15


def test_grid_energy_is_measured_for_each_volume():
    torch.manual_seed(0)
    images = torch.rand(2, 1, 16, 16, 16)
    images[1, :, ::4] += 1  # a plane of its own at every fourth voxel
    found = GridEnergyMetric()(images, torch.tensor([[4, 4, 4], [4, 4, 4]])).flatten().tolist()
    assert found == pytest.approx([grid_energy(images[:1], [4, 4, 4]), grid_energy(images[1:], [4, 4, 4])])
    assert found[1] > 3 * found[0]
