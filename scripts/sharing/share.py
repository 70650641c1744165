"""The weights of a run as files to share, which ``make release`` carries.

    python -m scripts.sharing.share --run_dir eval/diffusion

The files are made of what the run recorded. They hold no picture, no volume and no name of a file.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fire
import torch

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT
from scripts.bundle.files import content_hash, serialise, write_atomically
from scripts.bundle.json_files import read_dataclass
from scripts.bundle.machine import MIB
from scripts.bundle.weights import load_weights
from scripts.diffusion.generator import FOLDER, GeneratorDescription, load_generator
from scripts.sharing.model_card import AutoencoderDescription, AutoencoderMetrics, GeneratorMetrics, write_card

__all__ = ["AUTOENCODER", "share"]

AUTOENCODER = "models"
MAX_METRICS = 2**26  # bytes; an evaluation describes each sample
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kind:
    """What tells a generator's JSON file from an autoencoder's."""

    latents: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Evaluation:
    """What is read of an evaluation of reconstructions."""

    codecs: dict[str, AutoencoderMetrics]


def share(run_dir: str, data_source: str = "", license: str = "", half: bool = True) -> str:
    """
    Check a run of ``configs/train.json`` or ``configs/train_diffusion.json`` and write its autoencoder to ``models`` or its
    generator to ``models/generator``: ``model.pt``, ``model.json``, ``README.md``, which is the model card, and
    ``metrics.json``, if the weights were evaluated.

    Args:
        run_dir: ``output_dir`` of the run.
        data_source: origin of the training volumes, for the card.
        license: licence of the weights, for the card.
        half: whether the weights are stored in half precision. Latents belong to the stored autoencoder: share it before
            you encode with it, or share it as it is.

    Returns:
        what was written, for a person to read.

    Raises:
        FileNotFoundError: when there are no weights, or no JSON file beside them.
        ValueError: when a file is damaged, the two do not belong together, weights are too large for half precision, or a
            generator was trained for another autoencoder than that in ``models``.
    """
    weights = Path(run_dir, "checkpoints", "model.pt")
    beside = weights.with_suffix(".json")
    if not weights.is_file():
        raise FileNotFoundError(
            f"there are no weights at {weights}. `run_dir` is {run_dir}; set it to a training's `output_dir`."
        )
    if not beside.is_file():
        raise FileNotFoundError(f"{weights} has no {beside.name} beside it, without which it is useless.")
    evaluation = Path(run_dir, "evaluation", "metrics.json")
    known: AutoencoderDescription | GeneratorDescription
    if read_dataclass(beside, _Kind).latents is None:
        known, folder = read_dataclass(beside, AutoencoderDescription), AUTOENCODER
        network: Any = AutoencoderKL(**known.network)
        load_weights(network, weights)
        metrics = _metrics(evaluation, _Evaluation, known.sha256)
    else:
        known, folder = read_dataclass(beside, GeneratorDescription), FOLDER
        network = load_generator(str(weights)).network
        _refuse_other_autoencoder(known.latents.autoencoder.sha256)
        metrics = _metrics(evaluation, GeneratorMetrics, known.sha256)
    stored = _in_half_precision(network, weights) if half else weights.read_bytes()
    known = replace(known, sha256=content_hash(stored), sha256_before=content_hash(weights.read_bytes()))
    card = write_card(network, known, metrics, str(data_source), str(license))
    content = {"model.json": json.dumps(asdict(known), indent=2).encode(), "README.md": card.encode(), "model.pt": stored}
    if metrics is not None:
        content["metrics.json"] = json.dumps(asdict(metrics), indent=2).encode()
    target = ROOT / folder
    target.mkdir(parents=True, exist_ok=True)
    (target / "metrics.json").unlink(missing_ok=True)  # those of other weights
    for name, each in content.items():
        write_atomically(each, target / name)
    for name, value in (("data_source", data_source), ("license", license)):
        if not value:
            logger.warning(f"`{name}` is not given, and the card says so. Set --{name} before others use the weights.")
    evaluated = "with its scores" if metrics else "not evaluated"
    return f"{target}: {', '.join(sorted(content))}; {len(stored) / MIB:.1f} MiB of weights, {evaluated}"


def _in_half_precision(network: torch.nn.Module, weights: Path) -> bytes:
    state = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{weights} has weights above 65504, which half precision cannot hold. Set `half` to false.")
    return serialise(state)


def _refuse_other_autoencoder(expected: str) -> None:
    path = ROOT / AUTOENCODER / "model.pt"
    found = content_hash(path.read_bytes()) if path.is_file() else "nothing"
    if found != expected:
        raise ValueError(
            f"the generator needs the autoencoder whose SHA-256 begins with {expected[:12]}; that of {path} begins with "
            f"{found[:12]}. Put model.pt and model.json of the autoencoder that encoded the training volumes into models/."
        )


def _metrics(path: Path, kind: Any, sha256: str) -> Any:
    """What may be shared of an evaluation; None without one of these weights."""
    if not path.is_file():
        logger.warning(f"there is no {path}: the card will have no scores.")
        return None
    found = read_dataclass(path, kind, MAX_METRICS)
    found = found.codecs["reconstruction"] if isinstance(found, _Evaluation) else found
    if found.weights_sha256 != sha256:
        logger.warning(f"{path} is of other weights and is left out. Evaluate again to have scores in the card.")
        return None
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    fire.Fire(share)
