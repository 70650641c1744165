"""Weights of other programs: where in a file they are, whose network they are of, and what their tensors are called here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["autoencoder_in", "is_maisi", "is_of_this_bundle", "named_as_here"]

GENERATIVE_MODELS = (  # its names, and those of MONAI
    (re.compile(r"(\.blocks\.\d+)\.to_([qkv])\."), r"\1.attn.to_\2."),
    (re.compile(r"\.proj_attn\."), ".attn.out_proj."),
    (re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\."), r"\1.postconv.conv."),
)
MAISI = (  # each of its convolutions is in a module of its own
    (re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\.conv\."), r"\1.postconv.conv."),
    (re.compile(r"\.conv\.conv\."), ".conv."),
)


def autoencoder_in(content: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """
    The state dict of an autoencoder in a file: the whole of it, or the first value that is one.

    Args:
        content: of the file. Names may have a prefix (``module.``).
        path: of the file, for the error.

    Raises:
        ValueError: when the file has no weights of an autoencoder.
    """
    dictionaries = [content, *content.values()] if isinstance(content, dict) else []
    for found in dictionaries:
        keys = [key for key in found if isinstance(key, str)] if isinstance(found, dict) else []
        prefixes = [key.partition("encoder.blocks.")[0] for key in keys if "encoder.blocks." in key]
        if prefixes:
            named = {key.removeprefix(prefixes[0]): found[key] for key in keys if key.startswith(prefixes[0])}
            return {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
    held = (
        f"a dictionary of {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else type(content).__name__
    )
    raise ValueError(f"{path} holds no weights of an AutoencoderKL (none is called encoder.blocks...); it is {held}.")


def is_maisi(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict is one of MONAI's ``AutoencoderKlMaisi``, which MAISI and NV-Generate publish."""
    return any(".conv1.conv.conv." in key for key in state)


def is_of_this_bundle(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has a linear shortcut, which no other program's network has."""
    return any(key.startswith("shortcut.") for key in state)


def named_as_here(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of MAISI, of GenerativeModels or of MONAI with the names of this network."""
    names = MAISI if is_maisi(state) else GENERATIVE_MODELS
    return {_renamed(key, names): value for key, value in state.items()}


def _renamed(key: str, names: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for theirs, ours in names:
        key = theirs.sub(ours, key)
    return key
