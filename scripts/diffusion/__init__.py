"""The latent generator: its data, conditions, network, objective and sampler, and how it is shared."""

from scripts.diffusion.conditions import Conditions
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.generator import Generator, describe, load_autoencoder, load_generator
from scripts.diffusion.guidance import Guidance, load_guide
from scripts.diffusion.latent_data import LatentCollate, ReadLatentd, latent_lists, learn_space
from scripts.diffusion.latent_space import LatentSpace
from scripts.diffusion.latent_unet import LatentUNet
from scripts.diffusion.prepare_batch import FlowPrepareBatch
from scripts.diffusion.pretrained_generator import load_pretrained_generator
from scripts.diffusion.solvers import draw_noise, integrate
from scripts.diffusion.validation import FlowEvaluator, FlowInferer, averages

__all__ = [
    "Conditions",
    "FlowEvaluator",
    "FlowInferer",
    "FlowPrepareBatch",
    "Generator",
    "Guidance",
    "LatentCollate",
    "LatentSpace",
    "LatentUNet",
    "ReadLatentd",
    "RectifiedFlow",
    "averages",
    "describe",
    "draw_noise",
    "integrate",
    "latent_lists",
    "learn_space",
    "load_autoencoder",
    "load_generator",
    "load_guide",
    "load_pretrained_generator",
]
