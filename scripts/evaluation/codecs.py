"""Codecs: weights of this bundle or of other programs, exported files, and the block-wise cosine transform."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from scipy.fft import dctn, idctn

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import CONFIGS
from scripts.bundle.weights import (
    autoencoder_in,
    load_weights,
    named_as_here,
    named_for,
    read_description,
    read_weights,
)
from scripts.inference.exported_networks import SUFFIXES, ExportedNetwork
from scripts.layers.factors import by, per_axis
from scripts.layers.resampling import pad_to_multiple
from scripts.planning.autoencoder_estimates import read_plan
from scripts.planning.fake_tensors import fake_copy, fake_tensors

SPATIAL_DIMS = 3  # of the pipelines
PROBE = 256  # voxels along each axis of the volume that says by how much a network shrinks; nothing is computed


@dataclass(frozen=True)
class Codec:
    """
    Something that compresses volumes.

    Args:
        network: with ``reconstruct(x)``, which takes volumes ``BxCxHxWxD`` of any size and returns the same shape;
            ``total_downsample_factor``, voxels of one position in the latent along each axis; and ``latent_channels``,
            values at one position.
        weights: path of the file that it was read from.
        image_channels: number of channels of the volumes.
    """

    network: Any
    weights: str = ""
    image_channels: int = 1

    @property
    def voxels_per_value(self) -> float:
        """Values of a volume, all channels counted, for one value of its latent."""
        return math.prod(self.network.total_downsample_factor) * self.image_channels / self.network.latent_channels


def read_codecs(
    codecs: Mapping[str, Any], image_channels: int, device: Any, memory_format: Any = torch.contiguous_format
) -> dict[str, Codec]:
    """
    Load the codecs of a comparison and let each reconstruct a small volume, so that one which cannot be used ends the run
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
        memory_format: memory format of the weights.

    Raises:
        ValueError: for the first one that cannot be used, with its name.
    """
    found = {}
    for name, entry in codecs.items():
        try:
            given = dict(entry) if isinstance(entry, Mapping) else {"weights": entry}
            path = Path(given.pop("weights", ""))
            path = path / "model.pt" if path.is_dir() else path
            if path.suffix in SUFFIXES:
                network: Any = _Exported(path, device, **given)
            else:
                read: Any = _WithLatents if "network" in given else _autoencoder
                network = read(path, image_channels, **given).to(device, memory_format=memory_format)
            found[name] = Codec(network.eval(), str(path), image_channels)
            _try(found[name], device)
        except Exception as error:  # whatever is in the file
            raise ValueError(f"the codec {name!r} cannot be used: {' '.join(str(error).split())}") from error
    return found


class _Exported(nn.Module):
    """An exported file, in float32 as it was exported."""

    def __init__(self, path: Path, device: Any, total_downsample_factor: Any = None, latent_channels: Any = None) -> None:
        super().__init__()
        self.network = ExportedNetwork(str(path), str(device))
        known: Any = self.network.run  # TorchScript keeps both
        if not hasattr(known, "latent_channels") and (description := read_description(path)):
            with torch.device("meta"):
                known = AutoencoderKL(**description.network)
        factor = total_downsample_factor or getattr(known, "total_downsample_factor", None)
        self.latent_channels = latent_channels or getattr(known, "latent_channels", None)
        if factor is None or self.latent_channels is None:
            raise ValueError(f"{path} does not say `total_downsample_factor` and `latent_channels`: give both.")
        self.total_downsample_factor = per_axis("total_downsample_factor", factor, SPATIAL_DIMS)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.network(x)


class _WithLatents(nn.Module):
    """A network with ``encode`` and ``decode`` for volumes of any size, which are padded and cropped."""

    def __init__(self, path: Path, image_channels: int, network: Any) -> None:
        super().__init__()
        content, _ = read_weights(path)
        network.load_state_dict(named_for(network, content, path))
        self.network = network
        with fake_tensors(), torch.no_grad():
            (z_mu, *_) = fake_copy(network).encode(torch.empty(1, image_channels, *(PROBE,) * SPATIAL_DIMS))  # type: ignore[operator]
        self.latent_channels, *sizes = z_mu.shape[1:]
        if any(PROBE % size for size in sizes):
            raise ValueError(f"its latent of {by((PROBE,) * SPATIAL_DIMS)} voxels is {by(sizes)}, which is no whole factor.")
        self.total_downsample_factor = tuple(PROBE // size for size in sizes)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        (z_mu, *_) = self.network.encode(pad_to_multiple(x, self.total_downsample_factor))
        height, width, depth = x.shape[2:]
        return self.network.decode(z_mu)[:, :, :height, :width, :depth]


def _autoencoder(path: Path, image_channels: int, preset: str | None = None, **keys: Any) -> AutoencoderKL:
    content, arguments = read_weights(path)
    if arguments is None:  # of another program
        _, theirs = named_as_here(autoencoder_in(content, path))
        preset = preset or ("maisi" if theirs.get("upsample_mode") == "trilinear" else None)
        files = [str(CONFIGS / "inference.json")]
        if preset is not None:
            files.append(preset if Path(preset).suffix else str(CONFIGS / "presets" / f"{preset}.json"))
        norm = {"norm": theirs["norm"]} if theirs else {}
        arguments = read_plan(files, **{"image_channels": image_channels, **norm, **keys}).network.arguments
    elif preset or keys:
        raise ValueError(f"{path.with_suffix('.json')} says which network it is; give `weights` alone.")
    network = AutoencoderKL(**{**arguments, "use_flash_attention": True})
    load_weights(network, path)
    return network


@torch.no_grad()
def _try(codec: Codec, device: Any) -> None:
    """Reconstruct a small volume."""
    size = [2 * max(codec.network.total_downsample_factor)] * SPATIAL_DIMS
    volume = torch.zeros(1, codec.image_channels, *size, device=device)
    result = codec.network.reconstruct(volume)
    if result.shape != volume.shape or not result.isfinite().all():
        raise ValueError(f"it makes {by(result.shape)} of {by(volume.shape)} values, or values that are not finite.")


class BlockDCT(nn.Module):
    """
    Block-wise cosine transform in the place of an autoencoder: of every block it keeps the same coefficients, those with the
    most energy over the volume.

    Args:
        total_downsample_factor: size of a block along each axis.
        latent_channels: coefficients per block, of all channels of the volume together.
    """

    def __init__(self, total_downsample_factor: Sequence[int], latent_channels: int) -> None:
        super().__init__()
        self.total_downsample_factor, self.latent_channels = tuple(total_downsample_factor), latent_channels

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: one volume, ``1xCxHxWxD``; sizes that the factors do not divide are padded as a network pads them.

        Returns:
            the same shape on the same device, clipped to [0, 1].
        """
        fx, fy, fz = self.total_downsample_factor
        padded = pad_to_multiple(x, self.total_downsample_factor)[0].cpu().numpy()
        _, nx, ny, nz = padded.shape
        blocks = padded.reshape(-1, nx // fx, fx, ny // fy, fy, nz // fz, fz).transpose(1, 3, 5, 0, 2, 4, 6)
        spectrum = dctn(blocks, axes=(4, 5, 6), norm="ortho")
        energy = (spectrum**2).sum((0, 1, 2))
        spectrum *= energy >= sorted(energy.ravel())[-min(self.latent_channels, energy.size)]
        restored = idctn(spectrum, axes=(4, 5, 6), norm="ortho").transpose(3, 0, 4, 1, 5, 2, 6).reshape(padded.shape)
        height, width, depth = x.shape[2:]
        return torch.from_numpy(restored[None, :, :height, :width, :depth].copy()).clamp(0, 1).to(x.device)


def block_dct_of(codec: Codec) -> str:
    """The name of the block-wise cosine transform that keeps as many values as a codec, in blocks of its factor."""
    return f"block DCT, {codec.network.latent_channels} of {by(codec.network.total_downsample_factor)}"


def with_block_dcts(codecs: Mapping[str, Codec]) -> dict[str, Codec]:
    """Codecs, and behind them the block-wise cosine transforms of their sizes, each size once."""
    transforms = {
        block_dct_of(codec): Codec(BlockDCT(codec.network.total_downsample_factor, codec.network.latent_channels))
        for codec in codecs.values()
    }
    return {**codecs, **transforms}
