"""Convolutions of maps that are too small along the first or last axis stay out of bfloat16 on the CPU, and only those."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from monai.bundle import ConfigParser
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.autoencoderkl import AutoencoderKL
from scripts.layers import LinearShortcut
from scripts.layers.float32_convolutions import keep_in_float32
from scripts.slabs import stream
from tests.conftest import ROOT
from tests.test_autoencoderkl import build

PRESETS = ("32x", "64x")
aten = torch.ops.aten


@dataclass
class Seen:
    """A convolution that the dispatcher was given: its maps along the last axis and its data types."""

    backward: bool
    sizes: tuple[int, int]
    dtypes: set[torch.dtype]
    smaller_than_kernel: bool  # along the first axis of a 3D map that is read, whose weights get a gradient

    @property
    def spared(self) -> bool:
        return min(self.sizes) == 1 or self.smaller_than_kernel


class Convolutions(TorchDispatchMode):
    """Lists the convolutions that run, and their backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (aten.convolution.default, aten.convolution_backward.default):
            backward = function is aten.convolution_backward.default
            read, made = (args[1], args[0]) if backward else (args[0], result)
            tensors = [a for a in args[:3] if isinstance(a, torch.Tensor)]
            weight, stride, transposed = args[1 + backward], args[3 + backward], args[6 + backward]
            kernel = weight.shape[2] - (stride[0] - 1 if transposed else 0)  # an enlargement's is spread by its factor
            small = read.dim() == 5 and read.shape[2] < kernel and (backward or torch.is_grad_enabled())
            self.seen.append(Seen(backward, (read.shape[-1], made.shape[-1]), {t.dtype for t in tensors}, small))
        return result


def assert_bfloat16_where_it_works(seen: list[Seen]) -> None:
    for convolution in seen:
        expected = torch.float32 if convolution.spared else torch.bfloat16
        assert convolution.dtypes == {expected}, convolution


def preset_network(preset: str, **arguments) -> AutoencoderKL:
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs/train.json"), str(ROOT / f"configs/presets/{preset}.json")])
    parser.config.update(arguments)
    torch.manual_seed(0)
    return parser.get_parsed_content("network_def")


def training_step(network, *latent: int) -> Convolutions:
    image = torch.rand(1, 1, *(n * f for n, f in zip(latent, network.total_downsample_factor)))
    with Convolutions() as convolutions:
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction, z_mu, z_sigma = network(image)
        (reconstruction.float().square().mean() + z_mu.float().mean() + z_sigma.float().mean()).backward()
    return convolutions


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_leave_bfloat16_where_a_map_has_one_voxel_along_the_last_axis(preset):
    with FakeTensorMode():  # nothing is computed
        network = preset_network(preset).train()
        for latent in [(1, 1, 1), (2, 2, 1), (1, 1, 2)]:
            seen = training_step(network, *latent).seen
            assert_bfloat16_where_it_works(seen)
            for backward in (False, True):
                spared = [min(convolution.sizes) == 1 for convolution in seen if convolution.backward == backward]
                assert any(spared) == (latent[-1] == 1)
                assert not all(spared)


LAYERS = [
    {"linear_shortcut": True, "initial_downsample_factor": 2, "initial_mode": "pixelshuffle"},
    {"use_convtranspose": True},
    {"use_convtranspose": True, "downsample_factors": [4, 2], "initial_downsample_factor": 2},
    {"downsample_factors": [[2, 2, 4], [2, 2, 1]]},
    {"use_checkpoint": True, "initial_downsample_factor": 2},
]


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_every_kind_of_layer_leaves_bfloat16_there(arguments, spatial_dims):
    if spatial_dims < 3 and isinstance(arguments.get("downsample_factors", [1])[0], list):
        arguments = {"downsample_factors": [4, 1]}
    with FakeTensorMode():
        network = build(spatial_dims=spatial_dims, **arguments).train()
        seen = training_step(network, *[1] * spatial_dims).seen
    assert_bfloat16_where_it_works(seen)
    assert {min(convolution.sizes) == 1 for convolution in seen} == {True, False}


@pytest.mark.parametrize("latent", [1, 2])
def test_reconstruction_leaves_bfloat16_there_as_well(latent):
    with FakeTensorMode(), Convolutions() as convolutions, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        build(linear_shortcut=True).reconstruct(torch.rand(1, 1, 8, 8, 4 * latent))
    assert_bfloat16_where_it_works(convolutions.seen)
    assert any(min(convolution.sizes) == 1 for convolution in convolutions.seen) == (latent == 1)


def test_slabs_of_one_voxel_along_the_last_axis_leave_bfloat16():
    network = build(channels=(2, 2), attention_levels=[False] * 2, downsample_factors=[2], linear_shortcut=True)
    with Convolutions() as convolutions, torch.autocast("cpu", torch.bfloat16):
        result = stream(network, torch.rand(1, 1, 2, 2, 6), "reconstruct", 1e-6)
    assert_bfloat16_where_it_works(convolutions.seen)
    assert any(convolution.sizes == (1, 1) for convolution in convolutions.seen)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_without_bfloat16_autocast_nothing_is_cast(autocast):
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with FakeTensorMode(), Convolutions() as convolutions, context:
        build().reconstruct(torch.rand(1, 1, 4, 4, 4))
    assert set.union(*(convolution.dtypes for convolution in convolutions.seen)) == {autocast or torch.float32}


@pytest.mark.parametrize("first", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("kernel", [3, 5])
def test_gradients_of_weights_are_right_on_maps_smaller_than_the_kernel(kernel, first):
    """On processors with AVX-512, PyTorch's are what the memory held before."""
    torch.manual_seed(0)
    conv = torch.nn.Sequential(torch.nn.Conv3d(16, 16, kernel, padding=kernel // 2))
    keep_in_float32(conv)
    x, direction = torch.randn(2, 2, 16, first, 4, 4)
    conv(x).backward(direction)
    expected, conv[0].weight.grad = conv[0].weight.grad, None
    for _ in range(5):
        junk = [torch.full(conv[0].weight.shape, float("nan")) for _ in range(4)]
        del junk  # so that memory that is not written to would be seen
        with torch.autocast("cpu", torch.bfloat16):
            conv(x).backward(direction.bfloat16())
        assert torch.allclose(conv[0].weight.grad, expected, atol=0.05 * expected.abs().max().item())
        conv[0].weight.grad = None


def test_results_are_those_of_float32_in_the_type_of_autocast():
    torch.manual_seed(0)
    convolutions = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3, padding=1), torch.nn.ConvTranspose3d(3, 1, 2, 2))
    names = list(convolutions.state_dict())
    x = torch.rand(1, 2, 2, 2, 1)
    expected = convolutions[1](convolutions[0](x).bfloat16().float()).bfloat16()
    keep_in_float32(convolutions)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(convolutions(x), expected)
    assert list(convolutions.state_dict()) == names
    assert torch.equal(convolutions[0](x), torch.nn.functional.conv3d(x, *convolutions[0].parameters(), padding=1))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_in_bfloat16_on_patches_of_one_latent_voxel(preset):
    network = preset_network(preset, channels=[2, 2, 4], latent_channels=8).train()
    torch.manual_seed(1)
    image = torch.rand(1, 1, *network.total_downsample_factor)
    assert isinstance(network.shortcut, LinearShortcut)
    network.shortcut.fit([image])
    network.shortcut.fit_neighbours([image] * 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction, z_mu, _ = network(image)
        loss = (reconstruction.float() - image).abs().mean() + 1e-4 * z_mu.float().square().mean()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    assert all(torch.isfinite(p).all() for p in network.parameters())
