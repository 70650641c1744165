"""A trained generator, as its weights and the JSON file beside them tell it, and the autoencoder that it works with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.autoencoderkl import Reconstructor
from scripts.bundle.files import file_hash
from scripts.bundle.json_files import SHA256
from scripts.bundle.shared_generator import FOLDER
from scripts.bundle.weights import NETWORK, load_weights, read_description, read_weights
from scripts.diffusion.flow import RectifiedFlow
from scripts.diffusion.latent_space import LatentSpace
from scripts.diffusion.latent_unet import LatentUNet

__all__ = ["Generator", "describe", "load_autoencoder", "load_generator"]

MAX_CHANNELS, MAX_LEVELS, MAX_SIZE = 2**16, 16, 2**15 - 1
_COUNT = {"type": "integer", "minimum": 1, "maximum": MAX_CHANNELS, "description": f"an integer from 1 to {MAX_CHANNELS}"}
_COUNTS = {"type": "array", "minItems": 1, "maxItems": MAX_LEVELS, "items": _COUNT, "description": "a list of integers"}
_NUMBER = {"type": "number", "description": "a finite number"}
_NUMBERS = {"type": "array", "minItems": 1, "items": _NUMBER, "description": "a list of finite numbers"}
_POSITIVE = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "number", "exclusiveMinimum": 0},
    "description": "positive numbers",
}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1, "description": "a number from 0 to 1"}
_SEEN = {
    "type": "object",
    "required": ["mean", "deviation", "lowest", "highest"],
    "additionalProperties": _NUMBER,
    "description": "mean, deviation, lowest and highest",
}
_CLASSES = {
    "type": "object",
    "required": ["classes"],
    "properties": {"classes": {"type": "object", "minProperties": 1, "additionalProperties": _COUNT}},
    "description": "the number of volumes of each class",
}
_GEOMETRY = {
    "type": "object",
    "required": ["size", "spacing", "count"],
    "properties": {
        "size": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {"type": "integer", "minimum": 1, "maximum": MAX_SIZE},
            "description": "a size in voxels along each axis",
        },
        "spacing": {**_POSITIVE, "minItems": 2, "maxItems": 3},
        "count": {"type": "integer", "minimum": 1, "description": "a positive integer"},
    },
    "description": "size, spacing and how often they were seen",
}
DESCRIPTION = {  # schema of the JSON file beside the weights
    "type": "object",
    "required": ["network", "latents", "flow", "condition_dropout", "sha256"],
    "properties": {
        "network": {
            "type": "object",
            "required": ["spatial_dims", "latent_channels", "condition_size", "channels", "attention_levels"],
            "properties": {
                "spatial_dims": {"enum": [2, 3], "description": "2 or 3"},
                "latent_channels": _COUNT,
                "condition_size": _COUNT,
                "channels": _COUNTS,
                "attention_levels": {"type": "array", "items": {"type": "boolean"}, "description": "a list of flags"},
                "num_res_blocks": _COUNTS,
                "norm_num_groups": _COUNT,
                "num_head_channels": _COUNT,
                "gain": {"type": "boolean", "description": "a flag"},
            },
            "additionalProperties": False,
            "description": "the arguments of a LatentUNet",
        },
        "latents": {
            "type": "object",
            "required": [
                *("autoencoder", "volumes", "latent_gamma", "channel_mean", "channel_deviation", "channel_amplitude"),
                *("conditions", "geometries", "intensity_low", "intensity_high", "data_type", "scl_slope", "scl_inter"),
            ],
            "properties": {
                "autoencoder": {
                    "type": "object",
                    "required": ["network", "sha256"],
                    "properties": {"network": NETWORK, "sha256": SHA256},
                    "description": "the arguments of an AutoencoderKL and the SHA-256 of its weights",
                },
                "channel_mean": _NUMBERS,
                "channel_deviation": _POSITIVE,
                "channel_amplitude": _POSITIVE,
                "training_mean": _NUMBERS,
                "conditions": {
                    "type": "object",
                    "required": ["geometry", "keys"],
                    "properties": {
                        "geometry": {"type": "array", "items": _SEEN},
                        "keys": {"type": "object", "additionalProperties": {"anyOf": [_SEEN, _CLASSES]}},
                    },
                    "description": "what training saw of sizes, spacings and conditions",
                },
                "geometries": {"type": "array", "minItems": 1, "items": _GEOMETRY, "description": "sizes and spacings"},
                "intensity_low": _NUMBERS,
                "intensity_high": _NUMBERS,
                "data_type": {"type": "string", "pattern": "^[<>|][iuf][1248]$", "description": "a data type such as <i2"},
                "scl_slope": _NUMBER,
                "scl_inter": _NUMBER,
            },
            "description": "what the generator knows of its training latents",
        },
        "flow": {
            "type": "object",
            "required": ["prediction", "timestep_shift"],
            "additionalProperties": {"type": ["number", "string", "null"]},
            "maxProperties": 2,
            "description": "prediction and timestep_shift",
        },
        "condition_dropout": _SHARE,
        "trained": {
            "type": "object",
            "required": ["iteration", "epoch", "best_metric"],
            "properties": {
                "iteration": {"type": "integer", "minimum": 1, "description": "a positive integer"},
                "epoch": {"type": "integer", "minimum": 1, "description": "a positive integer"},
                "best_metric": _NUMBER,
            },
            "description": "iteration, epoch and best_metric",
        },
        "sha256": SHA256,
        "sha256_before": SHA256,
    },
    "description": "what training wrote of a generator",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generator:
    """
    Args:
        network: with its weights.
        space: what it knows of its training latents.
        flow: that it has learned.
        condition_dropout: share of the steps in which it was told nothing.
        sha256: of its weights.
    """

    network: LatentUNet
    space: LatentSpace
    flow: RectifiedFlow
    condition_dropout: float
    sha256: str


def describe(space: LatentSpace, flow: RectifiedFlow, condition_dropout: float) -> dict[str, Any]:
    """What the JSON file beside a generator's weights says besides the arguments of its network."""
    return {"latents": space.description, "flow": flow.arguments, "condition_dropout": condition_dropout}


def load_generator(path: str, wanted: str = "") -> Generator:
    """
    Read a generator.

    Args:
        path: of its weights; the JSON file beside them tells the rest.
        wanted: see :py:func:`scripts.bundle.weights.read_weights`.

    Raises:
        FileNotFoundError: when there are no weights, or nothing beside them.
        ValueError: when a file is damaged, or the two do not belong together.
    """
    if not Path(path).is_file() and Path(path).parent.as_posix().endswith(FOLDER):
        raise FileNotFoundError(
            f"there are no weights at {path}: this bundle carries no generator. Train one (docs/generation.md), or set "
            "`ckpt_dir` or `pretrained` to another."
        )
    if Path(path).is_file() and not Path(path).with_suffix(".json").is_file():
        raise FileNotFoundError(
            f"{path} has no {Path(path).with_suffix('.json').name} beside it, without which it is useless."
        )
    content, arguments = read_weights(path, DESCRIPTION, wanted)
    description = read_description(path, DESCRIPTION)
    assert description is not None and arguments is not None
    network = LatentUNet(**arguments)
    space = LatentSpace(description["latents"])
    _refuse_contradictions(path, network, space)
    try:
        network.load_state_dict(content)
    except Exception as error:  # whatever is in the file
        raise ValueError(f"{path} cannot be loaded into the network that its JSON file describes: {error}") from error
    network.eval()
    logger.info(f"loaded the generator {path}: {space.summary()}")
    return Generator(network, space, RectifiedFlow(**description["flow"]), description["condition_dropout"], file_hash(path))


def _refuse_contradictions(path: str, network: LatentUNet, space: LatentSpace) -> None:
    channels = network.arguments["latent_channels"]
    axes = network.arguments["spatial_dims"]
    names = ("channel_mean", "channel_deviation", "channel_amplitude")
    lengths = [len(values) for values in (*(space.description[name] for name in names), space.training_mean)]
    geometries = space.description["geometries"]
    agree = (
        lengths == [channels] * 4
        and len(space.conditions) == network.arguments["condition_size"]
        and all(len(each[name]) == axes for each in geometries for name in ("size", "spacing"))
        and len(space.description["conditions"]["geometry"]) == 2 * axes
        and len(space.factors) == axes
    )
    if not agree:
        raise ValueError(
            f"{Path(path).with_suffix('.json')} contradicts itself: `network` and `latents` differ in channels, conditions "
            "or axes. Restore the file, or train again."
        )


def load_autoencoder(path: str, space: LatentSpace) -> Reconstructor:
    """
    Load the autoencoder that made a generator's training latents.

    Args:
        path: of its weights.
        space: of the generator.

    Raises:
        ValueError: for other weights.
    """
    expected: Mapping[str, Any] = space.description["autoencoder"]
    if Path(path).is_file() and file_hash(path) != expected["sha256"]:
        raise ValueError(
            f"the autoencoder {path} is not the one that the generator was trained with: the SHA-256 of its weights begins "
            f"with {file_hash(path)[:12]} instead of {expected['sha256'][:12]}. Set `autoencoder` to the weights that "
            "encoded the training volumes."
        )
    autoencoder = Reconstructor(**expected["network"])
    load_weights(autoencoder, path)
    return autoencoder.eval()
