"""The latent generator: its data, conditions, network, objective and sampler."""

from scripts.diffusion.conditions import Conditions, Volume
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.generator import Generator, describe
from scripts.diffusion.guidance import load_guide
from scripts.diffusion.loading import load_autoencoder, load_generator, load_pretrained_generator
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.prepare_batch import FlowPrepareBatch
from scripts.diffusion.sampler import Sampler
from scripts.diffusion.statistics import LatentStatistics
from scripts.diffusion.training_data import LatentCollate, ReadLatentd, latent_lists, learn_statistics
from scripts.diffusion.validation import FlowEvaluator, FlowInferer, averages

__all__ = [
    "Conditions",
    "Denoiser",
    "FlowEvaluator",
    "FlowInferer",
    "FlowPrepareBatch",
    "Generator",
    "LatentCollate",
    "LatentStatistics",
    "ReadLatentd",
    "RectifiedFlow",
    "Sampler",
    "Volume",
    "averages",
    "describe",
    "latent_lists",
    "learn_statistics",
    "load_autoencoder",
    "load_generator",
    "load_guide",
    "load_pretrained_generator",
]
