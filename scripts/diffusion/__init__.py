"""The latent generator: its data, conditions, network, objective and sampler."""

from scripts.diffusion.conditions import Conditions, Volume
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.generator import describe, load_autoencoder, load_generator, load_guide, load_pretrained_generator
from scripts.diffusion.objective import FlowEvaluator, FlowPrepareBatch
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.sampler import Generator, Sampler
from scripts.diffusion.statistics import LatentStatistics
from scripts.diffusion.training_data import LatentCollate, ReadLatentd, latent_lists, learn_statistics
