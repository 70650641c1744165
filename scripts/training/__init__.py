"""Training: the trainers, losses, optimizer and adversary, repeatable batches, and the handlers of a run: initial weights,
checkpoints and exact resume, curves and progress.
"""

from scripts.training.averaging import moving_average
from scripts.training.checkpoints import TrainingSaver, claim_ckpt_dir, find_checkpoints, resumed_precision
from scripts.training.handlers import BeforeAndAfter, MLflowRun, RunHandlers, log_factors
from scripts.training.initial_weights import InitialWeights, load_pretrained
from scripts.training.losses import Adversary, LossTerm, ReconstructionLoss, SpectralLoss
from scripts.training.muon import Muon
from scripts.training.repeatable_batches import RepeatableBatchSampler, RepeatableDataset, RepeatableOrder
from scripts.training.trainer import AutoencoderTrainer, ResumableTrainer
