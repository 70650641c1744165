"""Latents on disk: ``z_mu`` as NIfTI, and beside it a JSON file with everything that is needed to restore the volume.

The JSON file is written last and holds the latent's hash: where the two agree, the latent is complete.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
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
from scripts.bundle.json_files import Count, PositiveInt, Sha256, checked, read_dataclass
from scripts.bundle.processes import share_of
from scripts.bundle.progress import ProgressBar
from scripts.bundle.weights import check_arguments
from scripts.data.dataset_tables import log_participants
from scripts.data.file_names import is_nifti, output_path, without_ending
from scripts.data.restored_volumes import (
    NiftiHeader,
    Record,
    clipped_shares,
    conditions_and_list,
    nifti_bytes,
    record_of,
    rows_of,
    with_record,
)
from scripts.data.spatial_conditions import SpatialDescription
from scripts.data.spatial_kinds import SpatialKind
from scripts.data.volume_checks import check_claim, explanation
from scripts.data.volume_reader import read_volume, state_of

__all__ = [
    "LatentDescription",
    "LoadLatentd",
    "SaveLatentd",
    "all_latents",
    "described",
    "find_latents",
    "read_description",
    "read_labels",
    "read_latent",
    "read_spatial",
    "save_latent_scale",
    "without_whole_latents",
]

POSTFIX = "latent"
OWN = f"_{POSTFIX}.nii.gz"  # end of the name of a latent that this bundle wrote
OF_CONDITION = re.compile(r"_(?:spatial|labels)-[\w-]+\.nii\.gz$")
SCALE_FILE = "latent_scale.json"
MAX_DESCRIPTION = 2**25  # bytes; a mask of missing voxels that are scattered at random takes up to 0.2 for each voxel
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
        spatial: the spatial conditions, by name, whose latents and label maps lie beside it.
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
    spatial: dict[str, SpatialDescription] = field(default_factory=dict)


class SaveLatentd(Transform):
    """
    Write a latent, those of the spatial conditions of its volume (``data["spatial"]``, see
    :py:class:`scripts.data.spatial_conditions.LoadSpatiald`) and their label maps, and last the description.

    Args:
        key: of the latent, ``CxHxWxD``, with the channels of the conditions after its own.
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
        spatial: dict[str, MetaTensor] = data.get("spatial") or {}  # MONAI makes None of an empty dictionary
        z_mu, *planes = self._split(data[self.key].detach().as_subclass(torch.Tensor).float().cpu(), spatial)
        path = output_path(self.output_dir, record.source, POSTFIX, record.keep_ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        factors = self.network.total_downsample_factor
        header = _latent_header(record, factors)
        saved = {key: _save_spatial(path, key, spatial[key], z, header) for key, z in zip(spatial, planes)}
        content = nifti_bytes(z_mu.movedim(0, -1).numpy(), header)
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
            spatial=saved,
        )
        write_atomically(content, path)
        _write_description(description, path)
        logger.info(f"{path}: {clipped_shares(vars(record))}")
        return dict(data)

    def _split(self, latents: torch.Tensor, spatial: Mapping[str, MetaTensor]) -> tuple[torch.Tensor, ...]:
        """The latent of the volume, and those of each condition."""
        own = self.network.arguments["latent_channels"]
        records: list[Any] = [record_of(volume) for volume in spatial.values()]
        return latents.split([own, *(own * each.kind.num_planes for each in records)])


def _save_spatial(
    path: Path, key: str, volume: MetaTensor, latents: torch.Tensor, header: NiftiHeader
) -> SpatialDescription:
    """Write the latents of a spatial condition, and its label map, beside the latent of its volume."""
    record: Any = record_of(volume)
    content = nifti_bytes(latents.movedim(0, -1).numpy(), header)
    write_atomically(content, spatial_path(path, key))
    hashes: dict[str, Any] = {"latent_sha256": content_hash(content)}
    if record.kind.is_label_map:
        labels = volume.as_tensor()[0].numpy()
        ends = (int(end) for end in (labels.min(), labels.max()))
        labels = labels.astype(np.result_type(*map(np.min_scalar_type, ends)))
        content = nifti_bytes(labels, NiftiHeader.of_affine(volume.affine.numpy(), data_type=labels.dtype.str))
        write_atomically(content, labels_path(path, key))
        hashes["labels_sha256"] = content_hash(content)
    if record.covered < 1:
        logger.info(f"{path}: {record.source} covers {record.covered:.1%} of the volume")
    return SpatialDescription(**vars(record), **hashes)


class LoadLatentd(Transform):
    """
    Read a latent and the record of its volume: one that :py:class:`SaveLatentd` wrote, or one of another program, as NIfTI
    with channels last. The volume of that one has the latent's spacing divided by the total factor of the network.

    Args:
        key: of the path, which is replaced by the latent, ``CxHxWxD``.
        network: that is to decode it.
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
        self.low, self.high = intensity_range or (0.0, 1.0)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        path = Path(data[self.key])
        if not path.name.endswith(OWN):
            return {**data, self.key: self._of_another_program(path, bool(data.get("keep_ending", False)))}
        description = read_description(path)
        check_arguments(description.network, self.arguments, path)
        if description.weights_sha256 != file_hash(self.weights):
            raise ValueError(
                f"{path} was made with other weights than {self.weights}; point `ckpt_dir` at those, or encode again."
            )
        channels = self.arguments["latent_channels"], self.arguments["out_channels"]
        return {**data, self.key: with_record(read_latent(path, description, self.factors, *channels), description)}

    def _of_another_program(self, path: Path, keep_ending: bool) -> MetaTensor:
        channels = self.arguments["latent_channels"]
        values, affine = read_volume(str(path))
        if channels == 1 and values.ndim == 3:
            values = values[..., None]
        if values.ndim != 4 or values.shape[-1] != channels:
            raise ValueError(
                f"has the shape {values.shape}, which is no latent of this network, with {channels} channels at the end."
            )
        if not np.isfinite(values).all():
            raise ValueError("has values that are NaN or infinite.")
        affine = affine @ np.linalg.inv(_to_volume(self.factors))
        shape = tuple(int(n) * factor for n, factor in zip(values.shape, self.factors))
        num_channels = self.arguments["out_channels"]
        described = {
            **vars(NiftiHeader.of_affine(affine)),
            "source": path.relative_to(self.dataset_dir).as_posix(),
            "keep_ending": keep_ending,
            "shape": (*shape, num_channels) if num_channels > 1 else shape,
            "preprocessed_shape": shape,
            "preprocessed_affine": rows_of(affine),
            "intensity_low": (self.low,) * num_channels,
            "intensity_high": (self.high,) * num_channels,
        }
        z_mu = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 0), dtype=np.float32))
        return with_record(z_mu, checked(described, Record))


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
    _check_hash(path, description.latent_sha256)
    size, padding, about = description.preprocessed_shape, description.padding, _description_path(path)
    if padding != tuple(-n % factor for n, factor in zip(size, factors)):
        raise ValueError(
            f"{about}: `padding` {padding} does not pad `preprocessed_shape` {size} to a multiple of {factors}."
        )
    if len(description.intensity_low) != image_channels:
        raise ValueError(f"{about}: `intensity_low` is {description.intensity_low}, for {image_channels} channels.")
    sizes = (-(-n // factor) for n, factor in zip(size, factors))
    return _read_voxels(path, (*sizes, latent_channels)).movedim(-1, 0)


def _read_voxels(path: Path, shape: tuple[int, ...], dtype: type = np.float32) -> torch.Tensor:
    """The voxels of a file of the shape that description and network determine."""
    try:
        image: Any = nib.load(path)
        check_claim(image)
        values: Any = np.asarray(image.dataobj, dtype=dtype) if image.shape == shape else None
    except Exception as error:  # readers raise errors of any type
        raise ValueError(f"{path} {explanation(error, str(path))}") from error
    if values is None:
        raise ValueError(f"{path} has the shape {image.shape}; by its description and network it must be {shape}.")
    if not np.isfinite(values).all():
        raise ValueError(f"{path} has values that are NaN or infinite; encode again.")
    return torch.from_numpy(values)


def read_spatial(path: Path, description: LatentDescription, keys: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """
    Read the latents of the spatial conditions of a volume.

    Args:
        path: of the latent of the volume.
        description: what :py:func:`read_description` found beside it.
        keys: which conditions; None for all. Those that the volume has not are left out.

    Returns:
        latents of the planes one after the other, ``num_planes * CxHxWxD`` for a latent of ``CxHxWxD``, by key.

    Raises:
        ValueError: for a file that is not what the description names.
    """
    latent: Any = nib.load(path)
    *sizes, channels = latent.shape
    latents = {}
    for key in description.spatial if keys is None else [key for key in keys if key in description.spatial]:
        each, file = description.spatial[key], spatial_path(path, key)
        _check_hash(file, each.latent_sha256)
        latents[key] = _read_voxels(file, (*sizes, channels * each.kind.num_planes)).movedim(-1, 0)
    return latents


def read_labels(path: Path, description: LatentDescription, key: str) -> torch.Tensor:
    """
    Read a label map on the preprocessed grid.

    Args:
        path: of the latent of its volume.
        description: what :py:func:`read_description` found beside it.
        key: of the label map.

    Returns:
        ``1xHxWxD``, int32.

    Raises:
        ValueError: for a file that is not what the description names, and a key that is no label map of the volume.
    """
    if key not in description.spatial or description.spatial[key].labels_sha256 is None:
        raise ValueError(f"{_description_path(path)} names no label map {key!r}; encode with `spatial_keys` again.")
    file = labels_path(path, key)
    _check_hash(file, description.spatial[key].labels_sha256)
    return _read_voxels(file, description.preprocessed_shape, np.int32)[None]


def spatial_path(path: Path, key: str) -> Path:
    """The file with the latents of a spatial condition, beside the latent of its volume."""
    return path.with_name(path.name.removesuffix(OWN) + f"_spatial-{key}.nii.gz")


def labels_path(path: Path, key: str) -> Path:
    """The file with a label map on the preprocessed grid, beside the latent of its volume."""
    return path.with_name(path.name.removesuffix(OWN) + f"_labels-{key}.nii.gz")


def _check_hash(path: Path, expected: str | None) -> None:
    if not path.is_file() or expected != content_hash(path.read_bytes()):
        raise ValueError(f"{path} is not the file that its description names: it was changed or damaged; encode again.")


def find_latents(dataset_dir: str) -> list[dict[str, Any]]:
    """
    This process's share of the latents below a folder, those of other programs included:
    ``[{"image": path, "keep_ending": whether the name of its volume does}, ...]``. A NIfTI file is one of another program if
    it is not called ``*_latent.nii.gz``.

    Raises:
        FileNotFoundError: when there are no latents.
    """
    files = sorted(path for path in Path(dataset_dir).glob("**/*") if is_nifti(path.name) and path.is_file())
    files = [path for path in files if not OF_CONDITION.search(path.name)]
    found = [path for path in files if not any(part[0] == "." for part in path.relative_to(dataset_dir).parts)]
    if not found:
        raise FileNotFoundError(f"there is no latent below `dataset_dir` {dataset_dir!r}; encode first.")
    names = Counter(path.with_name(without_ending(path.name.replace(OWN, ".nii.gz"))) for path in found)
    return share_of(
        [{"image": str(path), "keep_ending": names[path.with_name(without_ending(path.name))] > 1} for path in found]
    )


def all_latents(dataset_dir: str) -> list[str]:
    """
    The latents below a folder, sorted.

    Raises:
        FileNotFoundError: when there are no latents.
    """
    found = sorted(str(path) for path in Path(dataset_dir).glob(f"**/[!.]*{OWN}"))
    if not found:
        raise FileNotFoundError(
            f"there is no latent (*_{POSTFIX}.nii.gz) below `dataset_dir` {dataset_dir!r}; encode first."
        )
    return found


def described(item: Mapping[str, Any], dataset_dir: str, output_dir: str) -> LatentDescription | None:
    """
    The description of a volume's latent, if an earlier run wrote one that can be used.

    Args:
        item: ``{"image": path, "keep_ending": whether the name of its result does}``.
        dataset_dir: folder of the volume.
        output_dir: folder of the latents.
    """
    try:
        return read_description(_latent_of(item, dataset_dir, output_dir))
    except (OSError, ValueError):
        return None


def _latent_of(item: Mapping[str, Any], dataset_dir: str, output_dir: str) -> Path:
    source = str(Path(item["image"]).relative_to(dataset_dir))
    return output_path(output_dir, source, POSTFIX, item.get("keep_ending", False))


def without_whole_latents(
    items: Sequence[dict[str, Any]],
    dataset_dir: str,
    output_dir: str,
    weights: str,
    settings: Mapping[str, Any],
    kinds: Mapping[str, SpatialKind] | None = None,
) -> list[dict[str, Any]]:
    """
    Those of ``items`` that have no complete latent of an earlier run in the folder.

    Args:
        items: ``[{"image": path, "spatial": {key: path}}, ...]``; the latter may be missing.
        dataset_dir: their folder.
        output_dir: folder of the latents.
        weights: path of the weights; latents made with others do not count.
        settings: of the run; latents made with others do not count.
        kinds: of the spatial conditions; latents with others, or of other files, do not count.
    """
    log_participants([item["image"] for item in items], dataset_dir)
    missing = []
    changed = others = 0
    for item in ProgressBar(items, desc="looking for latents", unit="volume", leave=False):
        found = described(item, dataset_dir, output_dir)
        if (
            found is None
            or found.settings != dict(settings)
            or found.weights_sha256 != file_hash(weights)
            or found.source_state != state_of(item["image"])
            or not _has_conditions(found, item, dataset_dir, kinds or {})
            or not _is_whole(path := _latent_of(item, dataset_dir, output_dir), found)
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


def _has_conditions(
    found: LatentDescription, item: Mapping[str, Any], dataset_dir: str, kinds: Mapping[str, SpatialKind]
) -> bool:
    """Whether a latent has the spatial conditions that its volume has now."""
    now = {
        key: (kinds[key], os.path.relpath(path, dataset_dir), state_of(path))
        for key, path in item.get("spatial", {}).items()
    }
    return now == {key: (each.kind, each.source, each.source_state) for key, each in found.spatial.items()}


def _is_whole(path: Path, found: LatentDescription) -> bool:
    """Whether all files of a latent are those that its description names."""
    try:
        for file, expected in _files_of(path, found):
            _check_hash(file, expected)
    except ValueError:
        return False
    return True


def _files_of(path: Path, found: LatentDescription) -> Iterator[tuple[Path, str]]:
    """The files beside a description with their hashes."""
    yield path, found.latent_sha256
    for key, each in found.spatial.items():
        yield spatial_path(path, key), each.latent_sha256
        if each.labels_sha256 is not None:
            yield labels_path(path, key), each.labels_sha256


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
    paths = sorted(Path(output_dir).glob(f"**/[!.]*{OWN}"))
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
    affine = np.array(record.preprocessed_affine) @ _to_volume(factors)
    return NiftiHeader.of_affine(affine, xyzt_units=record.xyzt_units, sform_code=record.sform_code or 1)


def _to_volume(factors: Sequence[int]) -> np.ndarray:
    """The affine from voxels of a latent to those of its volume."""
    affine = np.diag([*factors, 1.0])
    affine[:3, 3] = [(factor - 1) / 2 for factor in factors]
    return affine


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
    return read_dataclass(_description_path(path), LatentDescription, MAX_DESCRIPTION)


def _usable_description(path: Path) -> LatentDescription | None:
    try:
        return read_description(path)
    except (OSError, ValueError):
        return None
