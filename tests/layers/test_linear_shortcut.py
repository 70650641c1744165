"""The linear shortcut: its initialisation, its fits, and that the network beside it only corrects it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.fft import dctn, idctn

from scripts.evaluation.metrics import grid_energy
from scripts.layers.linear_codes import RIDGES
from scripts.layers.linear_shortcut import LinearShortcut, beside_neighbours
from scripts.training.initial_weights import InitialWeights, fit_shortcut
from scripts.training.repeatable_batches import RepeatableBatchSampler
from tests.conftest import head_like
from tests.test_autoencoderkl import build, image_for


def shortcut_network(**arguments):
    defaults = {"initial_downsample_factor": 2, "initial_mode": "pixelshuffle", "latent_channels": 24}
    return build(linear_shortcut=True, **{**defaults, **arguments})


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
    assert code.fit([image] * 100) == 51200  # so many that the prior of cosine waves has no weight
    assert (code(image) - image).square().mean() < 1e-4 * before
    assert torch.allclose(code.encode(image).square().mean(dim=(0, 2, 3, 4)), torch.ones(6), atol=1e-3)


def smooth_volume(seed: int) -> torch.Tensor:
    """Noise of which an eighth of the frequencies is left along each axis."""
    noise = torch.randn(1, 1, 24, 24, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise[..., ::4, ::4, ::4], scale_factor=4, mode="trilinear")


def test_voxels_are_seen_beside_the_differences_to_their_neighbours():
    z = torch.rand(2, 3, 4, 5)
    seen = beside_neighbours(z).unflatten(1, (5, 3))
    assert torch.equal(seen[:, 0], z)
    assert torch.equal(seen[:, 1, :, 1:], z[:, :, :-1] - z[:, :, 1:])
    assert torch.equal(seen[:, 4, :, :, :-1], z[:, :, :, 1:] - z[:, :, :, :-1])
    assert (seen[:, 1, :, 0] == 0).all() and (seen[:, 4, :, :, -1] == 0).all()  # nothing is known beyond the border


@pytest.mark.parametrize("factors", [(4, 4, 4), (8, 4, 2)])
def test_fitted_neighbours_win_on_a_volume_that_was_not_seen(factors):
    code = LinearShortcut(1, 8, factors)
    code.fit([smooth_volume(seed) for seed in range(40)])
    unseen = smooth_volume(1000)
    with torch.no_grad():
        alone = code(unseen)
        overlapped = [2 * n // f - 1 for n, f in zip(unseen.shape[2:], factors)]  # blocks, by half of them
        assert code.fit_neighbours([smooth_volume(seed) for seed in range(40, 140)]) == 100 * math.prod(overlapped)
        together = code(unseen)
    assert (together - unseen).square().mean() < 0.7 * (alone - unseen).square().mean()
    assert grid_energy(together, factors) < 0.8 * grid_energy(alone, factors)


def test_fitted_neighbours_are_the_ridge_regression():
    torch.manual_seed(0)
    code = LinearShortcut(1, 3, (2, 2))
    images = torch.rand(16, 1, 4, 4)
    latent = code.encode(images).detach()
    code.fit_neighbours([images])
    # the same in one piece: the prior is a row for each feature, with the decoder without neighbours as its target
    start = LinearShortcut(1, 3, (2, 2))
    seen = beside_neighbours(latent).transpose(0, 1).flatten(1).t()
    blocks = torch.nn.functional.pixel_unshuffle(images, 2).transpose(0, 1).flatten(1).t()
    functions = torch.zeros(15, 4)
    functions[:3] = (start.outer.synthesis * start.scale.view(3, 1, 1, 1)).flatten(1).detach()
    weight = RIDGES[0] ** 0.5  # without held-out images, the strongest
    rows = torch.cat([seen, weight * torch.eye(15)])
    solution = torch.linalg.lstsq(rows, torch.cat([blocks, weight * functions])).solution
    expected = torch.nn.functional.pixel_shuffle((seen @ solution).t().reshape(4, 16, 2, 2).transpose(0, 1), 2)
    assert torch.allclose(code.decode(latent), expected, atol=1e-5)


def test_few_blocks_fit_no_worse_than_cosine_waves():
    code = LinearShortcut(1, 64, (8, 8, 8))
    unseen = smooth_volume(1000)
    with torch.no_grad():
        waves = (code(unseen) - unseen).square().mean()
        assert code.fit([smooth_volume(1), smooth_volume(2)]) == 36  # of 512 voxels, for 64 functions
        assert (code(unseen) - unseen).square().mean() < 1.05 * waves


def test_neighbours_without_information_get_no_weight():
    def noise(seed):
        return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))

    code = LinearShortcut(1, 8, (4, 4, 4))
    unseen = noise(1000)
    with torch.no_grad():
        code.fit([noise(seed) for seed in range(4)])
        alone = (code(unseen) - unseen).square().mean()
        code.fit_neighbours([noise(seed) for seed in range(4, 8)])
        assert 0 < code.outer.neighbours.abs().max() < 0.01 * code.outer.synthesis.abs().max()
        assert (code(unseen) - unseen).square().mean() < 1.001 * alone


def test_a_code_too_large_for_neighbours_has_none():
    large = LinearShortcut(1, 256, (64, 64, 64))
    assert large.halo == 0 and large.fit_neighbours([torch.rand(1, 1, 64, 64, 64)]) == 0
    for latent_channels, size in ((24, 8), (64, 16), (256, 32)):
        code = LinearShortcut(1, latent_channels, (size,) * 3)
        assert code.outer.neighbours is not None and code.halo == 1
        assert sum(p.numel() for p in code.parameters()) <= 10_000_000


def test_fitter_fits_a_new_run_alike_in_every_process_and_leaves_a_resumed_one(monkeypatch):
    class Patches:
        def __getitem__(self, draw):
            generator = torch.Generator().manual_seed(draw.seed)
            return [{"image": torch.rand(1, 16, 16, 16, generator=generator)}]

    weights = []
    for rank, resumed in ((0, False), (1, False), (0, True)):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda rank=rank: rank)
        network = shortcut_network()
        sampler = RepeatableBatchSampler(num_items=3, batch_size=1, seed=5)
        state = SimpleNamespace(dataloader=SimpleNamespace(dataset=Patches(), batch_sampler=sampler))
        torch.manual_seed(rank)
        saver = SimpleNamespace(network=network, resume=lambda _, resumed=resumed: resumed)
        start = InitialWeights(saver, resume=True, fit_shortcut=True)
        start(SimpleNamespace(state=state))
        weights.append(network.shortcut.state_dict())
    fresh = shortcut_network().shortcut.state_dict()
    for name in fresh:
        assert torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(weights[2][name], fresh[name])
        assert not torch.equal(weights[0][name], weights[2][name])


def test_a_code_that_was_fitted_or_loaded_is_not_fitted_again():
    fitted = shortcut_network()
    fitted.shortcut.fit([torch.rand(1, 1, 16, 16, 16)])
    loaded = shortcut_network()
    assert loaded.shortcut.is_as_built() and LinearShortcut(2, 20, (2, 2)).is_as_built()
    loaded.load_state_dict(fitted.state_dict())
    fit_shortcut(loaded.shortcut, dataset=None, sampler=None)
    assert all(torch.equal(weight, fitted.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_network_starts_as_a_small_correction_of_the_shortcut():
    network = shortcut_network()
    image = image_for(network, 4)
    difference = network.reconstruct(image) - network.shortcut(image)
    assert 0 < difference.abs().mean() < 0.02
    assert network.encode(image)[1].mean() < 0.1


def test_networks_beside_a_shortcut_start_with_filters_that_see_detail_alone():
    for arguments in ({}, {"initial_mode": "conv"}, {"initial_downsample_factor": 1}):
        network = shortcut_network(**arguments)
        image = image_for(network, 4)
        for layer, name in ((network.encoder.blocks[0], "encoder"), (network.decoder.refine, "decoder")):
            inside = (slice(None), slice(None), *[slice(1, -1)] * 3)  # zeros around the volume are an edge
            brighter = layer(image + 1)[inside] - layer(image)[inside]
            contrast = layer(2 * image)[inside] - layer(image)[inside]
            assert brighter.abs().max() < 1e-4 < 0.1 < contrast.std(), name


def test_correction_of_each_latent_channel_has_the_same_amplitude_in_the_image():
    code = LinearShortcut(1, 24, (8, 8, 8))
    code.fit([smooth_volume(seed)[..., :16] for seed in range(30)])
    assert code.scale.max() > 5 * code.scale.min()
    image = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        for channel in range(24):
            correction = torch.zeros(1, 24, 1, 1, 1)
            correction[:, channel] = 1
            change = code.decode(code.encode(image, correction)) - code(image)
            assert change.square().mean().sqrt().item() == pytest.approx(0.05, rel=0.01)


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
