"""MONAI's diffusion U-Net, told a vector of conditions."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet

from scripts.diffusion.conditioned_unet import ConditionedUNet
from scripts.diffusion.latent_unet import LatentUNet
from tests.diffusion.runs import leave_start

ARGUMENTS = {"spatial_dims": 3, "channels": [8, 16], "attention_levels": [False, True], "num_res_blocks": [1, 2]}
ARGUMENTS |= {"norm_num_groups": 4, "num_head_channels": 8, "use_flash_attention": True}


def test_it_has_the_parameters_and_results_of_monais():
    ours = ConditionedUNet(5, in_channels=4, out_channels=3, **ARGUMENTS).eval()
    leave_start(ours)
    monais = DiffusionModelUNet(in_channels=4, out_channels=3, num_class_embeds=1, **ARGUMENTS).eval()
    monais.class_embedding = ours.class_embedding
    monais.load_state_dict(ours.state_dict())
    x, timesteps, conditions = torch.randn(2, 4, 8, 6, 4), torch.tensor([20.0, 700.0]), torch.randn(2, 5)
    with torch.no_grad():
        expected = monais(x, timesteps, class_labels=conditions)
        assert expected.std() > 1e-2
        assert torch.allclose(ours(x, timesteps, conditions), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_compiled_it_predicts_the_same_at_other_sizes_too(gain, spatial_dims):
    settings = {"channels": [8, 16], "attention_levels": [True, True], "norm_num_groups": 4, "num_head_channels": 8}
    network = LatentUNet(spatial_dims, 4, 5, gain=gain, **settings).eval()
    leave_start(network)
    compiled = torch.jit.script(network)
    for size in ((8, 8, 8), (4, 10, 6)):
        x = torch.randn(2, 4, *size[:spatial_dims])
        inputs = (x, torch.tensor([30.0, 900.0]), torch.randn(2, 5), torch.rand(2, spatial_dims) / 2 + 0.5)
        with torch.no_grad():
            assert torch.allclose(compiled(*inputs), network(*inputs), atol=1e-6, rtol=1e-6)
            assert torch.allclose(compiled(*inputs[:3]), network(*inputs[:3]), atol=1e-6, rtol=1e-6)
