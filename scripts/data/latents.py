"""Latents on disk: ``z_mu`` as NIfTI, and beside it a JSON file with everything that is needed to restore the volume. The
JSON file is written last and holds the latent's hash: where the two agree, the latent is complete."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils.enums import CommonKeys as Keys

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.files import content_hash, file_hash, write_atomically
from scripts.bundle.json_files import NetworkArguments, PositiveInt, Sha256, checked, read_dataclass, total_downsample_factor
from scripts.bundle.machine import share_of
from scripts.bundle.progress import ProgressBar
from scripts.bundle.weights import check_arguments
from scripts.data.file_names import output_path, without_ending
from scripts.data.restored_volumes import (
    Record,
    clipped_shares,
    conditions_and_list,
    record_of,
    save_labels,
    save_nifti,
    with_record,
)
from scripts.data.spatial_conditions import SpatialDescription
from scripts.data.spatial_kinds import SpatialKind
from scripts.data.volume_lists import EVERY_NIFTI, visible_files
from scripts.data.volume_reader import NiftiHeader, read_volume, state_of

OWN = "_latent.nii.gz"  # end of the name of a latent that this bundle wrote
OF_CONDITION = re.compile(r"_(?:spatial|labels)-[\w-]+(?<!_latent)\.nii\.gz$")  # a volume may be called a_labels-b
MAX_DESCRIPTION = 2**25  # bytes; a mask of missing voxels that are scattered at random takes up to 0.2 for each voxel
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LatentDescription(Record):
    """
    What lies beside a latent.

    Args:
        settings: config values that the latent depends on.
        count: number of its values.
        channel_mean: mean of each channel.
        channel_mean_square: mean square of each channel.
        image_scale: factor of each channel that brings it to units of the image.
        network: arguments of the autoencoder.
        weights_sha256: hash of its weights.
        latent_sha256: hash of the latent's file.
        spatial: spatial conditions, by name, whose latents and label maps lie beside it.
    """

    settings: dict[str, Any]
    count: PositiveInt
    channel_mean: tuple[float, ...]
    channel_mean_square: tuple[float, ...]
    image_scale: tuple[float, ...]
    network: NetworkArguments
    weights_sha256: Sha256
    latent_sha256: Sha256
    spatial: dict[str, SpatialDescription] = field(default_factory=dict)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latent's file, ``HxWxDxC``."""
        pairs = zip(self.preprocessed_shape, total_downsample_factor(self.network))
        return *(-(-n // factor) for n, factor in pairs), len(self.channel_mean)


class SaveLatentd(Transform):
    """
    Write a latent, those of the spatial conditions of its volume (``data["spatial"]``, see
    :py:class:`scripts.data.LoadSpatiald`) and their label maps, and last the description.

    Args:
        key: key of the latent, ``CxHxWxD``, with the channels of the conditions after its own.
        output_dir: folder to write to; the files get the relative path that the volume has in its folder.
        network: network that made it.
        weights: path of its weights.
        settings: config values that the latent depends on; a run with other values encodes the volume again.
    """

    def __init__(self, key: str, output_dir: str, network: AutoencoderKL, weights: str, settings: Mapping[str, Any]) -> None:
        self.key, self.output_dir, self.network, self.weights = key, output_dir, network, weights
        self.settings = dict(settings)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        record = record_of(data[Keys.IMAGE])
        volumes: dict[str, MetaTensor] = data.get("spatial") or {}  # MONAI makes None of an empty dictionary
        spatial: dict[str, Any] = {key: record_of(volume) for key, volume in volumes.items()}
        channels = self.network.arguments["latent_channels"]
        latents = data[self.key].detach().as_subclass(torch.Tensor).float().cpu()
        z_mu, *planes = latents.split([channels, *(channels * each.kind.num_planes for each in spatial.values())])
        path = output_path(self.output_dir, record.source, "latent", record.keep_ending)
        affine = np.array(record.preprocessed_affine) @ _to_volume(self.network.total_downsample_factor)
        header = NiftiHeader.of_affine(affine, like=record)
        for (key, known), z in zip(spatial.items(), planes):
            if known.covered < 1:
                logger.info(f"{path}: {known.source} covers {known.covered:.1%} of the volume")
            hashes = {"latent_sha256": save_nifti(z.movedim(0, -1).numpy(), header, _beside(path, "spatial", key))}
            if known.kind.is_label_map:
                of_labels = NiftiHeader.of_affine(volumes[key].affine.numpy())
                hashes["labels_sha256"] = save_labels(volumes[key][0].numpy(), of_labels, _beside(path, "labels", key))
            spatial[key] = replace(known, **hashes)
        by_channel, shortcut = z_mu.double().flatten(1), self.network.shortcut
        description = LatentDescription(
            **vars(record),
            settings=self.settings,
            count=z_mu.numel(),
            channel_mean=tuple(by_channel.mean(1).tolist()),
            channel_mean_square=tuple(by_channel.square().mean(1).tolist()),
            image_scale=(1.0,) * channels if shortcut is None else tuple(shortcut.scale.flatten().tolist()),
            network=self.network.arguments,
            weights_sha256=file_hash(self.weights),
            latent_sha256=save_nifti(z_mu.movedim(0, -1).numpy(), header, path),
            spatial=spatial,
        )
        _write_description(description, path)
        logger.info(f"{path}: {clipped_shares(record)}")
        return dict(data)


class LoadLatentd(Transform):
    """
    Read a latent and the record of its volume: one that :py:class:`SaveLatentd` wrote, or one of another program, as NIfTI
    with channels last. The volume of that one has the latent's spacing divided by the total factor of the network.

    Args:
        key: key of the path, which is replaced by the latent, ``CxHxWxD``.
        network: network that is to decode it.
        weights: path of its weights.
        dataset_dir: folder of the latents.
        intensity_range: intensities of a volume whose latent is of another program; None for 0 to 1.

    Raises:
        ValueError: when called, for a latent that is damaged or was made by another network or other weights.
    """

    def __init__(
        self,
        key: str,
        network: AutoencoderKL,
        weights: str,
        dataset_dir: str,
        intensity_range: Sequence[float] | None = None,
    ) -> None:
        self.key, self.arguments, self.weights = key, network.arguments, weights
        self.factors, self.dataset_dir = network.total_downsample_factor, dataset_dir
        self.window = intensity_range or (0.0, 1.0)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        path = Path(data[self.key])
        if not path.name.endswith(OWN):
            return {**data, self.key: self._of_another_program(path, bool(data.get("keep_ending", False)))}
        description = read_description(path)
        check_arguments(description.network, self.arguments, path)
        if description.weights_sha256 != file_hash(self.weights):
            raise ValueError(f"{path} was made with other weights than {self.weights}; set `ckpt_dir`, or encode again.")
        return {**data, self.key: with_record(read_latent(path, description), description)}

    def _of_another_program(self, path: Path, keep_ending: bool) -> MetaTensor:
        channels, image_channels = self.arguments["latent_channels"], self.arguments["out_channels"]
        values, header = read_volume(str(path))
        values = values if values.ndim > 3 else values[..., None]
        if values.shape[3:] != (channels,):
            raise ValueError(f"has the shape {values.shape}; the last axis must be the {channels} channels of the network.")
        if not np.isfinite(values).all():
            raise ValueError("has values that are NaN or infinite.")
        affine = header.affine @ np.linalg.inv(_to_volume(self.factors))
        shape = [n * factor for n, factor in zip(values.shape, self.factors)]
        known = {
            **vars(NiftiHeader.of_affine(affine, [*shape, image_channels] if image_channels > 1 else shape)),
            "source": path.relative_to(self.dataset_dir).as_posix(),
            "keep_ending": keep_ending,
            "preprocessed_shape": shape,
            "preprocessed_affine": affine.tolist(),
            "intensity_low": [self.window[0]] * image_channels,
            "intensity_high": [self.window[1]] * image_channels,
        }
        latent = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 0), dtype=np.float32))
        return with_record(latent, checked(known, Record))


def _to_volume(factors: Sequence[int]) -> np.ndarray:
    """The affine from voxels of a latent, each at the centre of its block, to those of its volume."""
    affine = np.diag([*factors, 1.0])
    affine[:3, 3] = [(factor - 1) / 2 for factor in factors]
    return affine


def read_description(path: Path) -> LatentDescription:
    """
    The description beside a latent, whose path is given.

    Raises:
        OSError: when it is missing.
        ValueError: when it is not what :py:class:`LatentDescription` says.
    """
    return read_dataclass(_description_path(path), LatentDescription, MAX_DESCRIPTION)


def read_latent(path: Path, description: LatentDescription) -> torch.Tensor:
    """
    The voxels of a latent, ``CxHxWxD``.

    Raises:
        ValueError: for a file that is not the one that the description beside it names.
    """
    return _read(path, description.latent_sha256, description.latent_shape).movedim(-1, 0)


def read_spatial(path: Path, description: LatentDescription, keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """
    The latents of those of ``keys`` that are spatial conditions of a volume: by key, for a latent of ``CxHxWxD``, those of
    its planes one after the other, ``(planes * C)xHxWxD``.

    Raises:
        ValueError: for a file that is not the one that the description names.
    """
    *size, channels = description.latent_shape
    latents = {}
    for key in (key for key in keys if key in description.spatial):
        each = description.spatial[key]
        shape = (*size, channels * each.kind.num_planes)
        latents[key] = _read(_beside(path, "spatial", key), each.latent_sha256, shape).movedim(-1, 0)
    return latents


def read_labels(path: Path, description: LatentDescription, key: str) -> torch.Tensor:
    """
    A label map of a volume on its preprocessed grid, ``1xHxWxD``, int32.

    Raises:
        ValueError: for a file that is not the one that the description names, and a condition that is no label map.
    """
    sha256 = description.spatial[key].labels_sha256
    return _read(_beside(path, "labels", key), sha256, description.preprocessed_shape, np.int32)[None]


def _read(path: Path, sha256: str | None, shape: tuple[int, ...], dtype: type = np.float32) -> torch.Tensor:
    """The voxels of a file of which a description says the hash and the shape."""
    if not _is_file(path, sha256):
        raise ValueError(f"{path} is not the file that its description names: it was changed or damaged; encode again.")
    image: Any = nib.load(path)
    if image.shape != shape:
        raise ValueError(f"{path} has the shape {image.shape}; by its description and network it must be {shape}.")
    values: Any = np.asarray(image.dataobj, dtype)
    if not np.isfinite(values).all():
        raise ValueError(f"{path} has values that are NaN or infinite; encode again.")
    return torch.from_numpy(values)


def _is_file(path: Path, sha256: str | None) -> bool:
    return path.is_file() and content_hash(path.read_bytes()) == sha256


def _beside(path: Path, what: str, key: str) -> Path:
    """The file with the latents (``"spatial"``) or the label map (``"labels"``) of a spatial condition."""
    return path.with_name(path.name.removesuffix(OWN) + f"_{what}-{key}.nii.gz")


def _description_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def _write_description(description: LatentDescription, path: Path) -> None:
    write_atomically(json.dumps(asdict(description), indent=2).encode(), _description_path(path))


def all_latents(dataset_dir: str, image_glob: str = f"**/*{OWN}") -> list[str]:
    """The latents below a folder, by default those that this bundle wrote; a FileNotFoundError when there are none."""
    found = sorted(str(path) for path in visible_files(dataset_dir, image_glob) if not OF_CONDITION.search(path.name))
    if not found:
        raise FileNotFoundError(f"there is no latent ({image_glob}) below `dataset_dir` {dataset_dir!r}; encode first.")
    return found


def find_latents(dataset_dir: str) -> list[dict[str, Any]]:
    """
    This process's share of the latents below a folder, those of other programs included:
    ``[{"image": path, "keep_ending": whether the name of its volume does}, ...]``. A NIfTI file is one of another program if
    it is not called ``*_latent.nii.gz``.

    Raises:
        FileNotFoundError: when there are no latents.
    """
    found = all_latents(dataset_dir, EVERY_NIFTI)
    counts = Counter(without_ending(path.replace(OWN, ".nii.gz")) for path in found)
    return share_of([{"image": path, "keep_ending": counts[without_ending(path)] > 1} for path in found])


def without_whole_latents(
    items: Sequence[dict[str, Any]],
    dataset_dir: str,
    output_dir: str,
    weights: str,
    settings: Mapping[str, Any],
    kinds: Mapping[str, SpatialKind],
) -> list[dict[str, Any]]:
    """
    Those of ``items`` that have no complete latent of an earlier run with the same weights, settings and spatial conditions.
    The others get the conditions that ``dataset.json`` and ``participants.tsv`` say now.

    Args:
        items: ``[{"image": path, "spatial": {key: path}}, ...]``; the latter may be missing.
        dataset_dir: folder of the volumes.
        output_dir: folder of the latents.
        weights: path of the weights.
        settings: config values that latents depend on.
        kinds: kinds of the spatial conditions.
    """
    missing, others, weights_sha256 = [], 0, file_hash(weights)
    for item in ProgressBar(items, desc="looking for latents", unit="volume", leave=False):
        image, spatial = item["image"], item.get("spatial", {})
        try:
            source = os.path.relpath(image, dataset_dir)
            path = output_path(output_dir, source, "latent", item.get("keep_ending", False))
            found = read_description(path)
        except (OSError, ValueError):  # a bad name is an error where it is encoded
            missing.append(item)
            continue
        origins = {key: (kinds[key], os.path.relpath(file, dataset_dir), state_of(file)) for key, file in spatial.items()}
        if (
            found.settings != dict(settings)
            or found.weights_sha256 != weights_sha256
            or found.source_state != state_of(image)
            or {key: (each.kind, each.source, each.source_state) for key, each in found.spatial.items()} != origins
            or not all(_is_file(*pair) for pair in _files_of(path, found))
        ):
            missing.append(item)
            others += found.weights_sha256 != weights_sha256
            continue
        known = replace(found, **conditions_and_list(image, dataset_dir))
        if known != found:
            _write_description(known, path)
    if len(missing) < len(items):
        logger.info(f"{len(items) - len(missing)} of {len(items)} volumes are encoded already")
    if others:
        logger.warning(f"{others} latents in {output_dir} were made with other weights than {weights} and are replaced")
    return missing


def _files_of(path: Path, found: LatentDescription) -> Iterator[tuple[Path, str | None]]:
    """The files that a description is of, with their hashes."""
    yield path, found.latent_sha256
    for key, each in found.spatial.items():
        yield _beside(path, "spatial", key), each.latent_sha256
        if each.kind.is_label_map:
            yield _beside(path, "labels", key), each.labels_sha256


def save_latent_scale(output_dir: str, weights: str) -> None:
    """
    Write ``latent_scale.json``: the number by which latents are multiplied for a diffusion model, 1 / their standard
    deviation, over all latents below the folder. Waits for the other processes of the run.

    Args:
        output_dir: folder of the latents.
        weights: path of the weights; latents made with others do not count.
    """
    idist.barrier()
    found: list[LatentDescription] = []
    for path in sorted(visible_files(output_dir, f"**/*{OWN}")):
        with contextlib.suppress(OSError, ValueError):
            found.append(read_description(path))
    found = [each for each in found if each.weights_sha256 == file_hash(weights)]
    if idist.get_rank() > 0 or not found:
        return
    counts = [each.count for each in found]
    mean = np.average([np.mean(each.channel_mean) for each in found], weights=counts)
    mean_square = np.average([np.mean(each.channel_mean_square) for each in found], weights=counts)
    scale = 1 / math.sqrt(mean_square - mean**2)
    content = {"latent_scale": scale, "mean": mean, "volumes": len(found), "weights_sha256": file_hash(weights)}
    file = Path(output_dir) / "latent_scale.json"
    write_atomically(json.dumps(content, indent=2).encode(), file)
    logger.info(f"latent_scale {scale:.6g} over {len(found)} volumes, in {file}")
