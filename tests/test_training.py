"""The trainer, its loss, checkpoints and weights, in one process on tiny networks."""

from __future__ import annotations

import json

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.losses import JukeboxLoss
from monai.networks.nets import PatchDiscriminator
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from scripts.adversary import Adversary
from scripts.autoencoderkl import AutoencoderKL
from scripts.averaging import WeightAverage, moving_average
from scripts.checkpoints import WEIGHTS, TrainingResumer, TrainingSaver, claim_ckpt_dir, find_checkpoints
from scripts.inferer import ReconstructionInferer
from scripts.losses import LossTerm, SpectralLoss, kl_divergence, perceptual_loss
from scripts.metrics import ForegroundPSNRMetric, SharpnessMetric, trilinear_reconstruction
from scripts.report import BeforeAndAfter
from scripts.trainer import AutoencoderTrainer
from scripts.weights import load_weights, save_weights, write_atomically


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
    return Adversary(discriminator, torch.optim.Adam(discriminator.parameters(), lr=0.01), weight, warmup_epochs)


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


def test_each_step_moves_its_own_network_only():
    """The autoencoder's step with an adversary of weight 0 is that without one, and the discriminator's the other way."""
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
    assert losses[-1] < losses[0] / 2


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


def test_perceptual_loss_takes_its_weights_from_a_file(tmp_path):
    import torchvision

    path = tmp_path / "resnet50.pt"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)
    loss = perceptual_loss(3, str(path), "cpu")
    image, other = torch.rand(2, 1, 1, 33, 33, 33).unbind()
    assert loss(image, image) < 1e-6 < loss(other, image)


def test_perceptual_loss_without_weights_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="perceptual_weights_file.*nowhere"):
        perceptual_loss(3, "nowhere", "cpu")
    (tmp_path / "other.pt").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=r"(?s)other.pt.*perceptual_weights_file.*perceptual_weight` to 0"):
        perceptual_loss(3, str(tmp_path / "other.pt"), "cpu")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("scripts.losses.PerceptualLoss", offline)
    with pytest.raises(RuntimeError, match="internet.*no route to host.*perceptual_weights_file"):
        perceptual_loss(3, None, "cpu")


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
    trainer_of(network, images(5), handlers=[WeightAverage(average, network)], accumulation_steps=2).run()
    assert average.n_averaged == 3


def test_average_starts_as_the_network_does_in_a_new_run():
    network = small_network()
    average = AveragedModel(network)
    network.post_quant_conv.conv.weight.data.add_(1)  # as a handler that loads weights would
    trainer = trainer_of(network, images(1), handlers=[WeightAverage(average, network)])
    for iteration, same in ((7, False), (0, True)):
        trainer.state.iteration = iteration
        trainer.fire_event(Events.STARTED)
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


def test_gradients_are_clipped():
    network = small_network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    trainer_of(network, images(1), optimizer=torch.optim.SGD, lr=1.0, max_grad_norm=1e-3).run()
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in network.named_parameters()])
    assert moved.norm() == pytest.approx(1e-3, rel=1e-2)


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


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_fifty_steps_of_mixed_precision_stay_finite_and_learn(amp_dtype):
    """With the adversary and the spectral loss, whose gradients are the largest."""
    torch.manual_seed(0)
    network, losses = small_network(), []
    terms = {"spectral_loss": LossTerm(0.1, SpectralLoss(spatial_dims=3))}
    trainer = trainer_of(
        network, images(5), amp=True, amp_dtype=amp_dtype, max_epochs=10, loss_terms=terms, adversary=adversary_of()
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(trainer.state.output[0]))
    trainer.run()
    assert len(losses) == 50
    assert all(torch.isfinite(step[name]) for step in losses for name in trainer.loss_names)
    assert all(torch.isfinite(p).all() for p in [*network.parameters(), *trainer.adversary.discriminator.parameters()])
    first, last = (sum(step["recon_loss"].item() for step in part) for part in (losses[:5], losses[-5:]))
    assert last < first


def test_resumed_run_has_the_scale_of_the_gradients(tmp_path):
    first, _, _ = run_with_checkpoints(tmp_path, small_network(), epochs=2, amp=True, amp_dtype="float16")
    assert first.scaler.state_dict()["_growth_tracker"] > 0 or first.scaler.get_scale() < 65536
    found = []

    def look(trainer):
        found.append(trainer.scaler.state_dict())

    run_with_checkpoints(tmp_path, small_network(), 3, resume=True, at_start=look, amp=True, amp_dtype="float16")
    assert found == [first.scaler.state_dict()]


def test_unknown_amp_dtype_is_named():
    with pytest.raises(ValueError, match="amp_dtype.*int8"):
        trainer_of(small_network(), images(1), amp_dtype="int8")


def poisoned(bad: set[int]):
    """An L1 loss that is NaN at some calls, counted from 1."""
    calls = iter(range(1, 1000))
    return lambda pred, target: (pred - target).abs().mean() * (float("nan") if next(calls) in bad else 1.0)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_step_that_is_not_finite_is_left_out(accumulation_steps, caplog):
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
    with pytest.raises(
        FloatingPointError, match=r"3 steps.*iteration 6.*5\.nii.*last finite losses were: loss 0\.\d+, recon"
    ):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_gradient_that_is_not_finite_counts_without_a_scaler():
    """The loss can be finite where its gradient is not, as that of a root at zero."""

    def rooted(pred, target):
        return torch.sqrt((pred - pred).sum())

    with pytest.raises(FloatingPointError, match="because of the gradient"):
        trainer_of(small_network(), images(2), loss_function=rooted, max_nonfinite_steps=2).run()


# --- weights and checkpoints -----------------------------------------------------------------------------------------


def test_weights_load_into_the_network_they_were_made_for(tmp_path):
    saved, target = small_network(), small_network()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    save_weights(saved, tmp_path / "model.pt")
    load_weights(target, tmp_path / "model.pt")
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), target.state_dict().values()))
    assert json.loads((tmp_path / "model.json").read_text())["network"]["initial_downsample_factor"] == [2, 2, 2]


def test_weights_of_other_factors_are_refused_although_their_shapes_fit(tmp_path):
    save_weights(small_network(linear_shortcut=False), tmp_path / "model.pt")
    same = small_network(linear_shortcut=False, downsample_factors=[[2, 2, 2]], initial_downsample_factor=[2, 2, 2])
    load_weights(same, tmp_path / "model.pt")
    other = small_network(linear_shortcut=False, downsample_factors=[1])
    other.load_state_dict(same.state_dict(), strict=True)
    with pytest.raises(ValueError, match=r"`downsample_factors` is \[\[2, 2, 2\]\] there and \[\[1, 1, 1\]\] here"):
        load_weights(other, tmp_path / "model.pt")


def test_missing_damaged_and_unknown_weights(tmp_path, caplog):
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(small_network(), path)
    save_weights(small_network(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="changed or damaged"):
        load_weights(small_network(), path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_weights(small_network(), path)
    path.write_bytes(whole)
    load_weights(small_network(), path)
    assert "nobody knows" in caplog.text


class RunsCode:
    def __reduce__(self):
        return exec, ("raise SystemExit('a payload ran')",)


def test_pickled_payload_does_not_run(tmp_path):
    torch.save({"weight": RunsCode()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_weights(small_network(), tmp_path / "model.pt")


@pytest.mark.parametrize("moment", [1, 2])
def test_kill_while_weights_are_written_leaves_a_pair_that_loads(tmp_path, monkeypatch, moment):
    path = tmp_path / "model.pt"
    save_weights(small_network(), path)
    calls = []

    def killed(content, target):
        calls.append(target)
        if len(calls) == moment:
            raise KeyboardInterrupt
        write_atomically(content, target)

    monkeypatch.setattr("scripts.weights.write_atomically", killed)
    other = small_network()
    with torch.no_grad():
        other.post_quant_conv.conv.weight.add_(1)
    with pytest.raises(KeyboardInterrupt):
        save_weights(other, path)
    load_weights(small_network(), path)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_atomically(b"old", path)

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(b"new", path)
    assert path.read_bytes() == b"old"


def test_folder_of_another_run_is_refused(tmp_path):
    claim_ckpt_dir(str(tmp_path), resume=False, overwrite=False)
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(FileExistsError, match="resume.*overwrite"):
        claim_ckpt_dir(str(tmp_path), resume=False, overwrite=False)
    claim_ckpt_dir(str(tmp_path), resume=True, overwrite=False)
    claim_ckpt_dir(str(tmp_path), resume=False, overwrite=True)


def run_with_checkpoints(
    folder, network, epochs: int, resume: bool = False, num_images: int = 3, schedule=None, at_start=None, **arguments
):
    """Train ``epochs`` epochs with validation, a saver and a resumer, as train.json wires them."""
    from monai.handlers import PeakSignalToNoiseRatio, ValidationHandler, from_engine

    def psnr_metric():
        return PeakSignalToNoiseRatio(max_val=1.0, output_transform=from_engine(["pred", "image"]))

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(images(2)),
        network=network,
        inferer=ReconstructionInferer(amp=False, amp_dtype="bfloat16"),
        key_val_metric={"psnr": psnr_metric()},
        additional_metrics={"trilinear_psnr": psnr_metric()},
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    state = {"optimizer": optimizer, "lr_scheduler": schedule or torch.optim.lr_scheduler.ConstantLR(optimizer)}
    report = BeforeAndAfter(evaluator, picture="p.png", weights="model.pt")
    handlers = [
        TrainingResumer(str(folder), resume, network, state, evaluator),
        ValidationHandler(interval=2, validator=evaluator),
        report,
        TrainingSaver(str(folder), network, state, evaluator),
    ]
    trainer = trainer_of(network, images(num_images), handlers=handlers, max_epochs=epochs, **arguments)
    trainer.optimizer = optimizer
    if at_start is not None:
        trainer.add_event_handler(Events.STARTED, at_start)
    trainer.run()
    return trainer, evaluator, report


def test_resumed_training_goes_on_where_it_stopped(tmp_path):
    _, evaluator, _ = run_with_checkpoints(tmp_path, small_network(), epochs=2)
    best = evaluator.state.best_metric
    network = small_network()
    resumed, evaluator, report = run_with_checkpoints(tmp_path, network, epochs=4, resume=True)
    assert resumed.state.epoch == 4 and resumed.state.iteration == 12
    assert evaluator.state.best_metric >= best
    assert report.before == {}  # the network that resumes is not the one before the first step
    steps = [s["step"].item() for s in resumed.optimizer.state.values()]
    assert set(steps) == {12.0}


def test_resuming_a_finished_run_trains_no_further(tmp_path, caplog):
    network = small_network()
    run_with_checkpoints(tmp_path, network, epochs=2)
    before = find_checkpoints(tmp_path)[0].read_bytes()
    caplog.set_level("INFO")
    trainer, _, _ = run_with_checkpoints(tmp_path, small_network(), epochs=2, resume=True)
    assert trainer.state.iteration == 6
    assert find_checkpoints(tmp_path)[0].read_bytes() == before
    assert "all 2 epochs are done" in caplog.text and "validation PSNR at the end" in caplog.text


def test_resume_with_another_network_names_what_differs(tmp_path):
    run_with_checkpoints(tmp_path, small_network(), epochs=1)
    with pytest.raises(ValueError, match=r"`latent_channels` is 3 there and 5 here"):
        run_with_checkpoints(tmp_path, small_network(latent_channels=5), epochs=2, resume=True)


def test_last_checkpoints_and_the_best_are_kept(tmp_path, monkeypatch):
    """Of five epochs with three steps, validated after 2, 4 and 5, the best is the second."""
    scores = {"psnr": iter([1.0, 30.0, 20.0, 10.0]), "trilinear_psnr": iter([0.0] * 4)}
    monkeypatch.setattr("monai.handlers.PeakSignalToNoiseRatio.compute", lambda self: next(scores[self._name]))
    run_with_checkpoints(tmp_path, small_network(), epochs=5)
    assert [path.name for path in find_checkpoints(tmp_path)] == [
        f"checkpoint_{iteration:08d}.pt" for iteration in (15, 12, 6)
    ]
    assert not list(tmp_path.glob("*.unfinished"))


def damage(path, how):
    whole = bytearray(path.read_bytes())
    if how == "flipped bit":
        whole[whole.find(b"encoder") // 2 + len(whole) // 2] ^= 1
    elif how == "payload":
        torch.save({"network": RunsCode()}, path)
        return
    path.write_bytes({"truncated": whole[:-1000], "empty": b"", "zeros": bytes(len(whole))}.get(how, whole))


@pytest.mark.parametrize("how", ["truncated", "empty", "zeros", "flipped bit", "payload"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, how):
    run_with_checkpoints(tmp_path, small_network(), epochs=2)
    newest, before = find_checkpoints(tmp_path)
    damage(newest, how)
    caplog.set_level("INFO")
    trainer, _, _ = run_with_checkpoints(tmp_path, small_network(), epochs=3, resume=True)
    assert trainer.state.epoch == 3
    assert f"{newest} {'holds code (' if how == 'payload' else 'is damaged'}" in caplog.text
    assert f"resumed {before} after iteration 3" in caplog.text


def test_no_whole_checkpoint_is_an_error_and_loses_nothing(tmp_path):
    run_with_checkpoints(tmp_path, small_network(), epochs=2)
    for path in find_checkpoints(tmp_path):
        damage(path, "truncated")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints .* can be used; .*checkpoint_00000003.pt is damaged"):
        run_with_checkpoints(tmp_path, small_network(), epochs=3, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_longer_run_stretches_the_schedule(tmp_path):
    """The learning rate follows the new length, and not that of the checkpoint, where it would rise again."""
    from monai.optimizers import WarmupCosineSchedule

    def schedule_of(t_total):
        return WarmupCosineSchedule(torch.optim.SGD(torch.nn.Linear(1, 1).parameters()), warmup_steps=1, t_total=t_total)

    first, second = schedule_of(6), schedule_of(12)
    first.last_epoch = 4
    run_with_checkpoints(tmp_path, small_network(), 2, schedule=first)
    run_with_checkpoints(tmp_path, small_network(), 4, schedule=second, resume=True)
    assert (second.t_total, second.last_epoch) == (12, 4)


def test_other_number_of_batches_goes_on_at_an_epoch(tmp_path, caplog):
    run_with_checkpoints(tmp_path, small_network(), epochs=2)
    trainer, _, _ = run_with_checkpoints(tmp_path, small_network(), epochs=3, resume=True, num_images=5)
    assert "an epoch has 5 batches and had 3: going on after epoch 2" in caplog.text
    assert (trainer.state.epoch, trainer.state.iteration) == (3, 15)


def test_overwriting_removes_the_checkpoints_that_resuming_would_prefer(tmp_path):
    run_with_checkpoints(tmp_path, small_network(), epochs=2)
    claim_ckpt_dir(str(tmp_path), resume=False, overwrite=True)
    assert len(find_checkpoints(tmp_path)) == 2  # until the new run trains
    run_with_checkpoints(tmp_path, small_network(), epochs=1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint_00000003.pt"]


def test_best_weights_are_kept_and_the_untrained_network_is_not_among_them(tmp_path, monkeypatch):
    """Validation runs before the first step and after epochs 2, 4 and 5; the best of the last three is epoch 4's."""
    scores = {"psnr": iter([40.0, 20.0, 30.0, 10.0]), "trilinear_psnr": iter([0.0] * 4)}
    monkeypatch.setattr("monai.handlers.PeakSignalToNoiseRatio.compute", lambda self: next(scores[self._name]))
    saved = []

    def record(network, path):
        saved.append(network.post_quant_conv.conv.weight.clone())
        save_weights(network, path)

    monkeypatch.setattr("scripts.checkpoints.save_weights", record)
    _, evaluator, report = run_with_checkpoints(tmp_path, small_network(), epochs=5)
    assert (evaluator.state.best_metric, evaluator.state.best_metric_epoch) == (30.0, 4)
    assert report.before["psnr"] == 40.0
    assert len(saved) == 2
    best = small_network()
    load_weights(best, tmp_path / WEIGHTS)
    assert torch.equal(best.post_quant_conv.conv.weight, saved[-1])
    assert not torch.equal(saved[0], saved[1])


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_foreground_psnr_ignores_air():
    image = torch.zeros(1, 1, 4, 4, 4)
    image[..., :2] = 0.5
    pred = image.clone()
    pred[..., :2] += 0.1  # an error of 0.1 in the foreground
    metric = ForegroundPSNRMetric(max_val=1.0)
    metric(pred, image)
    assert metric.aggregate().item() == pytest.approx(20.0, abs=1e-4)
    metric.reset()
    metric(torch.cat([pred, image + 0.01]), torch.cat([image, image]))
    assert metric.get_buffer().flatten().tolist() == pytest.approx([20.0, 40.0], abs=1e-3)


def test_sharpness_is_one_for_the_image_and_less_for_a_blurred_one():
    image = torch.rand(2, 1, 16, 16, 16)
    metric = SharpnessMetric()
    metric(torch.cat([image, trilinear_reconstruction(image, (4, 4, 4))]), torch.cat([image, image]))
    same, blurred = metric.get_buffer().flatten().split(2)
    assert torch.allclose(same, torch.ones(2)) and (blurred < 0.5).all()


def test_trilinear_reconstruction_keeps_the_shape_and_blurs():
    image = torch.rand(1, 1, 19, 16, 8)
    blurred = trilinear_reconstruction(image, (8, 8, 8))
    assert blurred.shape == image.shape
    assert blurred.std() < image.std() / 2
