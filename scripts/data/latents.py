"""Latents on disk: ``z_mu`` as NIfTI, and beside it a JSON file with everything that is needed to restore the volume.

The JSON file is written last and holds the latent's hash: where the two agree, the latent is complete.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from monai.transforms import Transform
from monai.utils.enums import CommonKeys as Keys

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.files import content_hash, file_hash, write_atomically
from scripts.bundle.json_files import Count, PositiveInt, Sha256, read_dataclass
from scripts.bundle.processes import share_of
from scripts.bundle.progress import ProgressBar
from scripts.bundle.weights import check_arguments
from scripts.data.dataset_tables import log_participants
from scripts.data.file_names import output_path
from scripts.data.restored_volumes import (
    NiftiHeader,
    Record,
    clipped_shares,
    conditions_and_list,
    nifti_bytes,
    record_of,
    with_record,
)
from scripts.data.volume_checks import problem_of_claim, unreadable

__all__ = [
    "LatentDescription",
    "LoadLatentd",
    "SaveLatentd",
    "all_latents",
    "find_latents",
    "read_description",
    "read_latent",
    "save_latent_scale",
    "without_whole_latents",
]

POSTFIX = "latent"
SCALE_FILE = "latent_scale.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LatentDescription(Record):
    """
    What lies beside a latent.

    Args:
        padding: voxels at the end of each axis that the network was given in addition.
        settings: config values that the latent depends on.
        mean: of the latent.
        mean_square: ditto.
        count: number of its values.
        channel_mean: ditto of each channel.
        channel_mean_square: ditto.
        image_scale: what each channel is multiplied by to be in units of the image.
        network: arguments of the autoencoder.
        weights_sha256: hash of its weights.
        latent_sha256: hash of the latent's file.
    """

    padding: tuple[Count, Count, Count]
    settings: dict[str, Any]
    mean: float
    mean_square: float
    count: PositiveInt
    channel_mean: tuple[float, ...]
    channel_mean_square: tuple[float, ...]
    image_scale: tuple[float, ...]
    network: dict[str, Any]
    weights_sha256: Sha256
    latent_sha256: Sha256


class SaveLatentd(Transform):
    """
    Write a latent and its description.

    Args:
        key: of the latent, ``CxHxWxD``.
        output_dir: folder to write to; the files get the relative path that the volume has in its folder.
        network: that made it.
        weights: path of its weights.
        settings: config values that the latent depends on; a run with other values encodes the volume again.
    """

    def __init__(self, key: str, output_dir: str, network: AutoencoderKL, weights: str, settings: Mapping[str, Any]) -> None:
        self.key, self.output_dir, self.network, self.weights = key, output_dir, network, weights
        self.settings = dict(settings)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        record = record_of(data[Keys.IMAGE])
        z_mu = data[self.key].detach().as_subclass(torch.Tensor).float().cpu()
        path = output_path(self.output_dir, record.source, POSTFIX, record.keep_ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        factors = self.network.total_downsample_factor
        content = nifti_bytes(z_mu.movedim(0, -1).numpy(), _latent_header(record, factors))
        by_channel = z_mu.double().flatten(1)
        description = LatentDescription(
            **vars(record),
            padding=tuple(-size % factor for size, factor in zip(record.preprocessed_shape, factors)),
            settings=self.settings,
            mean=z_mu.double().mean().item(),
            mean_square=z_mu.double().square().mean().item(),
            count=z_mu.numel(),
            channel_mean=tuple(by_channel.mean(1).tolist()),
            channel_mean_square=tuple(by_channel.square().mean(1).tolist()),
            image_scale=_image_scale(self.network),
            network=self.network.arguments,
            weights_sha256=file_hash(self.weights),
            latent_sha256=content_hash(content),
        )
        write_atomically(content, path)
        _write_description(description, path)
        logger.info(f"{path}: {clipped_shares(vars(record))}")
        return dict(data)


class LoadLatentd(Transform):
    """
    Read a latent that :py:class:`SaveLatentd` wrote, and the record of its volume.

    Args:
        key: of the path, which is replaced by the latent, ``CxHxWxD``.
        network: that is to decode it.
        weights: path of its weights.

    Raises:
        ValueError: when called, for a latent that is damaged or was made by another network or other weights.
    """

    def __init__(self, key: str, network: AutoencoderKL, weights: str) -> None:
        self.key, self.arguments, self.weights = key, network.arguments, weights
        self.factors = network.total_downsample_factor

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        path = Path(data[self.key])
        description = read_description(path)
        check_arguments(description.network, self.arguments, path)
        if description.weights_sha256 != file_hash(self.weights):
            raise ValueError(
                f"{path} was made with other weights than {self.weights}; point `ckpt_dir` at those, or encode again."
            )
        channels = self.arguments["latent_channels"], self.arguments["out_channels"]
        return {**data, self.key: with_record(read_latent(path, description, self.factors, *channels), description)}


def read_latent(
    path: Path, description: LatentDescription, factors: Sequence[int], latent_channels: int, image_channels: int
) -> torch.Tensor:
    """
    Read the voxels of a latent.

    Args:
        path: of the latent.
        description: what :py:func:`read_description` found beside it.
        factors: total downsample factor of its network along each axis.
        latent_channels: of its network.
        image_channels: ditto.

    Returns:
        ``CxHxWxD``.

    Raises:
        ValueError: for a file that is not what its description names, or a description of another network.
    """
    if description.latent_sha256 != content_hash(path.read_bytes()):
        raise ValueError(f"{path} is not the file that its description names: it was changed or damaged; encode again.")
    size, padding, about = description.preprocessed_shape, description.padding, _description_path(path)
    if padding != tuple(-n % factor for n, factor in zip(size, factors)):
        raise ValueError(
            f"{about}: `padding` {padding} does not pad `preprocessed_shape` {size} to a multiple of {factors}."
        )
    if len(description.intensity_low) != image_channels:
        raise ValueError(f"{about}: `intensity_low` is {description.intensity_low}, for {image_channels} channels.")
    sizes = (-(-n // factor) for n, factor in zip(size, factors))
    return _read_voxels(path, (*sizes, latent_channels))


def _read_voxels(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """The voxels of a latent, ``CxHxWxD``; ``shape`` is ``HxWxDxC``, as description and network determine it."""
    try:
        image: Any = nib.load(path)
        problem = problem_of_claim(image, str(path))
        if problem is None and image.shape == shape:
            values = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:  # readers raise errors of any type
        raise ValueError(f"{path} {unreadable(error)}") from error
    if problem is not None:
        raise ValueError(f"{path} {problem}")
    if image.shape != shape:
        raise ValueError(f"{path} has the shape {image.shape}; by its description and network it must be {shape}.")
    if not np.isfinite(values).all():
        raise ValueError(f"{path} has values that are NaN or infinite; encode again.")
    return torch.from_numpy(values).movedim(-1, 0)


def find_latents(dataset_dir: str) -> list[dict[str, str]]:
    """
    This process's share of the latents below a folder, ``[{"image": path}, ...]``.

    Raises:
        FileNotFoundError: when there is none.
    """
    return share_of([{"image": path} for path in all_latents(dataset_dir)])


def all_latents(dataset_dir: str) -> list[str]:
    """
    The latents below a folder, sorted.

    Raises:
        FileNotFoundError: when there is none.
    """
    found = sorted(str(path) for path in Path(dataset_dir).glob(f"**/[!.]*_{POSTFIX}.nii.gz"))
    if not found:
        raise FileNotFoundError(
            f"there is no latent (*_{POSTFIX}.nii.gz) below `dataset_dir` {dataset_dir!r}; encode first."
        )
    return found


def without_whole_latents(
    items: Sequence[dict[str, str]], dataset_dir: str, output_dir: str, weights: str, settings: Mapping[str, Any]
) -> list[dict[str, str]]:
    """
    Those of ``items`` that have no complete latent of an earlier run in the folder.

    Args:
        items: ``[{"image": path}, ...]``.
        dataset_dir: their folder.
        output_dir: folder of the latents.
        weights: path of the weights; latents made with others do not count.
        settings: of the run; latents made with others do not count.
    """
    log_participants([item["image"] for item in items], dataset_dir)
    missing = []
    changed = others = 0
    for item in ProgressBar(items, desc="looking for latents", unit="volume", leave=False):
        source = Path(item["image"])
        path = output_path(output_dir, str(source.relative_to(dataset_dir)), POSTFIX, item.get("keep_ending", False))
        found = _usable_description(path)
        if (
            found is None
            or found.settings != dict(settings)
            or found.weights_sha256 != file_hash(weights)
            or _description_path(path).stat().st_mtime < source.stat().st_mtime
            or found.latent_sha256 != content_hash(path.read_bytes())
        ):
            missing.append(item)
            others += found is not None and found.weights_sha256 != file_hash(weights)
            continue
        known = replace(found, **conditions_and_list(item["image"], dataset_dir))
        if known != found:
            _write_description(known, path)
            changed += 1
    if len(missing) < len(items):
        logger.info(f"{len(items) - len(missing)} of {len(items)} volumes are encoded already")
    if changed:
        logger.info(f"new conditions or lists (participants.tsv, dataset.json) are now stored for {changed} of them")
    if others:
        logger.warning(
            f"{others} latents in {output_dir} were made with other weights than {weights} and are replaced; give each "
            "autoencoder an `output_dir` of its own to keep both"
        )
    return missing


def save_latent_scale(output_dir: str, weights: str) -> float | None:
    """
    Write the number by which latents are multiplied for a diffusion model: 1 / their standard deviation, over all latents
    below the folder. Waits for the other processes of the run.

    Args:
        output_dir: folder of the latents, where ``latent_scale.json`` is written.
        weights: path of the weights; latents made with others do not count.

    Returns:
        the scale; None where there is no latent.
    """
    if idist.get_world_size() > 1:
        idist.barrier()
    paths = sorted(Path(output_dir).glob(f"**/[!.]*_{POSTFIX}.nii.gz"))
    found = [d for d in map(_usable_description, paths) if d is not None and d.weights_sha256 == file_hash(weights)]
    if not found:
        return None
    count = sum(d.count for d in found)
    mean = math.fsum(d.count * d.mean for d in found) / count
    variance = math.fsum(d.count * d.mean_square for d in found) / count - mean**2
    if not variance > 0:
        raise ValueError(f"the latents below {output_dir} have a variance of {variance:g}, which gives no scale.")
    scale = 1 / math.sqrt(variance)
    if idist.get_rank() == 0:
        content = {"latent_scale": scale, "mean": mean, "volumes": len(found), "weights_sha256": file_hash(weights)}
        write_atomically(json.dumps(content, indent=2).encode(), Path(output_dir) / SCALE_FILE)
        logger.info(f"latent_scale {scale:.6g} over {len(found)} volumes, in {Path(output_dir) / SCALE_FILE}")
    return scale


def _latent_header(record: Record, factors: Sequence[int]) -> NiftiHeader:
    """Header of a latent, whose affine places each voxel at the centre of its block of the volume."""
    to_volume = np.diag([*factors, 1.0])
    to_volume[:3, 3] = [(factor - 1) / 2 for factor in factors]
    affine = np.array(record.preprocessed_affine) @ to_volume
    return NiftiHeader.of_affine(affine, xyzt_units=record.xyzt_units, sform_code=record.sform_code or 1)


def _image_scale(network: AutoencoderKL) -> tuple[float, ...]:
    """What each latent channel is multiplied by to be in units of the image; 1 without a linear shortcut."""
    if network.shortcut is None:
        return (1.0,) * network.arguments["latent_channels"]
    return tuple(network.shortcut.scale.flatten().tolist())


def _description_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def _write_description(description: LatentDescription, path: Path) -> None:
    write_atomically(json.dumps(asdict(description), indent=2).encode(), _description_path(path))


def read_description(path: Path) -> LatentDescription:
    """
    The description beside a latent.

    Args:
        path: of the latent.

    Raises:
        ValueError: when one of the two is missing, or the description is not what :py:class:`LatentDescription` says.
    """
    if not path.is_file() or not _description_path(path).is_file():
        raise ValueError(f"{path} or {_description_path(path).name} is missing; encode the volume again.")
    return read_dataclass(_description_path(path), LatentDescription)


def _usable_description(path: Path) -> LatentDescription | None:
    try:
        return read_description(path)
    except (OSError, ValueError):
        return None
