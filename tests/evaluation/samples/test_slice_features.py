"""Features of slices, by weights that an optional package ships."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from scripts.evaluation.samples import features
from scripts.evaluation.samples.features import IMAGE_SIZE, NUM_SLICES, images, load_slice_network, slice_features

installed = pytest.mark.skipif(load_slice_network() is None, reason="the extra `features` is not installed")


def waves(*shape: int) -> torch.Tensor:
    """A volume that does not depend on a random generator."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    return (0.5 + sum(torch.sin((3 + 2 * i) * a) for i, a in enumerate(axes)) / 6)[None]


@installed
def test_network_gives_the_numbers_of_the_package_of_its_authors():
    """What `extract_features` of efficientnet-lite-pytorch 0.1.0 gives, averaged over the image."""
    network = load_slice_network()
    assert network is not None
    found = network(images(waves(32, 40, 24), 1)[:2])
    assert found.shape == (2, 1280)
    expected = torch.tensor([[1.862464, 1.242191, 5.818149, 5.490334], [1.773819, 1.074758, 5.789602, 5.493851]])
    assert torch.allclose(found[:, [100, 900, 71, 957]], expected, atol=1e-4)
    assert (found[:, [0, 500, 1279]] == 0).all()


@installed
def test_features_do_not_depend_on_the_size_and_see_blur_and_each_channel():
    network = load_slice_network()
    assert network is not None
    small, large = waves(32, 40, 24), waves(64, 80, 48)
    noisy = small + 0.1 * torch.randn(small.shape, generator=torch.Generator().manual_seed(0))
    one, same, other = (slice_features(volume, network) for volume in (small, large, noisy))
    assert one.shape == (3 * 1280,)
    assert (one - other).norm() > 3 * (one - same).norm()
    both = slice_features(torch.cat([small, noisy]), network).unflatten(0, (3, 2, -1))
    assert torch.allclose(both[:, 0].flatten(), one, atol=1e-4)
    assert torch.allclose(both[:, 1].flatten(), other, atol=1e-4)


def test_slices_are_those_across_the_axis_evenly_spaced():
    volume = torch.arange(16.0).reshape(1, 1, 16, 1).expand(2, 4, 16, 6) / 15
    found = images(volume, 2).unflatten(0, (NUM_SLICES, 2))
    assert found.shape == (NUM_SLICES, 2, 3, IMAGE_SIZE, IMAGE_SIZE)
    values = (found.amax((1, 2, 3, 4)) + 1) / 2
    assert torch.allclose(values, torch.arange(1.0, 16, 2) / 15)
    assert torch.equal(found.amax((1, 2, 3, 4)), found.amin((1, 2, 3, 4)))


def test_average_is_over_the_slices_of_a_plane():
    class Brightness(torch.nn.Module):
        """In place of the network."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    volume = torch.zeros(1, 8, 8, 8)
    volume[:, 0] = 1
    found = slice_features(volume, Brightness()).reshape(3, 3)
    assert torch.allclose(found, torch.full((3, 3), 2 / 8 - 1), atol=1e-5)


@installed
def test_other_weights_are_refused(tmp_path, monkeypatch):
    file = Path(features.FILE)
    (tmp_path / "other_features" / file.parent).mkdir(parents=True)
    (tmp_path / "other_features" / "__init__.py").write_text("raise SystemExit('code of the package is run')")
    (tmp_path / "other_features" / file).write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(features, "PACKAGE", "other_features")
    with pytest.raises(ValueError, match=r"is not the file of version 0\.1\.0 of other_features"):
        load_slice_network()
    shutil.rmtree(tmp_path / "other_features")
    assert load_slice_network() is None
