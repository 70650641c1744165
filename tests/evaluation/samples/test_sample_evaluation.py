"""An evaluation of samples: what it finds, and what it leaves behind."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from scripts.bundle.errors import reason
from scripts.evaluation.samples.features import load_slice_network
from scripts.evaluation.samples.sample_evaluation import _closeness, _limit
from scripts.evaluation.samples.sample_metrics import NearestLatents
from scripts.evaluation.samples.sample_sets import Latent
from tests.conftest import save_volume
from tests.diffusion.runs import encode, make_weights, save_untrained_generator, workflow
from tests.evaluation.test_codec_evaluation import Page

OVERLAY = ("train_diffusion.json", "evaluate_diffusion.json")
KEYS = {"device": "cpu", "amp": False, "num_samples": 3, "num_inference_steps": 2}
SLICES = ("slices",) if load_slice_network() else ()
SHARE = 0.3  # of the volumes that are held out: two of seven


def test_memorised_volumes_are_found():
    latents = torch.randn(12, 4, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    training, held_out = latents[:6], latents[6:]
    samples = [training[1] + 1e-3, torch.zeros(4, 1, 1, 1)]
    search = NearestLatents({"all": [Latent(z) for z in (*samples, *held_out)]})
    for i, z in enumerate(training):
        search.add(f"training {i}", z)
    copy, other_size, *real = search.found["all"]
    assert copy == (pytest.approx(1e-3, rel=1e-3), "training 1")
    assert other_size == (math.inf, "")
    differences = (training - held_out[0]).flatten(1).square().mean(1).sqrt()
    assert real[0][0] == pytest.approx(float(differences.min()), rel=1e-5)
    limit = _limit(real * 4)
    assert _closeness([copy, copy, max(real), other_size], limit)[1] == pytest.approx(2 / 3)
    assert _closeness([copy], limit)[1] == 1
    too_few = _limit([*real * 3, other_size, other_size])  # 18 do not tell where 5 % of them begin
    assert math.isnan(_closeness([copy], too_few)[1])


def test_training_volume_is_not_compared_with_itself():
    latents = list(torch.randn(3, 4, 2, 3, 4, generator=torch.Generator().manual_seed(0)))
    search = NearestLatents({"all": [Latent(z, path=str(i)) for i, z in enumerate(latents)]})
    for i, z in enumerate(latents):
        search.add(str(i), z)
    assert all(path != str(i) and distance > 0.1 for i, (distance, path) in enumerate(search.found["all"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Latents of seven volumes of which two are held out, a generator that has learned nothing, and an evaluation of it."""
    folder = tmp_path_factory.mktemp("samples")
    weights = make_weights(folder / "autoencoder")
    for i in range(7):
        save_volume(folder / "volumes" / f"sub-{i}" / "T1w.nii.gz", (20, 20, 20), i, np.diag([1.0, 1.5, 2.0, 1.0]))
    rows = [f"sub-{i}\t{'FM'[i % 2]}" for i in range(7)]
    (folder / "volumes" / "participants.tsv").write_text("\n".join(["participant_id\tsex", *rows]))
    latents = encode(folder / "volumes", folder / "latents", weights)
    save_untrained_generator(latents, folder / "run", val_fraction=SHARE, condition_keys=["sex"])
    evaluate(folder, folder / "evaluation", val_fraction=SHARE)
    return folder


def evaluating(folder: Path, evaluation_dir: Path, **keys) -> ConfigWorkflow:
    paths = {"dataset_dir": folder / "latents", "output_dir": folder / "run", "evaluation_dir": evaluation_dir}
    paths["autoencoder"] = folder / "autoencoder" / "model.pt"
    return workflow(OVERLAY, "evaluating", "train", **{**paths, **KEYS, **keys})


def evaluate(folder: Path, evaluation_dir: Path, **keys) -> None:
    evaluating(folder, evaluation_dir, **keys).run()


def test_bundle_finds_every_property(folder, tmp_path):
    assert evaluating(folder, tmp_path).check_properties() == []


@pytest.fixture(scope="module")
def evaluation(folder) -> dict:
    return json.loads((folder / "evaluation" / "metrics.json").read_text())


def test_samples_stand_beside_real_volumes_and_gaussians(evaluation):
    sets = evaluation["sets"]
    assert list(sets) == ["samples", "held_out", "training", "covariance_gaussian", "gaussian"]
    assert [row["number"] for row in sets.values()] == [3, 2, 3, 3, 3]
    metrics = {f"{metric}_{kind}" for metric in ("mmd2", "p") for kind in ("coarse", "channels", "local", *SLICES)}
    assert all(sets[name][metric] is not None for name in sets if name != "held_out" for metric in metrics)
    assert all(sets["held_out"][metric] is None for metric in metrics)  # the others are compared with it
    assert sets["held_out"]["spectrum"] == 0 and sets["gaussian"]["spectrum"] > sets["training"]["spectrum"] > 0
    for name, row in sets.items():
        assert 0 <= row["ms_ssim"] < 1 and row["grid_energy"] >= 0
        assert (row["nearest"] is None) == (name in ("covariance_gaussian", "gaussian"))
        assert (row["obeyed_sex"] is None) == (name in ("covariance_gaussian", "gaussian"))
    assert sets["training"]["obeyed_sex"] > 0.6  # the means are theirs


def test_samples_have_sizes_and_conditions_of_held_out_volumes(evaluation):
    assert sorted(sample["index"] for sample in evaluation["samples"]) == [0, 1, 2]
    distances = [sample["distance"] for sample in evaluation["samples"]]
    assert distances == sorted(distances) and distances[0] > 0
    for sample in evaluation["samples"]:
        assert sample["size"] == [20, 20, 20] and sample["spacing"] == [1, 1.5, 2]
        assert (
            sample["conditions"] == json.loads(Path(sample["like"]).with_name("T1w_latent.json").read_text())["conditions"]
        )
        assert sample["conditions"]["sex"] in "FM" and Path(sample["nearest"]).is_file()
    assert any("held out: 2" in note for note in evaluation["notes"])
    assert not any("not the one" in note for note in evaluation["notes"])
    assert any("pip install" in note for note in evaluation["notes"]) != bool(SLICES)


def test_table_has_the_numbers_of_the_json(folder, evaluation):
    rows = list(csv.DictReader((folder / "evaluation" / "metrics.csv").open()))
    assert [row.pop("set") for row in rows] == list(evaluation["sets"])
    found = [{name: float(value) if value else None for name, value in row.items()} for row in rows]
    assert found == list(evaluation["sets"].values())
    names = ["metrics.csv", "metrics.json", "report.html", "samples.png"]
    assert sorted(path.name for path in (folder / "evaluation").iterdir()) == names


def test_picture_shows_samples_and_held_out_volumes(folder, evaluation):
    picture = np.asarray(Image.open(folder / "evaluation" / "samples.png").convert("L"))
    planes = np.array_split(picture, 3)
    assert all(np.unique(plane).size > 20 for plane in planes)
    assert picture.shape[1] > picture.shape[0]  # more columns than the three rows


def test_report_shows_samples_beside_their_nearest_training_volumes(folder, evaluation):
    html = (folder / "evaluation" / "report.html").read_text()
    page = Page(html)
    assert all(each.startswith(("data:image/png;base64,", "#")) for each in page.references)
    assert "http://" not in html and "https://" not in html and "default-src 'none'" in html
    columns = ("sample", "nearest training volume", "difference")
    panels = [f"{plane}, {column}" for plane in ("sagittal", "coronal", "axial") for column in columns]
    assert [image["alt"] for image in page.images] == 3 * panels
    assert evaluation["samples"][0]["nearest"] in html and evaluation["weights_sha256"] in html
    body = [row for row in page.rows if row and "data-value" in row[0]]
    assert len(body) == 5 and [float(row[1]["data-value"]) for row in body] == [3, 2, 3, 3, 3]
    assert html.count("<polyline") == 4


def test_viewer_shows_a_sample_and_its_nearest_training_volume(folder, evaluation, browser):
    viewer_page = pytest.importorskip("tests.evaluation.viewer_page", reason="needs selenium")
    viewer_page.open_page(browser, folder / "evaluation" / "report.html")
    viewer = viewer_page.ViewerPage(browser, f"sample {evaluation['samples'][1]['index']}")
    images = Page((folder / "evaluation" / "report.html").read_text()).images[9:18]  # of the second sample
    drawn = viewer.pictures()
    assert sorted(image["alt"] for image in images) == sorted(drawn)
    for image in images:  # the slices at which the viewer starts
        png = io.BytesIO(base64.b64decode(image["src"].split(",")[1]))
        expected = np.asarray(Image.open(png)).astype(float)[::-1].T
        assert abs(drawn[image["alt"]] - expected).max() <= 1 and np.unique(expected).size > 10
    viewer.point_at("axial", "sample", (0.42, 0.63))
    told = viewer.told()
    assert told["voxel"] == [8, 12, 9] and told["mm"] == [8, 18, 18]
    assert told["difference"][0] == pytest.approx(told["nearest training volume"][0] - told["sample"][0], abs=2e-4)
    assert len(browser.find_elements(viewer_page.By.CSS_SELECTOR, ".viewer")) == 3
    assert browser.get_log("browser") == []


def test_another_split_is_noted_and_what_one_held_out_volume_does_not_tell_is_empty(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.evaluation.samples.features.PACKAGE", "nowhere")
    evaluate(folder, tmp_path, val_fraction=0.1, num_samples=2, view_nearest=0, view_samples=[1])
    html = (tmp_path / "report.html").read_text()
    [viewed] = [article for article in html.split("<article") if 'class="viewer"' in article]
    assert "<h3>sample 1</h3>" in viewed
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert any("(6 latents) is not the one" in note and "(5 latents)" in note for note in found["notes"])
    assert found["held_out_volumes"] == found["sets"]["held_out"]["number"] == 1
    for name in ("mmd2_coarse", "p_local", "mmd2_local"):
        assert found["sets"]["samples"][name] is None
    assert "mmd2_slices" not in found["sets"]["samples"]
    assert "Slices are not compared: pip install" in (tmp_path / "report.html").read_text()
    assert found["sets"]["held_out"]["ms_ssim"] is None and found["sets"]["samples"]["ms_ssim"] is not None


def test_a_sample_that_is_not_made_cannot_be_viewed(folder, tmp_path):
    with pytest.raises(RuntimeError) as error:
        evaluate(folder, tmp_path, view_samples=[3])
    assert "`view_samples` is [3]; samples have the numbers 0 to 2" in str(reason(error.value))


def test_a_single_sample_is_refused(folder, tmp_path):
    with pytest.raises(RuntimeError) as error:
        evaluate(folder, tmp_path, num_samples=1)
    assert "`num_samples` is 1; it must be at least 2" in str(reason(error.value))
