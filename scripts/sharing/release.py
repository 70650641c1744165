"""The bundle as one file to share, which ``python -m monai.bundle download`` takes.

    python -m scripts.sharing.release [--output_dir dist] [--url ADDRESS]

The same content gives the same bytes, on every machine.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import fire
import safetensors.torch
from monai.bundle import ConfigParser

from scripts.bundle.config import ROOT
from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.json_files import read_dataclass
from scripts.bundle.machine import MIB
from scripts.bundle.weights import read_weights
from scripts.diffusion.generator import FOLDER, load_generator
from scripts.diffusion.sampler import Generator
from scripts.sharing.model_card import GeneratorMetrics

__all__ = ["build_release"]

NAME = "factor_aware_autoencoderkl"  # the folder that the file unpacks to; MONAI asks for it as `name`
CONTENT = (
    "CITATION.cff",
    "LICENSE",
    "README*.md",
    "pyproject.toml",
    "configs/**/*.json",
    "configs/logging.conf",
    "docs/**/*.md",
    "docs/*.ipynb",
    "docs/*.png",
    "docs/*.txt",
    "scripts/**/*.py",
    "scripts/**/*.jinja",
    "scripts/**/*.json",
    "scripts/**/*.js",
)
AUTOENCODERS = ("models", "models/16x")
SHARED = ("README.md", "metrics.json", "model.json", "model.pt")  # of a set of weights
CARD, METADATA, WEIGHTS, TORCHSCRIPT = "docs/README.md", "configs/metadata.json", "models/model.pt", "models/model.ts"
IN_MEMORY = ("configs/inference.json", "configs/in_memory.json")  # configs in the TorchScript file, as one
PICTURE = re.compile(r"!\[[^]]*\]\(([^)]+)\)")
DATA_FORMAT, SCORES = "generator_data_format", "eval_metrics"  # keys of the metadata
GENERATOR = "generator"  # among the scores
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can store
MODE = 0o644


def build_release(output_dir: str = "dist", url: str = "") -> str:
    """
    Write ``NAME_vVERSION.zip``: what a user of the bundle needs. The weights are also there as safetensors and those of
    ``models`` as TorchScript, all with their hashes; pictures of the model card are beside ``README.md`` too, which the card
    replaces on the Hugging Face Hub.

    Args:
        output_dir: folder to write to; it is made.
        url: address below which the unpacked files can be downloaded, for ``large_files.yml``; empty for none.

    Returns:
        path and SHA-256 of the file, and the size of the generator, for a person to read.

    Raises:
        FileNotFoundError: when there are no weights in ``models``, or a file beside them is missing.
        ValueError: when weights are damaged, or not those that their JSON file describes, or when the generator was made for
            another autoencoder.
    """
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for pattern in CONTENT for path in ROOT.glob(pattern)}
    for folder in (*AUTOENCODERS, FOLDER):
        files |= {
            f"{folder}/{name}": (ROOT / folder / name).read_bytes() for name in SHARED if (ROOT / folder / name).is_file()
        }
    if WEIGHTS not in files:
        raise FileNotFoundError(f"there are no weights at {ROOT / WEIGHTS}, and a release is made to share them.")
    for name in [f"{folder}/model.pt" for folder in AUTOENCODERS if f"{folder}/model.pt" in files]:
        files[name.replace(".pt", ".safetensors")] = _safetensors(ROOT / name)
    metadata = {name: value for name, value in json.loads(files[METADATA]).items() if name != DATA_FORMAT}
    metadata[SCORES] = {name: value for name, value in metadata[SCORES].items() if name != GENERATOR}
    said = ""
    if (ROOT / FOLDER).is_dir():
        metadata[DATA_FORMAT], scores = _of_generator(files)
        metadata[SCORES] |= {GENERATOR: scores} if scores else {}
        size = sum(len(content) for name, content in files.items() if name.startswith(FOLDER))
        said = f"; {size / MIB:.1f} MiB of it are the generator in {FOLDER}"
    if metadata != json.loads(files[METADATA]):
        files[METADATA] = json.dumps(metadata, indent=4, ensure_ascii=False).encode()
    files[TORCHSCRIPT] = _torchscript(metadata)
    large = {name: content_hash(files[name]) for name in files if Path(name).suffix in (".pt", ".safetensors", ".ts")}
    sums = [f"{value}  {name.removeprefix('models/')}\n" for name, value in large.items()]
    files["models/SHA256SUMS"] = "".join(sums).encode()  # as `sha256sum --check` reads it
    if url:
        files["large_files.yml"] = _large_files(large, url.rstrip("/"))
    files |= {name: files[f"docs/{name}"] for name in PICTURE.findall(files[CARD].decode())}
    target = Path(output_dir) / f"{NAME}_v{metadata['version']}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    archive = _zip({f"{NAME}/{name}": content for name, content in files.items()})
    write_atomically(archive, target)
    return f"{target}: {len(files)} files, {len(archive) / MIB:.0f} MiB, SHA-256 {content_hash(archive)}{said}"


def _safetensors(weights: Path) -> bytes:
    """The same weights in a format that cannot hold code; the arguments of their network are in its metadata."""
    state, arguments = read_weights(weights)
    if arguments is None:
        raise FileNotFoundError(
            f"{weights.with_suffix('.json')} is missing, which names the network that the weights are of."
        )
    return safetensors.torch.save(
        {name: value.contiguous() for name, value in state.items()}, {"network": json.dumps(arguments)}
    )


def _of_generator(files: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a generator adds to the metadata: input and output of its network, and scores."""
    generator = load_generator(str(ROOT / FOLDER / "model.pt"))
    if f"{FOLDER}/README.md" not in files:
        raise FileNotFoundError(
            f"{ROOT / FOLDER / 'README.md'} is missing. Write it with `python -m scripts.sharing.share`, or remove the "
            "folder."
        )
    expected, found = generator.statistics.autoencoder.sha256, content_hash(files[WEIGHTS])
    if expected != found:
        raise ValueError(
            f"{ROOT / FOLDER} was made for another autoencoder than {ROOT / WEIGHTS}: the SHA-256 of its weights begins "
            f"with {expected[:12]} there and {found[:12]} here. Share one of this autoencoder."
        )
    metrics, scores = ROOT / FOLDER / "metrics.json", {}
    if metrics.is_file():
        for name, row in read_dataclass(metrics, GeneratorMetrics).sets.items():
            scores[name] = {metric: value for metric, value in row.items() if value is not None}
    return _data_format(generator), scores


def _data_format(generator: Generator) -> dict[str, Any]:
    """Input and output of a generator's network in the terms of MONAI's schema."""
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
    return {"inputs": inputs, "outputs": {"pred": {**latent, "channel_def": {"0": "clean latent"}}}}


def _torchscript(metadata: dict[str, Any]) -> bytes:
    """
    The reconstructor of ``models`` with metadata and inference config, as MONAI Deploy reads them. Paths of source files on
    this machine, which torch adds, are left out, and so is their hash.
    """
    _, arguments = read_weights(ROOT / WEIGHTS)
    config = ConfigParser.load_config_files([str(ROOT / name) for name in IN_MEMORY])
    config["network_def"] = {"_target_": "scripts.autoencoderkl.Reconstructor", **(arguments or {})}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(TORCHSCRIPT).name)  # whose stem is the folder in the file, where configs are looked for
        files = {"meta_file": Path(folder, "metadata.json"), "config_file": Path(folder, "inference.json")}
        for file, content in zip(files.values(), (metadata, config)):
            file.write_text(json.dumps(content))
        paths = {"filepath": path, "ckpt_file": ROOT / WEIGHTS, **files}
        command = [sys.executable, "-m", "monai.bundle", "ckpt_export", "network_def"]
        subprocess.run(  # names in the file depend on hashes of text, and on what the process has scripted before
            [*command, *(word for name, value in paths.items() for word in (f"--{name}", str(value)))],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith((".debug_pkl", "serialization_id"))]
            return _zip({name: archive.read(name) for name in names})


def _large_files(hashes: dict[str, str], url: str) -> bytes:
    """What ``python -m monai.bundle download_large_files`` reads."""
    lines = [
        f'  - path: "{name}"\n    url: "{url}/{name}"\n    hash_val: "{value}"\n    hash_type: "sha256"\n'
        for name, value in hashes.items()
    ]
    return "".join(["large_files:\n", *lines]).encode()


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    # stored, since compressed bytes differ between versions of zlib, and weights hardly shrink
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system = 3  # Unix, on which the permissions depend
            entry.external_attr = MODE << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


if __name__ == "__main__":
    fire.Fire(build_release)
