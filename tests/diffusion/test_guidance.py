"""Classifier-free guidance, and autoguidance by a lesser generator."""

from __future__ import annotations

import json
import re

import pytest
import torch

from scripts.bundle.json_files import checked
from scripts.bundle.weights import save_weights
from scripts.diffusion.conditions import Volume
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.generator import describe, load_generator, load_guide
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.sampler import Generator, Sampler
from scripts.diffusion.statistics import LatentStatistics
from tests.conftest import ROOT
from tests.diffusion.runs import leave_start

CHANNELS = 4
AUTOENCODER = json.loads((ROOT / "models/model.json").read_text())["network"]
NUMBER = {"mean": 3.0, "deviation": 1e-15, "lowest": 3.0, "highest": 3.0}
AGE = {"mean": 50.0, "deviation": 10.0, "lowest": 30.0, "highest": 70.0}
SEX = {"classes": {"F": 3, "M": 4}}
TIME = 0.4


def described(**changes) -> dict:
    return {
        "autoencoder": {"network": AUTOENCODER, "sha256": "a" * 64},
        "volumes": 7,
        "latent_gamma": 0.5,
        "channel_mean": [0.0, 1.0, -1.0, 2.0],
        "channel_deviation": [1.0, 2.0, 0.5, 0.1],
        "channel_amplitude": [1.7, 1.0, 0.5, 0.4],
        "conditions": {"geometry": [NUMBER] * 6, "keys": {"age": AGE, "sex": SEX}},
        "geometries": [{"size": [16] * 3, "spacing": [1.0] * 3, "count": 7}],
        **{"intensity_low": [0.0], "intensity_high": [1.0], "data_type": "<i2", "scl_slope": 1.0, "scl_inter": 0.0},
        **changes,
    }


def made(seed: int, prediction: str = "x", dropout: float = 0.1, channels: tuple = (8, 8), **changes) -> Generator:
    torch.manual_seed(seed)
    statistics = checked(described(**changes), LatentStatistics)
    sizes = {"channels": list(channels), "attention_levels": [False] * len(channels), "norm_num_groups": 4}
    length = len(statistics.conditions)
    network = Denoiser(3, CHANNELS, length, num_head_channels=4, prediction=prediction, **sizes).eval()
    leave_start(network)
    return Generator(network, statistics, RectifiedFlow(), dropout, "b" * 64)


def estimate(x: torch.Tensor, generator: Generator, context: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return generator.network(x, torch.full((len(context),), TIME), context)


@pytest.fixture
def generator() -> Generator:
    return made(0)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, CHANNELS, 4, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def context(generator) -> torch.Tensor:
    return generator.statistics.conditions.vector(Volume([16] * 3, [1.0] * 3, {"age": 61, "sex": "M"}))[None]


def test_without_a_scale_the_estimate_stays_what_it_is(generator, x, context):
    assert torch.equal(Sampler(generator).denoise(x, TIME, context), estimate(x, generator, context))


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_classifier_free_guidance_goes_further_from_the_unconditional_estimate(x, context, prediction):
    generator = made(0, prediction)
    cond, uncond = (estimate(x, generator, each) for each in (context, torch.zeros_like(context)))
    assert (cond - uncond).abs().max() > 0.01
    found = Sampler(generator, guidance_scale=2.5).denoise(x, TIME, context)
    assert torch.allclose(found, cond + 1.5 * (cond - uncond), atol=1e-5)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_autoguidance_goes_further_from_the_estimate_of_a_guide_with_the_same_conditions(generator, x, context, prediction):
    guide = made(1, prediction)  # which may predict something else than the generator
    cond, of_guide = (estimate(x, each, context) for each in (generator, guide))
    found = Sampler(generator, guidance_scale=1.75, guide=guide).denoise(x, TIME, context)
    assert torch.allclose(found, cond + 0.75 * (cond - of_guide), atol=1e-5)
    assert (found - cond).abs().max() > 0.01


def test_there_is_none_outside_of_the_interval(generator, x, context):
    sampler = Sampler(generator, guidance_scale=2.0, guidance_interval=[0.3, 0.6], guide=made(1))
    for time, guided in ((0.29, False), (0.3, True), (0.6, True), (0.61, False)):
        with torch.no_grad():
            plain = generator.network(x, torch.tensor([time]), context)
        assert torch.equal(sampler.denoise(x, time, context), plain) is not guided


def test_samples_say_what_guided_them(generator):
    plain = {"guidance_scale": 1.0, "guidance_interval": [0.0, 1.0], "guide_sha256": None}
    assert plain.items() <= Sampler(generator).settings.items()
    assert Sampler(generator).networks == [generator.network]
    guide = made(1)
    sampler = Sampler(generator, guidance_scale=2, guidance_interval=[0, 0.5], guide=guide)
    guided = {"guidance_scale": 2.0, "guidance_interval": [0.0, 0.5], "guide_sha256": "b" * 64}
    assert guided.items() <= sampler.settings.items()
    assert sampler.networks == [generator.network, guide.network]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance_interval": 0.5}, r"`guidance_interval` is 0.5; it must be two times"),
        ({"guidance_interval": [0.6, 0.2]}, r"`guidance_interval` is .0.6, 0.2.*the lower one first"),
        ({"guidance_interval": [0, 2]}, r"`guidance_interval` is .0.0, 2.0"),
        (
            {"guidance_interval": [0, 0.6]},
            "`guidance_scale` is 1, with which .* no influence",
        ),
        ({"guide": made(1)}, "`guidance_scale` is 1, with which .* no influence"),
        ({"solver": "heun"}, "`solver` is 'heun'; it must be 'midpoint' or 'stochastic' or 'euler'"),
    ],
)
def test_what_cannot_be_is_refused(generator, arguments, words):
    with pytest.raises(ValueError, match=words):
        Sampler(generator, **arguments)


def test_a_generator_without_condition_dropout_needs_a_guide(x, context):
    generator = made(0, dropout=0)
    with pytest.raises(
        ValueError, match="`guidance_scale` is 1.5; a generator without `condition_dropout` needs 1, or a `guide`"
    ):
        Sampler(generator, guidance_scale=1.5)
    assert Sampler(generator, guidance_scale=1.5, guide=made(1)).denoise(x, TIME, context).isfinite().all()


def saved(folder, guide: Generator) -> str:
    path = folder / "model.pt"
    save_weights(guide.network, path, describe(guide.statistics, guide.flow, guide.condition_dropout))
    return str(path)


def with_numbers(mean: float, deviation: float) -> dict:
    return {"geometry": [NUMBER] * 6, "keys": {"age": {**AGE, "mean": mean, "deviation": deviation}, "sex": SEX}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channels": (8,)},
        {"channel_mean": [0.01, 1.0, -1.0, 2.0], "channel_deviation": [1.01, 2.0, 0.5, 0.1], "volumes": 9},
        {"conditions": with_numbers(50.1, 10.2)},
    ],
)
def test_a_guide_of_the_same_kind_of_latents_is_read(generator, tmp_path, changes):
    path = saved(tmp_path, made(1, **changes))
    found = load_guide(path, generator, "cpu", torch.channels_last_3d)
    assert found is not None and found.sha256 == load_generator(path).sha256
    weight = next(p for p in found.network.parameters() if p.dim() == 5 and p.shape[1] > 1 and p.shape[2] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert load_guide(None, generator, "cpu", torch.contiguous_format) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel_mean": [0.1, 1.0, -1.0, 2.0]}, "`channel_mean`"),
        ({"channel_deviation": [1.0, 2.2, 0.5, 0.1]}, "`channel_deviation`"),
        ({"channel_amplitude": [1.0] * 4, "latent_gamma": 0.0}, "`latent_gamma`, `channel_amplitude`"),
        ({"conditions": {"geometry": [NUMBER] * 6, "keys": {"age": AGE}}}, "the conditions"),
        ({"conditions": {"geometry": [NUMBER] * 6, "keys": {"sex": SEX, "age": AGE}}}, "the conditions"),
        ({"conditions": with_numbers(52.0, 10.0)}, "the conditions"),
        ({"autoencoder": {**described()["autoencoder"], "sha256": "c" * 64}}, "the autoencoder's weights"),
    ],
)
def test_a_guide_that_sees_something_else_is_refused(generator, tmp_path, changes, words):
    path = saved(tmp_path, made(1, **changes))
    with pytest.raises(ValueError, match=re.escape(path) + " cannot guide this generator; others are " + words):
        load_guide(path, generator, "cpu", torch.contiguous_format)


def test_what_is_no_guide_is_refused_by_its_name(generator, tmp_path):
    path = saved(tmp_path, generator)
    with pytest.raises(ValueError, match="`guide` is .* has the weights that it is to guide"):
        load_guide(path, load_generator(path), "cpu", torch.contiguous_format)
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        load_guide(str(tmp_path), generator, "cpu", torch.contiguous_format)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint_00000007.pt").touch()
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        load_guide(str(run / "model.pt"), generator, "cpu", torch.contiguous_format)
