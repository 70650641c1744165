"""The training of the autoencoder: its trainer and losses, the adversary, the average of the weights, repeatable batches,
where weights start, checkpoints and exact resume, signals, and progress.
"""

from scripts.training.adversary import Adversary
from scripts.training.autoencoder_trainer import AutoencoderTrainer
from scripts.training.checkpoints import TrainingResumer, TrainingSaver, claim_ckpt_dir, find_checkpoints
from scripts.training.losses import LossTerm, SpectralLoss, perceptual_loss
from scripts.training.pretrained import PretrainedLoader, load_pretrained
from scripts.training.progress import BeforeAndAfter, Throughput, TrainingProgress, log_factors
from scripts.training.repeatable_batches import RepeatableBatchSampler, RepeatableDataset, RepeatableOrder
from scripts.training.resumable_trainer import ResumableTrainer
from scripts.training.shortcut_fitter import ShortcutFitter
from scripts.training.signals import StopOnSignal, leave_signals_to_main
from scripts.training.weight_average import WeightAverage, moving_average

__all__ = [
    "Adversary",
    "AutoencoderTrainer",
    "BeforeAndAfter",
    "LossTerm",
    "PretrainedLoader",
    "RepeatableBatchSampler",
    "RepeatableDataset",
    "RepeatableOrder",
    "ResumableTrainer",
    "ShortcutFitter",
    "SpectralLoss",
    "StopOnSignal",
    "Throughput",
    "TrainingProgress",
    "TrainingResumer",
    "TrainingSaver",
    "WeightAverage",
    "claim_ckpt_dir",
    "find_checkpoints",
    "leave_signals_to_main",
    "load_pretrained",
    "log_factors",
    "moving_average",
    "perceptual_loss",
]
