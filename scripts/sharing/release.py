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

import fire
import safetensors.torch
from monai.bundle import ConfigParser

from scripts.bundle.config import ROOT
from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.machine import MIB
from scripts.bundle.weights import read_weights
from scripts.diffusion.generator import FOLDER, load_autoencoder, load_generator

NAME = "factor_aware_autoencoderkl"  # the folder that the file unpacks to; MONAI asks for it as `name`
CONTENT = (
    *("CITATION.cff", "LICENSE", "README*.md", "pyproject.toml", "configs/**/*.json", "configs/logging.conf"),
    *("docs/**/*.md", "docs/*.ipynb", "docs/*.png", "docs/*.txt"),
    *("scripts/**/*.py", "scripts/**/*.jinja", "scripts/**/*.json", "scripts/**/*.js"),
    *("models/**/README.md", "models/**/metrics.json", "models/**/model.json", "models/**/model.pt"),
)
LARGE = (".pt", ".safetensors", ".ts")
CARD, METADATA, WEIGHTS, TORCHSCRIPT = "docs/README.md", "configs/metadata.json", "models/model.pt", "models/model.ts"
IN_MEMORY = ("configs/inference.json", "configs/in_memory.json")  # configs in the TorchScript file, as one
PICTURE = re.compile(r"!\[[^]]*\]\(([^)]+)\)")


def build_release(output_dir: str = "dist", url: str = "") -> str:
    """
    Write ``NAME_vVERSION.zip``: what a user of the bundle needs. The weights are also there as safetensors and those of
    ``models`` as TorchScript, all with their hashes; pictures of the model card are beside ``README.md`` too, which the card
    replaces on the Hugging Face Hub.

    Args:
        output_dir: folder to write to; it is made.
        url: address below which the unpacked files can be downloaded, for ``large_files.yml``; empty for none.

    Returns:
        path and SHA-256 of the file, for a person to read.

    Raises:
        ValueError: when weights are damaged, or not those that their JSON file describes, or when the generator was made for
            another autoencoder.
    """
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for pattern in CONTENT for path in ROOT.glob(pattern)}
    if f"{FOLDER}/model.pt" in files:
        load_autoencoder(str(ROOT / WEIGHTS), load_generator(str(ROOT / FOLDER / "model.pt")).statistics)  # refuses another
    for name in [name for name in files if name.endswith("/model.pt") and not name.startswith(FOLDER)]:
        state, arguments = read_weights(ROOT / name)
        content = {key: value.contiguous() for key, value in state.items()}
        files[name.replace(".pt", ".safetensors")] = safetensors.torch.save(content, {"network": json.dumps(arguments)})
    files[TORCHSCRIPT] = _torchscript()
    large = {name: content_hash(content) for name, content in files.items() if name.endswith(LARGE)}
    sums = [f"{value}  {name.removeprefix('models/')}\n" for name, value in large.items()]
    files["models/SHA256SUMS"] = "".join(sums).encode()  # as `sha256sum --check` reads it
    if url:
        entries = [
            {"path": name, "url": f"{url.rstrip('/')}/{name}", "hash_val": value, "hash_type": "sha256"}
            for name, value in large.items()
        ]
        files["large_files.yml"] = json.dumps({"large_files": entries}, indent=4).encode()  # YAML too
    files |= {name: files[f"docs/{name}"] for name in PICTURE.findall(files[CARD].decode())}
    target = Path(output_dir) / f"{NAME}_v{json.loads(files[METADATA])['version']}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    archive = _zip({f"{NAME}/{name}": content for name, content in files.items()})
    write_atomically(archive, target)
    return f"{target}: {len(files)} files, {len(archive) / MIB:.0f} MiB, SHA-256 {content_hash(archive)}"


def _torchscript() -> bytes:
    """
    The reconstructor of ``models`` with metadata and inference config, as MONAI Deploy reads them. Paths of source files on
    this machine, which torch adds, are left out, and so is their hash.
    """
    _, arguments = read_weights(ROOT / WEIGHTS)
    config = ConfigParser.load_config_files([str(ROOT / name) for name in IN_MEMORY])
    config["network_def"] = {"_target_": "scripts.autoencoderkl.Reconstructor", **(arguments or {})}
    with tempfile.TemporaryDirectory() as folder:
        config_file = Path(folder, "inference.json")  # the name in the file is its
        config_file.write_text(json.dumps(config))
        path = Path(folder, Path(TORCHSCRIPT).name)  # whose stem is the folder in the file, where configs are looked for
        options = {"filepath": path, "ckpt_file": ROOT / WEIGHTS, "meta_file": ROOT / METADATA, "config_file": config_file}
        words = [f"--{name}={value}" for name, value in options.items()]
        subprocess.run(  # names in the file depend on hashes of text, and on what the process has scripted before
            [sys.executable, "-m", "monai.bundle", "ckpt_export", "network_def", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith((".debug_pkl", "serialization_id"))]
            return _zip({name: archive.read(name) for name in names})


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    # stored, since compressed bytes differ between versions of zlib, and weights hardly shrink
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)  # of 1980
            entry.create_system = 3  # Unix, on which the permissions depend
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


if __name__ == "__main__":
    fire.Fire(build_release)
