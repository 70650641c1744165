"""The bundle as one file to share, which ``python -m monai.bundle download`` takes.

    python -m scripts.bundle.release [--output_dir dist]

The same content gives the same bytes, on every machine.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import fire
import safetensors.torch

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import ROOT
from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.machine import MIB
from scripts.bundle.shared_generator import DATA_FORMAT, FOLDER, SCORES, shared_generator
from scripts.bundle.weights import load_weights

__all__ = ["build_release"]

NAME = "factor_aware_autoencoderkl"  # the folder that the file unpacks to; MONAI asks for it as `name`
CONTENT = (
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "configs/**/*.json",
    "configs/logging.conf",
    "docs/*.md",
    "docs/*.png",
    "docs/*.txt",
    "models/model.json",
    "models/model.pt",
    "models/16x/model.json",
    "models/16x/model.pt",
    "scripts/**/*.py",
    "scripts/**/*.jinja",
    "scripts/**/*.js",
)
GENERATOR = "generator"  # among the scores in configs/metadata.json
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can store
MODE = 0o644


def build_release(output_dir: str = "dist") -> str:
    """
    Write ``NAME_vVERSION.zip``: what a user of the bundle needs, the weights also as safetensors, the generator in
    ``models/generator`` if there is one, and hashes of the weights.

    Args:
        output_dir: folder to write to; it is made.

    Returns:
        path and SHA-256 of the file, and the size of the generator, for a person to read.

    Raises:
        FileNotFoundError: when there are no weights in ``models``, or a file of the generator is missing.
        ValueError: when weights are damaged, or not those that their JSON file describes, or when the generator was made for
            another autoencoder.
    """
    files = {str(path.relative_to(ROOT)): path.read_bytes() for pattern in CONTENT for path in ROOT.glob(pattern)}
    weights = [name.removeprefix("models/") for name in files if name.endswith("model.pt")]
    if "model.pt" not in weights:
        raise FileNotFoundError(f"there are no weights at {ROOT / 'models/model.pt'}, and a release is made to share them.")
    for name in list(weights):
        safe = name.replace(".pt", ".safetensors")
        files[f"models/{safe}"] = _safetensors(ROOT / "models" / name)
        weights.append(safe)
    said, added = "", None
    if (ROOT / FOLDER).is_dir():
        generator, added = shared_generator(ROOT, content_hash(files["models/model.pt"]))
        files |= generator
        weights.append("generator/model.pt")
        said = f"; {sum(map(len, generator.values())) / MIB:.1f} MiB of it are the generator in {FOLDER}"
    files["models/SHA256SUMS"] = _sums({name: files[f"models/{name}"] for name in weights})
    files["configs/metadata.json"] = _metadata(files["configs/metadata.json"], added)
    version = json.loads(files["configs/metadata.json"])["version"]
    target = Path(output_dir) / f"{NAME}_v{version}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    archive = _zip(files)
    write_atomically(archive, target)
    return f"{target}: {len(files)} files, {len(archive) / MIB:.0f} MiB, SHA-256 {content_hash(archive)}{said}"


def _metadata(content: bytes, added: dict[str, Any] | None) -> bytes:
    """``configs/metadata.json`` with what a generator adds, and without what an earlier one added."""
    found = json.loads(content)
    wanted = {name: value for name, value in found.items() if name != DATA_FORMAT}
    wanted[SCORES] = {name: value for name, value in found.get(SCORES, {}).items() if name != GENERATOR}
    if added is not None:
        wanted[DATA_FORMAT] = added[DATA_FORMAT]
        if added[SCORES]:
            wanted[SCORES][GENERATOR] = added[SCORES]
    return content if wanted == found else json.dumps(wanted, indent=4, ensure_ascii=False).encode()


def _safetensors(weights: Path) -> bytes:
    """The same weights in a format that cannot hold code; the arguments of their network are in its metadata."""
    description = weights.with_suffix(".json")
    if not description.is_file():
        raise FileNotFoundError(f"{description} is missing, which names the network that the weights are of.")
    arguments = json.loads(description.read_text())["network"]
    network = AutoencoderKL(**arguments)
    load_weights(network, weights)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    return safetensors.torch.save(state, metadata={"network": json.dumps(arguments)})


def _sums(files: dict[str, bytes]) -> bytes:
    """What ``sha256sum --check`` reads."""
    return "".join(f"{content_hash(content)}  {name}\n" for name, content in files.items()).encode()


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    # stored, since compressed bytes differ between versions of zlib, and weights hardly shrink
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{NAME}/{name}", EPOCH)
            entry.create_system = 3  # Unix, on which the permissions depend
            entry.external_attr = MODE << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


if __name__ == "__main__":
    fire.Fire(build_release)
