"""What an evaluation writes: numbers for each volume that agree with each other, and a report that needs no other file."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts.bundle.files import file_hash
from scripts.bundle.weights import save_weights
from scripts.evaluation.reports import render
from tests.conftest import ROOT, head_like, save_volume

CONFIGS = ("configs/train.json", "configs/evaluate.json")
NETWORK = {"channels": [4, 8, 8], "latent_channels": 8, "device": "cpu", "num_workers": 0, "amp": False}
VALIDATION = ("a.nii.gz", "ct.nii.gz", "deep/<b>&.nii.gz")


def keys_of(folder: Path) -> dict[str, str]:
    return {key: str(folder / name) for key, name in (("dataset_dir", "in"), ("output_dir", "out"), ("ckpt_dir", "weights"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Volumes in ``in``, one of them in HU and one with a name that must be escaped in HTML; and ``weights``."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_volume(folder / "in" / "a.nii.gz", (24, 24, 24))
    save_volume(folder / "in" / "training.nii.gz", (16, 16, 16), seed=1)
    save_volume(folder / "in" / "deep" / "<b>&.nii.gz", (21, 26, 9), seed=2, affine=np.diag([1.0, 1.0, 3.0, 1.0]))
    hounsfield = nib.Nifti1Image(head_like((20, 18, 24), seed=3) - 1000, np.eye(4))
    nib.save(hounsfield, folder / "in" / "ct.nii.gz")
    lists = {"training": [{"image": "training.nii.gz"}], "validation": [{"image": name} for name in VALIDATION]}
    (folder / "in" / "dataset.json").write_text(json.dumps(lists))
    flow = ConfigWorkflow(str(ROOT / "configs/inference.json"), logging_file=False, bundle_root=str(ROOT), **NETWORK)
    torch.manual_seed(0)
    save_weights(flow.parser.get_parsed_content("network_def"), folder / "weights" / "model.pt")
    return folder


def metrics_of(volume: dict) -> dict[str, float | None]:
    return volume["metrics"]["reconstruction"]


def mean_of(evaluation: dict) -> dict[str, float | None]:
    return evaluation["codecs"]["reconstruction"]["mean"]


@pytest.fixture(scope="module")
def evaluated(folder) -> dict:
    """The content of ``metrics.json`` after a run in this process."""
    flow = ConfigWorkflow(
        [str(ROOT / name) for name in CONFIGS],
        workflow_type="train",
        run_id="evaluating",
        logging_file=False,
        bundle_root=str(ROOT),
        **keys_of(folder),
        **NETWORK,
    )
    flow.initialize()
    flow.run()
    flow.finalize()
    return json.loads((folder / "out/evaluation/metrics.json").read_text())


class Page(HTMLParser):
    """The references of a page, its ids, the cells of its table and its text; wrongly closed tags are an error."""

    VOID = ("meta", "img", "link", "br", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[dict[str, str | None]]] = []
        self.images: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.references += [values[name] or "" for name in ("src", "href", "action", "data", "srcset") if name in values]
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append(values)
        if tag == "img":
            self.images.append(values)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def alike(one: dict[str, float | None], other: dict[str, float | None]) -> bool:
    """Whether two have the same metrics, up to rounding."""
    defined = {name for name, value in one.items() if value is not None}
    assert one.keys() == other.keys() and defined == {name for name, value in other.items() if value is not None}
    return all(one[name] == pytest.approx(other[name], rel=1e-4) for name in defined)


@pytest.fixture(scope="module")
def report(folder, evaluated) -> str:
    return (folder / "out/evaluation/report.html").read_text()


def test_csv_and_json_have_the_same_numbers_and_the_json_their_means(folder, evaluated):
    rows = list(csv.DictReader((folder / "out/evaluation/metrics.csv").open()))
    assert [row.pop("volume") for row in rows] == list(VALIDATION) == list(evaluated["volumes"])
    metrics = {"psnr", "foreground_psnr", "edge_psnr", "ssim", "ms_ssim", "mae", "mae_file_units", "grid_energy"}
    metrics.add("image_grid_energy")
    assert metrics <= set(rows[0])
    for row, volume in zip(rows, evaluated["volumes"].values()):
        assert row.pop("codec") == "reconstruction"
        assert {name: float(value) if value else None for name, value in row.items()} == metrics_of(volume)
    for name in metrics - {"ms_ssim"}:
        found = [metrics_of(volume)[name] for volume in evaluated["volumes"].values()]
        defined = [value for value in found if value is not None]
        assert mean_of(evaluated)[name] == pytest.approx(np.mean(defined), rel=1e-5)
        assert len(defined) == (2 if name == "ssim" else 3)
    names = sorted(path.name for path in (folder / "out/evaluation").iterdir())
    assert names == ["metrics.csv", "metrics.json", "report.html"]


def test_volumes_too_small_for_a_metric_have_none(evaluated, report):
    assert [metrics_of(volume)["ssim"] is None for volume in evaluated["volumes"].values()] == [False, False, True]
    assert mean_of(evaluated)["ms_ssim"] is None
    assert all(metrics_of(volume)["ms_ssim"] is None for volume in evaluated["volumes"].values())
    assert "needs at least 176 voxels along each axis" in report


def test_error_in_the_units_of_the_file_is_that_of_its_window(folder, evaluated):
    ct = evaluated["volumes"]["ct.nii.gz"]
    voxels = nib.load(folder / "in" / "ct.nii.gz").get_fdata()
    assert [*ct["intensity_low"], *ct["intensity_high"]] == pytest.approx(np.percentile(voxels, [0, 99.9]), rel=1e-3)
    width = ct["intensity_high"][0] - ct["intensity_low"][0]
    assert width > 500
    assert metrics_of(ct)["mae_file_units"] == pytest.approx(width * metrics_of(ct)["mae"], rel=1e-4)


def test_report_needs_no_other_file_and_no_network(report):
    page = Page(report)
    assert page.references
    for reference in page.references:
        assert urlsplit(reference).scheme == "data" or reference.startswith("#"), reference
    assert "url(" not in report and "@import" not in report and "http://" not in report and "https://" not in report
    assert "default-src 'none'" in report  # the browser enforces it as well
    for reference in page.references:
        assert not reference.startswith("#") or reference[1:] in page.ids


def test_report_shows_the_worst_volume_first_in_three_planes(report, evaluated):
    page = Page(report)
    by_psnr = sorted(VALIDATION, key=lambda name: metrics_of(evaluated["volumes"][name])["psnr"])
    body = [row for row in page.rows if row and row[0].get("data-value") in VALIDATION]
    assert [row[0]["data-value"] for row in body] == by_psnr
    assert [float(row[2]["data-value"] or "nan") for row in body] == [
        metrics_of(evaluated["volumes"][name])["psnr"] for name in by_psnr
    ]
    assert report.index(f"<h3>{by_psnr[0]}".replace("<b>&", "&lt;b&gt;&amp;")) < report.index('id="case-2"')
    panels = [f"{plane}, {column}" for plane in ("sagittal", "coronal", "axial") for column in ("image", "reconstruction")]
    alternatives = [image["alt"] for image in page.images]
    assert len(alternatives) == 3 * 9 and set(panels) <= set(alternatives)


def test_report_says_what_was_evaluated(folder, report):
    text = " ".join(" ".join(Page(report).words).split()).replace("\N{MULTIPLICATION SIGN}", "x")
    assert file_hash(str(folder / "weights" / "model.pt")) in text
    for words in ("reconstruction 8 x 8 x 8 8 64", "latent_channels 8", "downsample_factors"):
        assert words in text, words
    assert "deep/<b>&.nii.gz" in text  # not as bold text
    assert "21 x 26 x 9 voxels of 1 x 1 x 3 mm" in text


def test_report_takes_a_metric_that_it_does_not_know(evaluated):
    new = {"new": 0.123456}
    volumes = {name: {**volume, "metrics": {"reconstruction": new}} for name, volume in evaluated["volumes"].items()}
    codecs = {"reconstruction": {**evaluated["codecs"]["reconstruction"], "mean": new}}
    evaluation = {**evaluated, "codecs": codecs, "volumes": volumes}
    report = render("report.html.jinja", evaluation=evaluation, order=list(volumes), pictures={}, views={})
    assert "new" in Page(report).words and "0.1235" in Page(report).words


def test_two_processes_measure_the_same_and_one_writes(folder, evaluated):
    out = folder / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "monai.bundle"]
    files = ["configs/train.json", "configs/multi_gpu_train.json", "configs/evaluate.json"]
    command += ["run", "evaluating", "--config_file", str(files), "--logging_file", "configs/logging.conf"]
    keys = {**keys_of(folder), **NETWORK, "output_dir": str(out), "validate#handlers#2#max_pictures": "1", "view_worst": "1"}
    del keys["device"]  # the overlay gives each process its own
    command += [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    assert process.stdout.count("report: ") == 1
    found = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert found["volumes"].keys() == evaluated["volumes"].keys()
    for name, volume in evaluated["volumes"].items():
        assert found["volumes"][name]["shape"] == volume["shape"]
        assert alike(metrics_of(found["volumes"][name]), metrics_of(volume))
    assert alike(mean_of(found), mean_of(evaluated))
    page = Page((out / "evaluation" / "report.html").read_text())
    assert page.ids.count("case-1") == 1 and "case-2" not in page.ids and len(page.images) == 9
