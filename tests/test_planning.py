"""The planner: what it counts without computing is what a real step needs."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SimpleInferer
from monai.networks.nets import AutoencoderKL as MonaiAutoencoderKL

from benchmarks.networks import FACTORS, MONAI, WIDTH
from scripts.autoencoderkl import AutoencoderKL
from scripts.memory import SavedTensors, inference_cost, training_cost
from scripts.trainer import AutoencoderTrainer

MIB = 2**20


def on_meta(name: str, **kwargs) -> torch.nn.Module:
    with torch.device("meta"):
        return MonaiAutoencoderKL(**WIDTH, **kwargs) if name == MONAI else AutoencoderKL(**WIDTH, **FACTORS[name], **kwargs)


def counted_in_a_real_step(network: torch.nn.Module, size: int, batch_size: int, amp: bool) -> int:
    """Bytes that the second iteration of the real trainer saves."""
    saved = SavedTensors(list(network.parameters()))

    class Counting(AutoencoderTrainer):
        def _iteration(self, engine, batchdata):
            if engine.state.iteration == 1:
                return super()._iteration(engine, batchdata)
            with saved:
                return super()._iteration(engine, batchdata)

    Counting(
        kl_weight=1e-8,
        amp_dtype="bfloat16",
        amp=amp,
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.rand(batch_size, 1, size, size, size)}] * 2,
        network=network,
        optimizer=torch.optim.AdamW(network.parameters()),
        loss_function=torch.nn.functional.l1_loss,
        inferer=SimpleInferer(),
    ).run()
    return saved.nbytes


@pytest.mark.parametrize(
    "name, batch_size, amp",
    [(MONAI, 1, True), ("initial 2 (conv), [4,2]", 1, True), ("initial 2, [2,2]", 1, True), ("initial 2, [2,2]", 3, False)],
)
def test_saved_activations_are_those_of_a_real_step(name, batch_size, amp):
    network = on_meta(name).to_empty(device="cpu")
    amp_dtype = torch.bfloat16 if amp else None
    estimate = training_cost(network, (32,) * 3, batch_size=batch_size, amp_dtype=amp_dtype, device="cpu")
    assert estimate.saved_activations == pytest.approx(counted_in_a_real_step(network, 32, batch_size, amp), rel=0.02)
    assert sum(level.saved for level in estimate.levels) == estimate.saved_activations


def test_parts_of_the_estimate_are_exact_where_they_can_be_counted_by_hand():
    network = on_meta("initial 2, [2,2]")
    parameters = sum(4 * p.numel() for p in network.parameters())
    estimate = training_cost(network, (64,) * 3)
    assert estimate.parameters == estimate.gradients == parameters
    assert 2 * parameters <= estimate.optimizer_state <= 2 * parameters + 4 * len(list(network.parameters()))
    assert estimate.peak > estimate.saved_activations + 3 * parameters
    levels = [(level.part, level.spatial_shape[0]) for level in estimate.levels[:-1]]
    assert levels == [("encoder", n) for n in (64, 32, 16, 8)] + [("decoder", n) for n in (8, 16, 32, 64)]


def test_pytorch_still_has_the_private_parts_that_the_planner_needs():
    layer = torch.nn.Linear(1000, 500, bias=False)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.layer = torch.nn.Module(), layer
            self.encoder.in_channels = 1

        def reconstruct(self, x):
            return self.layer(x)

    cost = inference_cost(Net(), (1000,), batch_size=10, amp_dtype=None)
    image, result, weight = 40_000, 20_000, 2_000_000
    counted = (cost.parameters, cost.flops, cost.peak)
    expected = (weight, 2 * 10 * 1000 * 500, pytest.approx(weight + image + result, abs=3 * 512))
    assert counted == expected, "an upgrade of PyTorch changed FakeTensorMode, TorchDispatchMode or FlopCounterMode"


def test_cuda_keeps_norms_of_plain_modules_in_float32_and_those_of_this_network_not():
    size = (64,) * 3
    plain, lean = ([training_cost(on_meta(n), size, device=d) for d in ("cuda", "cpu")] for n in (MONAI, "[2,2]"))
    assert plain[0].saved_activations > 1.4 * plain[1].saved_activations
    assert lean[0].saved_activations == lean[1].saved_activations


def test_checkpointing_saves_activations_and_costs_operations():
    kept, recomputed = (training_cost(on_meta("[2,2]", use_checkpoint=c), (64,) * 3) for c in (False, True))
    assert recomputed.saved_activations < 0.1 * kept.saved_activations
    assert recomputed.peak < kept.peak
    assert recomputed.flops > 1.2 * kept.flops


def test_estimate_leaves_the_network_as_it_is():
    network = on_meta("initial 4, [2,2]").to_empty(device="cpu").eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    training_cost(network, (32,) * 3)
    assert not network.training and not network.encoder.blocks[0]._forward_hooks
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in network.state_dict().items())
