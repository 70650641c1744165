"""Weights and checkpoints, in one process on tiny networks: what they keep, what is refused, and damaged files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.handlers import PeakSignalToNoiseRatio, from_engine
from monai.optimizers import WarmupCosineSchedule
from torch.utils.data import DataLoader

from scripts.bundle.files import write_atomically
from scripts.bundle.weights import load_weights, save_weights
from scripts.inference.inferers import ReconstructionInferer
from scripts.training.checkpoints import WEIGHTS, TrainingSaver, claim_ckpt_dir, find_checkpoints
from scripts.training.handlers import BeforeAndAfter, RunHandlers
from scripts.training.initial_weights import InitialWeights
from scripts.training.repeatable_batches import RepeatableOrder
from tests.training.test_training import images, poisoned, small_network, trainer_of


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
    assert "it cannot be checked whether it fits this network" in caplog.text


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

    monkeypatch.setattr("scripts.bundle.weights.write_atomically", killed)
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
    with pytest.raises(FileExistsError, match="of an earlier run: set `resume`.*`overwrite`"):
        claim_ckpt_dir(str(tmp_path), resume=False, overwrite=False)
    claim_ckpt_dir(str(tmp_path), resume=False, overwrite=True)


def test_weights_without_a_checkpoint_are_not_resumed_and_not_overwritten(tmp_path):
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(FileExistsError, match="holds model.pt of an earlier run.*`overwrite`"):
        claim_ckpt_dir(str(tmp_path), resume=True, overwrite=False)
    claim_ckpt_dir(str(tmp_path), resume=True, overwrite=True)
    (tmp_path / "checkpoint_00000003.pt").touch()
    claim_ckpt_dir(str(tmp_path), resume=True, overwrite=False)


class NamedImages(torch.utils.data.Dataset):
    """Images as if they were read from files."""

    def __init__(self, names) -> None:
        self.data = [{"image": f"/data/{name}.nii.gz"} for name in names]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        return images(len(self))[index]


def evaluator_of(network, volumes=("a", "b")) -> SupervisedEvaluator:
    def psnr_metric():
        return PeakSignalToNoiseRatio(max_val=1.0, output_transform=from_engine(["pred", "image"]))

    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(NamedImages(volumes)),
        network=network,
        inferer=ReconstructionInferer(amp=False, amp_dtype="bfloat16"),
        key_val_metric={"psnr": psnr_metric()},
        additional_metrics={"trilinear_psnr": psnr_metric()},
    )


def run_with_checkpoints(
    folder,
    network,
    epochs: int,
    resume: bool = False,
    num_images: int = 3,
    schedule=None,
    at_start=None,
    config=None,
    volumes=("a", "b"),
    rates=None,
    **arguments,
):
    """Train ``epochs`` epochs with validation and checkpoints, as train.json wires them."""

    evaluator = evaluator_of(network, volumes)
    optimizer = schedule.optimizer if schedule else torch.optim.AdamW(network.parameters(), lr=1e-3)
    items = {"optimizer": optimizer, "lr_scheduler": schedule or torch.optim.lr_scheduler.ConstantLR(optimizer)}
    saver = TrainingSaver(str(folder), network, items, evaluator, config or {})
    report = BeforeAndAfter(
        evaluator, name="PSNR", unit="dB", compare={"trilinear": "trilinear_psnr"}, files={"weights": "model.pt"}
    )
    run = RunHandlers(InitialWeights(saver, resume), val_interval=2, report=report)
    handlers = [handler for handler in run.handlers if not isinstance(handler, RepeatableOrder)]
    trainer = trainer_of(network, images(num_images), handlers=handlers, max_epochs=epochs, **arguments)
    trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
    if rates is not None:
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda: rates.append(optimizer.param_groups[0]["lr"]))
    if at_start is not None:
        trainer.add_event_handler(Events.STARTED, at_start)
    trainer.run()
    return trainer, evaluator


def test_resumed_training_goes_on_where_it_stopped(tmp_path):
    _, evaluator = run_with_checkpoints(tmp_path, small_network(), epochs=2)
    best, before = evaluator.state.best_metric, evaluator.state.metric_before
    network = small_network()
    resumed, evaluator = run_with_checkpoints(tmp_path, network, epochs=4, resume=True)
    assert resumed.state.epoch == 4 and resumed.state.iteration == 12
    assert evaluator.state.best_metric >= best
    assert evaluator.state.metric_before == before  # of the network before the very first step
    steps = [s["step"].item() for s in resumed.optimizer.state.values()]
    assert set(steps) == {12.0}


@pytest.mark.parametrize("before, warned", [(0.0, False), (99.0, True)])
def test_training_that_made_nothing_better_says_so(tmp_path, caplog, before, warned):
    run_with_checkpoints(tmp_path, small_network(), epochs=1)
    newest = find_checkpoints(tmp_path)[0]
    content = torch.load(newest, weights_only=True)
    content["evaluator"]["metric_before"] = before
    torch.save(content, newest)
    caplog.clear()
    run_with_checkpoints(tmp_path, small_network(), epochs=2, resume=True)
    assert ("no validation was better than the one before the first step" in caplog.text) == warned


def test_resumed_run_has_the_scale_of_the_gradients(tmp_path):
    first, _ = run_with_checkpoints(tmp_path, small_network(), epochs=2, amp=True, amp_dtype="float16")
    assert first.scaler.state_dict()["_growth_tracker"] > 0 or first.scaler.get_scale() < 65536
    found = []

    def look(trainer):
        found.append(trainer.scaler.state_dict())

    run_with_checkpoints(tmp_path, small_network(), 3, resume=True, at_start=look, amp=True, amp_dtype="float16")
    assert found == [first.scaler.state_dict()]


def test_resuming_a_finished_run_trains_no_further(tmp_path, caplog):
    network = small_network()
    run_with_checkpoints(tmp_path, network, epochs=2)
    before = find_checkpoints(tmp_path)[0].read_bytes()
    caplog.set_level("INFO")
    trainer, _ = run_with_checkpoints(tmp_path, small_network(), epochs=2, resume=True)
    assert trainer.state.iteration == 6
    assert find_checkpoints(tmp_path)[0].read_bytes() == before
    assert "validation PSNR at the end" in caplog.text


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
    trainer, _ = run_with_checkpoints(tmp_path, small_network(), epochs=3, resume=True)
    assert trainer.state.epoch == 3
    assert f"{newest} is damaged, or holds code, which was not run. Trying the one before." in caplog.text
    assert f"resumed {before} after iteration 3" in caplog.text


def test_no_whole_checkpoint_is_an_error_and_loses_nothing(tmp_path):
    run_with_checkpoints(tmp_path, small_network(), epochs=2)
    for path in find_checkpoints(tmp_path):
        damage(path, "truncated")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints .* can be used"):
        run_with_checkpoints(tmp_path, small_network(), epochs=3, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def cosine(network, t_total: int, **settings):
    optimizer = torch.optim.AdamW(network.parameters(), **settings)
    return WarmupCosineSchedule(optimizer, warmup_steps=1, t_total=t_total)


def go_on(folder, before: dict, now: dict) -> tuple[WarmupCosineSchedule, torch.optim.Optimizer, list[float]]:
    """Two epochs of three steps with one schedule, then two with another: it, its optimizer, and the rates of its steps."""
    rates: list[float] = []
    for epochs, settings in ((2, before), (4, now)):
        network = small_network()
        schedule = cosine(network, **settings)
        rates.clear()
        run_with_checkpoints(folder, network, epochs, resume=epochs > 2, schedule=schedule, rates=rates)
    return schedule, schedule.optimizer, rates


def rates_of(num_steps: int, **settings) -> list[float]:
    """Rates of all steps of an uninterrupted run."""
    schedule, rates = cosine(torch.nn.Linear(1, 1), **settings), []
    for _ in range(num_steps):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


def test_longer_run_stretches_the_schedule(tmp_path):
    """The learning rate follows the new length from the first step, and not that of the checkpoint, where it would rise."""
    schedule, _, rates = go_on(tmp_path, {"t_total": 6, "lr": 1e-3}, {"t_total": 12, "lr": 1e-3})
    assert (schedule.t_total, schedule.last_epoch) == (12, 12)
    assert rates == rates_of(12, t_total=12, lr=1e-3)[6:]


def test_rate_and_weight_decay_of_a_resumed_run_are_its_own(tmp_path):
    _, optimizer, rates = go_on(tmp_path, {"t_total": 12, "lr": 1e-3}, {"t_total": 12, "lr": 1e-5, "weight_decay": 0.3})
    assert rates == rates_of(12, t_total=12, lr=1e-5)[6:]
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_rate_of_another_schedule_is_scaled(tmp_path):
    """Such as PyTorch's, which compute a rate from the one before."""
    rates: list[float] = []
    for epochs, lr in ((1, 0.8), (2, 0.08)):
        network = small_network()
        schedule = torch.optim.lr_scheduler.StepLR(torch.optim.AdamW(network.parameters(), lr=lr), 2, gamma=0.5)
        rates.clear()
        run_with_checkpoints(tmp_path, network, epochs, resume=epochs > 1, schedule=schedule, rates=rates)
    assert rates == pytest.approx([0.04, 0.02, 0.02])


def test_run_that_stopped_because_steps_were_not_finite_goes_on_with_a_lower_rate(tmp_path):
    settings = {"schedule": cosine(network := small_network(), 9, lr=1e-3)}
    with pytest.raises(FloatingPointError, match="2 steps in a row were not finite"):
        run_with_checkpoints(
            tmp_path, network, 3, loss_function=poisoned({5, 6}), max_nonfinite_steps=2, **settings, rates=[]
        )
    rates: list[float] = []
    settings = {"schedule": cosine(network := small_network(), 9, lr=1e-4)}
    trainer, _ = run_with_checkpoints(tmp_path, network, 3, resume=True, rates=rates, **settings)
    assert trainer.state.iteration == 9 and trainer.nonfinite_steps == 0
    assert rates == rates_of(9, t_total=9, lr=1e-4)[3:]


def test_settings_that_changed_are_one_line_of_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    before = {"lr": 0.001, "kl_weight": 1e-8, "optimizer": {"weight_decay": 0.1, "lr": "@lr"}, "resume": False}
    now = {"lr": 0.00001, "kl_weight": 1e-8, "optimizer": {"weight_decay": 0.2, "lr": "@lr"}, "resume": True}
    run_with_checkpoints(tmp_path, small_network(), 1, config=before)
    run_with_checkpoints(tmp_path, small_network(), 2, config=now, resume=True)
    run_with_checkpoints(tmp_path, small_network(), 3, config=now, resume=True)
    (line,) = (record.message for record in caplog.records if record.message.startswith("settings that changed"))
    assert "written: `lr` is 0.001 there and 1e-05 here; `optimizer` is {" in line and "kl_weight" not in line


def scores_of(monkeypatch, *values: float) -> None:
    """The PSNR of the validations to come."""
    scores = {"psnr": iter(values), "trilinear_psnr": iter([0.0] * len(values))}
    monkeypatch.setattr("monai.handlers.PeakSignalToNoiseRatio.compute", lambda self: next(scores[self._name]))


def best_of(folder) -> float:
    return json.loads((folder / "model.json").read_text())["trained"]["best_metric"]


def test_other_validation_volumes_start_a_new_best_metric(tmp_path, caplog, monkeypatch):
    scores_of(monkeypatch, 1.0, 30.0, 20.0)
    run_with_checkpoints(tmp_path, small_network(), 2)
    _, evaluator = run_with_checkpoints(tmp_path, small_network(), 4, resume=True, volumes=("b", "c"))
    assert "the best metric starts anew" in caplog.text
    assert (evaluator.state.best_metric, evaluator.state.best_metric_epoch) == (20.0, 4)
    assert not hasattr(evaluator.state, "metric_before")
    assert best_of(tmp_path) == 20.0


def test_metric_that_is_nan_is_never_the_best(tmp_path, monkeypatch):
    scores_of(monkeypatch, 1.0, math.nan, 20.0, math.nan)
    run_with_checkpoints(tmp_path, small_network(), 2)
    assert not (tmp_path / WEIGHTS).exists()
    _, evaluator = run_with_checkpoints(tmp_path, small_network(), 5, resume=True)
    assert (evaluator.state.best_metric, evaluator.state.best_metric_epoch) == (20.0, 4)
    assert best_of(tmp_path) == 20.0


def test_other_number_of_batches_goes_on_at_an_epoch(tmp_path, caplog):
    run_with_checkpoints(tmp_path, small_network(), epochs=2)
    trainer, _ = run_with_checkpoints(tmp_path, small_network(), epochs=3, resume=True, num_images=5)
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

    def record(network, path, description):
        saved.append(network.post_quant_conv.conv.weight.clone())
        save_weights(network, path, description)

    monkeypatch.setattr("scripts.training.checkpoints.save_weights", record)
    _, evaluator = run_with_checkpoints(tmp_path, small_network(), epochs=5)
    assert (evaluator.state.best_metric, evaluator.state.best_metric_epoch) == (30.0, 4)
    assert evaluator.state.metric_before == 40.0
    assert len(saved) == 2
    best = small_network()
    load_weights(best, tmp_path / WEIGHTS)
    assert torch.equal(best.post_quant_conv.conv.weight, saved[-1])
    assert not torch.equal(saved[0], saved[1])
