"""The trainer and its loss, in one process on tiny networks."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from ignite.engine import Events
from monai.losses import JukeboxLoss
from monai.networks.nets import PatchDiscriminator
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from scripts.autoencoderkl import AutoencoderKL
from scripts.training.averaging import moving_average
from scripts.training.checkpoints import TrainingSaver
from scripts.training.initial_weights import InitialWeights
from scripts.training.losses import Adversary, LossTerm, ReconstructionLoss, SpectralLoss, kl_divergence
from scripts.training.trainer import AutoencoderTrainer


def small_network(**arguments) -> AutoencoderKL:
    torch.manual_seed(0)
    defaults = {
        "spatial_dims": 3,
        "channels": (4, 8),
        "num_res_blocks": 1,
        "attention_levels": (False, False),
        "norm_num_groups": 1,
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
        "initial_downsample_factor": 2,
        "initial_mode": "pixelshuffle",
        "linear_shortcut": True,
    }
    return AutoencoderKL(**{**defaults, **arguments})


class FixedNoise(AutoencoderKL):
    """Samples the mean, so that two ways to see the same images can be compared."""

    def sampling(self, z_mu, z_sigma):
        return z_mu


def images(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.rand(1, 8, 8, 8, generator=generator)} for _ in range(count)]


def smooth_images(count: int) -> list[dict[str, torch.Tensor]]:
    """Sums of three waves, which a network learns within some steps; noise it does not."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 8)] * 3, indexing="ij"))
    found = []
    for _ in range(count):
        frequencies, phases = (torch.rand(2, 3, 1, 1, 1, generator=generator) * 6).unbind()
        found.append({"image": 0.5 + 0.15 * torch.sin((3 + frequencies) * axes + phases).sum(0, keepdim=True)})
    return found


def trainer_of(network, items, batch_size=1, handlers=(), optimizer=torch.optim.AdamW, lr=1e-3, **arguments):
    defaults = {
        "device": torch.device("cpu"),
        "loss_function": torch.nn.L1Loss(),
        "max_epochs": 1,
        "kl_weight": 1e-4,
        "amp": False,
        "amp_dtype": "bfloat16",
    }
    return AutoencoderTrainer(
        train_data_loader=DataLoader(items, batch_size=batch_size),
        network=network,
        optimizer=optimizer(network.parameters(), lr=lr),
        train_handlers=list(handlers),
        **{**defaults, **arguments},
    )


# --- the loss --------------------------------------------------------------------------------------------------------


def test_kl_divergence_is_that_of_torch_distributions():
    mean, deviation = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 3, 4, 4, 4) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
    )
    assert torch.allclose(kl_divergence(mean, deviation), expected.sum() / 2, rtol=1e-5)


def test_kl_divergence_of_tiny_float16_deviations_is_finite():
    deviation = torch.full((1, 1, 2, 2, 2), 1e-6, dtype=torch.float16)
    assert torch.isfinite(kl_divergence(torch.zeros_like(deviation), deviation))


def test_loss_is_its_parts():
    trainer = trainer_of(small_network(), images(1), kl_weight=0.01)
    trainer.run()
    output = trainer.state.output[0]
    assert torch.isclose(output["loss"], output["recon_loss"] + 0.01 * output["kl_loss"])
    assert torch.isclose(output["recon_loss"], (output["pred"] - output["image"]).abs().mean())


# --- the adversary, further terms, and the average ---------------------------------------------------------------------


def adversary_of(weight=0.1, warmup_epochs=0):
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(3, channels=4, in_channels=1, num_layers_d=1, norm="INSTANCE")
    return Adversary(discriminator, partial(torch.optim.Adam, lr=0.01), 1000, weight, warmup_epochs)


def snapshot(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_adversary_waits_for_its_warmup():
    adversary = adversary_of(warmup_epochs=2)
    judged, weights = [], [snapshot(adversary.discriminator)]

    def remember(trainer):
        judged.append(trainer.state.output[0]["adv_loss"].item() > 0)
        weights.append(snapshot(adversary.discriminator))

    trainer = trainer_of(small_network(), images(1), adversary=adversary, max_epochs=3)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, remember)
    trainer.run()
    assert judged == [False, False, True]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])
    output = trainer.state.output[0]
    assert torch.isclose(output["loss"], output["recon_loss"] + 1e-4 * output["kl_loss"] + 0.1 * output["adv_loss"])


def test_each_step_changes_its_own_network_only():
    """An adversary of weight 0 leaves the autoencoder's step as it is, and its loss gives the discriminator no gradient."""
    networks = []
    for adversary in (None, adversary_of(weight=0.0)):
        networks.append(small_network())
        torch.manual_seed(0)
        trainer_of(networks[-1], images(3), adversary=adversary).run()
    assert torch.equal(snapshot(networks[0]), snapshot(networks[1]))

    image, reconstruction = torch.rand(2, 2, 1, 8, 8, 8).unbind()
    reconstruction.requires_grad_()
    adversary = adversary_of()
    adversary.generator_loss(reconstruction).backward()
    assert reconstruction.grad.abs().sum() > 0 and all(p.grad is None for p in adversary.discriminator.parameters())
    adversary.discriminator_loss(image, reconstruction.detach()).backward()
    assert all(p.grad is not None for p in adversary.discriminator.parameters())


def test_discriminator_learns_to_tell_images_from_noise():
    adversary = adversary_of()
    losses = []
    for _ in range(80):
        smooth = torch.nn.functional.interpolate(torch.rand(2, 1, 2, 2, 2), size=(8, 8, 8), mode="trilinear")
        adversary.optimizer.zero_grad()
        losses.append(adversary.discriminator_loss(smooth, torch.rand(2, 1, 8, 8, 8)))
        losses[-1].backward()
        adversary.optimizer.step()
        adversary.lr_scheduler.step()
    assert losses[-1] < losses[0] / 2


def test_reconstruction_loss_is_absolute_error_and_weighted_squared_error():
    pred, target = torch.rand(2, 1, 1, 4, 4, 4).unbind()
    expected = (pred - target).abs().mean() + 3 * (pred - target).square().mean()
    assert torch.isclose(ReconstructionLoss(3.0)(pred, target), expected)


def test_loss_terms_are_weighted_and_named():
    terms = {"spectral_loss": LossTerm(0.5, SpectralLoss(spatial_dims=3))}
    trainer = trainer_of(small_network(), images(1), loss_terms=terms, kl_weight=0.0)
    trainer.run()
    output = trainer.state.output[0]
    assert trainer.loss_names == ("loss", "recon_loss", "kl_loss", "spectral_loss")
    assert torch.isclose(output["loss"], output["recon_loss"] + 0.5 * output["spectral_loss"])


def test_spectral_loss_is_monais_with_a_finite_gradient():
    image, other = torch.rand(2, 2, 1, 8, 8, 8).unbind()
    assert torch.isclose(SpectralLoss(spatial_dims=3)(image, other), JukeboxLoss(spatial_dims=3)(image, other))
    flat = torch.full((1, 1, 8, 8, 8), 0.5, requires_grad=True)  # all its frequencies but one are zero
    SpectralLoss(spatial_dims=3)(flat, image[:1]).backward()
    assert torch.isfinite(flat.grad).all() and flat.grad.abs().sum() > 0


def test_average_follows_the_weights_and_grows_longer():
    network = torch.nn.Linear(1, 1, bias=False)
    average = AveragedModel(network, multi_avg_fn=moving_average(0.5))
    values, expected = [], 0.0
    for step in range(12):
        network.weight.data.fill_(step)
        average.update_parameters(network)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = step if step == 0 else expected * decay + step * (1 - decay)
        values.append(average.module.weight.item())
        assert values[-1] == pytest.approx(expected)
    with pytest.raises(ValueError, match="ema_decay.*1"):
        moving_average(1)


def test_average_is_updated_once_a_step():
    network = small_network()
    average = AveragedModel(network, multi_avg_fn=moving_average(0.9))
    trainer_of(network, images(5), average=average, accumulation_steps=2).run()
    assert average.n_averaged == 3


def test_average_starts_as_the_network_does_in_a_new_run(monkeypatch):
    network = small_network()
    average = AveragedModel(network)
    network.post_quant_conv.conv.weight.data.add_(1)  # as a handler that loads weights would
    for resumed, same in ((True, False), (False, True)):
        monkeypatch.setattr(TrainingSaver, "resume", lambda *args, resumed=resumed: resumed)
        start = InitialWeights(TrainingSaver("", network, {}, evaluator=None), resume=True, average=average)
        trainer_of(network, images(1), handlers=[start]).fire_event(Events.STARTED)
        assert torch.equal(snapshot(average.module), snapshot(network)) == same


# --- the step --------------------------------------------------------------------------------------------------------


def test_accumulation_equals_a_larger_batch():
    weights = []
    for batch_size, accumulation_steps in ((4, 1), (1, 4)):
        network = FixedNoise(**small_network().arguments)
        network.load_state_dict(small_network().state_dict())
        trainer_of(
            network, images(8), batch_size, optimizer=torch.optim.SGD, lr=0.1, accumulation_steps=accumulation_steps
        ).run()
        weights.append(torch.cat([p.flatten() for p in network.parameters()]))
    start = torch.cat([p.flatten() for p in small_network().parameters()])
    assert (weights[0] - weights[1]).abs().max() < 1e-5 < (weights[0] - start).abs().max()


def test_an_epoch_that_the_accumulation_does_not_divide_uses_all_its_batches():
    steps = []
    network = small_network()
    trainer = trainer_of(network, images(5), accumulation_steps=2)
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *args, **kwargs: (steps.append(trainer.state.iteration), step(*args, **kwargs))
    trainer.run()
    assert steps == [2, 4, 5]


@pytest.mark.parametrize("adv_warmup_epochs", [0, 1])
def test_schedules_follow_the_steps_of_their_optimizers(adv_warmup_epochs):
    """Also where batches accumulate, and before the adversary's warm-up is over; PyTorch warns of another order."""
    network, adversary, rates = small_network(), adversary_of(warmup_epochs=adv_warmup_epochs), []
    trainer = trainer_of(network, images(4), accumulation_steps=2, adversary=adversary, max_epochs=2)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1 / (1 + step))
    for optimizer in (trainer.optimizer, adversary.optimizer):
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: rates.append((optimizer is trainer.optimizer, optimizer.param_groups[0]["lr"]))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.run()
    assert [rate for own, rate in rates if own] == pytest.approx([1e-3 / n for n in range(1, 5)])
    count = 4 - 2 * adv_warmup_epochs
    assert (trainer.lr_scheduler.last_epoch, adversary.lr_scheduler.last_epoch) == (4, count)
    assert [rate for own, rate in rates if not own] == pytest.approx([0.01] * count, rel=1e-3)


def test_gradients_are_clipped():
    network = small_network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    trainer_of(network, images(1), optimizer=torch.optim.SGD, lr=1.0, max_grad_norm=1e-3).run()
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in network.named_parameters()])
    assert moved.norm() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.precision
@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_on_the_cpu(amp_dtype):
    network = small_network()
    seen = []
    network.encoder.blocks[-1].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    trainer = trainer_of(network, images(4), amp=True, amp_dtype=amp_dtype, max_epochs=3)
    trainer.run()
    assert set(seen) == {getattr(torch, amp_dtype)}
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert trainer.scaler.is_enabled() == (amp_dtype == "float16")
    if amp_dtype == "float16":
        assert trainer.scaler.state_dict()["_growth_tracker"] > 0


@pytest.mark.precision
@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_fifty_steps_of_mixed_precision_stay_finite_and_learn(amp_dtype):
    """With the adversary and the spectral loss, whose gradients are the largest."""
    torch.manual_seed(0)
    network, losses = small_network(), []
    terms = {"spectral_loss": LossTerm(0.1, SpectralLoss(spatial_dims=3))}
    further = {"max_epochs": 10, "loss_terms": terms, "adversary": adversary_of(), "lr": 3e-3}
    trainer = trainer_of(network, smooth_images(5), amp=True, amp_dtype=amp_dtype, **further)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(trainer.state.output[0]))
    trainer.run()
    assert len(losses) == 50
    assert all(torch.isfinite(step[name]) for step in losses for name in trainer.loss_names)
    assert all(torch.isfinite(p).all() for p in [*network.parameters(), *trainer.adversary.discriminator.parameters()])
    first, last = (sum(step["recon_loss"].item() for step in part) for part in (losses[:5], losses[-5:]))
    assert last < first


def test_unknown_amp_dtype_is_named():
    with pytest.raises(ValueError, match="amp_dtype.*int8"):
        trainer_of(small_network(), images(1), amp_dtype="int8")


def poisoned(bad: set[int]):
    """An L1 loss that is NaN at some calls, counted from 1."""
    calls = iter(range(1, 1000))
    return lambda pred, target: (pred - target).abs().mean() * (float("nan") if next(calls) in bad else 1.0)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_step_that_is_not_finite_is_skipped(accumulation_steps, caplog):
    network = small_network()
    items = [{**item, "file": f"{i}.nii"} for i, item in enumerate(images(4))]
    weights = []

    def remember(trainer):
        weights.append(network.post_quant_conv.conv.weight.clone())

    trainer = trainer_of(network, items, loss_function=poisoned({3}), accumulation_steps=accumulation_steps)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, remember)
    trainer.run()
    assert torch.equal(weights[1], weights[3 if accumulation_steps == 2 else 2])
    assert torch.equal(weights[2], weights[3]) == (accumulation_steps == 2)
    assert torch.isfinite(weights[3]).all() and trainer.nonfinite_steps == accumulation_steps - 1
    assert "the loss of 2.nii is not finite" in caplog.text


def test_too_many_steps_that_are_not_finite_stop_the_run_and_name_the_file():
    network = small_network()
    items = [{**item, "file": f"{i}.nii"} for i, item in enumerate(images(8))]
    trainer = trainer_of(network, items, loss_function=poisoned({2, 4, 5, 6}), max_nonfinite_steps=3)
    with pytest.raises(FloatingPointError, match=r"3 steps.*iteration 6.*5\.nii"):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_gradient_that_is_not_finite_counts_without_a_scaler():
    """The loss can be finite where its gradient is not, as that of a root at zero."""

    def rooted(pred, target):
        return torch.sqrt((pred - pred).sum())

    with pytest.raises(FloatingPointError, match="because of the gradient"):
        trainer_of(small_network(), images(2), loss_function=rooted, max_nonfinite_steps=2).run()
