"""`make release`: one file, the same bytes each time, that a user can download into an empty folder and use."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser, download, download_large_files, run
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy.ndimage import gaussian_filter

from scripts.sharing.release import NAME, build_release
from tests.conftest import ROOT, save_volume
from tests.inference.test_exported_networks import documented_python

LINK = re.compile(r"\]\(([^)\s]+)\)")
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

from scripts.sharing.release import build_release
build_release("../again", URL)

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
    said = build_release(str(folder), f"file://{folder}/{NAME}/")
    [path] = folder.iterdir()
    assert str(path) in said and hashlib.sha256(path.read_bytes()).hexdigest() in said
    return path


@pytest.fixture(scope="module")
def downloaded(archive, tmp_path_factory) -> Path:
    """The bundle as ``monai.bundle download`` leaves it in an empty folder."""
    folder = tmp_path_factory.mktemp("empty")
    download(NAME, bundle_dir=str(folder), url=f"file://{archive}")
    return folder / NAME


def run_python(folder: Path, *arguments: str, bundle: str = NAME) -> str:
    """What Python prints in a folder, with the bundle's folder below it on its path."""
    environment = {**os.environ, "PYTHONPATH": bundle}
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
    return process.stdout


def test_file_holds_what_a_user_needs_and_no_more(archive):
    version = json.loads((ROOT / "configs/metadata.json").read_text())["version"]
    assert archive.name == f"{NAME}_v{version}.zip"
    names = zipfile.ZipFile(archive).namelist()
    assert {name.split("/")[0] for name in names} == {NAME}
    inside = {name.removeprefix(f"{NAME}/") for name in names}
    pictures = {"reconstruction.png", "reconstruction_brain1.png", "reconstruction_lung1.png"}  # that the card shows
    assert {name.split("/")[0] for name in inside} - pictures == {
        *("CITATION.cff", "LICENSE", "README.md", "README.zh-CN.md", "pyproject.toml", "large_files.yml"),
        *("configs", "docs", "models", "scripts"),
    }
    assert {name for name in inside if name.startswith("models/") and not name.startswith("models/generator/")} == {
        *("models/SHA256SUMS", "models/model.ts"),
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
    assert hashes.keys() == {
        *("model.pt", "model.safetensors", "model.ts", "16x/model.pt", "16x/model.safetensors", "generator/model.pt")
    }
    for name, value in hashes.items():
        assert hashlib.sha256((downloaded / "models" / name).read_bytes()).hexdigest() == value


def test_downloaded_bundle_trains_evaluates_encodes_and_loads(downloaded, archive):
    folder = downloaded.parent
    for i in range(2):
        save_volume(folder / "volumes" / f"sub-{i}" / "T1w.nii.gz", (24, 24, 17), seed=i)
    run_python(folder, "-c", f"URL = 'file://{archive.parent}/{NAME}'{WORK}")
    assert (downloaded / "eval/fast_dev_run/checkpoints/model.pt").is_file()
    assert (downloaded / "eval/evaluation/metrics.csv").is_file()
    assert len(list((downloaded / "latents").rglob("*_latent.nii.gz"))) == 2
    assert (folder / "again" / archive.name).read_bytes() == archive.read_bytes()  # a download can be shared again


@pytest.fixture(scope="module")
def uploaded(downloaded, tmp_path_factory) -> Path:
    """The folder that ``monai.bundle push_to_hf_hub`` uploads."""
    from monai.bundle import push_to_hf_hub, scripts

    folder = tmp_path_factory.mktemp("uploaded")

    class Hub:
        HfApi = lambda token: Hub  # noqa: E731  in place of the package, which needs an internet connection
        create_repo = create_tag = lambda **_: None

        def upload_folder(repo_id: str, folder_path: str) -> str:
            shutil.copytree(folder_path, folder / "tree")
            return repo_id

    shutil.copytree(downloaded, folder / NAME)  # the model card becomes its README.md
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts, "huggingface_hub", Hub)
        assert push_to_hf_hub("someone/bundle", NAME, str(folder), version="0.1.0") == "someone/bundle"
    return folder / "tree"


def test_every_link_in_the_uploaded_tree_leads_to_a_file(uploaded):
    broken = []
    for document in uploaded.rglob("*.md"):
        for link in LINK.findall(document.read_text()):
            path = document.parent / link.partition("#")[0]
            if not link.startswith(("http://", "https://", "#")) and not path.is_file():
                broken.append(f"{document.relative_to(uploaded)}: {link}")
    assert broken == []


def test_card_of_the_hub_is_the_model_card_with_a_header_that_the_hub_shows(uploaded):
    card = (ROOT / "docs/README.md").read_text()
    assert (uploaded / "README.md").read_text().endswith(card)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "apache-2.0" and header["library_name"] == "monai"
    assert {"monai", "medical"} <= {*header["tags"]}
    assert header["pipeline_tag"] == "image-to-image" and header["metrics"] == ["psnr", "ssim"]
    for heading in ("### **Authors**", "### **Tags**", "## System Configuration", "# Citation Info"):
        assert f"\n{heading}\n" in card


def test_files_that_a_zoo_keeps_out_of_git_are_downloaded(downloaded, archive, tmp_path):
    shutil.unpack_archive(archive, archive.parent)  # at the address
    names = [each["path"] for each in yaml.safe_load((downloaded / "large_files.yml").read_text())["large_files"]]
    assert {"models/model.pt", "models/model.ts", "models/generator/model.pt"} <= set(names)
    shutil.copytree(downloaded, tmp_path / NAME)
    for name in names:
        (tmp_path / NAME / name).unlink()
    download_large_files(str(tmp_path / NAME))
    for name in names:
        assert (tmp_path / NAME / name).read_bytes() == (downloaded / name).read_bytes()


def in_memory(torchscript: Path, values: np.ndarray, meta: dict, folder: Path) -> np.ndarray:
    """What MONAI Deploy's ``MonaiBundleInferenceOperator`` does with a TorchScript file and an image in memory."""
    parser = ConfigParser()
    with zipfile.ZipFile(torchscript) as archive:
        parser.read_meta(json.loads(archive.read("model/extra/metadata.json")))
        parser.read_config(archive.extract("model/extra/inference.json", folder))
    parser.parse()
    inferer, before, after = map(parser.get_parsed_content, ("inferer", "preprocessing", "postprocessing"))
    for steps in (before, after):
        kept = [step for step in steps.transforms if not re.search("LoadImage|SaveImage", type(step).__name__)]
        assert isinstance(kept[0], MapTransform)
        steps.transforms = tuple(kept)
    network = torch.jit.load(torchscript).eval()
    item = before({"image": MetaTensor.ensure_torch_and_prune_meta(values, meta)})
    with torch.no_grad():
        pred = inferer(inputs=item["image"][None], network=network)
    return np.asarray(after({"pred": pred[0], **item})["pred"])


def test_torchscript_reconstructs_in_memory_what_evaluating_writes(downloaded, tmp_path):
    path = tmp_path / "in" / "head.nii.gz"
    path.parent.mkdir()
    values = gaussian_filter(np.random.default_rng(0).normal(size=(24, 21, 17)), 2).astype(np.float32) * 1000
    affine = np.array([[0, -1.5, 0, 3], [0, 0, 2.0, -7], [1.0, 0, 0, 5], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(values, affine), path)
    paths = {"dataset_dir": str(path.parent), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(ROOT / "models")}
    keys = {"bundle_root": str(ROOT), "device": "cpu", "num_workers": 0, "amp": False, **paths}
    run("evaluating", config_file=str(ROOT / "configs/inference.json"), logging_file=False, **keys)
    expected = nib.load(tmp_path / "out" / "head_reconstruction.nii.gz").get_fdata()
    meta = {"affine": affine, "original_affine": affine, "spatial_shape": np.array(values.shape)}
    meta["original_channel_dim"] = "no_channel"  # as the operator describes an image of a DICOM series
    (found,) = in_memory(downloaded / "models/model.ts", values, meta, tmp_path)
    assert found.shape == values.shape and np.abs(found - expected).max() < 1e-4 * np.ptp(values)
    assert np.corrcoef(found.ravel(), values.ravel())[0, 1] > 0.9
