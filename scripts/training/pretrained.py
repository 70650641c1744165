"""Fine-tuning and migration: a run that starts from weights, this bundle's or MONAI's, of the same or another network."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.foreign_weights import autoencoder_in, is_maisi, named_as_here
from scripts.bundle.weights import read_weights, what_differs
from scripts.layers.factors import by

__all__ = ["load_pretrained"]

LAYER = re.compile(r"((?:encoder|decoder)\.blocks\.\d+|decoder\.refine|\w+)\.(.+)")  # and the name of a tensor in it
BLOCK = re.compile(r"(encoder|decoder)\.blocks\.(\d+)")
# What a block is can be told from the names of its tensors
KINDS = {"conv1.": "residual", "attn.": "attention", "conv.conv.": "step", "postconv.": "step", "deconv.": "step"}
# Layers that compute latent and image from the features; beside a linear shortcut they only compute a correction of both
ENDS = ("encoder norm", "decoder norm", "decoder last", "quant_conv_mu", "quant_conv_log_sigma")
logger = logging.getLogger(__name__)

Layer = tuple[str, dict[str, torch.Tensor]]  # its name in the state dict, and its tensors


def load_pretrained(network: AutoencoderKL, path: str | Path) -> None:
    """
    Take over weights: those of the same network strictly, those of another network layer by layer. A layer is taken over
    when the file has one at the same place and of the same kind, factor and shapes; every other one is logged with the
    reason.

    Without a description beside them, weights are taken as those of MONAI's network, with a factor of 2 at every step, with
    the names of MONAI, GenerativeModels or MAISI, which enlarges trilinearly. They may be one value of a checkpoint's
    dictionary, under any key, and in float16.

    Args:
        network: the network.
        path: of the weights.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, holds code, holds no AutoencoderKL, or holds one of which no layer fits.
    """
    content, arguments = read_weights(path)
    state = autoencoder_in(content, path)
    if arguments is None:
        arguments = content.get("arguments")  # of a checkpoint of this bundle
    if arguments is None:
        maisi = is_maisi(state)
        whose = "MAISI's" if maisi else "MONAI's"
        logger.info(
            f"{path} does not record the network's arguments: it is taken as {whose} network, with a factor of 2 at every "
            f"step, and `norm_num_groups` {network.arguments['norm_num_groups']} as here"
        )
        arguments = _as_monai(network.arguments, "trilinear" if maisi else "nearest")
        state = named_as_here(state)
    elif what_differs(arguments, network.arguments):
        logger.info(f"{path} was made for another network: {what_differs(arguments, network.arguments)}")
    target = _layers(network.state_dict())
    taken, reasons = _match(_layers(state), arguments, target, network.arguments)
    if reasons and not what_differs(arguments, network.arguments):
        raise ValueError(f"{path} is not what its arguments say, which are this network's: {_listed(reasons)}.")
    for reason in reasons:
        logger.info(f"not taken over: {reason}")
    if not taken:
        raise ValueError(f"nothing in {path} fits this network: {_listed(reasons)}.")
    network.load_state_dict({**network.state_dict(), **_merged(taken)})
    logger.info(f"training starts from {path}: {len(taken)} of {len(target)} layers taken over")


def _listed(reasons: list[str]) -> str:
    return "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")


def _as_monai(arguments: dict[str, Any], upsample_mode: str) -> dict[str, Any]:
    axes = arguments["spatial_dims"]
    factors = [[2] * axes for _ in arguments["downsample_factors"]]
    monai = {"initial_downsample_factor": [1] * axes, "initial_mode": "conv", "linear_shortcut": False}
    return {**arguments, "downsample_factors": factors, **monai, "upsample_mode": upsample_mode, "norm": "group"}


# --- layers by their place ---------------------------------------------------------------------------------------------


def _layers(state: dict[str, torch.Tensor]) -> dict[str, Layer]:
    """
    The layers of a state dict by their place, such as ``"encoder level 1 residual 0"``, which stays the same when other
    levels have more blocks: the number in a name (``encoder.blocks.3``) does not.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in state.items():
        match = LAYER.fullmatch(key)
        layer, name = (match[1], match[2]) if match else (key, "")
        tensors[layer][name] = value
    places = {name: name for name in tensors}
    for part in ("encoder", "decoder"):
        blocks = sorted((int(match[2]), name) for name in tensors if (match := BLOCK.fullmatch(name)) and match[1] == part)
        names = [name for _, name in blocks]
        places.update(zip(names, _places(part, [_kind(tensors[name]) for name in names])))
    return {places[name]: (name, tensors[name]) for name in tensors}


def _kind(tensors: dict[str, torch.Tensor]) -> str:
    return next((kind for start, kind in KINDS.items() if any(name.startswith(start) for name in tensors)), "layer")


def _places(part: str, kinds: list[str]) -> Iterator[str]:
    """A place for each block; levels count from the finest."""
    inner = kinds[1:-2]
    nonlocal_attention = _nonlocal_attention(part, inner)
    level = 0 if part == "encoder" else inner.count("step")
    counts: Counter[str] = Counter()
    yield f"{part} first"
    for i, kind in enumerate(inner):
        if kind == "step":
            level -= part == "decoder"
            yield f"{part} step {level}"
            level += part == "encoder"
            counts.clear()
        else:
            place = "nonlocal" if i in nonlocal_attention else f"level {level}"
            yield f"{part} {place} {kind} {counts[place + kind]}"
            counts[place + kind] += 1
    yield f"{part} norm"
    yield f"{part} last"


def _nonlocal_attention(part: str, inner: list[str]) -> range:
    """
    Position of the non-local attention: residual, attention, residual at the encoder's end or the decoder's start. In a
    level with attention every residual block has an attention block of its own.
    """
    triple = ["residual", "attention", "residual"]
    if part == "encoder" and inner[-3:] == triple:
        return range(len(inner) - 3, len(inner))
    if part == "decoder" and inner[:3] == triple and inner[3:4] != ["attention"]:
        return range(3)
    return range(0)


# --- which of them fit -------------------------------------------------------------------------------------------------


def _match(
    source: dict[str, Layer], source_arguments: dict[str, Any], target: dict[str, Layer], arguments: dict[str, Any]
) -> tuple[dict[str, Layer], list[str]]:
    """The layers that fit, by place, under the names of ``target``; and for each other one its name and why it does not."""
    taken = {}
    reasons = [f"{source[place][0]} of the file, which has no place here" for place in source if place not in target]
    for place, (name, tensors) in target.items():
        if place not in source:
            reasons.append(f"{name}, which is missing there")
        elif (before := _factor(place, source_arguments)) != (now := _factor(place, arguments)):
            reasons.append(f"{name}, whose factor is {before} there and {now} here")
        elif (before := _norm(place, source_arguments)) != (now := _norm(place, arguments)):
            reasons.append(f"{name}, whose norm is {before} there and {now} here")
        elif difference := _difference(source[place][1], tensors):
            reasons.append(f"{name}, where {difference}")
        else:
            taken[place] = (name, source[place][1])
    if "shortcut" in target and "shortcut" not in source:
        for place in [place for place in ENDS if place in taken]:
            name, _ = taken.pop(place)
            reasons.append(f"{name}, which is a small correction of the linear shortcut here")
    return taken, reasons


def _factor(place: str, arguments: dict[str, Any]) -> Any:
    """The factor of a layer that changes the resolution, and how it does so. Neither always shows in a shape."""
    mode = arguments.get("upsample_mode", "nearest")
    enlarges = [mode] if place.startswith("decoder ") and mode != "nearest" else []
    if place in ("encoder first", "decoder last", "decoder.refine"):
        initial = arguments["initial_downsample_factor"]
        return initial if max(initial) == 1 else (initial, arguments["initial_mode"], *enlarges)
    _, _, step = place.partition(" step ")
    factor = dict(enumerate(arguments["downsample_factors"])).get(int(step)) if step else None
    return (factor, *enlarges) if factor and enlarges else factor


def _norm(place: str, arguments: dict[str, Any]) -> str | None:
    """The kind of norm that a layer has, which shows in no shape; None for a layer without one."""
    has_norm = re.search(r" (norm|(residual|attention) \d+)$", place)
    return arguments.get("norm", "group") if has_norm else None


def _difference(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> str:
    for name in sorted(target.keys() ^ source.keys()):
        return f"`{name}` is only {'here' if name in target else 'there'}"
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            return f"`{name}` is {_shape(source[name])} there and {_shape(tensor)} here"
    return ""


def _shape(tensor: torch.Tensor) -> str:
    return by(tensor.shape) or "a number"


def _merged(layers: dict[str, Layer]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}" if key else name: value for name, tensors in layers.values() for key, value in tensors.items()}
