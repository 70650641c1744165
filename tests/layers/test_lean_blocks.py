"""The lean blocks give the results of MONAI's, and keep only the feature maps that they claim."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks import Convolution
from monai.networks.blocks import Upsample as MonaiUpsample
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch.overrides import TorchFunctionMode

from scripts.autoencoderkl import Reconstructor, Upsample
from scripts.layers.lean_blocks import NORMS, GroupNorm, ResidualBlock, RMSNorm, rms_norm
from scripts.planning.fake_tensors import SavedTensors
from tests.test_autoencoderkl import build, image_for


def pair(in_channels: int = 4, out_channels: int = 8, spatial_dims: int = 3, norm: str = "group"):
    """MONAI's block, or its parts around other norms, and the lean one around the same parameters, and an input."""
    torch.manual_seed(0)
    theirs = AEKLResBlock(spatial_dims, in_channels, 2, 1e-6, out_channels)
    if norm == "rms":
        theirs.norm1, theirs.norm2 = RMSNorm(theirs.norm1), RMSNorm(theirs.norm2)
    return theirs, ResidualBlock(theirs, NORMS[norm]), inputs(in_channels, spatial_dims)


def inputs(channels: int, spatial_dims: int) -> torch.Tensor:
    return torch.randn(2, channels, *[8] * spatial_dims)


def kept_maps(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Feature maps, each once, that the backward pass of ``module`` keeps."""
    parameters = {p.data_ptr() for p in module.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters and tensor.ndim >= 4:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = module(x)
    result.sum().backward()
    return list(kept.values())


@pytest.mark.parametrize("norm", ["group", "rms"])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("out_channels", [4, 8])
def test_residual_block_has_the_result_and_the_gradients_of_monai(out_channels, spatial_dims, norm):
    theirs, ours, x = pair(4, out_channels, spatial_dims, norm)
    gradients = []
    for block in (theirs, ours):
        image = x.clone().requires_grad_()
        block.zero_grad()
        result = block(image)
        result.square().sum().backward()
        gradients.append([image.grad, *(p.grad.clone() for p in block.parameters())])
        with torch.no_grad():
            assert torch.equal(block(x), result)
    assert torch.equal(theirs(x), ours(x))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients))


@pytest.mark.parametrize("norm", ["group", "rms"])
def test_residual_block_passes_gradcheck(norm):
    _, block, _ = pair(2, 4, 2, norm)
    block.double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)


def test_residual_block_keeps_two_feature_maps_of_six():
    theirs, ours, x = pair(8, 8)
    x.requires_grad_()
    assert len(kept_maps(theirs, x)) == 6
    assert len(kept_maps(ours, x)) == 2


def test_residual_block_with_norms_of_voxels_keeps_two_feature_maps():
    _, block, x = pair(8, 8, norm="rms")
    x.requires_grad_()
    assert len(kept_maps(block, x)) == 2


@pytest.mark.parametrize("norm", ["group", "rms"])
@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_residual_block_trains_under_autocast(amp_dtype, norm):
    theirs, ours, x = pair(8, 8, norm=norm)
    gradients = []
    for block in (theirs, ours):
        block.zero_grad()
        with torch.autocast("cpu", amp_dtype):
            result = block(x.to(amp_dtype))
        assert result.dtype == amp_dtype
        result.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in block.parameters()]))
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_without_gradients_the_input_is_left_alone():
    _, block, x = pair(8, 8)
    before = x.clone()
    with torch.no_grad():
        block(x)
    assert torch.equal(x, before)


def test_checkpointing_and_lean_blocks_go_together():
    gradients = []
    for use_checkpoint in (False, True):
        network = build(initial_downsample_factor=2, use_checkpoint=use_checkpoint).train()
        torch.manual_seed(3)
        network(image_for(network, 2))[0].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.allclose(*gradients)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_checkpointing_one_level_saves_its_maps_and_changes_no_gradient(level):
    results = []
    for use_checkpoint in (False, [i == level for i in range(3)]):
        network = build(initial_downsample_factor=2, linear_shortcut=True, use_checkpoint=use_checkpoint).train()
        image = image_for(network, 2)
        kept = kept_bytes(network, image)
        torch.manual_seed(3)
        network(image)[0].square().mean().backward()
        results.append((kept, torch.cat([p.grad.flatten() for p in network.parameters()])))
    (plain, gradients), (recomputed, gradients_again) = results
    assert recomputed < plain
    assert torch.allclose(gradients, gradients_again)


def kept_bytes(network: torch.nn.Module, image: torch.Tensor) -> int:
    saved = SavedTensors()
    with saved:
        result = network(image)  # noqa: F841  what is freed could be counted twice
    return saved.nbytes


@pytest.mark.filterwarnings("ignore")  # of the compiler's, about its own parts
def test_network_compiles_and_gives_the_same():
    levels = {"channels": (4, 8), "attention_levels": (False, False), "downsample_factors": [2]}
    network = build(initial_downsample_factor=2, linear_shortcut=True, **levels).train()
    image = image_for(network, 2)
    results = []
    for compiled in (False, True):
        if compiled:
            network.compile(backend="aot_eager")  # traces as the default does, without its minutes of compilation
        torch.manual_seed(3)
        reconstruction = network(image)[0]
        network.zero_grad()
        reconstruction.square().mean().backward()
        results.append(torch.cat([reconstruction.flatten(), *[p.grad.flatten() for p in network.parameters()]]).detach())
    assert torch.allclose(*results, atol=1e-6)


def test_norms_stay_in_the_autocast_type_on_cuda():
    """CUDA's autocast casts `group_norm` to float32 and has no rule for the kernel below it, which the network calls."""
    has_rule = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_rule("aten::group_norm", "AutocastCUDA")
    assert not has_rule("aten::native_group_norm", "AutocastCUDA")
    called = set()

    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.add(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    network = build(attention_levels=(False, False, True), initial_downsample_factor=2)
    image = image_for(network, 2)
    with Record():
        network(image)
        with torch.no_grad():
            network.reconstruct(image)
    assert "native_group_norm" in called
    assert "group_norm" not in called


def test_group_norm_is_that_of_torch():
    norm = torch.nn.GroupNorm(2, 4)
    torch.nn.init.normal_(norm.weight)
    for x in (torch.randn(2, 4, 3, 5, 7), torch.randn(2, 4, 8, 8, 8).to(memory_format=torch.channels_last_3d)):
        assert torch.equal(GroupNorm(norm)(x), norm(x))


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_rms_norm_is_that_of_torch(spatial_dims, layout):
    """Which takes the channels last, and has no summands."""
    x, weight, bias = inputs(6, spatial_dims), torch.randn(6), torch.randn(6)
    by_voxel = x.movedim(1, -1).contiguous()
    if layout == "channels last":
        x = by_voxel.movedim(-1, 1)
    theirs = torch.nn.functional.rms_norm(by_voxel, (6,), weight, 1e-6) + bias
    assert torch.allclose(rms_norm(x, weight, bias, 1e-6), theirs.movedim(-1, 1), atol=1e-6)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, bias, 1e-6), rms_norm(x.clone().requires_grad_(), weight, bias, 1e-6))


def test_rms_norm_in_float16_takes_values_whose_squares_overflow():
    x = torch.full((1, 4, 2, 2, 2), 1000.0)
    half = rms_norm(x.half(), torch.ones(4), torch.zeros(4), 1e-6)
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), rms_norm(x, torch.ones(4), torch.zeros(4), 1e-6), atol=1e-2)


@pytest.mark.parametrize("norm", ["group", "rms"])
def test_a_patch_alone_gives_what_the_whole_volume_gives_with_norms_of_voxels_only(norm):
    network = build(Reconstructor, norm=norm, initial_downsample_factor=2, linear_shortcut=True)
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    volume = torch.rand(1, 1, 192, 16, 16)
    volume[:, :, 96:] = 0  # air
    with torch.no_grad():
        whole, patch = network(volume), network(volume[:, :, :96])
    scale = whole.max() - whole.min()
    difference = (whole[:, :, :16] - patch[:, :, :16]).abs().max() / scale  # 80 voxels from where the patch was cut
    assert difference < 1e-5 if norm == "rms" else difference > 1e-3


def test_a_norm_that_there_is_not_is_refused_by_name():
    with pytest.raises(ValueError, match="`norm` is 'batch'; it must be one of group, rms"):
        build(norm="batch")


@pytest.mark.parametrize("spatial_dims, factors", [(3, (2, 2, 2)), (3, (4, 4, 4)), (3, (2, 3, 1)), (2, (8, 2)), (1, (3,))])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_upsample_equals_enlarging_and_convolving(spatial_dims, factors, kernel_size):
    ours = Upsample(spatial_dims, 3, 5, factors, kernel_size=kernel_size).double()
    post_conv = Convolution(spatial_dims, 3, 5, kernel_size=kernel_size, conv_only=True)
    scale = [float(f) for f in factors]
    theirs = MonaiUpsample(
        spatial_dims, 3, 3, scale, mode="nontrainable", interp_mode="nearest", post_conv=post_conv, align_corners=None
    ).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, *[4, 5, 6][:spatial_dims], dtype=torch.float64, requires_grad=True)
    assert torch.allclose(ours(x), theirs(x))
    gradients = [torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]) for layer in (ours, theirs)]
    assert all(torch.allclose(a, b) for a, b in zip(*gradients))


def test_upsample_keeps_only_the_small_feature_map():
    x = torch.randn(1, 4, 4, 4, 4, requires_grad=True)
    kept = kept_maps(Upsample(3, 4, scale_factor=2), x)
    assert max(tensor.shape[2:].numel() for tensor in kept) == 4**3  # x, and the 4^3 kernel
