"""How a volume follows its spatial conditions, where the right number is known."""

from __future__ import annotations

import math

import pytest
import torch

from scripts.evaluation.samples.spatial_evaluation import border_step, explained_share, fidelity, inside_mae

LABELS = torch.zeros(1, 6, 6, 6, dtype=torch.int32)
LABELS[0, 1:5, 1:5, 1:3], LABELS[0, 1:5, 1:5, 3:5] = 2, 7


def test_label_map_explains_a_volume_that_is_constant_in_each_class():
    volume = torch.where(LABELS == 2, 0.25, 0.75)
    assert explained_share(volume, LABELS) == pytest.approx(1)
    assert explained_share(volume, LABELS.flip(1)) == pytest.approx(1)  # the names of the classes do not count
    across = LABELS.transpose(1, 3)  # each class has as many voxels of the volume's classes
    assert explained_share(volume, across) == pytest.approx(0, abs=1e-9)


def test_share_is_that_of_the_variance_between_classes_where_there_are_labels():
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 6, 6, 6, generator=random)
    inside = LABELS[0] > 0
    means = torch.stack([noise[:, LABELS[0] == label].mean(1) for label in (2, 7)], 1)
    centred = noise - torch.where(LABELS == 2, *means[..., None, None, None].unbind(1))
    volume = centred + torch.where(LABELS == 2, 0.0, 1.0)  # half a unit from the mean, in both channels
    within = centred[:, inside].square().mean(1).sum()
    assert explained_share(volume, LABELS) == pytest.approx(float(0.5 / (0.5 + within)), rel=1e-5)
    assert explained_share(volume + 100 * ~inside, LABELS) == pytest.approx(float(0.5 / (0.5 + within)), rel=1e-5)


def test_nothing_is_explained_of_a_constant_volume_or_without_labels():
    assert math.isnan(explained_share(torch.ones(1, 6, 6, 6), LABELS))
    assert math.isnan(explained_share(torch.rand(1, 6, 6, 6), torch.zeros_like(LABELS)))


def test_fidelity_is_that_of_the_error():
    truth = torch.rand(1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    found = fidelity(truth + 0.1, truth)
    assert found["psnr"] == pytest.approx(20, abs=1e-3) and 0.5 < found["ssim"] < 1
    assert fidelity(truth, truth)["ssim"] == pytest.approx(1)
    assert math.isnan(fidelity(truth[..., :10], truth[..., :10])["ssim"])


def test_only_what_is_inside_counts():
    truth = torch.zeros(2, 6, 6, 6)
    volume = torch.where(LABELS > 0, torch.tensor([0.25, -0.75])[:, None, None, None], 9.0)
    assert inside_mae(volume, truth, LABELS) == pytest.approx(0.5)


def test_step_is_that_between_both_sides_of_the_border():
    volume = torch.where(LABELS > 0, 0.3, 0.1)
    volume[:, 2:4, 2:4, 2:4] = 9.0  # does not touch the border
    volume[:, 0, 0, 0] = 9.0
    assert border_step(volume, LABELS) == pytest.approx(0.2)
    volume[:, 1:5, 1:5, 0] = 0.3  # level at one of six faces
    assert border_step(volume, LABELS) == pytest.approx(0.2 * 5 / 6)
    assert math.isnan(border_step(volume, torch.ones_like(LABELS)))
