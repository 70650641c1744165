"""The generator that a release carries, as ``python -m scripts.diffusion.share`` leaves it in ``models/generator``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.bundle.json_files import SHA256, read_json
from scripts.bundle.weights import read_description, read_weights

__all__ = ["DATA_FORMAT", "FOLDER", "OF_EVALUATION", "SCORES", "shared_generator"]

FOLDER = "models/generator"
REQUIRED = ("README.md", "metadata.json", "model.json", "model.pt")
OF_EVALUATION = "metrics.json"
DATA_FORMAT, SCORES = "generator_data_format", "eval_metrics"  # keys of configs/metadata.json
DESCRIPTION = {  # schema of what a release needs of the generator's model.json
    "type": "object",
    "required": ["network", "latents", "sha256"],
    "properties": {
        "latents": {
            "type": "object",
            "required": ["autoencoder"],
            "properties": {"autoencoder": {"type": "object", "required": ["sha256"], "properties": {"sha256": SHA256}}},
        },
        "sha256": SHA256,
    },
    "description": "what training wrote of a generator",
}
METADATA = {  # schema of what a generator adds to configs/metadata.json
    "type": "object",
    "required": [DATA_FORMAT, SCORES],
    "properties": {name: {"type": "object", "description": "an object"} for name in (DATA_FORMAT, SCORES)},
    "description": "what a generator adds to configs/metadata.json",
}
ADVICE = "Write it with `python -m scripts.diffusion.share`"


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
    read_weights(weights, DESCRIPTION)  # refuses damaged ones
    description: Any = read_description(weights, DESCRIPTION)
    expected = description["latents"]["autoencoder"]["sha256"]
    if expected != autoencoder:
        raise ValueError(
            f"{folder} was made for another autoencoder than {root / 'models' / 'model.pt'}: the SHA-256 of its weights "
            f"begins with {expected[:12]} there and {autoencoder[:12]} here. Share one of this autoencoder."
        )
    present = [name for name in (*REQUIRED, OF_EVALUATION) if (folder / name).is_file()]
    added = read_json(folder / "metadata.json", METADATA, advice=ADVICE.lower())
    return {f"{FOLDER}/{name}": (folder / name).read_bytes() for name in present}, added
