"""`make release`: one file, the same bytes each time, that a user can download into an empty folder and use."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from scripts.bundle.release import NAME, build_release
from tests.conftest import ROOT, save_volume
from tests.inference.test_exported_networks import documented_python

# what a user does in the downloaded bundle, and from Python in the folder above it
WORK = """
import os
from pathlib import Path
import torch
from monai.bundle import ConfigWorkflow, load, run

name = "factor_aware_autoencoderkl"
common = {"meta_file": "configs/metadata.json", "logging_file": "configs/logging.conf", "num_workers": 0, "device": "cpu"}
common["dataset_dir"] = os.path.abspath("volumes")
os.chdir(name)
train, evaluate = "configs/train.json", "configs/evaluate.json"
run("training", config_file=train, fast_dev_run=True, patch_size=[16, 16, 16], **common)
run("evaluating", config_file=[train, evaluate], ckpt_dir="models", val_fraction=0.5, **common)
run("encoding", config_file="configs/inference.json", output_dir="latents", **common)

from scripts.bundle.release import build_release
build_release("../again")

os.chdir("..")
weights = torch.load(f"{name}/models/model.pt", weights_only=True)
for workflow_type in ("train", "inference"):
    network = load(name, bundle_dir=".", workflow_type=workflow_type, device="cpu")
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
assert network(torch.rand(1, 1, 9, 9, 9)).shape == (1, 1, 9, 9, 9)
flow = ConfigWorkflow(f"{name}/configs/train.json", bundle_root=name, dataset_dir="volumes", num_workers=0, device="cpu")
flow.initialize()
assert flow.check_properties() == []
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    said = build_release(str(folder))
    [path] = folder.iterdir()
    assert str(path) in said and hashlib.sha256(path.read_bytes()).hexdigest() in said
    return path


@pytest.fixture(scope="module")
def downloaded(archive, tmp_path_factory) -> Path:
    """The bundle as ``monai.bundle download`` leaves it in an empty folder."""
    folder = tmp_path_factory.mktemp("empty")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        _python(folder, "-m", "monai.bundle", "download", "--name", NAME, "--bundle_dir", ".", "--url", url)
        server.shutdown()
    return folder / NAME


def _python(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": NAME, "no_proxy": "127.0.0.1"}
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-5000:]


def test_two_builds_are_the_same_bytes(archive, tmp_path):
    build_release(str(tmp_path))
    assert (tmp_path / archive.name).read_bytes() == archive.read_bytes()


def test_file_holds_what_a_user_needs_and_no_more(archive):
    version = json.loads((ROOT / "configs/metadata.json").read_text())["version"]
    assert archive.name == f"{NAME}_v{version}.zip"
    names = zipfile.ZipFile(archive).namelist()
    assert {name.split("/")[0] for name in names} == {NAME}
    inside = {name.removeprefix(f"{NAME}/") for name in names}
    assert {name.split("/")[0] for name in inside} == {
        *("LICENSE", "README.md", "pyproject.toml", "configs", "docs", "models", "scripts")
    }
    assert {name for name in inside if name.startswith("models/") and not name.startswith("models/generator/")} == {
        "models/SHA256SUMS",
        *(f"{folder}/model.{suffix}" for folder in ("models", "models/16x") for suffix in ("pt", "json", "safetensors")),
    }
    assert not [name for name in inside if "__pycache__" in name or "test_" in name]


def test_safetensors_are_the_weights_and_know_their_network(downloaded, monkeypatch):
    monkeypatch.chdir(downloaded)
    found: dict = {}
    exec(documented_python("load_file"), found)
    weights = torch.load(ROOT / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in found["network"].state_dict().items())


def test_hashes_are_those_of_the_weights(downloaded):
    lines = (downloaded / "models" / "SHA256SUMS").read_text().splitlines()
    hashes = {name: value for value, name in (line.split("  ") for line in lines)}
    assert hashes.keys() - {"generator/model.pt"} == {
        *("model.pt", "model.safetensors", "16x/model.pt", "16x/model.safetensors")
    }
    for name, value in hashes.items():
        assert hashlib.sha256((downloaded / "models" / name).read_bytes()).hexdigest() == value


def test_downloaded_bundle_trains_evaluates_encodes_and_loads(downloaded, archive):
    folder = downloaded.parent
    for i in range(2):
        save_volume(folder / "volumes" / f"sub-{i}" / "T1w.nii.gz", (24, 24, 17), seed=i)
    _python(folder, "-c", WORK)
    assert (downloaded / "eval/fast_dev_run/checkpoints/model.pt").is_file()
    assert (downloaded / "eval/evaluation/metrics.csv").is_file()
    assert len(list((downloaded / "latents").rglob("*_latent.nii.gz"))) == 2
    assert (folder / "again" / archive.name).read_bytes() == archive.read_bytes()  # a download can be shared again


def test_layout_is_what_the_hub_takes(downloaded, tmp_path, monkeypatch):
    from monai.bundle import push_to_hf_hub, scripts

    uploaded = {}

    class Hub:
        HfApi = lambda token: Hub  # noqa: E731  in place of the package, which needs an internet connection
        create_repo = create_tag = lambda **_: None

        def upload_folder(repo_id: str, folder_path: str) -> str:
            uploaded.update({path.name: path.read_text() for path in Path(folder_path).glob("*.md")})
            return repo_id

    monkeypatch.setattr(scripts, "huggingface_hub", Hub)
    shutil.copytree(downloaded, tmp_path / NAME)  # the model card becomes its README.md
    assert push_to_hf_hub("someone/bundle", NAME, str(tmp_path), version="0.1.0") == "someone/bundle"
    assert "license: apache-2.0" in uploaded["README.md"]
    assert uploaded["README.md"].endswith((ROOT / "docs/README.md").read_text())
