"""What only a GPU can show. `make gpu` runs these tests; elsewhere they are skipped."""

from __future__ import annotations

import pytest
import torch
from monai.data import DataLoader

from benchmarks.networks import build
from scripts.bundle.machine import GIB
from scripts.bundle.precision import choose_precision
from scripts.inference.inferers import StreamingInferer
from scripts.layers.lean_blocks import GroupNorm, ResidualBlock
from scripts.planning.fake_tensors import SavedTensors
from scripts.planning.training_costs import training_cost
from scripts.training.trainer import AutoencoderTrainer
from tests.inference.test_inferers import CONFIGURATIONS, network_and_image
from tests.layers.test_lean_blocks import pair

DEVICE = "cuda"
LOWER = [torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last_3d]
DEFAULT = ("initial 2, [2,2]", {"linear_shortcut": True})

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


def gradients_of(network: torch.nn.Module, image: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """All gradients of a reconstruction's error in one vector, float64 on the host."""
    network.zero_grad()
    torch.manual_seed(0)
    with torch.autocast(image.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        reconstruction, z_mu, _ = network(image)
    (torch.nn.functional.mse_loss(reconstruction.float(), image) + 1e-3 * z_mu.float().square().mean()).backward()
    return torch.cat([p.grad.detach().flatten().double().cpu() for p in network.parameters()])


def similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Error of ``a`` as a share of the size of ``b``."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_norm_in_a_lower_precision_is_that_of_float32_to_rounding(dtype, memory_format):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(2, 8)
    torch.nn.init.normal_(norm.weight)
    norm = norm.to(DEVICE)
    x = (3 + torch.randn(2, 8, 12, 10, 8)).to(DEVICE, dtype).to(memory_format=memory_format)
    exact = norm(x.float())
    with torch.autocast(DEVICE, dtype):
        found = GroupNorm(norm)(x)
    assert found.dtype == dtype
    assert relative(found, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_residual_block_has_the_gradients_of_monai_under_autocast(dtype, memory_format):
    """Beside MONAI's block in float32 neither is far off, and the lean one not more than MONAI's under autocast."""
    theirs, ours, x = pair(8, 16)
    found = []
    for block, precision in ((theirs, None), (theirs, dtype), (ours, dtype)):
        block = block.to(DEVICE, memory_format=memory_format)
        image = x.to(DEVICE, memory_format=memory_format).requires_grad_()
        block.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=precision is not None):
            result = block(image)
        result.float().square().mean().backward()
        found.append(torch.cat([image.grad.flatten(), *(p.grad.flatten() for p in block.parameters())]))
    exact, plain, lean = found
    assert relative(lean, exact) < max(2 * relative(plain, exact), 4 * torch.finfo(dtype).eps)


def test_in_place_activations_leave_the_input_alone():
    _, block, x = pair(8, 8)
    block, x = block.to(DEVICE), x.to(DEVICE)
    before = x.clone()
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [None, *LOWER], ids=str)
def test_network_has_the_gradients_of_the_cpu(dtype):
    name, arguments = DEFAULT
    network, image = build(name, **arguments), torch.rand(1, 1, 32, 32, 32)
    exact = gradients_of(network.double(), image.double(), None)
    network = network.float().to(DEVICE)
    # the samples of the latent differ from those of the CPU, but the gradients of a mean over many hardly do
    assert similarity(gradients_of(network, image.to(DEVICE), dtype), exact) > 0.95


@pytest.mark.parametrize("dtype", LOWER, ids=str)
def test_channels_last_has_the_gradients_of_contiguous_maps(dtype):
    name, arguments = DEFAULT
    image = torch.rand(1, 1, 32, 32, 32, device=DEVICE)
    found = [
        gradients_of(build(name, **arguments).to(DEVICE, memory_format=memory_format), image, dtype)
        for memory_format in FORMATS
    ]
    assert similarity(*found) > 0.99


@pytest.mark.parametrize("dtype", LOWER, ids=str)
def test_compiled_network_has_the_gradients_of_the_plain_one(dtype):
    name, arguments = DEFAULT
    image = torch.rand(1, 1, 32, 32, 32, device=DEVICE)
    network = build(name, **arguments).to(DEVICE)
    network.deterministic = True
    plain = gradients_of(network, image, dtype)
    network.compile()
    compiled = gradients_of(network, image, dtype)
    assert torch.isfinite(compiled).all()
    assert similarity(plain, compiled) > 0.95


def test_float16_trains_with_a_gradient_scaler_and_leaves_overflows_out():
    name, arguments = DEFAULT
    network = build(name, **arguments).to(DEVICE)
    images = [torch.rand(1, 1, 32, 32, 32, device=DEVICE)] * 30
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    trainer = AutoencoderTrainer.of_images(images, network, optimizer, amp_dtype=torch.float16)
    trainer.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**60)  # far too large: the first steps overflow
    start = [p.detach().clone() for p in network.parameters()]
    trainer.add_event_handler("iteration_completed", lambda e: losses.append(e.state.output[0]["loss"].item()))
    trainer.run()
    assert trainer.scaler.get_scale() < 2.0**60
    assert trainer.nonfinite_steps == 0
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(start, network.parameters()))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("arguments", CONFIGURATIONS[:5], ids=str)
def test_streaming_from_the_host_equals_one_pass(arguments, amp, monkeypatch):
    network, image = network_and_image(arguments, (33, 40, 24))
    network = network.to(DEVICE)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    dtype = choose_precision(DEVICE).amp_dtype
    whole, slabs = (StreamingInferer(amp, dtype, budget)(image, network) for budget in (4.0, 1e-3))
    assert whole.device == slabs.device == image.device
    difference = ((whole - slabs).abs().max() / (whole.max() - whole.min())).item()
    assert difference < (2e-2 if amp else 1e-4)


def test_streaming_keeps_its_budget():
    name, arguments = DEFAULT
    network = build(name, **arguments).eval().to(DEVICE)
    image = torch.rand(1, 1, 256, 256, 256)
    StreamingInferer(True, choose_precision(DEVICE).amp_dtype, 0.5)(image[..., :64, :64, :64], network)
    torch.cuda.reset_peak_memory_stats()
    StreamingInferer(True, choose_precision(DEVICE).amp_dtype, 0.5)(image, network)
    assert torch.cuda.max_memory_allocated() < 0.5 * GIB


def test_pinned_batches_arrive_whole():
    """A copy from pinned memory returns before it is done; what uses the batch waits for it."""
    volumes = [{"image": torch.full((1, 64, 64, 64), float(i))} for i in range(8)]
    loader = DataLoader(volumes, batch_size=2, num_workers=2, pin_memory=True)
    seen = []
    for batch in loader:
        assert batch["image"].is_pinned()
        seen += batch["image"].to(DEVICE, non_blocking=True).mean(dim=(1, 2, 3, 4)).tolist()
    assert seen == [float(i) for i in range(8)]


@pytest.mark.parametrize(
    "name, arguments", [DEFAULT, ("[2,2]", {}), ("initial 4, [2,2]", {}), ("[2,2]", {"use_checkpoint": True})], ids=str
)
def test_planner_foretells_what_a_step_saves_and_allocates(name, arguments):
    dtype = getattr(torch, choose_precision(DEVICE).amp_dtype)
    network, size = build(name, **arguments), (96, 96, 96)
    expected = training_cost(network, size, amp_dtype=dtype)
    network = network.to(DEVICE)
    images = [torch.rand(1, 1, *size, device=DEVICE)] * 2
    trainer = AutoencoderTrainer.of_images(images, network, torch.optim.AdamW(network.parameters()), amp_dtype=dtype)
    trainer.add_event_handler("iteration_started", lambda: torch.cuda.reset_peak_memory_stats())
    saved = SavedTensors(list(network.parameters()))
    saved.attach(trainer)
    with saved:
        trainer.run()
    assert saved.nbytes == pytest.approx(expected.saved_activations, rel=0.02)
    # the peak without cuDNN's workspace is a lower bound, what is said to be needed an upper one
    assert 0.95 * expected.peak < torch.cuda.max_memory_allocated() < expected.needed


@pytest.mark.parametrize("channels", [16, 32])
def test_large_convolution_in_bfloat16_is_that_of_float32(channels):
    """cuDNN 9.10, which came with PyTorch 2.9, gave wrong results and took several times the memory."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(channels, channels, 3, padding=1).to(DEVICE)
    x = torch.randn(1, channels, 160, 160, 160, device=DEVICE)
    with torch.no_grad():
        exact = convolution(x)
        with torch.autocast(DEVICE, torch.bfloat16):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = convolution(x)
            taken = torch.cuda.max_memory_allocated() - before
    assert relative(found.float(), exact) < 2e-2
    assert taken < 4 * x.nbytes


def test_lean_block_keeps_as_little_as_on_the_cpu():
    kept = []
    for device in ("cpu", DEVICE):
        _, block, x = pair(8, 8)
        block, saved = ResidualBlock(block).to(device), SavedTensors()
        with saved:
            result = block(x.to(device).requires_grad_())  # noqa: F841  what is freed could be counted twice
        kept.append(saved.nbytes)
    assert kept[0] == kept[1]
