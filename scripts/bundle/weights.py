"""``model.pt`` and the ``model.json`` beside it, which says which network the weights are of.

``model.pt`` is a plain state dict, as the bundle tools want it. Factors do not show in the shapes of all weights, so
``[2, 2]`` would load into ``[2, 1]`` and give nonsense; ``model.json`` keeps the network's arguments and the weights'
SHA-256, and loading checks both.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
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
from scripts.bundle.foreign_weights import autoencoder_in, is_maisi, is_of_this_bundle, named_as_here
from scripts.bundle.json_files import Sha256, read_dataclass, shortened
from scripts.bundle.network_arguments import NetworkArguments

__all__ = [
    "WeightsLoader",
    "check_arguments",
    "load_weights",
    "named_for",
    "read_description",
    "read_weights",
    "save_weights",
    "what_differs",
    "what_is_wrong",
]


@dataclass(frozen=True)
class Description:
    """
    The JSON file beside the weights of an autoencoder, as far as loading needs it.

    Args:
        network: arguments of the network.
        sha256: hash of the weights.
        sha256_before: hash of the weights that they replaced.
    """

    network: NetworkArguments | None = None
    sha256: Sha256 | None = None
    sha256_before: Sha256 | None = None


FOREIGN = re.compile(r"Unsupported (?:global|class): GLOBAL (\S+)", re.IGNORECASE)  # torch's message where it refuses code
logger = logging.getLogger(__name__)


def save_weights(network: Any, path: str | Path, description: Mapping[str, Any] | None = None) -> None:
    """
    Write ``network``'s weights to ``path`` and its arguments to the JSON file beside it, each in one step.

    Args:
        network: the network, with ``arguments``.
        path: of the weights, e.g. ``models/model.pt``.
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
        path: a state dict that :py:func:`save_weights` wrote, or one of MONAI, GenerativeModels or MAISI, also as one value
            of a dictionary (which is loaded with a warning).

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged, or was made for another network, with the arguments that differ.
    """
    content, arguments = read_weights(path)
    if arguments is None:
        description = Path(path).with_suffix(".json").name
        logger.warning(f"{path} has no {description} beside it, so it cannot be checked whether it fits this network.")
        content = named_for(network, content, path)
    else:
        check_arguments(arguments, network.arguments, path)
    try:
        network.load_state_dict(content)
    except Exception as error:  # whatever is in the file
        problems = " ".join(textwrap.shorten(line, 160) for line in str(error).splitlines()[1:4])
        raise ValueError(
            f"{path} cannot be loaded into this network: {problems} Set the arguments that the weights were trained with."
        ) from None
    logger.info(f"loaded the weights {path}")


def named_for(network: torch.nn.Module, content: Any, path: str | Path) -> dict[str, Any]:
    """
    Weights that a file without a description holds, with the names of a network.

    Args:
        network: that they are for, an autoencoder of this bundle or of MONAI.
        content: of the file.
        path: of the file, for the error.

    Raises:
        ValueError: when there are none, and for those of a network that computes something else with them.
    """
    keys = network.state_dict().keys()
    state = content if isinstance(content, dict) and content.keys() == keys else autoencoder_in(content, path)
    arguments = getattr(network, "arguments", {})
    if state.keys() != keys and is_maisi(state) and arguments.get("upsample_mode") != "trilinear":
        raise ValueError(
            f"{path} holds weights of MAISI's network, which enlarges trilinearly: use configs/presets/maisi.json, or set "
            '`upsample_mode` to "trilinear".'
        )
    if arguments.get("norm", "group") != "group" and not is_of_this_bundle(state):
        raise ValueError(
            f"{path} has no {Path(path).with_suffix('.json').name} beside it: it is taken for weights of MONAI's network, "
            'whose norms are group norms. Use configs/presets/4x.json, or set `norm` to "group".'
        )
    return state if state.keys() == keys else named_as_here(state)


def read_weights(path: str | Path, kind: Any = Description, wanted: str = "") -> tuple[Any, dict[str, Any] | None]:
    """
    Read a file of weights. No code in it is run.

    Args:
        path: file of weights.
        kind: dataclass of the JSON file beside them, with ``network``, ``sha256`` and ``sha256_before``.
        wanted: sentence for the error where there are none, with the argument that names them.

    Returns:
        what the file holds, on the CPU, and the arguments of its network from the JSON file beside it, None without one.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, holds code, or is not the one that the JSON file describes.
    """
    path = Path(path)
    if not path.is_file():
        wanted = wanted or "Train first, or set `ckpt_dir` or `pretrained` to others."
        raise FileNotFoundError(f"there are no weights at {path}. {wanted}")
    content = path.read_bytes()
    description = read_description(path, kind)
    if description and content_hash(content) not in (description.sha256, description.sha256_before):
        raise ValueError(
            f"{path} is not the file that {path.with_suffix('.json')} describes: it was changed or damaged. "
            "Restore the pair, or remove the description if you trust the weights."
        )
    try:
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise errors of any type
        raise ValueError(f"{path} cannot be loaded: it {what_is_wrong(error)}.") from error
    return weights, description.network if description else None


def read_description(weights: str | Path, kind: Any = Description) -> Any:
    """
    What :py:func:`save_weights` wrote beside weights; None where there is no such file, or one of another program.

    Args:
        weights: file of weights.
        kind: see :py:func:`read_weights`.

    Raises:
        ValueError: when it holds something else.
    """
    path = Path(weights).with_suffix(".json")
    if not path.is_file():
        return None
    try:
        description = read_dataclass(path, kind)
    except ValueError as error:
        raise ValueError(f"{error} Restore the file, or remove it if you trust the weights.") from error
    return description if description.network and description.sha256 else None


def what_is_wrong(error: Exception) -> str:
    """
    Why torch refused to read a file, as the end of a sentence about it. Torch's own message is left out, because it advises
    reading the file without checks.
    """
    payload = FOREIGN.search(str(error))
    if payload:
        return f"holds code ({payload[1]}), which was not run"
    if isinstance(error, (pickle.UnpicklingError, LookupError, EOFError)):  # a LookupError's message is a number
        return "is damaged (it holds no checkpoint)"
    return f"is damaged ({(str(error).splitlines() or [type(error).__name__])[0]})"


def what_differs(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The arguments in which two networks differ, with both values; empty if in none."""
    differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
    values = {name: (shortened(saved.get(name)), shortened(wanted.get(name))) for name in differing}
    return "; ".join(f"`{name}` is {there} there and {here} here" for name, (there, here) in values.items())


def check_arguments(saved: dict[str, Any], wanted: dict[str, Any], path: str | Path) -> None:
    """
    Compare the arguments of two networks.

    Args:
        saved: arguments of the network in the file.
        wanted: arguments of the other network.
        path: of the file, for the error.

    Raises:
        ValueError: when they differ, with the arguments that do and both values.
    """
    details = what_differs(saved, wanted)
    if details:
        raise ValueError(
            f"{path} was made for another network: {details}. Use the config that it was trained with, or other weights "
            "(`ckpt_dir`)."
        )


class WeightsLoader:
    """
    Handler that loads weights before the engine reads its first batch; see :py:func:`load_weights`.

    Args:
        network: the network.
        path: of the weights.
    """

    def __init__(self, network: AutoencoderKL, path: str) -> None:
        self.network = network
        self.path = path

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: load_weights(self.network, self.path))
