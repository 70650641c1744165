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

__all__ = ["load_pretrained"]

LAYER = re.compile(r"((?:encoder|decoder)\.blocks\.\d+|decoder\.refine|[^.]+)\.?(.*)")  # and the name of a tensor in it
# The names of a block's tensors say what it is
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
    arguments = arguments or content.get("arguments")  # of a checkpoint of this bundle
    differing = what_differs(arguments or {}, network.arguments)
    if arguments is None:
        maisi = is_maisi(state)
        whose = "MAISI's" if maisi else "MONAI's"
        logger.info(
            f"{path} does not record the network's arguments: it is taken as {whose} network, with a factor of 2 at every "
            f"step, and `norm_num_groups` {network.arguments['norm_num_groups']} as here"
        )
        arguments = _as_monai(network.arguments, "trilinear" if maisi else "nearest")
        state = named_as_here(state)
    elif differing:
        logger.info(f"{path} was made for another network: {differing}")
    target = _layers(network.state_dict())
    taken, reasons = _match(_layers(state), arguments, target, network.arguments)
    first = "; ".join(reasons[:3])
    if reasons and not differing:
        raise ValueError(f"{path} is not what its arguments say, which are this network's: {first}.")
    for reason in reasons:
        logger.info(f"not taken over: {reason}")
    if not taken:
        raise ValueError(f"nothing in {path} fits this network: {first}.")
    network.load_state_dict({**network.state_dict(), **_merged(taken)})
    logger.info(f"training starts from {path}: {len(taken)} of {len(target)} layers taken over")


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
        [(layer, name)] = LAYER.findall(key)
        tensors[layer][name] = value
    places = {name: name for name in tensors}
    for part in ("encoder", "decoder"):
        names = [name for name in tensors if name.startswith(f"{part}.blocks.")]
        names.sort(key=lambda name: int(name.rpartition(".")[2]))
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
    corrections = ENDS if "shortcut" in target and "shortcut" not in source else ()
    for place, (name, tensors) in target.items():
        if place not in source:
            reasons.append(f"{name}, which is missing there")
            continue
        there, here = _properties(place, source[place][1], source_arguments), _properties(place, tensors, arguments)
        differing = next((key for key in {**here, **there} if here.get(key) != there.get(key)), None)
        if differing:
            reasons.append(f"{name}, whose `{differing}` is {there.get(differing)} there and {here.get(differing)} here")
        elif place in corrections:
            reasons.append(f"{name}, which is a small correction of the linear shortcut here")
        else:
            taken[place] = (name, source[place][1])
    return taken, reasons


def _properties(place: str, tensors: dict[str, torch.Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    """What a layer computes: its factor, how it enlarges, and its norm, which show in no shape; and the shapes."""
    found: dict[str, Any] = {}
    if place in ("encoder first", "decoder last", "decoder.refine"):
        found["factor"] = arguments["initial_downsample_factor"]
        if max(found["factor"]) > 1:
            found["initial_mode"] = arguments["initial_mode"]
    elif " step " in place:
        found["factor"] = dict(enumerate(arguments["downsample_factors"])).get(int(place.rpartition(" ")[2]))
    if place.startswith("decoder ") and max(found.get("factor") or [1]) > 1:
        found["upsample_mode"] = arguments.get("upsample_mode", "nearest")
    if re.search(r" (norm|(residual|attention) \d+)$", place):
        found["norm"] = arguments.get("norm", "group")
    return found | {name: list(tensor.shape) for name, tensor in tensors.items()}


def _merged(layers: dict[str, Layer]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}" if key else name: value for name, tensors in layers.values() for key, value in tensors.items()}
