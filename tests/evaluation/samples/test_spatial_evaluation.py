"""An evaluation of samples with spatial conditions: a label map, another contrast, and a hole."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from scripts.bundle.errors import reason
from scripts.evaluation.pictures import draw_columns
from tests.diffusion.runs import encode, make_weights, save_untrained_generator
from tests.evaluation.samples.test_sample_evaluation import SHARE, evaluate, evaluating
from tests.evaluation.test_codec_evaluation import Page

SIZE = (18, 15, 16)  # of which the latents hold more
SPATIAL = ["label", "t2", "hole"]
LEVELS = (0.1, 0.4, 0.9)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)


def save_case(folder: Path, seed: int) -> None:
    """A volume that is constant in each of two classes, the negative of it, and a hole."""
    random, middle = np.random.default_rng(seed), np.array(SIZE) / 2
    offset = np.indices(SIZE).T - middle + random.uniform(-2, 2, 3)
    distance = np.linalg.norm(offset, axis=-1).T
    label = np.select([distance < 4, distance < 7], [2, 1], 0).astype(np.uint8)
    volume = np.array(LEVELS, dtype=np.float32)[label]
    hole = np.zeros(SIZE, dtype=np.uint8)
    hole[5:9, 5:9, 5:9] = 1
    for name, values in {"T1w": volume, "T1w_label": label, "T1w_t2": 1 - volume, "T1w_hole": hole}.items():
        save(folder / f"sub-{seed}" / f"{name}.nii.gz", values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Latents of seven volumes of which two are held out, and a generator that has learned nothing."""
    folder = tmp_path_factory.mktemp("spatial")
    weights = make_weights(folder / "autoencoder")
    for seed in range(7):
        save_case(folder / "volumes", seed)
    keys = {"spatial_keys": SPATIAL, "label_keys": ["hole"], "intensity_range": [0, 1]}
    latents = encode(folder / "volumes", folder / "latents", weights, **keys)
    save_untrained_generator(latents, folder / "run", val_fraction=SHARE, spatial_keys=SPATIAL)
    return folder


@pytest.fixture(scope="module")
def evaluation(folder) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.evaluation.samples.features.PACKAGE", "nowhere")
        evaluate(folder, folder / "evaluation", val_fraction=SHARE, segmenter_steps=1, view_nearest=1)
    return json.loads((folder / "evaluation" / "metrics.json").read_text())


def test_sets_and_columns_of_spatial_conditions(folder, evaluation):
    sets = evaluation["sets"]
    gaussians = ["covariance_gaussian", "gaussian"]
    assert list(sets) == ["samples", "held_out", "training", "condition_t2", "training_mean", *gaussians]
    assert [row["number"] for row in sets.values()] == [3, 2, 3, 2, 2, 3, 3]
    real = {"explained_label", "explained_by_other_label", "step_hole"}
    compared = {"psnr", "ssim", "inside_mae_hole"}
    dice = {"dice_label", "dice_label_1", "dice_label_2", "dice_hole"}
    expected = dict.fromkeys(sets, real | compared | dice) | {"held_out": real | dice, "training": real}
    expected |= {name: set() for name in gaussians}
    for name, row in sets.items():
        assert {column for column in real | compared | dice if row[column] is not None} == expected[name]
    like = {sample["index"]: sample["like"] for sample in evaluation["samples"]}
    assert like[0] == like[2] != like[1]  # two held-out volumes take turns
    assert evaluation["settings"]["spatial_keys"] == SPATIAL
    assert not any("spatial" in note for note in evaluation["notes"])
    assert next(csv.DictReader((folder / "evaluation" / "metrics.csv").open()))["psnr"] == str(sets["samples"]["psnr"])


def test_label_map_explains_real_volumes_and_another_one_less(evaluation):
    for name in ("held_out", "training"):
        row = evaluation["sets"][name]
        assert row["explained_label"] > 0.7 and row["explained_by_other_label"] < row["explained_label"] - 0.2
    assert evaluation["sets"]["samples"]["explained_label"] < 0.5  # of a network that has learned nothing


def test_conditions_and_mean_are_compared_with_held_out_volumes(evaluation):
    sets = evaluation["sets"]
    assert sets["training_mean"]["psnr"] > sets["condition_t2"]["psnr"]
    expected = np.mean([abs(1 - 2 * level) for level in LEVELS])
    assert 0.2 < sets["condition_t2"]["inside_mae_hole"] < 0.8 and expected == pytest.approx(0.6)
    assert sets["training_mean"]["inside_mae_hole"] < sets["condition_t2"]["inside_mae_hole"]


def test_report_shows_conditions_beside_samples(folder, evaluation):
    html = (folder / "evaluation" / "report.html").read_text()
    page = Page(html)
    columns = [
        "sample",
        "sample with label",
        "sample with hole",
        "t2",
        "held-out volume",
        "nearest training volume",
        "difference",
    ]
    titles = [image["alt"].split(", ")[1] for image in page.images]
    assert titles == 3 * 3 * columns
    pictures = [Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) for image in page.images[:7]]
    assert [picture.mode for picture in pictures] == ["L", "RGB", "RGB", "L", "L", "L", "L"]
    coloured = np.ptp(np.asarray(pictures[2]), axis=-1) > 0
    assert coloured.sum() == 16 and pictures[2].size == SIZE[1:]  # the hole, where the slice crosses it
    assert "<dt>explained by label</dt>" in html and "t2 itself" in html


def test_picture_shows_label_maps_in_colour(folder, evaluation):
    picture = np.asarray(Image.open(folder / "evaluation" / "samples.png").convert("RGB")).astype(int)
    assert (np.ptp(picture, axis=-1) > 30).mean() > 0.005


def test_picture_shows_a_held_out_volume_once_though_more_samples_have_its_conditions(folder, tmp_path, monkeypatch):
    drawn: dict[str, torch.Tensor] = {}

    def draw(columns, spacing):
        drawn.update(columns)
        return draw_columns(columns, spacing)

    monkeypatch.setattr("scripts.evaluation.samples.sample_evaluation.draw_columns", draw)
    evaluate(folder, tmp_path, val_fraction=0.1, spatial_keys=["label"], num_samples=2, view_nearest=0)
    assert list(drawn) == ["sample 0", "sample with label 0", "held-out volume 0"]


def test_conditions_are_those_that_the_generator_has_unless_named(folder, tmp_path):
    found = [evaluating(folder, tmp_path, **keys) for keys in ({}, {"spatial_keys": []}, {"spatial_keys": ["hole"]})]
    given = [list(flow.parser.get_parsed_content("evaluation").kinds) for flow in found]
    assert given == [SPATIAL, [], ["hole"]]


def test_condition_that_the_generator_does_not_have_is_refused(folder, tmp_path):
    with pytest.raises(RuntimeError) as error:
        evaluate(folder, tmp_path, spatial_keys=["flair"])
    assert "`spatial_keys` names 'flair'; this generator has the spatial conditions label, t2, hole" in str(
        reason(error.value)
    )


def test_label_maps_of_other_classes_are_refused_and_missing_ones_noted(folder, evaluation, tmp_path):
    for path in (folder / "latents").rglob("*_latent.json"):
        description = json.loads(path.read_text())
        description["spatial"].pop("t2")
        description["spatial"]["label"]["kind"]["classes"] = [1, 3]
        (copy := tmp_path / "latents" / path.relative_to(folder / "latents")).parent.mkdir(parents=True)
        copy.write_text(json.dumps(description))
        for file in path.parent.glob("*.nii.gz"):
            (copy.parent / file.name).hardlink_to(file)
    keys = {"val_fraction": SHARE, "view_nearest": 0, "dataset_dir": tmp_path / "latents"}
    with pytest.raises(RuntimeError) as error:
        evaluate(folder, tmp_path / "evaluation", **keys)
    assert "'label' was encoded as" in str(reason(error.value)) and "classes=(1, 3)" in str(reason(error.value))
    evaluate(folder, tmp_path / "evaluation", spatial_keys=["t2"], **keys)
    found = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert any("2 of 2 held-out volumes do not have the spatial condition 't2'" in note for note in found["notes"])
    assert list(found["sets"]) == ["samples", "held_out", "training", "covariance_gaussian", "gaussian"]
    assert found["sets"]["held_out"]["nearest"] == evaluation["sets"]["held_out"]["nearest"]
    assert found["sets"]["samples"]["nearest"] != evaluation["sets"]["samples"]["nearest"]  # which have their conditions
