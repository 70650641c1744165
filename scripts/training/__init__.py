"""Training: the trainer that can be resumed and the autoencoder's, its losses, optimizer and adversary, repeatable batches,
and the handlers of a run: initial weights, checkpoints and exact resume, curves and progress, signals.
"""

from scripts.training.autoencoder_trainer import AutoencoderTrainer
from scripts.training.checkpoints import TrainingSaver, claim_ckpt_dir, find_checkpoints, resumed_precision
from scripts.training.handlers import InitialWeights, RunHandlers
from scripts.training.losses import Adversary, LossTerm, ReconstructionLoss, SpectralLoss, perceptual_loss
from scripts.training.muon import Muon
from scripts.training.pretrained import load_pretrained
from scripts.training.repeatable_batches import RepeatableBatchSampler, RepeatableDataset, RepeatableOrder
from scripts.training.resumable_trainer import ResumableTrainer, moving_average
from scripts.training.resume import RunState
from scripts.training.run_log import BeforeAndAfter, MLflowRun, log_factors

__all__ = [
    "Adversary",
    "AutoencoderTrainer",
    "BeforeAndAfter",
    "InitialWeights",
    "LossTerm",
    "MLflowRun",
    "Muon",
    "ReconstructionLoss",
    "RepeatableBatchSampler",
    "RepeatableDataset",
    "RepeatableOrder",
    "ResumableTrainer",
    "RunHandlers",
    "RunState",
    "SpectralLoss",
    "TrainingSaver",
    "claim_ckpt_dir",
    "find_checkpoints",
    "load_pretrained",
    "log_factors",
    "moving_average",
    "perceptual_loss",
    "resumed_precision",
]
