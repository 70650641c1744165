"""The generator's network: MONAI's diffusion U-Net with coordinates and conditions, and the denoiser around it."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet

from scripts.diffusion.network import LatentUNet, coordinates
from scripts.diffusion.preconditioning import Denoiser, posterior
from tests.diffusion.runs import leave_start

ARGUMENTS = {"spatial_dims": 3, "latent_channels": 4, "condition_size": 5, "channels": [8, 16]}
ARGUMENTS |= {"attention_levels": [False, True], "norm_num_groups": 4, "num_head_channels": 8}
AMPLITUDE = torch.tensor([2.0, 1.0, 0.5, 0.1])


@pytest.fixture
def network() -> Denoiser:
    torch.manual_seed(0)
    network = Denoiser(**ARGUMENTS, prediction="x").eval()
    leave_start(network)
    return network


def test_arguments_build_the_same_network(network):
    assert isinstance(network.unet, DiffusionModelUNet)
    again = Denoiser(**network.arguments)
    assert again.arguments == network.arguments and again.multiple == 2
    again.load_state_dict(network.state_dict())


def test_output_depends_on_time_conditions_and_place(network):
    x, time = torch.zeros(1, 4, 8, 8, 8), torch.tensor([0.5])
    context = torch.randn(1, 5)
    output = network(x, time, context)
    assert output.shape == x.shape
    assert not torch.allclose(output, network(x, time + 0.3, context), atol=1e-3)
    assert not torch.allclose(output, network(x, time, -context), atol=1e-3)
    inner = output[0, :, 3:5, 3:5, 3:5]  # borders apart, a network without coordinates makes the same everywhere
    assert inner.std(dim=(1, 2, 3)).max() > 1e-3


def test_position_runs_over_the_volume_and_not_over_its_padding():
    whole = coordinates(torch.zeros(1, 4, 6, 6, 6), None)
    assert whole.shape == (1, 9, 6, 6, 6)
    assert whole[0, 0, :, 0, 0].tolist() == pytest.approx([-5 / 6, -3 / 6, -1 / 6, 1 / 6, 3 / 6, 5 / 6])
    padded = coordinates(torch.zeros(1, 4, 8, 6, 8), torch.tensor([[6 / 8, 1, 6 / 8]]))
    assert torch.allclose(padded[:, :, :6, :, :6], whole, atol=1e-5)


def test_padding_of_one_latent_in_a_batch_leaves_the_other_alone(network):
    x, time, context = torch.randn(2, 4, 8, 8, 8), torch.tensor([0.1, 0.9]), torch.randn(2, 5)
    extent = torch.tensor([[1.0, 1.0, 1.0], [0.75, 1.0, 1.0]])
    both = network(x, time, context, extent)
    assert torch.allclose(both[:1], network(x[:1], time[:1], context[:1]), atol=1e-5)


def test_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="`prediction` is 'epsilon'"):
        Denoiser(**ARGUMENTS, prediction="epsilon")


def test_a_gain_that_has_learned_nothing_is_the_best_linear_estimate_of_each_value():
    """With the last layer at zero; of Gaussian values, no factor of the noisy latent comes closer to the clean one."""
    torch.manual_seed(0)
    network = Denoiser(**ARGUMENTS, amplitude=AMPLITUDE).eval()
    clean = torch.randn(1, 4, 16, 16, 16) * AMPLITUDE.reshape(-1, 1, 1, 1)
    for time in (0.1, 0.5, 0.9):
        noisy = (1 - time) * clean + time * torch.randn_like(clean)
        with torch.no_grad():
            estimate = network(noisy, torch.tensor([time]), torch.zeros(1, 5))
        best = [(x @ y / (y @ y)).item() for x, y in zip(clean[0].flatten(1), noisy[0].flatten(1))]
        found = (estimate / noisy)[0].flatten(1).median(1).values.tolist()
        assert found == pytest.approx(best, abs=0.05)


def test_posterior_is_that_of_bayes_rule():
    noisy, mean, log_ratio = torch.randn(3, 1, 4, 3, 3, 3, dtype=torch.float64)
    time, amplitude = torch.full((1, 1, 1, 1, 1), 0.3, dtype=torch.float64), AMPLITUDE.double().reshape(-1, 1, 1, 1)
    precision, seen = 1 / (amplitude.square() * log_ratio.exp()), (0.7 / 0.3) ** 2
    found, deviation = posterior(noisy, time, amplitude, mean, log_ratio)
    assert torch.allclose(found, (precision * mean + seen * noisy / 0.7) / (precision + seen))
    assert torch.allclose(deviation, 1 / (precision + seen).sqrt())


def test_with_little_noise_the_residual_is_the_noise():
    """So a network need not reproduce what it sees to remove the noise from it."""
    clean, noise = torch.randn(2, 1, 4, 3, 3, 3)
    time = torch.full((1, 1, 1, 1, 1), 0.01)
    noisy = (1 - time) * clean + time * noise
    mean, deviation = posterior(noisy, time, torch.ones(1, 4, 1, 1, 1), torch.zeros_like(noisy), torch.zeros_like(noisy))
    assert (mean - deviation * noise - clean).abs().max() < 0.05 * (mean - clean).abs().max()


def test_gain_is_finite_at_both_ends_and_in_half_precision():
    network = Denoiser(**ARGUMENTS, amplitude=AMPLITUDE).eval()
    x, ends, context = torch.randn(2, 4, 8, 8, 8), torch.tensor([0.0, 1.0]), torch.randn(2, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(network(x, ends, context)[0], x[0], atol=1e-2)  # without noise there is nothing to estimate
        leave_start(network)
        estimate = network(x, ends, context)
    assert estimate.dtype == torch.float32 and estimate.isfinite().all()


def test_weights_bring_their_amplitude():
    trained = Denoiser(**ARGUMENTS, amplitude=AMPLITUDE)
    loaded = Denoiser(**trained.arguments)
    loaded.load_state_dict(trained.state_dict())
    assert loaded.amplitude.flatten().tolist() == AMPLITUDE.tolist()


def test_channels_last_changes_nothing():
    network = Denoiser(**ARGUMENTS, amplitude=AMPLITUDE).eval()
    leave_start(network)
    x, time, context = torch.randn(1, 4, 8, 8, 8), torch.tensor([0.3]), torch.randn(1, 5)
    with torch.no_grad():
        expected = network(x, time, context)
        network.to(memory_format=torch.channels_last_3d)
        found = network(x.contiguous(memory_format=torch.channels_last_3d), time, context)
    assert torch.allclose(found, expected, atol=1e-4)


UNET = {"channels": [8, 16], "attention_levels": [False, True], "num_res_blocks": [1, 2]}
UNET |= {"norm_num_groups": 4, "num_head_channels": 8, "use_flash_attention": True}


def test_unet_has_the_parameters_and_results_of_monais():
    ours = LatentUNet(3, 4, 3, 5, **UNET).eval()
    leave_start(ours)
    monais = DiffusionModelUNet(3, 4 + 9, 3, num_class_embeds=1, **UNET).eval()
    monais.class_embedding = ours.class_embedding
    monais.load_state_dict(ours.state_dict())
    x, time, context = torch.randn(2, 4, 8, 6, 4), torch.tensor([0.02, 0.7]), torch.randn(2, 5)
    with torch.no_grad():
        expected = monais(torch.cat([x, coordinates(x, None)], 1), 1000 * time, class_labels=context)
        assert expected.std() > 1e-2
        assert torch.allclose(ours(x, time, context), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("spatial_dims, prediction", [(2, "gain"), (3, "gain"), (3, "x"), (3, "v")])
def test_compiled_it_predicts_the_same_at_other_sizes_too(prediction, spatial_dims):
    settings = {"channels": [8, 16], "attention_levels": [True, True], "norm_num_groups": 4, "num_head_channels": 8}
    network = Denoiser(spatial_dims, 4, 5, prediction=prediction, **settings).eval()
    leave_start(network)
    compiled = torch.jit.script(network)
    for size in ((8, 8, 8), (4, 10, 6)):
        x = torch.randn(2, 4, *size[:spatial_dims])
        inputs = (x, torch.tensor([0.03, 0.9]), torch.randn(2, 5), torch.rand(2, spatial_dims) / 2 + 0.5)
        with torch.no_grad():
            assert torch.allclose(compiled(*inputs), network(*inputs), atol=1e-6, rtol=1e-6)
            assert torch.allclose(compiled(*inputs[:3]), network(*inputs[:3]), atol=1e-6, rtol=1e-6)
