"""What CUDA does with data types and memory formats, found without a card; see :py:mod:`tests.fake_cuda`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import PatchDiscriminator
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.networks import MONAI, build
from scripts.bundle.machine import GIB
from scripts.inference.inferers import StreamingInferer
from scripts.layers.lean_blocks import GroupNorm, ResidualBlock, _NormSiluConv
from scripts.planning import fake_tensors as module
from scripts.planning.fake_tensors import autocast, casting_rules, fake_tensors
from scripts.training.losses import ReconstructionLoss
from tests.fake_cuda import autocast_of_cuda, fake_card

ATTENTION = {"attention_levels": (False, False, True), "use_flash_attention": True}
NETWORKS = [
    (MONAI, {}),
    (MONAI, {"attention_levels": (False, False, True)}),
    ("[2,2]", {}),
    ("[2,2]", {"use_convtranspose": True}),
    ("[2,2]", {"use_checkpoint": True}),
    ("initial 2 (conv), [4,2]", {}),
    ("initial 2, [2,2]", {"linear_shortcut": True}),
    ("initial 4, [2,2]", {}),
]
LOWER = [torch.bfloat16, torch.float16]
CASES = [*((name, arguments, torch.bfloat16) for name, arguments in NETWORKS), (*NETWORKS[2], torch.float16)]
operators = torch._C._dispatch_get_registrations_for_dispatch_key


def kept(function, *arguments) -> tuple[list, list]:
    """Data type and shape of each result, and of each map or kernel that the backward pass keeps, in their order."""
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim > 2:  # a norm's statistics and weights are a few numbers, which CUDA's kernel takes in another type
            saved.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = function(*arguments)
    results = results if isinstance(results, (list, tuple)) else [results]
    return [(result.dtype, tuple(result.shape)) for result in results], saved


@pytest.mark.parametrize("name, arguments, dtype", CASES, ids=str)
def test_planner_casts_as_the_dispatcher_does_for_cuda(name: str, arguments: dict, dtype: torch.dtype):
    """Without flash attention, whose kernel the card decides, and without maps that the CPU keeps out of bfloat16."""
    with fake_card():
        network, image = build(name, **arguments), torch.rand(1, 1, 48, 48, 48)
        with autocast_of_cuda(dtype):
            on_card = kept(network, image)
    with fake_tensors():
        network, image = build(name, **arguments), torch.rand(1, 1, 48, 48, 48)
        with casting_rules("cuda"), autocast(dtype):
            planned = kept(network, image)
    assert planned == on_card
    assert on_card[0][0][0] == dtype  # so mixed precision was on


def test_planner_casts_the_discriminator_and_the_loss_as_the_dispatcher_does():
    def judged(image):
        discriminator = PatchDiscriminator(3, 8, 1, num_layers_d=2, norm="INSTANCE")
        logits = discriminator(image)[-1]
        return (
            logits,
            torch.nn.functional.mse_loss(logits, torch.ones_like(logits)),
            ReconstructionLoss(10.0)(image, image + 1),
        )

    with fake_card(), autocast_of_cuda(torch.bfloat16):
        on_card = kept(judged, torch.rand(1, 1, 32, 32, 32))
    with fake_tensors(), casting_rules("cuda"), autocast(torch.bfloat16):
        planned = kept(judged, torch.rand(1, 1, 32, 32, 32))
    assert planned == on_card


def test_planner_names_what_only_cuda_runs_in_float32():
    """Each name is an operator for which CUDA's autocast has a rule, or a Python function above such a one."""
    for_cuda = {name.split("::")[1].split(".")[0] for name in operators("AutocastCUDA")}
    above = {"__pow__", "__rpow__", "interpolate", "matrix_norm", "vector_norm"}
    assert {*module.FLOAT32_ON_CUDA, *module.FLOAT32_RESULT_ON_CUDA} - above <= for_cuda


@pytest.mark.parametrize(
    "name, arguments, dtype",
    [
        *(case for case in CASES if case[0] != MONAI),
        ("initial 2, [4,2]", ATTENTION, torch.bfloat16),
        *[("initial 2, [4,2]", {"norm": "rms"}, dtype) for dtype in LOWER],
    ],
    ids=str,
)
def test_no_map_of_the_network_is_in_float32_on_cuda(name: str, arguments: dict, dtype: torch.dtype):
    """MONAI's own norms are; that is what CUDA's autocast does to `group_norm`."""
    maps = []

    def look(module, inputs, result):
        maps.append(result.dtype)

    with fake_card():
        network = build(name, **arguments)
        for part in (network.encoder, network.decoder):
            for block in part.blocks:
                block.register_forward_hook(look)
        with autocast_of_cuda(dtype):
            network(torch.rand(1, 1, 32, 32, 32))
    assert set(maps) == {dtype}


@pytest.mark.parametrize("dtype", [*LOWER, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_backward_pass_of_the_lean_block_gives_cuda_kernels_the_types_they_take(dtype, memory_format):
    """CUDA's norms refuse mixed types; the weights' gradients are those of the weights that the convolution used."""
    asked = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.__name__.startswith(("native_group_norm", "convolution")):
                asked.append((operator.__name__, {a.dtype for a in args if isinstance(a, torch.Tensor) and a.ndim != 2}))
            return operator(*args, **(kwargs or {}))

    with fake_card(), Record():
        x = torch.empty(2, 8, 4, 4, 4, dtype=dtype).to(memory_format=memory_format)
        norm_weight, norm_bias, bias = torch.empty(8), torch.empty(8), torch.empty(16)
        weight = torch.empty(16, 8, 3, 3, 3).to(memory_format=memory_format)
        context = SimpleNamespace(needs_input_grad=(True,) * 5 + (False,))
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        norm = GroupNorm(torch.nn.GroupNorm(2, 8))
        result = _NormSiluConv.forward(context, x, norm_weight, norm_bias, weight, bias, norm)
        assert (result.dtype, result.shape) == (dtype, (2, 16, 4, 4, 4))
        grad = torch.empty_like(result)
        gradients = _NormSiluConv.backward(context, grad)
    forward = ["native_group_norm.default", "convolution.default"]
    backward = ["native_group_norm.default", "convolution_backward.default", "native_group_norm_backward.default"]
    assert asked == [(name, {dtype}) for name in forward + backward]
    assert [g.shape for g in gradients[:5]] == [t.shape for t in (x, norm_weight, norm_bias, weight, bias)]
    assert {g.dtype for g in gradients[:5]} == {dtype}


@pytest.mark.parametrize("dtype", LOWER, ids=str)
def test_residual_block_adds_in_the_memory_format_of_its_input_on_cuda(dtype):
    """Norms give contiguous maps there whatever they get; the convolution after them gives back channels-last."""
    with fake_card():
        block = ResidualBlock(AEKLResBlock(3, 8, 2, 1e-6, 8))
        for layer in (block.conv1.conv, block.conv2.conv):
            layer.weight = torch.nn.Parameter(layer.weight.to(memory_format=torch.channels_last_3d))
        x = torch.empty(1, 8, 4, 6, 4, dtype=dtype).to(memory_format=torch.channels_last_3d)
        with torch.no_grad(), autocast_of_cuda(dtype):
            without_gradients = block(x)
        with autocast_of_cuda(dtype):
            result = block(x)
    for found in (without_gradients, result):
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last_3d)


def test_other_networks_on_the_card_leave_less_of_the_budget():
    with fake_card():
        other = torch.nn.Linear(1024, 1024)
    inferer = StreamingInferer(True, "bfloat16", 1.0, others=[other, torch.nn.Linear(4, 4)])  # the second is on the host
    assert inferer.held_by_others(other.weight.device) == 4 * 1025 * 1024 / GIB
    assert inferer.held_by_others(torch.device("cpu")) == 0  # whose budget is for the growth of the process
