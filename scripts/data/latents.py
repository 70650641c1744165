"""Latents on disk: ``z_mu`` as NIfTI, and beside it everything that is needed to make the volume of it again.

The JSON file beside a latent is written last and has the latent's hash: where both agree the latent is whole.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from monai.transforms import Transform

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.files import file_hash, write_atomically
from scripts.bundle.processes import share_of
from scripts.bundle.progress import ProgressBar
from scripts.bundle.weights import check_arguments
from scripts.data.conditions import conditions_of, dataset_list_of
from scripts.data.restored_volumes import RECORD, clipped_shares, nifti_bytes, output_path

__all__ = [
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


class SaveLatentd(Transform):
    """
    Write a latent and its description.

    Args:
        key: of the latent, ``CxHxWxD``.
        output_dir: folder; the files get the place in it that the volume has in its own.
        network: that made it.
        weights: path of its weights.
        settings: of the run, on which the latent depends; a run with others makes it again.
    """

    def __init__(self, key: str, output_dir: str, network: AutoencoderKL, weights: str, settings: Mapping[str, Any]) -> None:
        self.key, self.output_dir, self.network, self.weights = key, output_dir, network, weights
        self.settings = dict(settings)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        record = json.loads(data[RECORD])
        z_mu = data[self.key].detach().as_subclass(torch.Tensor).float().cpu()
        path = output_path(self.output_dir, record["source"], POSTFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        factors = self.network.total_downsample_factor
        content = nifti_bytes(z_mu.movedim(0, -1).numpy(), _latent_header(record, factors))
        description = {
            **record,
            "padding": [-size % factor for size, factor in zip(record["preprocessed_shape"], factors)],
            "settings": self.settings,
            "mean": z_mu.double().mean().item(),
            "mean_square": z_mu.double().square().mean().item(),
            "count": z_mu.numel(),
            "channel_mean": z_mu.double().flatten(1).mean(1).tolist(),
            "channel_mean_square": z_mu.double().flatten(1).square().mean(1).tolist(),
            "image_scale": _image_scale(self.network),
            "network": self.network.arguments,
            "weights_sha256": file_hash(self.weights),
            "latent_sha256": _digest(content),
        }
        write_atomically(content, path)
        write_atomically(json.dumps(description, indent=2).encode(), _description_path(path))
        logger.info(f"{path}: {clipped_shares(record)}")
        return dict(data)


class LoadLatentd(Transform):
    """
    Read a latent that :py:class:`SaveLatentd` wrote, and the record of its volume.

    Args:
        key: of the path, and of the latent, ``CxHxWxD``.
        network: that is to decode it.
        weights: path of its weights.

    Raises:
        ValueError: when called, for a latent that is damaged or was made by another network or other weights.
    """

    def __init__(self, key: str, network: AutoencoderKL, weights: str) -> None:
        self.key, self.arguments, self.weights = key, network.arguments, weights

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        path = Path(data[self.key])
        description = read_description(path)
        check_arguments(description["network"], self.arguments, path)
        if description["weights_sha256"] != file_hash(self.weights):
            raise ValueError(
                f"{path} was made with other weights than {self.weights}; point `ckpt_dir` at those, or encode again."
            )
        return {**data, self.key: read_latent(path, description), RECORD: json.dumps(description)}


def read_description(path: Path) -> dict[str, Any]:
    """
    What :py:class:`SaveLatentd` wrote beside a latent.

    Raises:
        ValueError: when it is missing or cannot be read.
    """
    description = _read_description(path)
    if description is None:
        raise ValueError(f"{_description_path(path)} is missing or damaged; encode the volume again.")
    return description


def read_latent(path: Path, description: Mapping[str, Any]) -> torch.Tensor:
    """
    A latent, ``CxHxWxD``.

    Raises:
        ValueError: when the file is not the one that its description names.
    """
    content = path.read_bytes()
    if description["latent_sha256"] != _digest(content):
        raise ValueError(f"{path} is not the file that its description names, it was changed or damaged; encode again.")
    z_mu = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj, dtype=np.float32)
    return torch.from_numpy(z_mu).movedim(-1, 0)


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
    found = sorted(str(path) for path in Path(dataset_dir).glob(f"**/*_{POSTFIX}.nii.gz"))
    if not found:
        raise FileNotFoundError(
            f"there is no latent (*_{POSTFIX}.nii.gz) below `dataset_dir` {dataset_dir!r}; encode first."
        )
    return found


def without_whole_latents(
    items: Sequence[dict[str, str]], dataset_dir: str, output_dir: str, weights: str, settings: Mapping[str, Any]
) -> list[dict[str, str]]:
    """
    The volumes that an earlier run into the folder did not encode to the end.

    Args:
        items: ``[{"image": path}, ...]``.
        dataset_dir: their folder.
        output_dir: folder of the latents.
        weights: path of the weights; latents that others made do not count.
        settings: of the run, ditto.
    """
    missing = []
    changed = 0
    for item in ProgressBar(items, desc="looking for latents", unit="volume", leave=False):
        source = Path(item["image"])
        path = output_path(output_dir, str(source.relative_to(dataset_dir)), POSTFIX)
        found = _read_description(path)
        if (
            found is None
            or found["settings"] != dict(settings)
            or found["weights_sha256"] != file_hash(weights)
            or _description_path(path).stat().st_mtime < source.stat().st_mtime
            or found["latent_sha256"] != _digest(path.read_bytes())
            or "image_scale" not in found  # of a version that did not know what a generator needs
        ):
            missing.append(item)
            continue
        known = {
            "conditions": conditions_of(item["image"], dataset_dir),
            "dataset_list": dataset_list_of(item["image"], dataset_dir),
        }
        if any(found.get(key) != value for key, value in known.items()):
            write_atomically(json.dumps({**found, **known}, indent=2).encode(), _description_path(path))
            changed += 1
    if len(missing) < len(items):
        logger.info(f"{len(items) - len(missing)} of {len(items)} volumes are encoded already")
    if changed:
        logger.info(f"conditions or lists (participants.tsv, dataset.json) of {changed} of them have changed and are noted")
    return missing


def save_latent_scale(output_dir: str, weights: str) -> float | None:
    """
    Write the number that latents are multiplied by before a diffusion model sees them: 1 / their standard deviation, over
    all latents that lie below the folder. Waits for the other processes of the run.

    Args:
        output_dir: folder of the latents, where ``latent_scale.json`` is written.
        weights: path of the weights; latents that others made do not count.

    Returns:
        the scale; None where there is no latent.
    """
    if idist.get_world_size() > 1:
        idist.barrier()
    paths = sorted(Path(output_dir).glob(f"**/*_{POSTFIX}.nii.gz"))
    found = [d for d in map(_read_description, paths) if d is not None and d["weights_sha256"] == file_hash(weights)]
    if not found:
        return None
    count = sum(d["count"] for d in found)
    mean = math.fsum(d["count"] * d["mean"] for d in found) / count
    variance = math.fsum(d["count"] * d["mean_square"] for d in found) / count - mean**2
    scale = 1 / math.sqrt(variance)
    if idist.get_rank() == 0:
        content = {"latent_scale": scale, "mean": mean, "volumes": len(found), "weights_sha256": file_hash(weights)}
        write_atomically(json.dumps(content, indent=2).encode(), Path(output_dir) / SCALE_FILE)
        logger.info(f"latent_scale {scale:.6g} over {len(found)} volumes, in {Path(output_dir) / SCALE_FILE}")
    return scale


def _latent_header(record: Mapping[str, Any], factors: Sequence[int]) -> dict[str, Any]:
    """Of a file whose voxels lie over the blocks of the volume that they stand for."""
    to_volume = np.diag([*factors, 1.0])
    to_volume[:3, 3] = [(factor - 1) / 2 for factor in factors]
    return {
        "affine": np.array(record["preprocessed_affine"]) @ to_volume,
        "data_type": "<f4",
        "scl_slope": 1.0,
        "scl_inter": 0.0,
        "xyzt_units": record["xyzt_units"],
        "qform_code": 0,
        "sform_code": record["sform_code"] or 1,
    }


def _image_scale(network: AutoencoderKL) -> list[float]:
    """What each latent channel is multiplied by to be in units of the image; 1 without a linear shortcut."""
    if network.shortcut is None:
        return [1.0] * network.arguments["latent_channels"]
    return network.shortcut.scale.flatten().tolist()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _description_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def _read_description(path: Path) -> dict[str, Any] | None:
    """What lies beside a latent; None when one of the two is missing, or the description cannot be read."""
    try:
        return json.loads(_description_path(path).read_text()) if path.is_file() else None
    except (OSError, ValueError):
        return None
