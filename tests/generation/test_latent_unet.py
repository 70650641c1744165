"""The generator's network: MONAI's, told where it is and what it is to make."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet

from scripts.generation.latent_unet import LatentUNet, coordinates
from tests.generation.runs import leave_start

ARGUMENTS = {"spatial_dims": 3, "latent_channels": 4, "condition_size": 5, "channels": [8, 16]}
ARGUMENTS |= {"attention_levels": [False, True], "norm_num_groups": 4, "num_head_channels": 8}


@pytest.fixture
def network() -> LatentUNet:
    torch.manual_seed(0)
    network = LatentUNet(**ARGUMENTS).eval()
    leave_start(network)
    return network


def test_arguments_build_the_same_network(network):
    assert isinstance(network.unet, DiffusionModelUNet)
    again = LatentUNet(**network.arguments)
    assert again.arguments == network.arguments and again.multiple == 2
    again.load_state_dict(network.state_dict())


def test_output_depends_on_time_conditions_and_place(network):
    x, timesteps = torch.zeros(1, 4, 8, 8, 8), torch.tensor([500.0])
    context = torch.randn(1, 5)
    output = network(x, timesteps, context)
    assert output.shape == x.shape
    assert not torch.allclose(output, network(x, timesteps + 300, context), atol=1e-3)
    assert not torch.allclose(output, network(x, timesteps, -context), atol=1e-3)
    inner = output[0, :, 3:5, 3:5, 3:5]  # borders apart, a network without coordinates makes the same everywhere
    assert inner.std(dim=(1, 2, 3)).max() > 1e-3


def test_position_runs_over_the_volume_and_not_over_its_padding():
    whole = coordinates(torch.zeros(1, 4, 6, 6, 6), None)
    assert whole.shape == (1, 9, 6, 6, 6)
    assert whole[0, 0, :, 0, 0].tolist() == pytest.approx([-5 / 6, -3 / 6, -1 / 6, 1 / 6, 3 / 6, 5 / 6])
    padded = coordinates(torch.zeros(1, 4, 8, 6, 8), torch.tensor([[6 / 8, 1, 6 / 8]]))
    assert torch.allclose(padded[:, :, :6, :, :6], whole, atol=1e-5)


def test_padding_of_one_latent_in_a_batch_leaves_the_other_alone(network):
    x, timesteps, context = torch.randn(2, 4, 8, 8, 8), torch.tensor([100.0, 900.0]), torch.randn(2, 5)
    extent = torch.tensor([[1.0, 1.0, 1.0], [0.75, 1.0, 1.0]])
    both = network(x, timesteps, context, extent)
    assert torch.allclose(both[:1], network(x[:1], timesteps[:1], context[:1]), atol=1e-5)


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="`attention_levels` has 1 entries for 2 levels"):
        LatentUNet(**{**ARGUMENTS, "attention_levels": [True]})
    with pytest.raises(ValueError, match="`channels` has 10; it must be a multiple of `norm_num_groups` 4"):
        LatentUNet(**{**ARGUMENTS, "channels": [8, 10]})
