"""The generator that a release carries, as ``python -m scripts.diffusion.share`` leaves it in ``models/generator``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bundle.json_files import Sha256, read_dataclass
from scripts.bundle.weights import read_description, read_weights

__all__ = ["DATA_FORMAT", "FOLDER", "OF_EVALUATION", "SCORES", "shared_generator"]

FOLDER = "models/generator"
REQUIRED = ("README.md", "metadata.json", "model.json", "model.pt")
OF_EVALUATION = "metrics.json"
ADVICE = "Write it with `python -m scripts.diffusion.share`"
DATA_FORMAT, SCORES = "generator_data_format", "eval_metrics"  # keys of configs/metadata.json


@dataclass(frozen=True)
class _Autoencoder:
    sha256: Sha256


@dataclass(frozen=True)
class _Latents:
    autoencoder: _Autoencoder


@dataclass(frozen=True)
class _Generator:
    """What a release needs of the generator's model.json."""

    network: dict[str, Any]
    latents: _Latents
    sha256: Sha256
    sha256_before: Sha256 | None = None


@dataclass(frozen=True)
class _Metadata:
    """What a generator adds to configs/metadata.json."""

    generator_data_format: dict[str, Any]
    eval_metrics: dict[str, Any]


def shared_generator(root: Path, autoencoder: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """
    Args:
        root: folder of the bundle.
        autoencoder: SHA-256 of the weights that the bundle has.

    Returns:
        the files of the generator by their names in the bundle, and what it adds to ``configs/metadata.json``.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is damaged, or the generator was made for another autoencoder.
    """
    folder = root / FOLDER
    for name in REQUIRED:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing. {ADVICE}, or remove {folder} to release no generator.")
    weights = folder / "model.pt"
    read_weights(weights, _Generator)  # refuses damaged ones
    expected = read_description(weights, _Generator).latents.autoencoder.sha256
    if expected != autoencoder:
        raise ValueError(
            f"{folder} was made for another autoencoder than {root / 'models' / 'model.pt'}: the SHA-256 of its weights "
            f"begins with {expected[:12]} there and {autoencoder[:12]} here. Share one of this autoencoder."
        )
    present = [name for name in (*REQUIRED, OF_EVALUATION) if (folder / name).is_file()]
    added = asdict(read_dataclass(folder / "metadata.json", _Metadata))
    return {f"{FOLDER}/{name}": (folder / name).read_bytes() for name in present}, added
