"""The trainer, its checkpoints and its initial weights work with a network that is not an autoencoder."""

from __future__ import annotations

import pytest
import torch
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanSquaredError, from_engine
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from scripts.training import (
    InitialWeights,
    RepeatableBatchSampler,
    ResumableTrainer,
    RunHandlers,
    TrainingSaver,
    moving_average,
)


class Denoiser(torch.nn.Module):
    """A network with one output, no shortcut, and an argument of its inferer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.arguments = {"channels": channels}
        self.layers = torch.nn.Sequential(torch.nn.Conv3d(1, channels, 3, padding=1), torch.nn.Conv3d(channels, 1, 1))

    def forward(self, x: torch.Tensor, level: float = 0.0) -> torch.Tensor:
        return self.layers(x) + level


class SameNoise(torch.utils.data.Dataset):
    """Volumes for :py:class:`RepeatableBatchSampler`."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, draw):
        return {"image": torch.rand(1, 6, 6, 6, generator=torch.Generator().manual_seed(draw.item))}


def noisy(batchdata, device, non_blocking, **kwargs):
    image = batchdata["image"].to(device)
    return image + 0.1 * torch.randn_like(image), image, (), {"level": 0.5}


def run(folder, epochs: int, resume: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    network = Denoiser(2)
    average = AveragedModel(network, multi_avg_fn=moving_average(0.9))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader([{"image": torch.ones(1, 6, 6, 6), "label": torch.ones(1, 6, 6, 6)}]),
        network=average.module,
        key_val_metric={"mse": MeanSquaredError(output_transform=from_engine(["pred", "label"]))},
        metric_cmp_fn=lambda current, best: current < best or best == -1,
    )
    sampler = RepeatableBatchSampler(3, batch_size=1, seed=0)
    saver = TrainingSaver(str(folder), network, {"optimizer": optimizer, "ema": average}, evaluator)
    trainer = ResumableTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(SameNoise(), batch_sampler=sampler),
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.functional.mse_loss,
        prepare_batch=noisy,
        amp_dtype="bfloat16",
        average=average,
        train_handlers=[RunHandlers(InitialWeights(saver, resume, average), val_interval=1)],
    )
    trainer.run()
    assert trainer.loss_names == ("loss",) and torch.isfinite(trainer.state.output[0]["loss"])
    assert evaluator.state.best_metric_epoch > 0
    return {**network.state_dict(), **{f"average {name}": value for name, value in average.state_dict().items()}}


def test_a_resumed_run_of_another_network_ends_as_one_that_was_not_interrupted(tmp_path):
    whole = run(tmp_path / "whole", epochs=4)
    short = run(tmp_path / "resumed", epochs=2)
    resumed = run(tmp_path / "resumed", epochs=4, resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not torch.equal(short["layers.0.weight"], whole["layers.0.weight"])


def test_checkpoint_of_another_network_names_what_differs(tmp_path, monkeypatch):
    run(tmp_path, epochs=1)
    original = Denoiser.__init__
    monkeypatch.setattr(Denoiser, "__init__", lambda self, channels: original(self, channels + 1))
    with pytest.raises(ValueError, match="`channels` is 2 there and 3 here"):
        run(tmp_path, epochs=2, resume=True)
