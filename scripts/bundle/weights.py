"""``model.pt``, a plain state dict as the bundle tools want it, and ``model.json`` beside it; and weights of other programs.

Factors do not show in the shapes of all weights, so ``[2, 2]`` would load into ``[2, 1]`` and give nonsense. ``model.json``
keeps the network's arguments and the weights' SHA-256, and loading checks both.
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
    """The JSON file beside the weights of an autoencoder or a generator, as far as loading needs it."""

    network: dict[str, Any] | None = None
    sha256: Sha256 | None = None
    sha256_before: Sha256 | None = None  # of the weights that they replaced


def save_weights(network: Any, path: str | Path, description: Mapping[str, Any] | None = None) -> None:
    """
    Write ``network``'s weights to ``path``, and its ``arguments`` with the further entries of ``description`` to the JSON
    file beside it, each in one step.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = serialise(network.state_dict())
    new = content_hash(content)
    old = content_hash(path.read_bytes()) if path.is_file() else new
    known = {"network": network.arguments, **(description or {}), "sha256": new, "sha256_before": old}
    # the description first, with the hash of the old weights too, so that the pair is valid at any moment
    write_atomically(json.dumps(known, indent=2).encode(), path.with_suffix(".json"))
    write_atomically(content, path)


def load_weights(network: Any, path: str | Path) -> None:
    """
    Load ``path`` into ``network``, after checking that the weights were made for it. They are a state dict that
    :py:func:`save_weights` wrote, or one of MONAI, GenerativeModels or MAISI, also as one value of a dictionary, which
    cannot be checked and is loaded with a warning.

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
    What :py:func:`save_weights` wrote beside ``weights``, a path; None where there is no such file, or one of another
    program.
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
    """Raise a ValueError when the arguments of the network in a file are not those of another one, with both values."""
    if details := what_differs(saved, wanted):
        raise ValueError(f"{path} was made for another network: {details}.")


@dataclass(eq=False)
class WeightsLoader:
    """Handler that loads weights before the engine reads its first batch, by :py:func:`load_weights`."""

    network: AutoencoderKL
    path: str

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: load_weights(self.network, self.path))


# --- weights of other programs -----------------------------------------------------------------------------------------


def autoencoder_in(content: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """
    The state dict of an autoencoder in the ``content`` of a file: the whole of it, or the first value that is one, without
    a prefix of its names (``module.``). ValueError without such weights.
    """
    for found in [content, *content.values()] if isinstance(content, dict) else []:
        keys = [key for key in found if isinstance(key, str)] if isinstance(found, dict) else []
        prefixes = [key.partition("encoder.blocks.")[0] for key in keys if "encoder.blocks." in key]
        if prefixes:
            named = {key.removeprefix(prefixes[0]): found[key] for key in keys if key.startswith(prefixes[0])}
            return {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
    held = shortened(list(content)) if isinstance(content, dict) else type(content).__name__
    raise ValueError(f"{path} holds no weights of an AutoencoderKL (none is called encoder.blocks...), but {held}.")


def named_as_here(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    A state dict with the names of this network, and the arguments of its network that its names tell: MONAI's,
    GenerativeModels' and MAISI's have group norms, and MAISI's (MONAI's ``AutoencoderKlMaisi``) enlarges trilinearly. Those
    with a linear shortcut, which no other program's network has, tell none.
    """
    if any(key.startswith("shortcut.") for key in state):
        return state, {}
    is_maisi = any(".conv1.conv.conv." in key for key in state)
    for theirs, ours in MAISI if is_maisi else GENERATIVE_MODELS:
        state = {theirs.sub(ours, key): value for key, value in state.items()}
    return state, {"norm": "group", "upsample_mode": "trilinear" if is_maisi else "nearest"}


def named_for(network: torch.nn.Module, content: Any, path: str | Path) -> dict[str, Any]:
    """
    Weights in the ``content`` of a file without a description, with the names of a network, an autoencoder of this bundle or
    of MONAI.

    Raises:
        ValueError: when there are none, and for those of a network that computes something else with them.
    """
    keys, here = network.state_dict().keys(), getattr(network, "arguments", {})
    state = content if isinstance(content, dict) and content.keys() == keys else autoencoder_in(content, path)
    named, theirs = named_as_here(state)
    fits = state.keys() == keys
    if not fits and theirs.get("upsample_mode") == "trilinear" and here.get("upsample_mode") != "trilinear":
        raise ValueError(f"{path} holds weights of MAISI's network, which needs configs/presets/maisi.json.")
    if theirs and here.get("norm", "group") != "group":
        raise ValueError(
            f"{path} has no JSON file beside it, so it is taken for weights of MONAI's network, which needs "
            'configs/presets/4x.json, or `norm` "group".'
        )
    return state if fits else named
