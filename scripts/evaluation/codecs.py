"""Codecs from files of any origin: weights of this bundle or of other programs, exported files, and networks of MONAI."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import CONFIGS
from scripts.bundle.errors import reason
from scripts.bundle.foreign_weights import autoencoder_in, is_maisi, is_of_this_bundle
from scripts.bundle.weights import load_weights, named_for, read_description, read_weights
from scripts.evaluation.comparison import Codec
from scripts.inference.exported_networks import SUFFIXES, ExportedNetwork
from scripts.layers.factors import by, per_axis
from scripts.layers.resampling import pad_to_multiple
from scripts.planning.fake_tensors import fake_copy, fake_tensors
from scripts.planning.plans import read_plan

__all__ = ["read_codecs"]

SPATIAL_DIMS = 3  # of the pipelines
PROBE = 256  # voxels along each axis of the volume that says by how much a network shrinks; nothing is computed
SIZE_OF_LATENT = ("total_downsample_factor", "latent_channels")
logger = logging.getLogger(__name__)


def read_codecs(
    codecs: Mapping[str, Any],
    image_channels: int,
    device: str | torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, Codec]:
    """
    Load all codecs of a comparison and let each reconstruct a small volume, so that one which cannot be used ends the run
    before the first volume is read.

    Args:
        codecs: by name, a path, or a dictionary with the path as ``weights`` and what the file does not say:

            - a folder with ``model.pt``, or such a file, with its JSON file beside it;
            - the same without a JSON file, of MONAI, GenerativeModels or MAISI: ``preset`` (a name in ``configs/presets``,
              or a path), or keys of ``configs/inference.json`` such as ``channels``. For MAISI's file, its preset is used;
            - an exported file (``.ts``, ``.pt2``, ``.onnx``): ``total_downsample_factor`` and ``latent_channels``, which
              TorchScript knows, and a JSON file of the same name says as well;
            - weights for a ``network`` with ``encode``, which returns the mean of a latent first, and ``decode``, such as
              MONAI's ``AutoencoderKL``.
        image_channels: number of channels of the volumes.
        device: where to run.
        memory_format: of the weights.

    Raises:
        ValueError: when codecs cannot be used; it names each of them, says what is wrong, and what to do.
    """
    if not isinstance(codecs, Mapping) or not codecs:
        raise ValueError(f"`codecs` is {codecs!r}; it must name at least one, as in {{'mine': 'eval/checkpoints'}}.")
    found, problems = {}, {}
    for name, entry in codecs.items():
        try:
            found[name] = _read(entry, image_channels, device, memory_format)
            _try(found[name], device)
        except Exception as error:  # whatever is in the files
            problems[name] = " ".join(str(reason(error)).split())
    if problems:
        lines = [f"{name!r}: {problem}" for name, problem in problems.items()]
        raise ValueError("\n  ".join([f"{len(lines)} of {len(codecs)} `codecs` cannot be used:", *lines]))
    for name, codec in found.items():
        size = f"{codec.latent_channels} values for {by(codec.total_downsample_factor)} voxels"
        logger.info(f"{name}: {codec.weights}, {size}")
    return found


def _read(entry: Any, image_channels: int, device: str | torch.device, memory_format: torch.memory_format) -> Codec:
    given = dict(entry) if isinstance(entry, Mapping) else {"weights": entry}
    weights = given.pop("weights", None)
    if not isinstance(weights, (str, Path)):
        raise ValueError(f"its `weights` are {weights!r}; they must be the path of a file or of a folder with model.pt.")
    path = Path(weights) / "model.pt" if Path(weights).is_dir() else Path(weights)
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}. Give the path of weights, of a folder with model.pt, or of an exported file."
        )
    if path.suffix in SUFFIXES:
        return _exported(path, given, image_channels, device)
    if "network" in given:
        network = _with_weights(given.pop("network"), path, image_channels)
        _refuse(given, "its `network` is complete")
    else:
        network = _autoencoder(path, given, image_channels)
    network = network.eval().to(device, memory_format=memory_format)  # type: ignore[call-overload]
    return Codec(network, network.total_downsample_factor, network.latent_channels, image_channels, str(path))


def _refuse(given: Mapping[str, Any], why: str) -> None:
    if given:
        raise ValueError(f"{why}; leave out {', '.join(f'`{key}`' for key in given)}.")


class _Exported(nn.Module):
    """An exported file, in float32 as it was exported."""

    def __init__(self, path: Path, device: str | torch.device) -> None:
        super().__init__()
        self.network = ExportedNetwork(str(path), str(device))

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.network(x)


class _WithLatents(nn.Module):
    """A network with ``encode`` and ``decode`` for volumes of any size, which are padded and cropped."""

    def __init__(self, network: Any, image_channels: int) -> None:
        super().__init__()
        self.network = network
        with fake_tensors(), torch.no_grad():
            (z_mu, *_) = fake_copy(network).encode(torch.empty(1, image_channels, *(PROBE,) * SPATIAL_DIMS))  # type: ignore[operator]
        self.latent_channels, *sizes = z_mu.shape[1:]
        if len(sizes) != SPATIAL_DIMS or any(PROBE % size for size in sizes):
            raise ValueError(f"its latent of {by((PROBE,) * SPATIAL_DIMS)} voxels is {by(sizes)}, which is no whole factor.")
        self.total_downsample_factor = tuple(PROBE // size for size in sizes)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        (z_mu, *_) = self.network.encode(pad_to_multiple(x, self.total_downsample_factor))
        height, width, depth = x.shape[2:]
        return self.network.decode(z_mu)[:, :, :height, :width, :depth]


def _with_weights(network: Any, path: Path, image_channels: int) -> Any:
    if not (callable(getattr(network, "encode", None)) and callable(getattr(network, "decode", None))):
        raise ValueError(
            f"its `network` is {type(network).__name__}; it needs `encode` and `decode`, as MONAI's AutoencoderKL."
        )
    content, _ = read_weights(path)
    network.load_state_dict(named_for(network, content, path))
    return network if isinstance(network, AutoencoderKL) else _WithLatents(network, image_channels)


def _autoencoder(path: Path, given: dict[str, Any], image_channels: int) -> AutoencoderKL:
    content, arguments = read_weights(path)
    if arguments is None:
        arguments = _arguments_of_another_program(path, content, given, image_channels)
    else:
        _refuse(given, f"{path.with_suffix('.json').name} beside {path} says which network it is")
    network = AutoencoderKL(**{**arguments, "use_flash_attention": True})
    load_weights(network, path)
    return network


def _arguments_of_another_program(path: Path, content: Any, given: dict[str, Any], image_channels: int) -> dict[str, Any]:
    state = autoencoder_in(content, path)
    if not given and not is_maisi(state):
        presets = ", ".join(sorted(file.stem for file in (CONFIGS / "presets").glob("*.json")))
        raise ValueError(
            f"{path} has no {path.with_suffix('.json').name} beside it, so its network is not known. Add `preset` "
            f"({presets}), keys such as `channels`, or `network`, as in {{'weights': {str(path)!r}, 'preset': '4x'}}."
        )
    keys = {**given} if is_of_this_bundle(state) else {"norm": "group", **given}
    preset = keys.pop("preset", "maisi" if is_maisi(state) else None)
    files = [CONFIGS / "inference.json"]
    if preset is not None:
        files.append(Path(preset) if Path(preset).suffix else CONFIGS / "presets" / f"{preset}.json")
    plan = read_plan([str(file) for file in files], **{"image_channels": image_channels, **keys})
    return plan.network.arguments


def _exported(path: Path, given: dict[str, Any], image_channels: int, device: str | torch.device) -> Codec:
    codec = _Exported(path, device).eval()
    known = {name: getattr(codec.network.run, name, None) for name in SIZE_OF_LATENT}  # TorchScript keeps them
    if None in known.values():
        described = read_description(path)
        if described is not None:
            with torch.device("meta"):
                network = AutoencoderKL(**described.network)
            known = {name: getattr(network, name) for name in SIZE_OF_LATENT}
    known |= {name: given.pop(name) for name in SIZE_OF_LATENT if name in given}
    _refuse(given, f"{path} is a whole network")
    if None in known.values():
        raise ValueError(
            f"{path} does not say how large its latents are. Add them, as in {{'weights': {str(path)!r}, "
            "'total_downsample_factor': 8, 'latent_channels': 24}."
        )
    factors = per_axis("total_downsample_factor", known["total_downsample_factor"], SPATIAL_DIMS)
    (channels,) = per_axis("latent_channels", known["latent_channels"], 1)
    return Codec(codec, factors, channels, image_channels, str(path))


@torch.no_grad()
def _try(codec: Codec, device: str | torch.device) -> None:
    """Reconstruct a volume of two latent values along each axis."""
    if len(codec.total_downsample_factor) != SPATIAL_DIMS:
        raise ValueError(f"it is for {len(codec.total_downsample_factor)} axes, and volumes have {SPATIAL_DIMS}.")
    volume = torch.zeros(1, codec.image_channels, *(2 * factor for factor in codec.total_downsample_factor), device=device)
    what = f"a volume of {codec.image_channels} channels (`image_channels`) and {by(volume.shape[2:])} voxels"
    try:
        result = codec.network.reconstruct(volume)  # type: ignore[operator]
    except Exception as error:  # of any type
        raise ValueError(f"{codec.weights} cannot reconstruct {what}: {error}") from error
    if result.shape != volume.shape or not result.isfinite().all():
        raise ValueError(f"{codec.weights} makes {by(result.shape)} of {what}, or values that are not finite.")
