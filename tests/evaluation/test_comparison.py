"""A comparison: each codec has the numbers of an evaluation by itself, beside those of the cosine transform of its size."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.metrics import PSNRMetric
from monai.networks.nets import AutoencoderKL as MonaiAutoencoderKL
from monai.transforms import Compose, LoadImaged, Orientationd

from scripts.autoencoderkl import Reconstructor
from scripts.bundle.files import file_hash
from scripts.bundle.weights import save_weights
from scripts.data.intensity_window import ScaleIntensityWindowd
from scripts.evaluation.codecs import BlockDCT
from tests.conftest import ROOT, save_volume
from tests.evaluation.test_codec_evaluation import Page

CONFIGS = ("train.json", "evaluate.json", "compare.json")
NETWORK = {"channels": [4, 8, 8], "latent_channels": 8, "norm": "group", "num_res_blocks": 1}
PLAIN = {
    "spatial_dims": 3,
    "channels": [4, 8, 8],
    "attention_levels": [False] * 3,
    "num_res_blocks": 1,
    "norm_num_groups": 1,
    "latent_channels": 3,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
VALIDATION = ("a.nii.gz", "b.nii.gz")
PLAIN_NAME = "v1.0, a <b>"  # the name of a codec, which must be escaped in HTML


def workflow(folder: Path, files: tuple[str, ...] = CONFIGS, **keys) -> ConfigWorkflow:
    paths = {"dataset_dir": folder / "in", "output_dir": folder / "out", "ckpt_dir": folder / "mine"}
    defaults = {key: str(path) for key, path in paths.items()} | {"num_workers": 0, "device": "cpu", "amp": False}
    flow = ConfigWorkflow(
        [str(ROOT / "configs" / name) for name in files],
        workflow_type="train",
        run_id="evaluating",
        logging_file=False,
        bundle_root=str(ROOT),
        **{**defaults, **keys},
    )
    flow.initialize()
    return flow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two validation volumes, one of them odd, weights of the bundle in ``mine``, and weights of MONAI."""
    folder = tmp_path_factory.mktemp("comparison")
    for seed, (name, shape) in enumerate([("a", (24, 24, 24)), ("b", (21, 26, 17)), ("training", (16, 16, 16))]):
        save_volume(folder / "in" / f"{name}.nii.gz", shape, seed=seed)
    lists = {"training": [{"image": "training.nii.gz"}], "validation": [{"image": name} for name in VALIDATION]}
    (folder / "in" / "dataset.json").write_text(json.dumps(lists))
    torch.manual_seed(0)
    ours = Reconstructor(**PLAIN | {"latent_channels": 8}, initial_downsample_factor=2, linear_shortcut=True)
    save_weights(ours, folder / "mine" / "model.pt")
    torch.save(MonaiAutoencoderKL(**PLAIN).state_dict(), folder / "monai.pt")
    return folder


@pytest.fixture(scope="module")
def compared(folder) -> dict:
    """The content of ``metrics.json`` after a run in this process."""
    monai = {"weights": str(folder / "monai.pt"), "network": {"_target_": "monai.networks.nets.AutoencoderKL", **PLAIN}}
    codecs = {"mine": str(folder / "mine"), "again": str(folder / "mine" / "model.pt"), PLAIN_NAME: monai}
    flow = workflow(folder, codecs=codecs)
    assert flow.check_properties() == []
    flow.run()
    flow.finalize()
    return json.loads((folder / "out/comparison/metrics.json").read_text())


def test_numbers_are_those_of_an_evaluation_of_the_codec_alone(folder, compared):
    arguments = {**NETWORK, "initial_mode": "conv"}
    workflow(folder, CONFIGS[:2], output_dir=str(folder / "alone"), **arguments).run()
    alone = json.loads((folder / "alone/evaluation/metrics.json").read_text())
    mean = alone["codecs"]["reconstruction"]["mean"]
    assert {"psnr", "foreground_psnr", "ssim", "sharpness", "grid_energy", "image_grid_energy"} <= mean.keys()
    for codec in ("mine", "again"):
        assert own(compared["codecs"][codec]["mean"]) == own(mean)
        for name, volume in alone["volumes"].items():
            assert own(compared["volumes"][name]["metrics"][codec]) == own(volume["metrics"]["reconstruction"])
    for name, volume in alone["volumes"].items():
        assert {**compared["volumes"][name], "metrics": None} == {**volume, "metrics": None}


def own(metrics: dict) -> dict:
    """Those that both have."""
    return {name: value for name, value in metrics.items() if name != "trilinear_psnr" and not name.startswith("block_dct_")}


def test_each_codec_is_beside_the_cosine_transform_of_its_size(folder, compared):
    sizes = {"mine": ([8, 8, 8], 8, 64), "again": ([8, 8, 8], 8, 64), PLAIN_NAME: ([4, 4, 4], 3, 64 / 3)}
    images = {name: load(folder / "in" / name) for name in VALIDATION}
    assert list(compared["codecs"]) == list(sizes)
    for name, (factors, channels, voxels) in sizes.items():
        codec = compared["codecs"][name]
        assert (codec["total_downsample_factor"], codec["latent_channels"]) == (factors, channels)
        assert codec["voxels_per_value"] == pytest.approx(voxels, rel=1e-5)
        assert codec["mean"]["block_dct_grid_energy"] != codec["mean"]["grid_energy"]
        for volume, image in images.items():
            expected = PSNRMetric(max_val=1.0)(BlockDCT(factors, channels).reconstruct(image), image).item()
            assert compared["volumes"][volume]["metrics"][name]["block_dct_psnr"] == pytest.approx(expected, rel=1e-5)
    assert compared["codecs"]["mine"]["weights_sha256"] == file_hash(str(folder / "mine" / "model.pt"))


def load(path: Path) -> torch.Tensor:
    window = ScaleIntensityWindowd("image", [0.0, 99.9])
    steps = [LoadImaged("image", ensure_channel_first=True), Orientationd("image", "RAS", labels=None), window]
    return Compose(steps)({"image": str(path)})["image"].as_tensor()[None]


def test_csv_and_page_have_the_same_numbers(folder, compared):
    rows = list(csv.DictReader((folder / "out/comparison/metrics.csv").open()))
    assert [(row["volume"], row["codec"]) for row in rows] == [(v, c) for v in VALIDATION for c in compared["codecs"]]
    for row in rows:
        found = compared["volumes"][row["volume"]]["metrics"][row["codec"]]
        assert "block_dct_psnr" in found
        for metric, value in found.items():
            assert row[metric] == ("" if value is None else str(value))
    html = (folder / "out/comparison/report.html").read_text()
    page = Page(html)
    for reference in page.references:
        assert reference.startswith("data:") or reference[1:] in page.ids, reference
    assert len(page.images) == len(VALIDATION) * 3 * (1 + 2 * 3)
    body = [row for row in page.rows if row and row[0].get("data-value") in VALIDATION]
    psnrs = [found["psnr"] for volume in compared["volumes"].values() for found in volume["metrics"].values()]
    assert sorted(float(row[2]["data-value"] or "nan") for row in body) == sorted(psnrs)
    assert "<b>" not in html and PLAIN_NAME in "".join(page.words)


def test_log_ends_with_the_means_of_all_volumes_and_the_worst_are_drawn(folder, caplog):
    caplog.set_level("INFO")
    keys = {"codecs": {"mine": str(folder / "mine")}, "output_dir": str(folder / "log"), "all_volumes": "true"}
    workflow(folder, **keys, **{"validate#handlers#2#max_pictures": 1}).run()
    *_, table, report = [record.getMessage() for record in caplog.records if record.name.startswith("scripts.evaluation")]
    found = json.loads((folder / "log/comparison/metrics.json").read_text())
    assert set(found["volumes"]) == {*VALIDATION, "training.nii.gz"}
    mine = found["codecs"]["mine"]["mean"]
    assert table.startswith("means of 3 volumes:\n|")
    numbers = dict(line.strip("| ").split("|") for line in table.replace(" ", "").splitlines()[3:])
    for metric in ("psnr", "block_dct_psnr"):
        assert float(numbers[metric]) == pytest.approx(mine[metric], rel=1e-3)
    assert report.endswith("comparison/report.html")
    html = (folder / "log/comparison/report.html").read_text()
    psnrs = {name: volume["metrics"]["mine"]["psnr"] for name, volume in found["volumes"].items()}
    assert html.count("<article") == 1 and f"<h3>{min(psnrs, key=psnrs.get)}</h3>" in html


def test_codec_that_cannot_be_used_ends_the_run_before_the_volumes_are_looked_for(folder):
    flow = workflow(folder, codecs={"gone": str(folder / "nowhere")}, dataset_dir="/no/such/folder")
    with pytest.raises(RuntimeError) as error:
        flow.run()
    assert "'gone' cannot be used: there are no weights" in str(error.value.__cause__)
