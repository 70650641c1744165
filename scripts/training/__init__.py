"""Training: the trainer that can be resumed and the autoencoder's, its losses, optimizer and adversary, the average of the
weights, repeatable batches, initial weights, checkpoints and exact resume, signals, and progress.
"""

from scripts.training.adversary import Adversary
from scripts.training.autoencoder_trainer import AutoencoderTrainer
from scripts.training.checkpoints import TrainingSaver, claim_ckpt_dir, find_checkpoints
from scripts.training.initial_weights import InitialWeights
from scripts.training.losses import LossTerm, ReconstructionLoss, SpectralLoss, perceptual_loss
from scripts.training.muon import Muon
from scripts.training.precision_of_checkpoints import resumed_precision
from scripts.training.pretrained import load_pretrained
from scripts.training.progress import BeforeAndAfter, Throughput, TrainingProgress, log_factors
from scripts.training.repeatable_batches import RepeatableBatchSampler, RepeatableDataset, RepeatableOrder
from scripts.training.resumable_trainer import ResumableTrainer, lr_and_losses
from scripts.training.signals import StopOnSignal
from scripts.training.weight_average import WeightAverage, moving_average

__all__ = [
    "Adversary",
    "AutoencoderTrainer",
    "BeforeAndAfter",
    "InitialWeights",
    "LossTerm",
    "Muon",
    "ReconstructionLoss",
    "RepeatableBatchSampler",
    "RepeatableDataset",
    "RepeatableOrder",
    "ResumableTrainer",
    "SpectralLoss",
    "StopOnSignal",
    "Throughput",
    "TrainingProgress",
    "TrainingSaver",
    "WeightAverage",
    "claim_ckpt_dir",
    "find_checkpoints",
    "load_pretrained",
    "log_factors",
    "lr_and_losses",
    "moving_average",
    "perceptual_loss",
    "resumed_precision",
]
