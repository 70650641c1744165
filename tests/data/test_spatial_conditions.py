"""Label maps are encoded as planes; conditions lie on the grid of their volume, with values in a window of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, LoadImaged, Orientationd, Spacingd
from nibabel.processing import resample_from_to

from scripts.data import LoadSpatiald
from scripts.data.grids import Grid, on_grid, preprocessed_grid
from scripts.data.restored_volumes import record_of
from scripts.data.spatial_conditions import learn_kinds
from scripts.data.spatial_kinds import SpatialKind, labels_in
from tests.conftest import head_like

SHAPE = (14, 12, 10)
AFFINE = nib.affines.from_matvec(np.diag([1.0, 1.5, 2.0]), [-7.0, 3.0, 20.0])
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([1.2, 1.1, 0.9]), [-10.0, 0.0, 22.0])
CLASSES = (1, 2, 9)
LABELS = torch.tensor([0, 3, 7, 3, -2, 0]).reshape(1, 1, 1, 2, 3)


def test_label_map_has_a_plane_for_each_class():
    kind = SpatialKind((-2, 3, 7))
    planes = torch.cat(list(kind.planes(LABELS, "x")))
    assert planes.dtype == torch.float32 and kind.num_planes == 3
    assert kind.names == ["class -2", "class 3", "class 7"]
    assert planes.flatten(1).tolist() == [[0, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("count, planes", [(16, 16), (17, 5), (31, 5), (32, 6), (132, 8)])
def test_many_classes_share_planes_by_the_bits_of_their_numbers(count, planes):
    kind = SpatialKind(tuple(10 * n for n in range(1, count + 1)))
    assert kind.num_planes == planes
    labels = torch.tensor((0, *kind.classes), dtype=torch.int32).reshape(1, 1, 1, 1, -1)
    found = torch.cat(list(kind.planes(labels, "x"))).reshape(planes, -1)
    assert len({tuple(column) for column in found.T.tolist()}) == count + 1
    assert not found[:, 0].any()
    if planes < count:
        assert ((found.T.long() << torch.arange(planes)).sum(1) == torch.arange(count + 1)).all()


def test_bits_count_classes_in_order_with_labels_below_0():
    kind = SpatialKind((*range(-5, 0), *range(1, 15)))
    labels = torch.tensor([0, -5, 14]).reshape(1, 1, 1, 1, -1)
    found = torch.stack(list(kind.planes(labels, "x"))).reshape(kind.num_planes, -1).T.long()
    assert (found << torch.arange(kind.num_planes)).sum(1).tolist() == [0, 1, 19]


def test_image_is_its_only_plane():
    image = torch.rand(1, 2, 3, 4, 5)
    (plane,) = SpatialKind().planes(image, "x")
    assert torch.equal(plane, image) and SpatialKind().num_planes == 1


def test_label_that_is_no_class_is_refused_by_name():
    with pytest.raises(ValueError, match=r"mask.nii has labels that are not among .*: \[-2, 7\]; known are \[0, 3\]"):
        list(SpatialKind((3,)).planes(LABELS, "mask.nii"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_labels_are_integers_of_any_type(dtype):
    values = np.zeros((3, 4, 5), dtype)
    values[1], values[2, 1] = 4, 100
    assert labels_in(values) == [0, 4, 100]


@pytest.mark.parametrize("strange", [0.5, np.nan, np.inf, 1e30, 2.0**31])
def test_voxels_that_are_no_labels_are_refused(strange):
    values = np.zeros((3, 4, 5))
    values[1, 2, 3] = strange
    with pytest.raises(ValueError, match="is no label map: it has voxels of .*, and labels are integers"):
        labels_in(values)


def test_image_of_integers_is_no_label_map():
    with pytest.raises(ValueError, match="more than 1024 different values"):
        labels_in(np.arange(2000).reshape(2, 10, 100))


def labels(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    blocks = np.random.default_rng(seed).choice([0, *CLASSES], [-(-n // 3) for n in shape])
    return np.kron(blocks, np.ones((3, 3, 3)))[tuple(map(slice, shape))].astype(np.uint8)


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return str(path)


def reordered(values: np.ndarray, affine: np.ndarray, axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume with axes in another order and direction."""
    turned = nib.Nifti1Image(values, affine).as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axcodes))
    )
    return np.asarray(turned.dataobj), turned.affine


def image_of(path: str, spacing: float | None = None) -> Any:
    steps: list[Any] = [
        LoadImaged("image", reader="scripts.data.VolumeReader", ensure_channel_first=True),
        Orientationd("image", "RAS", labels=None),
        *([Spacingd("image", spacing)] if spacing else []),
    ]
    return Compose(steps)({"image": path})["image"]


def load(folder: Path, kinds: dict[str, SpatialKind], image: Any = None, **kwargs: Any) -> dict[str, Any]:
    """The conditions ``KEY.nii`` of a folder."""
    paths = {key: str(folder / f"{key}.nii") for key in kinds}
    return LoadSpatiald(kinds, str(folder), **kwargs)({"image": image, "spatial": paths})["spatial"]


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "SLA"])
def test_volume_on_the_same_grid_keeps_its_voxels_however_its_axes_run(tmp_path, axcodes):
    head, mask = head_like(SHAPE).astype(np.float32), labels()
    image = image_of(save(tmp_path / "image.nii", *reordered(head, AFFINE, "LSA")))
    save(tmp_path / "label.nii", *reordered(mask, AFFINE, axcodes))
    save(tmp_path / "t2.nii", *reordered(head, AFFINE, axcodes))
    found = load(tmp_path, {"label": SpatialKind(CLASSES), "t2": SpatialKind((), (0.0, 100.0))}, image)
    assert found["label"].dtype == torch.int32 and np.array_equal(found["label"][0], mask)
    expected = torch.from_numpy((head - head.min()) / (head.max() - head.min()))
    assert found["t2"].dtype == torch.float32 and torch.equal(found["t2"].as_tensor()[0], expected)
    assert all(np.array_equal(each.affine, image.affine) for each in found.values())


@pytest.mark.parametrize("affine", [OBLIQUE, nib.affines.from_matvec(np.diag([-2.0, 0.7, 1.3]), [8.3, 4.0, 19.0])])
def test_volume_on_another_grid_lands_where_nibabel_puts_it(tmp_path, affine):
    shape = (11, 20, 17)
    head = head_like(shape).astype(np.float32)
    image = image_of(save(tmp_path / "image.nii", head_like(SHAPE)))
    save(tmp_path / "label.nii", labels(shape), affine)
    save(tmp_path / "t2.nii", head, affine)
    found = load(tmp_path, {"label": SpatialKind(CLASSES), "t2": SpatialKind((), (0.0, 100.0))}, image)
    target = (SHAPE, AFFINE)
    inside = resample_from_to(nib.Nifti1Image(np.ones(shape), affine), target, order=1).get_fdata() == 1
    assert 0.2 < inside.mean() < 1
    mask = resample_from_to(nib.Nifti1Image(labels(shape), affine), target, order=0).get_fdata()
    assert np.array_equal(found["label"][0][inside], mask[inside])
    values = resample_from_to(nib.Nifti1Image((head - head.min()) / (head.max() - head.min()), affine), target, order=1)
    assert np.allclose(found["t2"][0][inside], values.get_fdata()[inside], atol=1e-5)
    outside = resample_from_to(nib.Nifti1Image(np.ones(shape), affine), target, order=0, mode="grid-constant")
    assert not found["label"][0][outside.get_fdata() == 0].any() and not found["t2"][0][outside.get_fdata() == 0].any()
    record: Any = record_of(found["label"])
    assert record.covered == pytest.approx(outside.get_fdata().mean(), abs=0.01)


def test_coarser_voxels_of_the_same_field_of_view_reach_its_border():
    fine = Grid((8, 8, 8), np.eye(4))
    coarse = nib.affines.from_matvec(np.diag([4.0, 2.0, 8.0]), [1.5, 0.5, 3.5])
    for nearest in (False, True):
        values, covered = on_grid(np.full((1, 2, 4, 1), 5, np.float32), coarse, fine, nearest)
        assert covered == 1 and (values == 5).all()


def test_grids_of_tiny_voxels_are_told_apart():
    volume = np.arange(1000, dtype=np.float32).reshape(1, 10, 10, 10)
    grid = Grid((10, 10, 10), np.diag([2e-3, 2e-3, 2e-3, 1]))
    assert on_grid(volume, np.diag([2.5e-3, 2e-3, 2e-3, 1]), grid)[0][0, 5, 0, 0] == pytest.approx(400)


def test_volume_elsewhere_is_refused_by_name(tmp_path):
    image = image_of(save(tmp_path / "image.nii", head_like(SHAPE)))
    far = AFFINE.copy()
    far[0, 3] += 40
    save(tmp_path / "label.nii", labels(), far)
    with pytest.raises(ValueError, match=r"label\.nii does not overlap the volume that it is a condition of"):
        load(tmp_path, {"label": SpatialKind(CLASSES)}, image)


@pytest.mark.parametrize("spacing", [None, 1.3])
def test_grid_of_a_file_is_that_of_its_preprocessed_image(tmp_path, spacing):
    path = save(tmp_path / "image.nii", *reordered(head_like(SHAPE), OBLIQUE, "PSL"))
    image, grid = image_of(path, spacing), preprocessed_grid(Grid((12, 10, 14), nib.load(path).affine), spacing)
    assert grid.shape == image.shape[1:] and np.allclose(grid.affine, image.affine, atol=1e-9)


def test_without_an_image_the_first_condition_gives_the_grid(tmp_path):
    save(tmp_path / "label.nii", *reordered(labels(), AFFINE, "LIP"))
    save(tmp_path / "t2.nii", head_like((9, 9, 9)), OBLIQUE)
    kinds = {"seg": SpatialKind((1,)), "label": SpatialKind(CLASSES), "t2": SpatialKind()}
    paths = {key: str(tmp_path / f"{key}.nii") for key in ("t2", "label")}
    found = LoadSpatiald(kinds, str(tmp_path))({"spatial": paths})["spatial"]
    assert list(found) == ["label", "t2"]
    assert np.array_equal(found["label"][0], labels()) and np.allclose(found["label"].affine, AFFINE)
    assert found["t2"].shape == found["label"].shape
    finer = LoadSpatiald(kinds, str(tmp_path), spacing=0.5)({"spatial": paths})["spatial"]
    assert np.allclose(nib.affines.voxel_sizes(finer["label"].affine.numpy()), 0.5)
    assert finer["t2"].shape == finer["label"].shape == (1, 27, 34, 37)


def test_image_has_a_window_of_its_own(tmp_path):
    head = head_like(SHAPE).astype(np.float32)
    image = image_of(save(tmp_path / "image.nii", head))
    save(tmp_path / "a.nii", 100 * head)
    save(tmp_path / "b.nii", 2 * head)
    found = load(tmp_path, {"a": SpatialKind((), (0.0, 100.0)), "b": SpatialKind((), intensity_range=(0.0, 4000.0))}, image)
    records: dict[str, Any] = {key: record_of(volume) for key, volume in found.items()}
    assert (records["a"].intensity_low, records["a"].intensity_high) == ((0.0,), (100 * head.max(),))
    assert (records["b"].intensity_low, records["b"].intensity_high) == ((0.0,), (4000.0,))
    assert torch.allclose(found["b"].as_tensor()[0], torch.from_numpy(head / 2000).clamp(0, 1))


def test_channels_are_one_or_those_of_the_network(tmp_path):
    image = image_of(save(tmp_path / "image.nii", np.stack([head_like(SHAPE)] * 3, -1)))
    save(tmp_path / "one.nii", head_like(SHAPE))
    save(tmp_path / "three.nii", np.stack([head_like(SHAPE, seed) for seed in range(3)], -1))
    found = load(tmp_path, {"one": SpatialKind(), "three": SpatialKind()}, image, image_channels=3)
    assert [len(volume) for volume in found.values()] == [1, 3]
    save(tmp_path / "two.nii", np.stack([head_like(SHAPE)] * 2, -1))
    with pytest.raises(ValueError, match=r"two\.nii has the shape .* and 3 channels"):
        load(tmp_path, {"two": SpatialKind()}, image, image_channels=3)


@pytest.mark.parametrize(
    "values, words",
    [
        (head_like(SHAPE) / 7.0, "is no label map: it has voxels of .*, and labels are integers"),
        (labels() * 2, r"has labels that are not among the classes: \[4, 18\]; known are \[0, 1, 2, 9\]"),
        (np.eye(4, dtype=np.uint8)[labels() % 4], "has 4 channels; a label map has one, with an integer for each class"),
    ],
    ids=["intensities", "other labels", "one-hot"],
)
@pytest.mark.parametrize("image_channels", [1, 4])
def test_what_is_no_label_map_of_the_classes_is_refused_by_name(tmp_path, values, words, image_channels):
    image = image_of(save(tmp_path / "image.nii", head_like(SHAPE)))
    save(tmp_path / "label.nii", values)
    with pytest.raises(ValueError, match=rf"label\.nii {words}"):
        load(tmp_path, {"label": SpatialKind(CLASSES)}, image, image_channels=image_channels)


def test_classes_are_those_of_all_label_maps_that_can_be_read(tmp_path, caplog):
    save(tmp_path / "a.nii", labels())
    save(tmp_path / "b.nii", np.full(SHAPE, 12, np.uint8))
    (tmp_path / "c.nii").write_text("no volume")
    save(tmp_path / "d.nii", np.eye(10, dtype=np.uint8)[labels()])
    items = [{"image": "", "spatial": {"seg": str(tmp_path / f"{name}.nii")}} for name in "abcd"]
    kinds = learn_kinds([*items, {"image": "", "spatial": {}}], ["seg", "t2"], ["seg"])
    assert kinds == {"seg": SpatialKind((*CLASSES, 12)), "t2": SpatialKind()}
    assert "c.nii cannot be read to its end" in caplog.text
    assert "d.nii has 10 channels; a label map has one" in caplog.text
    with pytest.raises(ValueError, match="the label maps 'seg' have 0 labels beside 0"):
        learn_kinds(items[2:], ["seg"], ["seg"])


def test_keys_of_kinds_are_among_the_spatial_keys():
    with pytest.raises(ValueError, match="`label_keys` has 'seg', which is not among `spatial_keys`"):
        learn_kinds([], ["t2"], ["seg"])
    with pytest.raises(ValueError, match="`spatial_ranges` has 't1'"):
        learn_kinds([], ["t2"], spatial_ranges={"t1": [0, 1]})
    with pytest.raises(ValueError, match="`intensity_range` is .* must be two numbers with the lower one first"):
        learn_kinds([], ["t2"], spatial_ranges={"t2": [3, 1]})
