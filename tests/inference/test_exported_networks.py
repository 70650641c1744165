"""The commands of docs/export.md on the shipped weights: exported files give the results of the network, at any size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import fire
import nibabel as nib
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, onnx_export

from scripts.bundle.weights import load_weights
from scripts.inference.exported_networks import ExportedNetwork
from tests.conftest import ROOT, save_volume

DOCUMENT = (ROOT / "docs" / "export.md").read_text()
FORMATS = (".ts", ".pt2", ".onnx")
TOLERANCE = {".ts": 1e-6, ".pt2": 1e-6, ".onnx": 1e-4}
TWO_LATENTS = 9  # the smallest size that is padded to two latents of 8 voxels


def run_documented(command: str, files: dict[str, str], *further: str) -> None:
    """The command of the document that names these files, as a shell would pass it to MONAI, with others in their place."""
    found = re.findall(rf"^python -m monai\.bundle ({command} (?:.|\n)*?)\n```", DOCUMENT, re.MULTILINE)
    (words,) = (words for text in found if files.keys() <= set(words := shlex.split(text.replace("\\\n", " "))))
    words = [files.get(word, word) for word in words]
    fire.Fire({"ckpt_export": ckpt_export, "onnx_export": onnx_export}, command=[*words, *further])


def documented_python(words: str) -> str:
    """The Python in the document that has these words."""
    return next(code for code in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if words in code)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with the shipped weights in all formats."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run_documented("ckpt_export", {"models/model.ts": f"{folder}/model.ts"})
        run_documented("onnx_export", {"models/model.onnx": f"{folder}/model.onnx"})
        exec(documented_python("torch.export.save").replace("models/model.pt2", f"{folder}/model.pt2"), {})
    return folder


@pytest.fixture(scope="module")
def networks(exported) -> dict[str, ExportedNetwork]:
    """The exported files, loaded."""
    return {suffix: ExportedNetwork(str(exported / f"model{suffix}"), "cpu").eval() for suffix in FORMATS}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(ROOT / "configs" / "inference.json")
    network = parser.get_parsed_content("network_def").eval()
    load_weights(network, ROOT / "models" / "model.pt")
    return network


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 32, 32, 32), (1, 1, 16, 16, 16), (1, 1, 16, 24, 48), (1, 1, 37, 50, 21), (3, 1, TWO_LATENTS, 64, TWO_LATENTS)],
    ids=str,
)
@torch.no_grad()
def test_exported_file_gives_what_the_network_gives(networks, network, suffix, shape):
    image = torch.rand(*shape)
    result = networks[suffix](image)
    assert result.shape == image.shape
    assert torch.allclose(result, network(image), atol=TOLERANCE[suffix], rtol=0)


@pytest.mark.parametrize("suffix", [".ts", ".onnx"])
@torch.no_grad()
def test_exported_file_takes_a_single_voxel(networks, network, suffix):
    image = torch.rand(1, 1, 1, 1, 1)
    assert torch.allclose(networks[suffix](image), network(image), atol=TOLERANCE[suffix], rtol=0)


def inference(run_id: str, *overlays: str, **overrides) -> ConfigWorkflow:
    found = ConfigWorkflow(
        [str(ROOT / "configs" / name) for name in ("inference.json", *overlays)],
        workflow_type="infer",
        run_id=run_id,
        logging_file=False,
        bundle_root=str(ROOT),
        device="cpu",
        num_workers=0,
        **overrides,
    )
    found.initialize()
    return found


def test_reconstructing_with_exported_files(exported, tmp_path):
    save_volume(tmp_path / "in" / "deep" / "odd.nii.gz", (21, 26, 19))
    folders = {"dataset_dir": str(tmp_path / "in")}
    inference("evaluating", output_dir=str(tmp_path / "network"), amp=False, **folders).run()
    expected = nib.load(tmp_path / "network" / "deep" / "odd_reconstruction.nii.gz")
    for suffix in FORMATS:
        weights, output = str(exported / f"model{suffix}"), tmp_path / suffix
        flow = inference("evaluating", "inference_exported.json", weights=weights, output_dir=str(output), **folders)
        assert flow.check_properties() == []
        flow.run()
        result = nib.load(output / "deep" / "odd_reconstruction.nii.gz")
        assert result.header == expected.header
        assert abs(result.get_fdata() - expected.get_fdata()).max() <= 1  # one step of rounding to int16


@pytest.mark.parametrize("run_id", ["encoding", "decoding"])
def test_exported_file_makes_no_latents(exported, tmp_path, run_id):
    flow = inference(
        run_id, "inference_exported.json", weights=str(exported / "model.ts"), dataset_dir="unread", output_dir=str(tmp_path)
    )
    with pytest.raises(RuntimeError) as error:
        flow.run()
    assert "leave out inference_exported.json" in str(error.value.__cause__)


@pytest.mark.parametrize(
    "name, error, words",
    [("model.pt", ValueError, "must end in .ts, .pt2, .onnx"), ("nowhere.ts", FileNotFoundError, "no exported network at")],
)
def test_file_that_is_no_exported_network_is_named(name, error, words):
    with pytest.raises(error, match=words):
        ExportedNetwork(str(ROOT / "models" / name), "cpu")
