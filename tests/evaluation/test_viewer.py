"""The viewer of the report: every slice in three planes, linked, and the values of the file under the cursor."""

from __future__ import annotations

import base64
import itertools
import json
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events

from scripts.bundle.errors import reason
from scripts.evaluation.codec_evaluation import EvaluationSaver
from scripts.evaluation.pictures import panels_of
from scripts.evaluation.reports import render
from scripts.evaluation.viewer import view_of
from tests.conftest import head_like, save_volume
from tests.diffusion.runs import AUTOENCODER, make_weights, workflow

viewer_page = pytest.importorskip("tests.evaluation.viewer_page", reason="needs selenium")
PLANES = viewer_page.PLANES
TITLES = ("image", "reconstruction", "error")
TILTED = np.array([[0, -2.0, 0, 30], [-1.0, 0, 0, 20], [0, 0, 1.5, -10], [0, 0, 0, 1]])  # axes swapped and mirrored
SHAPE = (18, 25, 14)  # of the file with this affine
VIEWED, LARGE, WITHOUT = "viewed.nii.gz", "large.nii.gz", "without.nii.gz"
MAX_VOXELS = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three validation volumes; two are named for the viewer, of which one is larger than it takes."""
    folder = tmp_path_factory.mktemp("viewer")
    save_volume(folder / "in" / VIEWED, SHAPE, affine=TILTED)
    save_volume(folder / "in" / WITHOUT, (16, 16, 16), seed=1)
    noise = np.random.default_rng(0).normal(0, 300, (26, 24, 22))
    nib.save(nib.Nifti1Image((head_like(noise.shape, seed=2) + noise).astype(np.float32), np.eye(4)), folder / "in" / LARGE)
    save_volume(folder / "in" / "training.nii.gz", (16, 16, 16), seed=3)
    validation = [{"image": name} for name in (VIEWED, WITHOUT, LARGE)]
    lists = {"training": [{"image": "training.nii.gz"}], "validation": validation}
    (folder / "in" / "dataset.json").write_text(json.dumps(lists))
    make_weights(folder / "weights")
    return folder


def evaluating(folder: Path, output_dir: Path, **keys):
    paths = {"dataset_dir": folder / "in", "output_dir": output_dir, "ckpt_dir": folder / "weights"}
    keys = {**AUTOENCODER, "view_worst": 0, "view_volumes": [VIEWED, LARGE], "view_max_voxels": MAX_VOXELS, **keys}
    return workflow(("train.json", "evaluate.json"), "evaluating", "train", **paths, **keys)


@pytest.fixture(scope="module")
def reconstructions(folder) -> dict[str, np.ndarray]:
    """What the evaluation compares with the images, in the units of the file; it leaves a report in ``folder/out``."""
    flow = evaluating(folder, folder / "out")
    found = {}

    def keep(engine) -> None:
        image, pred = (engine.state.output[0][key] for key in ("image", "pred"))
        found[Path(image.meta["filename_or_obj"]).name] = pred[0].numpy().copy()

    flow.parser.get_parsed_content("validate#evaluator").add_event_handler(Events.ITERATION_COMPLETED, keep)
    flow.run()
    volumes = json.loads((folder / "out/evaluation/metrics.json").read_text())["volumes"]
    windows = {name: (volumes[name]["intensity_low"][0], volumes[name]["intensity_high"][0]) for name in found}
    return {name: low + (high - low) * found[name] for name, (low, high) in windows.items()}


@pytest.fixture(scope="module")
def report(folder, reconstructions) -> Path:
    return folder / "out/evaluation/report.html"


@pytest.fixture
def open_viewer(browser, report):
    """Opens the report and the viewer of a volume."""

    def opened(name: str) -> viewer_page.ViewerPage:
        viewer_page.open_page(browser, report)
        return viewer_page.ViewerPage(browser, name)

    return opened


def window_of(report: Path, name: str) -> tuple[float, float]:
    volume = json.loads(report.with_name("metrics.json").read_text())["volumes"][name]
    return volume["intensity_low"][0], volume["intensity_high"][0]


def at_mm(path: Path, place: list[float]) -> float:
    """The value that a file has at a place."""
    image = nib.load(path)
    index = np.linalg.solve(image.affine, [*place, 1])[:3]
    assert np.allclose(index, index.round(), atol=0.1)
    return float(image.get_fdata()[tuple(index.round().astype(int))])


@pytest.mark.parametrize("name, zooms", [(VIEWED, (1, 4)), (LARGE, (3,))])
def test_value_under_the_cursor_is_that_of_the_file(folder, open_viewer, report, reconstructions, name, zooms):
    viewer = open_viewer(name)
    low, high = window_of(report, name)
    step = (high - low) / 255
    rounding = 0.51 * step
    viewer.set("crosshair", False)
    seen = set()
    for zoom, plane, shares in itertools.product(zooms, PLANES, ((0.52, 0.53), (0.31, 0.62))):
        viewer.set("zoom", zoom)
        brightness = viewer.point_at(plane, "image", shares)
        told = viewer.told()
        value = np.clip(at_mm(folder / "in" / name, told["mm"]), low, high)
        assert told["image"][0] == pytest.approx(value, abs=rounding)
        assert low + brightness * step == pytest.approx(value, abs=rounding)  # what is seen there
        reconstruction = reconstructions[name][tuple(int(index) for index in told["voxel"])]
        assert told["reconstruction"][0] == pytest.approx(reconstruction, abs=rounding)
        assert told["error"][0] == pytest.approx(reconstruction - value, abs=2 * rounding)
        seen.add(told["image"][0])
    assert len(seen) > 2


def slices(viewer, reconstruction: np.ndarray, image: np.ndarray, low: float, high: float) -> None:
    """All nine pictures are slices through the same voxel."""
    levels = [np.rint(255 * (np.clip(v, low, high) - low) / (high - low)) for v in (image, reconstruction)]
    expected = [*levels, np.clip(5 * abs(levels[1] - levels[0]), 0, 255)]
    pictures = viewer.pictures()
    assert len(pictures) == 9
    for axis, plane in enumerate(PLANES):
        for title, volume in zip(TITLES, expected):
            difference = abs(pictures[f"{plane}, {title}"] - volume.take(viewer.position[axis], axis))
            assert difference.max() <= (5 if title == "error" else 1), (plane, title)  # a level, where rounding is a tie
            assert difference.mean() < 0.1


def test_planes_stay_linked_whatever_moves_them(folder, open_viewer, report, reconstructions):
    viewer = open_viewer(VIEWED)
    low, high = window_of(report, VIEWED)
    image = nib.as_closest_canonical(nib.load(folder / "in" / VIEWED)).get_fdata()
    check = lambda: slices(viewer, reconstructions[VIEWED], image, low, high)  # noqa: E731
    shape = image.shape
    start = viewer.position
    assert start == [int(0.45 * size) for size in shape]
    check()
    viewer.turn_wheel("axial", "error", 3)
    assert viewer.position == [start[0], start[1], start[2] + 3]
    check()
    viewer.turn_wheel("coronal", "image", -2)
    assert viewer.position == [start[0], start[1] - 2, start[2] + 3]
    check()
    viewer.point_at("sagittal", "reconstruction", [0.21, 0.81], click=True)
    assert viewer.position == [start[0], int(0.21 * shape[1]), int(0.81 * shape[2])]
    assert viewer.told()["voxel"] == viewer.position
    check()
    viewer.press(viewer_page.Keys.PAGE_UP)  # of the picture that was clicked
    viewer.press(viewer_page.Keys.ARROW_LEFT)
    viewer.press(viewer_page.Keys.ARROW_UP)
    assert viewer.position == [start[0] + 1, int(0.21 * shape[1]) - 1, int(0.81 * shape[2]) + 1]
    check()
    viewer.press(viewer_page.Keys.ARROW_RIGHT, "coronal")  # of the slider
    assert viewer.position[1] == int(0.21 * shape[1])
    check()
    viewer.turn_wheel("axial", "image", 5)
    assert viewer.position[2] == shape[2] - 1  # and no further
    check()


def test_page_scrolls_while_the_viewer_has_no_focus(browser, open_viewer):
    viewer = open_viewer(VIEWED)
    position = viewer.position
    browser.execute_script("document.activeElement.blur()")
    viewer.point_at("axial", "image", (0.5, 0.5))
    before = browser.execute_script("return window.scrollY")
    viewer.turn_wheel("axial", "image", 2)
    viewer_page.WebDriverWait(browser, 20).until(lambda _: browser.execute_script("return window.scrollY") < before)
    assert viewer.position == position


def test_window_and_gain_are_adjustable(open_viewer, report):
    viewer = open_viewer(VIEWED)
    low, high = window_of(report, VIEWED)
    image, error = (viewer.pictures()[f"axial, {title}"] for title in ("image", "error"))
    level, width, gain = low + 0.6 * (high - low), 0.5 * (high - low), 2
    for name, value in (("level", level), ("width", width), ("gain", gain)):
        viewer.set(name, value)
    expected = np.clip(255 * ((low + image * (high - low) / 255 - level) / width + 0.5), 0, 255)
    pictures = viewer.pictures()
    assert abs(pictures["axial, image"] - expected).max() <= 1
    assert len(np.unique(expected)) > 10 and abs(expected - image).max() > 30
    unclipped = error < 255
    assert np.array_equal(pictures["axial, error"][unclipped], error[unclipped] * gain / 5)
    assert (error[unclipped] > 0).any()
    viewer.reset()
    assert np.array_equal(viewer.pictures()["axial, image"], image)


def test_large_volume_is_shown_in_part_at_full_resolution(folder, open_viewer, report, reconstructions):
    viewer = open_viewer(LARGE)
    image = nib.load(folder / "in" / LARGE).get_fdata()
    pictures = viewer.pictures()
    axial = pictures["axial, image"]
    (width, height), (_, depth) = axial.shape, pictures["coronal, image"].shape
    assert 0.8 * MAX_VOXELS < width * height * depth <= MAX_VOXELS < image.size
    text = viewer.element.text
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, (width, height, depth)))
    assert f"{shape} voxels from voxel" in text and "view_max_voxels" in text
    low, high = window_of(report, LARGE)
    start = [viewer.minimum(plane) for plane in PLANES]
    part = image[start[0] : start[0] + width, start[1] : start[1] + height, viewer.position[2]]
    assert abs(axial - 255 * (np.clip(part, low, high) - low) / (high - low)).max() <= 0.51


def test_report_loads_nothing_and_reports_no_error(browser, open_viewer, report):
    viewer = open_viewer(VIEWED)
    assert viewer.told()["voxel"] == viewer.position
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in loaded)
    assert browser.get_log("browser") == []
    assert len(browser.find_elements(viewer_page.By.CSS_SELECTOR, ".viewer")) == 2  # those that are named


def test_a_single_volume_is_shown_without_a_difference(browser, folder, report, tmp_path):
    evaluation = json.loads(report.with_name("metrics.json").read_text())
    volumes = {"sample": torch.rand(8, 9, 10, generator=torch.manual_seed(0))}
    view = view_of(volumes, "difference", np.diag([1.0, 2.0, 3.0, 1.0]).tolist())
    page = tmp_path / "page.html"
    shown = {"pictures": {VIEWED: panels_of(volumes)}, "views": {VIEWED: view}, "order": [VIEWED]}
    page.write_text(render("report.html.jinja", evaluation=evaluation, **shown))
    viewer_page.open_page(browser, page)
    viewer = viewer_page.ViewerPage(browser, VIEWED)
    viewer.point_at("coronal", "sample", (0.3, 0.7))
    told = viewer.told()
    assert list(told) == ["voxel", "mm", "sample"] and told["voxel"] == [2, 4, 7] and told["mm"] == [2, 8, 21]
    assert told["sample"][0] == pytest.approx(float(volumes["sample"][2, 4, 7]), abs=0.0026)


def test_packed_levels_are_those_of_the_volume():
    volume = torch.rand(5, 6, 7, generator=torch.manual_seed(0))
    view = view_of({"a": volume}, "", np.eye(4).tolist())
    packed = np.frombuffer(zlib.decompress(base64.b64decode(view["voxels"][0])), np.uint8).reshape(7, 6, 5)
    levels = packed.cumsum(2, dtype=np.uint8).cumsum(1, dtype=np.uint8).transpose(2, 1, 0)
    assert abs(levels / 255 - volume.numpy()).max() <= 0.5 / 255 + 1e-6


def test_part_is_where_volumes_differ_most():
    image = torch.rand(40, 30, 20, generator=torch.manual_seed(0))
    other = image.clone()
    other[30:36, 2:6, 10:14] += 0.5
    view = view_of({"a": image, "b": other}, "difference", np.eye(4).tolist(), max_voxels=1000)
    assert view["about"]["shape"] == [10, 10, 10] and view["whole"] == [40, 30, 20]
    for start, (first, last) in zip(view["about"]["start"], ((30, 36), (2, 6), (10, 14))):
        assert start <= first and last <= start + 10
    assert view_of({"a": image}, "", np.eye(4).tolist(), max_voxels=40 * 30 * 20)["about"]["shape"] == [40, 30, 20]


def test_worst_and_named_volumes_are_shown():
    saver, other = (EvaluationSaver("", "", {}, {}, view_volumes=names) for names in (["named"], []))
    saver.errors = other.errors = {"b": 2.0, "named": 0.0, "a": 1.0, "d": 4.0, "c": 3.0}
    assert list(saver._worst(saver.errors, 2)) == ["d", "c", "named"]
    assert saver._worst({"a": "picture", "c": "another"}, 2) == {"c": "another"}
    assert other._worst(other.errors, 0) == {}


def test_name_that_no_volume_has_is_refused_before_the_first_volume(folder, tmp_path):
    with pytest.raises(RuntimeError) as error:
        evaluating(folder, tmp_path, view_volumes=["viewd.nii.gz"]).run()
    assert "`view_volumes` names viewd.nii.gz;" in str(reason(error.value))
