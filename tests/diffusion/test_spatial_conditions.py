"""Spatial conditions of a generator: what the network sees of them, in training and in sampling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scripts.data.spatial_kinds import SpatialKind
from scripts.diffusion.conditions import Conditions, Volume
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.objective import FlowPrepareBatch
from scripts.diffusion.preconditioning import PREDICTIONS, Denoiser
from scripts.diffusion.sampler import Generator, Sampler
from scripts.diffusion.statistics import Geometry, LatentAutoencoder, LatentStatistics
from scripts.diffusion.training_data import LatentCollate
from tests.diffusion.runs import leave_start

SIZE = (3, 5, 4)
VOLUME = Volume([6, 10, 8], [1.0, 1.0, 1.0])


@pytest.fixture
def statistics() -> LatentStatistics:
    """Latents of two channels, with a label map of three classes and an image as spatial conditions."""
    network = {"initial_downsample_factor": [2, 2, 2], "downsample_factors": []}
    return LatentStatistics(
        autoencoder=LatentAutoencoder(network, "0" * 64),
        volumes=1,
        latent_gamma=1.0,
        channel_mean=[1.0, 2.0],
        channel_deviation=[2.0, 4.0],
        channel_amplitude=[1.0, 0.5],
        conditions=Conditions.learn([], [VOLUME]),
        geometries=[Geometry([6, 10, 8], [1.0, 1.0, 1.0], 1)],
        intensity_low=[0.0],
        intensity_high=[1.0],
        data_type="<f4",
        scl_slope=1.0,
        scl_inter=0.0,
        spatial={"label": SpatialKind((1, 2, 5)), "t2": SpatialKind()},
    )


def latents_of_conditions() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"label": torch.randn(6, *SIZE), "t2": torch.randn(2, *SIZE)}


def denoiser(statistics: LatentStatistics, **arguments) -> Denoiser:
    torch.manual_seed(0)
    arguments = {"spatial_channels": statistics.spatial_channels, "prediction": "x", **arguments}
    unet = {"attention_levels": [False, True], "norm_num_groups": 4, "num_head_channels": 8}
    return Denoiser(3, 2, len(statistics.conditions), [8, 16], **unet, **arguments)


def test_network_sees_normalised_latents_and_which_are_given(statistics):
    given = latents_of_conditions()
    stacked, known = statistics.stacked(given, SIZE)
    seen = statistics.spatial_input(stacked[None], known[None])[0]
    assert len(seen) == statistics.spatial_channels == len(statistics.spatial_entries) == 3 * 2 + 2 + 2
    # plane by plane as the image's latents are: minus 1 and 2, times 1 / 2 and 0.5 / 4
    torch.testing.assert_close(seen[:6:2], (given["label"][::2] - 1) / 2)
    torch.testing.assert_close(seen[1:6:2], (given["label"][1::2] - 2) / 8)
    torch.testing.assert_close(seen[6], (given["t2"][0] - 1) / 2)
    assert (seen[8:] == 1).all()
    assert statistics.spatial_entries[3] == ("label", "class 2", 1) and statistics.spatial_entries[8:] == [
        ("label",),
        ("t2",),
    ]


def test_missing_conditions_are_zeros(statistics):
    stacked, known = statistics.stacked({"t2": latents_of_conditions()["t2"]}, SIZE)
    seen = statistics.spatial_input(stacked[None], known[None])[0]
    assert not seen[:6].any() and not seen[8].any() and (seen[9] == 1).all() and seen[6:8].any()
    none = statistics.spatial_input(*(each[None] for each in statistics.stacked({}, SIZE)))
    assert none.shape == (1, 10, *SIZE) and not none.any()


def test_training_leaves_each_out_at_random_and_all_with_the_null_vector(statistics):
    stacked, known = statistics.stacked(latents_of_conditions(), SIZE)
    item = {"image": torch.zeros(2, *SIZE), "spatial": stacked, "given": known, "volume": VOLUME, "file": ""}
    prepare = FlowPrepareBatch(statistics, RectifiedFlow(), condition_dropout=0.4)
    batch = LatentCollate(2)([{**item, "seed": seed} for seed in range(400)])
    arguments = prepare(batch)[3]
    kept = arguments["spatial"][:, 8:, 0, 0, 0].bool()
    null = ~arguments["context"].any(1)
    assert not kept[null].any()
    assert kept[~null].float().mean(0).numpy() == pytest.approx(0.6, abs=0.08)
    again = prepare(LatentCollate(2)([{**item, "seed": seed} for seed in (7, 3)]))[3]
    assert torch.equal(again["spatial"], arguments["spatial"][[7, 3]])
    validated = prepare.at_time(batch, 0.5, torch.device("cpu"))[3]["spatial"]
    assert (validated[:, 8:, :3, :5, :4] == 1).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conditions_change_the_estimate_once_the_layers_have_weights(statistics, prediction):
    network = denoiser(statistics, prediction=prediction)
    x, time, context = torch.randn(1, 2, 4, 6, 4), torch.tensor([0.7]), torch.randn(1, len(statistics.conditions))
    spatial = torch.randn(1, 10, 4, 6, 4)
    leave_start(network)
    scripted = torch.jit.script(network)
    found = network(x, time, context, None, spatial)
    assert not torch.allclose(found, network(x, time, context, None, torch.zeros_like(spatial)))
    torch.testing.assert_close(scripted(x, time, context, None, spatial), found)


def test_guidance_compares_with_nothing_given(statistics):
    network = denoiser(statistics)
    leave_start(network)
    generator = Generator(network, statistics, RectifiedFlow(), 0.1, "")
    spatial, context = torch.randn(1, 10, 4, 6, 4), statistics.conditions.vector(VOLUME)[None]
    x = torch.randn(1, 2, 4, 6, 4)
    time, null = torch.tensor([0.7]), torch.zeros_like(context)
    with torch.no_grad():
        cond, uncond = network(x, time, context, None, spatial), network(x, time, null, None, torch.zeros_like(spatial))
    guided = Sampler(generator, guidance_scale=2.0).denoise(x, 0.7, context, None, spatial)
    torch.testing.assert_close(guided, 2 * cond - uncond, rtol=1e-4, atol=1e-5)


def test_guide_and_generator_need_not_both_have_spatial_conditions(statistics):
    networks = denoiser(statistics), denoiser(statistics, spatial_channels=0)
    for network in networks:
        leave_start(network)
    having, plain = (
        Generator(network, replace(statistics, spatial=spatial), RectifiedFlow(), 0.1, str(spatial))
        for network, spatial in zip(networks, (statistics.spatial, {}))
    )
    x, context, spatial = torch.randn(1, 2, 4, 6, 4), statistics.conditions.vector(VOLUME)[None], torch.randn(1, 10, 4, 6, 4)
    time, nothing = torch.tensor([0.7]), torch.zeros_like(spatial)
    with torch.no_grad():
        given, not_given = (networks[0](x, time, context, None, each) for each in (spatial, nothing))
        without = networks[1](x, time, context)
    found = Sampler(having, guidance_scale=2.0, guide=plain).denoise(x, 0.7, context, None, spatial)
    torch.testing.assert_close(found, 2 * given - without)
    found = Sampler(plain, guidance_scale=2.0, guide=having).denoise(x, 0.7, context)
    torch.testing.assert_close(found, 2 * without - not_given)


def test_sample_depends_on_its_conditions_and_pads_them_as_training_does(statistics):
    network = denoiser(statistics)
    leave_start(network)
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    sampler = Sampler(Generator(network, statistics, RectifiedFlow(), 0.1, ""), num_inference_steps=2)
    start = sampler.start(VOLUME, 0)
    given = {key: z[None] for key, z in latents_of_conditions().items()}
    with_both = sampler(**start, spatial=given)
    assert seen[0].shape == (1, 10, 4, 6, 4) and torch.equal(seen[0][:, :, 3], seen[0][:, :, 2])
    assert not torch.allclose(with_both, sampler(**start, spatial={"t2": given["t2"]}))
    assert with_both.shape == (1, 2, *SIZE)


def test_random_state_of_trainings_without_spatial_conditions_stays_the_same(statistics):
    """What is drawn for a spatial condition comes after what is drawn anyway."""
    plain = replace(statistics, spatial={})
    item = {"image": torch.zeros(2, *SIZE), "volume": VOLUME, "file": "", "seed": 5}
    vectors = []
    for each in (statistics, plain):
        stacked, known = each.stacked({}, SIZE)
        batch = LatentCollate(2)([{**item, "spatial": stacked, "given": known}])
        noisy, target, _, arguments = FlowPrepareBatch(each, RectifiedFlow(), 0.3)(batch)
        vectors.append((noisy, target.times, arguments["context"]))
        assert ("spatial" in arguments) == bool(each.spatial)
    assert all(torch.equal(one, other) for one, other in zip(*vectors))
    assert np.isfinite(vectors[0][0]).all()
