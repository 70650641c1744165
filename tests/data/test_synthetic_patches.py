"""Synthetic volumes that are made while training runs."""

from __future__ import annotations

import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose
from torch.utils.data import ConcatDataset

from scripts.data import HeadPatchd, ProceduralVolumed
from scripts.data.synthetic_patches import bent_grid, fractal_noise, head_patch, procedural_volume, share_inside
from scripts.training import RepeatableDataset
from scripts.training.repeatable_batches import Draw

SIZE = (24, 20, 16)


@pytest.fixture(scope="module")
def tissues() -> torch.Tensor:
    """Six shells around a centre, in place of the atlas."""
    axes = torch.meshgrid(*[torch.arange(40) - 20.0] * 3, indexing="ij")
    radius = torch.stack(axes).square().sum(0).sqrt()
    shells = [(6, 10), (3, 6), (0, 3), (10, 12), (12, 14), (14, 17)]
    return torch.stack([((radius >= low) & (radius < high)).float() for low, high in shells])


@pytest.mark.parametrize("kind", ["head", "procedural"])
def test_a_volume_depends_on_its_seed_alone_and_lies_in_the_window(kind, tissues):
    make = (lambda seed: head_patch(tissues, SIZE, seed)) if kind == "head" else (lambda seed: procedural_volume(SIZE, seed))
    torch.manual_seed(0)
    first = [make(seed) for seed in range(8)]
    torch.manual_seed(1)
    assert all(torch.equal(make(seed), volume) for seed, volume in enumerate(first))
    assert all(volume.shape == SIZE and volume.dtype == torch.float32 for volume in first)
    assert all(volume.min() >= 0 and volume.max() <= 1 and torch.isfinite(volume).all() for volume in first)
    assert len({float(volume.mean()) for volume in first}) == len(first)
    assert sum(float(volume.std()) > 0.02 for volume in first) >= 6  # hardly any is empty


def test_noise_has_the_spectrum_that_is_asked_for():
    noise = fractal_noise((64, 64, 64), (1.0, 1.0, 1.0), 2.0, torch.Generator().manual_seed(0))
    assert noise.mean().abs() < 1e-4 and torch.isclose(noise.std(), torch.tensor(1.0))
    power = torch.fft.rfftn(noise)[1:32, 0, 0].abs().log()
    slope = (
        torch.linalg.lstsq(torch.stack([torch.arange(1, 32).log(), torch.ones(31)], dim=1), power[:, None])
        .solution[0]
        .item()
    )
    assert slope == pytest.approx(-2, abs=0.3)


def test_thick_slices_have_rougher_noise_across_than_within():
    noise = fractal_noise((48, 48, 48), (1.0, 1.0, 6.0), 1.5, torch.Generator().manual_seed(0))
    within, across = noise.diff(dim=0).std(), noise.diff(dim=2).std()
    assert across > 1.3 * within


@pytest.mark.parametrize("normal", [(1.0, 0.0, 0.0), (1.0, 2.0, 0.5)])
def test_an_edge_takes_its_share_of_a_voxel(normal):
    """As a box of the scanner's size would measure it, wherever the edge lies between the voxels."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(12.0)] * 3, indexing="ij"))
    direction = torch.tensor(normal) / torch.tensor(normal).norm()
    fine = torch.stack(torch.meshgrid(*[torch.arange(-0.5, 11.5, 0.1) + 0.05] * 3, indexing="ij"))
    for offset in (4.3, 5.0, 5.8):
        share = share_inside(torch.einsum("i,ixyz->xyz", direction, grid) - offset)
        exact = (torch.einsum("i,ixyz->xyz", direction, fine) > offset).float()
        assert share.sum().item() == pytest.approx(exact.sum().item() / 1000, rel=0.02)
        assert ((share > 0) & (share < 1)).any() or offset == 5.0


def test_a_bent_grid_keeps_its_orientation_and_spacing():
    points = bent_grid(SIZE, (1.0, 1.0, 4.0), torch.Generator().manual_seed(3))
    assert points.shape == (3, *SIZE)
    steps = [points[axis].diff(dim=axis).mean().item() for axis in range(3)]
    assert steps == pytest.approx([1, 1, 4], rel=0.3)


def test_items_of_mixed_datasets_are_seeded_by_their_draws():
    parts = {"a head": HeadPatchd, "a procedural volume": ProceduralVolumed}
    datasets = [
        Dataset(count * [{"image": name}], Compose([parts[name]("image", SIZE)])) for name, count in zip(parts, (2, 3))
    ]
    dataset = RepeatableDataset(ConcatDataset(datasets))
    draws = [Draw(item, 10 + item) for item in range(5)]
    forward = [dataset[draw][0] for draw in draws]
    backward = [dataset[draw][0] for draw in reversed(draws)][::-1]
    assert [item["file"] for item in forward] == 2 * ["a head"] + 3 * ["a procedural volume"]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(forward, backward))
    assert not torch.equal(dataset[Draw(2, 99)][0]["image"], forward[2]["image"])
