"""The weights of a run as files to share, which ``make release`` carries.

    python -m scripts.sharing.share --run_dir eval/diffusion

The files are made of what the run recorded. They hold no picture, no volume and no name of a file.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import fire
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT
from scripts.bundle.files import file_hash, write_atomically
from scripts.bundle.weights import load_weights, save_weights
from scripts.diffusion.generator import FOLDER, load_autoencoder, load_generator
from scripts.diffusion.statistics import ranges
from scripts.evaluation.reports import summary_table

AUTOENCODER = "models"
# what is shared of an evaluation; the rest has paths and describes held-out volumes
OF_RECONSTRUCTIONS = ("weights_sha256", "mean")
OF_SAMPLES = ("weights_sha256", "training_volumes", "held_out_volumes", "notes", "sets")
SETTINGS = (
    *("num_samples", "seed", "val_fraction", "num_inference_steps", "solver"),
    *("guidance_scale", "guidance_interval", "guide_sha256", "amp_dtype"),
)
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
logger = logging.getLogger(__name__)


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
    known = json.loads(weights.with_suffix(".json").read_text())
    network: Any
    if "latents" in known:
        generator = load_generator(str(weights))
        load_autoencoder(str(ROOT / AUTOENCODER / "model.pt"), generator.statistics)  # refuses another one
        folder, network, statistics = FOLDER, generator.network, generator.statistics
    else:
        folder, network, statistics = AUTOENCODER, AutoencoderKL(**known["network"]), None
        load_weights(network, weights)
    if half and not all(value.isfinite().all() for value in network.half().state_dict().values()):
        raise ValueError(f"{weights} has weights above 65504, which half precision cannot hold. Set `half` to false.")
    metrics = _metrics(Path(run_dir, "evaluation", "metrics.json"), known["sha256"])
    target = ROOT / folder
    for name in ("README.md", "metrics.json"):  # of other weights
        (target / name).unlink(missing_ok=True)
    save_weights(network, target / "model.pt", known)
    file_hash.cache_clear()  # the file was replaced
    if metrics is not None:
        write_atomically(json.dumps(metrics, indent=2).encode(), target / "metrics.json")
    card = TEMPLATES.get_template("autoencoder_card.md.jinja" if statistics is None else "generator_card.md.jinja")
    text = card.render(
        data_source=data_source,
        example=_example(statistics) if statistics else {},
        factors=statistics.factors if statistics else network.total_downsample_factor,
        known=json.loads((target / "model.json").read_text()),
        latents=statistics,
        license=license,
        metrics=metrics,
        parameters=sum(each.numel() for each in network.parameters()),
        ranges=ranges,
        summary_table=summary_table,
    )
    write_atomically(f"{text}\n".encode(), target / "README.md")
    for name, value in (("data_source", data_source), ("license", license)):
        if not value:
            logger.warning(f"`{name}` is not given, and the card says so. Set --{name} before others use the weights.")
    return f"{target}: {', '.join(sorted(path.name for path in target.iterdir() if path.is_file()))}"


def _metrics(path: Path, sha256: str) -> dict[str, Any] | None:
    """What may be shared of an evaluation; None without one of these weights."""
    if not path.is_file():
        logger.warning(f"there is no {path}: the card will have no scores.")
        return None
    found = json.loads(path.read_text())
    found = found["codecs"]["reconstruction"] if "codecs" in found else found
    if found["weights_sha256"] != sha256:
        logger.warning(f"{path} is of other weights and is left out. Evaluate again to have scores in the card.")
        return None
    if "sets" not in found:
        return {name: found[name] for name in OF_RECONSTRUCTIONS}
    return {**{name: found[name] for name in OF_SAMPLES}, "settings": {name: found["settings"][name] for name in SETTINGS}}


def _example(statistics: Any) -> dict[str, str | float]:
    """A value of each condition that can be asked for: the most frequent class, or the mean."""
    found: dict[str, str | float] = {}
    for key, seen in statistics.conditions.keys.items():
        classes = getattr(seen, "classes", None)
        found[key] = max(classes, key=classes.get) if classes else float(f"{seen.mean:.3g}")
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    fire.Fire(share)
