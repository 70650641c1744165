"""``model.pt`` and the ``model.json`` beside it, which says which network the weights are of; and weights of other programs.

``model.pt`` is a plain state dict, as the bundle tools want it. Factors do not show in the shapes of all weights, so
``[2, 2]`` would load into ``[2, 1]`` and give nonsense; ``model.json`` keeps the network's arguments and the weights'
SHA-256, and loading checks both.
"""

from __future__ import annotations

import io
import json
import logging
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.files import content_hash, serialise, write_atomically
from scripts.bundle.json_files import Sha256, read_dataclass, shortened

GENERATIVE_MODELS = (  # its names, and those of MONAI
    (re.compile(r"(\.blocks\.\d+)\.to_([qkv])\."), r"\1.attn.to_\2."),
    (re.compile(r"\.proj_attn\."), ".attn.out_proj."),
    (re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\."), r"\1.postconv.conv."),
)
MAISI = (  # each of its convolutions is in a module of its own
    (re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\.conv\."), r"\1.postconv.conv."),
    (re.compile(r"\.conv\.conv\."), ".conv."),
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """
    The JSON file beside the weights of an autoencoder or a generator, as far as loading needs it.

    Args:
        network: arguments of the network.
        sha256: hash of the weights.
        sha256_before: hash of the weights that they replaced.
    """

    network: dict[str, Any] | None = None
    sha256: Sha256 | None = None
    sha256_before: Sha256 | None = None


def save_weights(network: Any, path: str | Path, description: Mapping[str, Any] | None = None) -> None:
    """
    Write ``network``'s weights to ``path`` and its arguments to the JSON file beside it, each in one step.

    Args:
        network: the network, with ``arguments``.
        path: path of the weights, e.g. ``models/model.pt``.
        description: further entries of the JSON file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = serialise(network.state_dict())
    # The description is written first and holds the hash of the old weights too, so that the pair is valid at any moment.
    hashes = [content_hash(content)]
    if path.is_file():
        hashes.append(content_hash(path.read_bytes()))
    known = {"network": network.arguments, **(description or {}), "sha256": hashes[0], "sha256_before": hashes[-1]}
    write_atomically(json.dumps(known, indent=2).encode(), path.with_suffix(".json"))
    write_atomically(content, path)


def load_weights(network: Any, path: str | Path) -> None:
    """
    Load ``path`` into ``network``, after checking that the weights were made for it.

    Args:
        network: the network.
        path: path of a state dict that :py:func:`save_weights` wrote, or of MONAI, GenerativeModels or MAISI, also as one
            value of a dictionary (which is loaded with a warning).

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged, or was made for another network, with the arguments that differ.
    """
    content, arguments = read_weights(path)
    if arguments is None:
        logger.warning(f"{path} has no JSON file beside it, so it cannot be checked whether it fits this network.")
        content = named_for(network, content, path)
    else:
        check_arguments(arguments, network.arguments, path)
    try:
        network.load_state_dict(content)
    except Exception as error:  # whatever is in the file
        raise ValueError(f"{path} cannot be loaded into this network: {textwrap.shorten(str(error), 400)}") from None
    logger.info(f"loaded the weights {path}")


def read_weights(path: str | Path) -> tuple[Any, dict[str, Any] | None]:
    """
    Read a file of weights. No code in it is run.

    Args:
        path: path of the weights.

    Returns:
        what the file holds, on the CPU, and the arguments of its network from the JSON file beside it, None without one.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, holds code, or is not the one that the JSON file describes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}.")
    content = path.read_bytes()
    description = read_description(path)
    if description and content_hash(content) not in (description.sha256, description.sha256_before):
        raise ValueError(f"{path} was changed or damaged: it is not the file that {path.with_suffix('.json')} describes.")
    try:
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # of any type; torch's message advises reading the file without checks
        raise ValueError(f"{path} cannot be loaded: it is damaged, or holds code, which was not run.") from None
    return weights, description.network if description else None


def read_description(weights: str | Path) -> Any:
    """
    What :py:func:`save_weights` wrote beside weights; None where there is no such file, or one of another program.

    Args:
        weights: path of the weights.

    Raises:
        ValueError: when it holds something else.
    """
    path = Path(weights).with_suffix(".json")
    description = read_dataclass(path, Description) if path.is_file() else None
    return description if description and description.network and description.sha256 else None


def what_differs(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The arguments in which two networks differ, with both values; empty if in none."""
    differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
    return "; ".join(
        f"`{name}` is {shortened(saved.get(name))} there and {shortened(wanted.get(name))} here" for name in differing
    )


def check_arguments(saved: dict[str, Any], wanted: dict[str, Any], path: str | Path) -> None:
    """
    Compare the arguments of two networks.

    Args:
        saved: arguments of the network in the file.
        wanted: arguments of the other network.
        path: path of the file, for the error.

    Raises:
        ValueError: when they differ, with the arguments that do and both values.
    """
    if details := what_differs(saved, wanted):
        raise ValueError(f"{path} was made for another network: {details}.")


class WeightsLoader:
    """
    Handler that loads weights before the engine reads its first batch; see :py:func:`load_weights`.

    Args:
        network: the network.
        path: path of the weights.
    """

    def __init__(self, network: AutoencoderKL, path: str) -> None:
        self.network = network
        self.path = path

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: load_weights(self.network, self.path))


# --- weights of other programs -----------------------------------------------------------------------------------------


def autoencoder_in(content: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """
    The state dict of an autoencoder in a file: the whole of it, or the first value that is one.

    Args:
        content: content of the file. Names may have a prefix (``module.``).
        path: path of the file, for the error.

    Raises:
        ValueError: when the file has no weights of an autoencoder.
    """
    for found in [content, *content.values()] if isinstance(content, dict) else []:
        keys = [key for key in found if isinstance(key, str)] if isinstance(found, dict) else []
        prefixes = [key.partition("encoder.blocks.")[0] for key in keys if "encoder.blocks." in key]
        if prefixes:
            named = {key.removeprefix(prefixes[0]): found[key] for key in keys if key.startswith(prefixes[0])}
            return {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
    held = shortened(list(content)) if isinstance(content, dict) else type(content).__name__
    raise ValueError(f"{path} holds no weights of an AutoencoderKL (none is called encoder.blocks...), but {held}.")


def is_maisi(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict is one of MONAI's ``AutoencoderKlMaisi``, which MAISI and NV-Generate publish."""
    return any(".conv1.conv.conv." in key for key in state)


def is_of_this_bundle(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has a linear shortcut, which no other program's network has."""
    return any(key.startswith("shortcut.") for key in state)


def named_as_here(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of MAISI, of GenerativeModels or of MONAI with the names of this network."""
    renamed = {}
    for key, value in state.items():
        for theirs, ours in MAISI if is_maisi(state) else GENERATIVE_MODELS:
            key = theirs.sub(ours, key)
        renamed[key] = value
    return renamed


def named_for(network: torch.nn.Module, content: Any, path: str | Path) -> dict[str, Any]:
    """
    Weights that a file without a description holds, with the names of a network.

    Args:
        network: network that they are for, an autoencoder of this bundle or of MONAI.
        content: content of the file.
        path: path of the file, for the error.

    Raises:
        ValueError: when there are none, and for those of a network that computes something else with them.
    """
    keys = network.state_dict().keys()
    state = content if isinstance(content, dict) and content.keys() == keys else autoencoder_in(content, path)
    arguments = getattr(network, "arguments", {})
    if state.keys() != keys and is_maisi(state) and arguments.get("upsample_mode") != "trilinear":
        raise ValueError(f"{path} holds weights of MAISI's network, which needs configs/presets/maisi.json.")
    if arguments.get("norm", "group") != "group" and not is_of_this_bundle(state):
        raise ValueError(
            f"{path} has no JSON file beside it, so it is taken for weights of MONAI's network, which needs "
            'configs/presets/4x.json, or `norm` "group".'
        )
    return state if state.keys() == keys else named_as_here(state)
