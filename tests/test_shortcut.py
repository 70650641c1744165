"""The linear shortcut: where it starts, what it is fitted to, and that the network only corrects it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy.fft import dctn, idctn

from scripts.sampling import RepeatableBatchSampler
from scripts.shortcut import LinearShortcut, ShortcutFitter
from tests.conftest import head_like
from tests.test_autoencoderkl import build, image_for


def shortcut_network(**arguments):
    return build(
        initial_downsample_factor=2,
        initial_mode="pixelshuffle",
        linear_shortcut=True,
        **{"latent_channels": 24, **arguments},
    )


def test_shortcut_starts_as_the_lowest_frequencies_of_the_dct():
    network = shortcut_network()
    image = image_for(network, 2)
    linear = network.shortcut(image)[0, 0].detach().numpy()
    order = sorted((i * i + j * j + k * k, (i, j, k)) for i in range(8) for j in range(8) for k in range(8))[:24]
    for corner in [(0, 0, 0), (8, 0, 8)]:
        block = tuple(slice(c, c + 8) for c in corner)
        spectrum = dctn(image[0, 0].numpy()[block], norm="ortho")
        kept = spectrum * 0
        for _, index in order:
            kept[index] = spectrum[index]
        assert abs(linear[block] - idctn(kept, norm="ortho")).max() < 1e-5


def test_large_code_is_factorised_and_starts_as_nearly_the_same_waves():
    code = LinearShortcut(1, 256, (32, 32, 32))
    assert code.inner is not None
    assert sum(p.numel() for p in code.parameters()) <= 10_000_000
    assert sum(p.numel() for p in LinearShortcut(1, 256, (64, 64, 64)).parameters()) <= 10_000_000
    torch.manual_seed(0)
    latent = torch.randn(1, 256, 2, 2, 2)
    with torch.no_grad():
        again = code.encode(code.decode(latent))
        image = code.decode(latent)
        assert (code(image) - image).std() < 0.05 * image.std()
    assert (again - latent).std() < 0.05


@pytest.mark.parametrize("factors", [(4, 4, 4), (4, 4, 2)])
def test_fitted_code_is_the_best_linear_one(factors):
    torch.manual_seed(0)
    code = LinearShortcut(1, 6, factors)
    mixing = torch.randn(6, *factors)  # blocks of six dimensions: six coefficients hold all of them
    weights = torch.randn(6, 512)
    blocks = torch.einsum("khwd,kn->nhwd", mixing, weights)
    image = torch.cat(list(blocks.split(1)), dim=1)[None]  # along one axis
    before = (code(image) - image).square().mean()
    assert code.fit([image]) == 512
    assert (code(image) - image).square().mean() < 1e-6 < before
    assert torch.allclose(code.encode(image).square().mean(dim=(0, 2, 3, 4)), torch.ones(6), atol=1e-3)


def test_fitter_fits_a_new_run_alike_in_every_process_and_leaves_a_resumed_one(monkeypatch):
    class Patches:
        def __getitem__(self, draw):
            generator = torch.Generator().manual_seed(draw.seed)
            return [{"image": torch.rand(1, 16, 16, 16, generator=generator)}]

    weights = []
    for rank, iteration in ((0, 0), (1, 0), (0, 7)):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda rank=rank: rank)
        network = shortcut_network()
        sampler = RepeatableBatchSampler(num_items=3, batch_size=1, seed=5)
        state = SimpleNamespace(iteration=iteration, dataloader=SimpleNamespace(dataset=Patches()))
        torch.manual_seed(rank)
        ShortcutFitter(network, sampler)(SimpleNamespace(state=state))
        weights.append(network.shortcut.outer.analysis.detach())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], shortcut_network().shortcut.outer.analysis)
    assert not torch.equal(weights[0], weights[2])


def test_network_starts_as_a_small_correction_of_the_shortcut():
    network = shortcut_network()
    image = image_for(network, 4)
    difference = network.reconstruct(image) - network.shortcut(image)
    assert 0 < difference.abs().mean() < 0.02
    assert network.encode(image)[1].mean() < 0.1


def test_latent_of_a_volume_has_about_unit_variance():
    network = shortcut_network()
    volume = torch.from_numpy(head_like((64, 64, 64)).astype("float32")) / 1000
    z_mu, _ = network.encode(volume[None, None].clamp(0, 1))
    assert 0.3 < z_mu.std() < 3


def test_shortcut_is_trained_and_off_by_default():
    assert build().shortcut is None
    network = shortcut_network().train()
    network(image_for(network, 2))[0].square().mean().backward()
    assert all((p.grad != 0).any() for p in network.shortcut.parameters())


def test_shortcut_with_several_channels_and_more_latents_than_voxels():
    network = build(
        channels=(4, 8),
        attention_levels=[False] * 2,
        in_channels=2,
        out_channels=2,
        latent_channels=20,
        downsample_factors=[2],
        linear_shortcut=True,
    )
    image = image_for(network, 2)  # 2 x 2^3 numbers per block fit into 20 latent channels: the code is lossless
    assert torch.allclose(network.shortcut(image), image, atol=1e-5)
