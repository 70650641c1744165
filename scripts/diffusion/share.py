"""A trained generator as files to share, which ``make release`` carries.

    python -m scripts.diffusion.share --run_dir eval/diffusion

The files are made of what the run recorded. They hold no picture, no volume and no name of a file.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fire

from scripts.bundle.config import ROOT
from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.json_files import Sha256, read_dataclass
from scripts.bundle.machine import MIB
from scripts.bundle.shared_generator import DATA_FORMAT, FOLDER, OF_EVALUATION, SCORES
from scripts.diffusion.generator import Generator, GeneratorDescription
from scripts.diffusion.loading import load_generator
from scripts.diffusion.model_card import write_card

__all__ = ["share_generator"]

MAX_METRICS = 2**26  # bytes; an evaluation describes each sample
SETTINGS = (
    *("num_samples", "seed", "val_fraction", "num_inference_steps", "solver"),
    *("guidance_scale", "guidance_interval", "guide_sha256", "amp_dtype"),
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metrics:
    """The part of an evaluation that is shared; the rest has paths and describes held-out volumes."""

    weights_sha256: Sha256
    training_volumes: int
    held_out_volumes: int
    settings: dict[str, Any]
    notes: list[str]
    sets: dict[str, dict[str, float | None]]

    def __post_init__(self) -> None:
        missing = [*(set(SETTINGS) - self.settings.keys()), *({"samples", "held_out"} - self.sets.keys())]
        if missing:
            raise ValueError(f"`{missing[0]}` is missing.")


def share_generator(run_dir: str, data_source: str = "", license: str = "") -> str:
    """
    Check a run of ``configs/train_diffusion.json`` and write its generator to ``models/generator``: ``model.pt`` and
    ``model.json``; ``README.md``, the model card; ``metrics.json``, if the weights were evaluated; and ``metadata.json``,
    which ``make release`` adds to ``configs/metadata.json``.

    Args:
        run_dir: ``output_dir`` of the run.
        data_source: where the training volumes are from, for the card.
        license: of the generator's weights, for the card.

    Returns:
        what was written, for a person to read.

    Raises:
        FileNotFoundError: when there are no weights, or no JSON file beside them.
        ValueError: when a file is damaged, the two do not belong together, or the autoencoder in ``models`` is another one.
    """
    weights = Path(run_dir, "checkpoints", "model.pt")
    wanted = f"`run_dir` is {run_dir}; it must be the `output_dir` of a training with configs/train_diffusion.json."
    generator = load_generator(str(weights), wanted)
    _refuse_other_autoencoder(generator)
    metrics = _metrics(Path(run_dir, "evaluation", "metrics.json"), generator)
    known = asdict(read_dataclass(weights.with_suffix(".json"), GeneratorDescription))
    known = {**known, "sha256": generator.sha256, "sha256_before": generator.sha256}
    files = {
        "model.json": json.dumps(known, indent=2),
        "metadata.json": json.dumps(_metadata(generator, metrics), indent=2),
        "README.md": write_card(generator, metrics, str(data_source), str(license)),
    }
    if metrics is not None:
        files[OF_EVALUATION] = json.dumps(metrics, indent=2)
    content = {name: text.encode() for name, text in files.items()} | {"model.pt": weights.read_bytes()}
    folder = ROOT / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if metrics is None:  # those that are there are of other weights
        (folder / OF_EVALUATION).unlink(missing_ok=True)
    for name, each in content.items():
        write_atomically(each, folder / name)
    for name, value in (("data_source", data_source), ("license", license)):
        if not value:
            logger.warning(f"`{name}` is not given, and the card says so. Set --{name} before others use the weights.")
    evaluated = "with its scores" if metrics else "not evaluated"
    return f"{folder}: {', '.join(sorted(content))}; {len(content['model.pt']) / MIB:.1f} MiB of weights, {evaluated}"


def _refuse_other_autoencoder(generator: Generator) -> None:
    path = ROOT / "models" / "model.pt"
    expected = generator.statistics.autoencoder.sha256
    found = content_hash(path.read_bytes()) if path.is_file() else "nothing"
    if found != expected:
        raise ValueError(
            f"the generator needs the autoencoder whose SHA-256 begins with {expected[:12]}; that of {path} begins with "
            f"{found[:12]}. Put model.pt and model.json of the autoencoder that encoded the training volumes into models/."
        )


def _metrics(path: Path, generator: Generator) -> dict[str, Any] | None:
    """What may be shared of the evaluation; None without one of these weights."""
    if not path.is_file():
        logger.warning(f"there is no {path}: the card will have no scores. docs/generation.md says how to evaluate.")
        return None
    found = read_dataclass(path, Metrics, max_bytes=MAX_METRICS)
    if found.weights_sha256 != generator.sha256:
        logger.warning(f"{path} is of other weights and is left out. Evaluate again to have scores in the card.")
        return None
    return {**asdict(found), "settings": {name: found.settings[name] for name in SETTINGS}}


def _metadata(generator: Generator, metrics: dict[str, Any] | None) -> dict[str, Any]:
    """Input and output of the network in the terms of MONAI's schema, and scores."""
    arguments = generator.network.arguments
    axes = arguments["spatial_dims"]
    latent = {
        "type": "latent",
        "format": "latent",
        "num_channels": arguments["latent_channels"],
        "spatial_shape": [f"{generator.network.multiple}*n"] * axes,
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
    }
    vector = {**latent, "type": "vector", "format": "vector", "spatial_shape": []}
    inputs = {
        "image": {**latent, "channel_def": {"0": "noisy latent"}},
        "time": {**vector, "type": "timestep", "format": "timestep", "num_channels": 1, "value_range": [0, 1]},
        "context": {**vector, "num_channels": arguments["condition_size"]},
        "extent": {**vector, "num_channels": axes, "value_range": [0, 1]},
    }
    data_format = {"inputs": inputs, "outputs": {"pred": {**latent, "channel_def": {"0": "clean latent"}}}}
    sets = metrics["sets"] if metrics else {}
    scores = {name: {metric: value for metric, value in row.items() if value is not None} for name, row in sets.items()}
    return {DATA_FORMAT: data_format, SCORES: scores}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    fire.Fire(share_generator)
