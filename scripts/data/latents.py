"""Latents on disk: ``z_mu`` as NIfTI, and beside it a JSON file with everything that is needed to restore the volume.

The JSON file is written last and holds the latent's hash: where the two agree, the latent is complete.
"""

from __future__ import annotations

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
from scripts.bundle.files import content_hash, file_hash, write_atomically
from scripts.bundle.json_files import SHA256, read_json
from scripts.bundle.processes import share_of
from scripts.bundle.progress import ProgressBar
from scripts.bundle.weights import NETWORK, check_arguments
from scripts.data.dataset_tables import conditions_of, dataset_list_of, log_participants
from scripts.data.file_names import output_path
from scripts.data.restored_volumes import DESCRIBED, RECORD, clipped_shares, nifti_bytes, problem_of_record
from scripts.data.volume_checks import problem_of_claim, unreadable

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
ADVICE = "encode the volume again"
_NUMBER = {"type": "number", "description": "a finite number"}
_NUMBERS = {"type": "array", "minItems": 1, "items": _NUMBER, "description": "a finite number for each channel"}
DESCRIPTION = {  # schema of what lies beside a latent
    "type": "object",
    "required": [
        *(DESCRIBED.keys() - {"clipped_below", "clipped_above"}),
        "padding",
        "settings",
        "mean",
        "mean_square",
        "count",
        "network",
        "weights_sha256",
        "latent_sha256",
    ],
    "properties": {
        **DESCRIBED,
        "padding": {
            "type": "array",
            "minItems": 3,
            "maxItems": 3,
            "items": {"type": "integer", "minimum": 0},
            "description": "three integers from 0 on",
        },
        "settings": {"type": "object", "description": "an object"},
        "mean": _NUMBER,
        "mean_square": _NUMBER,
        "count": {"type": "integer", "minimum": 1, "description": "a positive integer"},
        "network": NETWORK,
        "weights_sha256": SHA256,
        "latent_sha256": SHA256,
        **dict.fromkeys(("channel_mean", "channel_mean_square", "image_scale"), _NUMBERS),
        "conditions": {
            "type": "object",
            "maxProperties": 1000,
            "additionalProperties": {"type": ["number", "string"], "description": "a number or text"},
            "description": "an object",
        },
        "dataset_list": {"enum": ["training", "validation", "none", None], "description": "a list of dataset.json"},
    },
    "description": "an object",
}
logger = logging.getLogger(__name__)


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
        record = json.loads(data[RECORD])
        z_mu = data[self.key].detach().as_subclass(torch.Tensor).float().cpu()
        path = output_path(self.output_dir, record["source"], POSTFIX, record["keep_ending"])
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
            "latent_sha256": content_hash(content),
        }
        write_atomically(content, path)
        write_atomically(json.dumps(description, indent=2).encode(), _description_path(path))
        logger.info(f"{path}: {clipped_shares(record)}")
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
        check_arguments(description["network"], self.arguments, path)
        if description["weights_sha256"] != file_hash(self.weights):
            raise ValueError(
                f"{path} was made with other weights than {self.weights}; point `ckpt_dir` at those, or encode again."
            )
        z_mu = read_latent(
            path, description, self.factors, self.arguments["latent_channels"], self.arguments["out_channels"]
        )
        record = {name: description[name] for name in DESCRIBED if name in description}
        return {**data, self.key: z_mu, RECORD: json.dumps(record)}


def read_latent(
    path: Path, description: Mapping[str, Any], factors: Sequence[int], latent_channels: int, image_channels: int
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
        ValueError: for a file that is not what its description names, or a description that contradicts itself.
    """
    if description["latent_sha256"] != content_hash(path.read_bytes()):
        raise ValueError(f"{path} is not the file that its description names: it was changed or damaged; encode again.")
    problem = problem_of_record(description, image_channels) or _problem_of_padding(description, factors)
    if problem is not None:
        raise ValueError(f"{_description_path(path)}: {problem}; {ADVICE}.")
    sizes = (-(-n // factor) for n, factor in zip(description["preprocessed_shape"], factors))
    return _read_voxels(path, (*sizes, latent_channels))


def _problem_of_padding(description: Mapping[str, Any], factors: Sequence[int]) -> str | None:
    size, padding = description["preprocessed_shape"], description["padding"]
    if padding == [-n % factor for n, factor in zip(size, factors)]:
        return None
    return f"`padding` {padding} does not pad `preprocessed_shape` {size} to a multiple of {list(factors)}"


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
        raise ValueError(
            f"{path} has the shape {image.shape}; with `preprocessed_shape` in {_description_path(path).name} it must be "
            f"{shape}; {ADVICE}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{path} has values that are NaN or infinite; {ADVICE}.")
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
            or found["settings"] != dict(settings)
            or found["weights_sha256"] != file_hash(weights)
            or _description_path(path).stat().st_mtime < source.stat().st_mtime
            or found["latent_sha256"] != content_hash(path.read_bytes())
            or "image_scale" not in found  # of an older version, which did not store what a generator needs
        ):
            missing.append(item)
            others += found is not None and found["weights_sha256"] != file_hash(weights)
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
    paths = sorted(Path(output_dir).glob(f"**/*_{POSTFIX}.nii.gz"))
    found = [d for d in map(_usable_description, paths) if d is not None and d["weights_sha256"] == file_hash(weights)]
    if not found:
        return None
    count = sum(d["count"] for d in found)
    mean = math.fsum(d["count"] * d["mean"] for d in found) / count
    variance = math.fsum(d["count"] * d["mean_square"] for d in found) / count - mean**2
    if not variance > 0:
        raise ValueError(f"the latents below {output_dir} have a variance of {variance:g}, which gives no scale; {ADVICE}.")
    scale = 1 / math.sqrt(variance)
    if idist.get_rank() == 0:
        content = {"latent_scale": scale, "mean": mean, "volumes": len(found), "weights_sha256": file_hash(weights)}
        write_atomically(json.dumps(content, indent=2).encode(), Path(output_dir) / SCALE_FILE)
        logger.info(f"latent_scale {scale:.6g} over {len(found)} volumes, in {Path(output_dir) / SCALE_FILE}")
    return scale


def _latent_header(record: Mapping[str, Any], factors: Sequence[int]) -> dict[str, Any]:
    """Header of a latent, whose affine places each voxel at the centre of its block of the volume."""
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


def _description_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def read_description(path: Path) -> dict[str, Any]:
    """
    The description beside a latent.

    Args:
        path: of the latent.

    Raises:
        ValueError: when one of the two is missing, or the description is not what :py:data:`DESCRIPTION` says.
    """
    if not path.is_file() or not _description_path(path).is_file():
        raise ValueError(f"{path} or {_description_path(path).name} is missing; {ADVICE}.")
    return read_json(_description_path(path), DESCRIPTION, ADVICE)


def _usable_description(path: Path) -> dict[str, Any] | None:
    try:
        return read_description(path)
    except (OSError, ValueError):
        return None
