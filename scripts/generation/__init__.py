"""The generator: latents of a folder and what is known of them, the rectified flow that is learned on them, and samples."""

from scripts.generation.conditions import Conditions
from scripts.generation.flow import RectifiedFlow
from scripts.generation.generator import Generator, describe, load_autoencoder, load_generator
from scripts.generation.guidance import Guidance, load_guide
from scripts.generation.latent_data import LatentCollate, ReadLatentd, latent_lists, learn_space
from scripts.generation.latent_space import LatentSpace
from scripts.generation.latent_unet import LatentUNet
from scripts.generation.prepare_batch import FlowPrepareBatch
from scripts.generation.pretrained_generator import load_pretrained_generator
from scripts.generation.sample_evaluation import SampleEvaluation
from scripts.generation.samples import DrawStartd, SampleInferer, SaveSampled, plan_samples
from scripts.generation.solvers import draw_noise, integrate
from scripts.generation.validation import FlowEvaluator, FlowInferer, averages

__all__ = [
    "Conditions",
    "DrawStartd",
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
    "SampleEvaluation",
    "SampleInferer",
    "SaveSampled",
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
    "plan_samples",
]
