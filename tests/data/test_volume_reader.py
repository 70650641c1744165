"""Every voxel of a file comes back where it was, whatever the header says, and the header comes back as it was."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import DataLoader, Dataset, decollate_batch
from monai.transforms import Compose, LoadImaged, Orientationd

from scripts.data import (
    DescribeSourced,
    LoadLatentd,
    RestoreVolumed,
    SaveImageOfRecordd,
    SaveLatentd,
    ScaleIntensityWindowd,
    VolumeReader,
)
from scripts.data.latents import without_whole_latents
from scripts.data.volume_checks import find_problem
from scripts.data.volume_reader import NiftiHeader, read_header, read_volume, state_of

VOXELS = np.random.default_rng(0).permutation(5 * 4 * 3).reshape(5, 4, 3).astype(np.int16)
SPACING = np.array([2.2, 1.8, 2.1])
QFORM = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.05, 0.09, -0.07) @ np.diag(SPACING), [-50.0, -70.0, -30.0])
RAW = ("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
RAW += ("srow_x", "srow_y", "srow_z", "xyzt_units")


def restore_and_save(key: str, output_dir: str, postfix: str) -> Compose:
    return Compose([RestoreVolumed(key), SaveImageOfRecordd(key, output_dir, postfix)])


class Identity:
    """A codec that returns its input."""

    def __init__(self) -> None:
        self.total_downsample_factor, self.shortcut = (1, 1, 1), None
        self.arguments = {
            **{"latent_channels": 1, "out_channels": 1, "spatial_dims": 3, "channels": [1], "initial_mode": "conv"},
            **{"downsample_factors": [], "initial_downsample_factor": [1, 1, 1]},
        }


def write(path: Path, data: np.ndarray, *, changed: dict[str, Any] | None = None, **forms: Any) -> Path:
    """A NIfTI file whose ``sform`` and ``qform`` are given as (affine, code), and further fields of its header."""
    header = nib.Nifti1Header(endianness=">" if data.dtype.byteorder == ">" else "<")
    header.set_data_dtype(data.dtype)
    image = nib.Nifti1Image(data, None, header)
    image.header.set_xyzt_units("mm", "sec")
    for name, (affine, code) in forms.items():
        getattr(image.header, f"set_{name}")(affine, code)
    for name, value in (changed or {}).items():
        image.header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def preprocessing(folder: Path) -> Compose:
    return Compose(
        [
            LoadImaged("image", reader=VolumeReader(), ensure_channel_first=True),
            Orientationd("image", "RAS", labels=None),
            ScaleIntensityWindowd("image", [0.0, 100.0]),
            DescribeSourced("image", str(folder)),
        ]
    )


def returned(path: Path, out: Path) -> list[Any]:
    """The file as it comes back from reconstructing, and from encoding and decoding."""
    item = preprocessing(path.parent)({"image": str(path)})
    restore_and_save("image", str(out / "reconstructed"), "x")(item)
    weights = out / "weights"
    weights.write_bytes(b"")
    SaveLatentd("image", str(out / "latents"), Identity(), str(weights), {})(item)
    latent = next((out / "latents").glob("*.nii.gz"))
    loaded = LoadLatentd("image", Identity(), str(weights), str(out / "latents"))({"image": str(latent)})
    restore_and_save("image", str(out / "decoded"), "x")(loaded)
    return [nib.load(next((out / kind).glob("*.nii.gz"))) for kind in ("reconstructed", "decoded")]


def assert_comes_back(path: Path, out: Path, affine: np.ndarray | None = None) -> None:
    before = nib.load(path)
    for after in returned(path, out):
        assert np.array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
        for name in RAW:
            assert np.array_equal(after.header[name], before.header[name], equal_nan=True), name
        assert np.allclose(NiftiHeader.of_file(after).affine, before.affine if affine is None else affine, atol=1e-5)


def sheared(affine: np.ndarray) -> np.ndarray:
    tilt = np.eye(4)
    tilt[1, 2] = np.tan(np.radians(20))
    return affine @ tilt


FLIPS = [signs for signs in itertools.product((1, -1), repeat=3)]
TURNS = {
    "none": np.eye(3),
    "small": QFORM[:3, :3] / SPACING,
    "axes": np.eye(3)[[2, 0, 1]],
    "45": nib.eulerangles.euler2mat(np.pi / 4),
}
PIXDIMS: dict[str, Any] = {"of the qform": None, "ones": [1, 1, 1], "zeros": [0, 0, 0], "twos": [2, 2, 2]}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("shear", [False, True])
def test_identity_codec_gives_back_every_voxel_and_the_header(tmp_path, turn, shear):
    sforms = {"rounded": lambda a: np.round(a, 3), "as the qform": lambda a: a}
    cases = itertools.product(FLIPS[::3], sforms, [(1, 1), (1, 0), (2, 4), (0, 1), (0, 0)], PIXDIMS)
    for i, (signs, kind, (sform_code, qform_code), pixdim) in enumerate(itertools.islice(cases, None, None, 7)):
        qform = nib.affines.from_matvec(TURNS[turn] @ np.diag(signs * SPACING), [-50.0, -70.0, -30.0])
        sform = sforms[kind](sheared(qform) if shear else qform)
        changed = {} if PIXDIMS[pixdim] is None else {"pixdim": [1, *PIXDIMS[pixdim], 2.5, 1, 1, 1]}
        path = write(
            tmp_path / f"{i}" / "a.nii.gz", VOXELS, qform=(qform, qform_code), sform=(sform, sform_code), changed=changed
        )
        assert_comes_back(path, tmp_path / f"{i}")


ROUNDED = np.array([[0.9379, 0, 0, -55], [0, 0.9379, 0, -70], [0, 0, 1.2, -30], [0, 0, 0, 1]])
TWO = np.diag([2.0, 2.0, 2.0, 1.0])
ROWS: dict[str, dict[str, Any]] = {
    "no qform, pixdim 1": {"sform": (QFORM, 1), "changed": {"pixdim": [1] * 8}},
    "no qform, pixdim 0": {"sform": (QFORM, 1), "changed": {"pixdim": [0] * 8}},
    "no qform, pixdim 2": {"sform": (QFORM, 1), "changed": {"pixdim": [1, 2, 2, 2, 1, 1, 1, 1]}},
    "sform of three digits": {"sform": (ROUNDED, 1), "changed": {"pixdim": [1, 0.9375, 0.9375, 1.2, 1, 1, 1, 1]}},
    "sform of other spacing": {"sform": (TWO @ np.diag([1, 1, 1.3335, 1]), 1), "qform": (TWO, 1)},
    "tilted, qform without": {"sform": (sheared(TWO), 1), "qform": (TWO, 1)},
    "tilted, no qform": {"sform": (sheared(TWO), 1), "qform": (TWO, 0)},
}


@pytest.mark.parametrize("row", ROWS)
def test_sform_places_the_voxels_where_its_code_is_set(tmp_path, row):
    path = write(tmp_path / "a.nii.gz", VOXELS, **ROWS[row])
    values, header = read_volume(str(path))
    assert np.allclose(header.affine, ROWS[row]["sform"][0], atol=1e-5)
    assert np.array_equal(values, VOXELS)
    assert_comes_back(path, tmp_path)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_unusable_sform_gives_way_to_the_qform_with_a_warning(tmp_path, caplog, value):
    unusable = {name: [value] * 4 for name in ("srow_x", "srow_y", "srow_z")}
    path = write(tmp_path / "a.nii.gz", VOXELS, qform=(QFORM, 1), changed={"sform_code": 1, **unusable})
    with caplog.at_level(logging.WARNING):
        assert np.allclose(read_volume(str(path), 1)[1].affine, QFORM, atol=1e-5)
        assert_comes_back(path, tmp_path, QFORM)
    assert [record.getMessage() for record in caplog.records if "its qform is used" in record.getMessage()]
    alone = write(tmp_path / "alone.nii.gz", VOXELS, changed={"sform_code": 1, **unusable})
    with pytest.raises(ValueError, match="alone.nii.gz has no orientation and spacing"):
        read_volume(str(alone))


def test_quaternion_that_is_no_rotation_does_not_matter_beside_an_sform(tmp_path, caplog):
    changed = {"quatern_b": 0.9, "quatern_c": 0.9, "qform_code": 1}
    path = write(tmp_path / "a.nii.gz", VOXELS, sform=(QFORM, 1), changed=changed)
    assert_comes_back(path, tmp_path)
    assert "no valid qform" in caplog.text


def test_sform_and_qform_that_disagree_are_noted_once(tmp_path, caplog):
    apart = write(tmp_path / "apart.nii.gz", VOXELS, sform=(sheared(QFORM), 1), qform=(QFORM, 1))
    alike = write(tmp_path / "alike.nii.gz", VOXELS, sform=(np.round(QFORM, 3), 1), qform=(QFORM, 1))
    shift = 2 * SPACING[1] * np.tan(np.radians(20)) / SPACING[1]  # the last slice, in voxels of the second axis
    with caplog.at_level(logging.WARNING):
        for path in (apart, alike, apart):
            assert find_problem(str(path), 1) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{apart} has an sform and a qform that are up to {shift:.3g} voxels apart; the sform is used"
    ]


def test_volume_that_was_read_by_another_affine_is_refused(tmp_path):
    path = write(tmp_path / "a.nii.gz", VOXELS, **ROWS["no qform, pixdim 1"])
    steps = list(preprocessing(tmp_path).transforms)
    steps[0] = LoadImaged("image", reader="NibabelReader", ensure_channel_first=True)  # takes the qform
    with pytest.raises(RuntimeError) as stopped:
        Compose(steps)({"image": str(path)})
    assert "was not read by scripts.data.VolumeReader" in str(stopped.value.__cause__)


def test_base_affine_without_sform_and_qform(tmp_path):
    path = write(tmp_path / "a.nii.gz", VOXELS, changed={"pixdim": [1, 2, 3, 4, 1, 1, 1, 1]})
    assert np.allclose(read_header(str(path)).affine, nib.load(path).affine)
    assert_comes_back(path, tmp_path)


@pytest.mark.parametrize("shape", [(5, 4, 3, 1), (5, 4, 3, 1, 1), (5, 4, 3)])
def test_trailing_axes_of_one_and_repetition_time_come_back(tmp_path, shape):
    changed = {"pixdim": [1, *SPACING, 2.5, 1, 1, 1]}
    path = write(tmp_path / "a.nii.gz", VOXELS.reshape(shape), sform=(QFORM, 1), qform=(QFORM, 1), changed=changed)
    assert find_problem(str(path), 1) is None
    assert_comes_back(path, tmp_path)
    assert all(after.shape == shape and after.header["pixdim"][4] == 2.5 for after in returned(path, tmp_path))


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 1, 1), (5, 1, 4)])
def test_slice_is_refused_however_its_axes_are_written(tmp_path, shape):
    path = write(tmp_path / "a.nii.gz", VOXELS[:, :, 0].reshape(shape), sform=(QFORM, 1))
    with pytest.raises(ValueError, match="a 2D slice"):
        read_volume(str(path), 1)


def test_channels_come_back_in_their_place(tmp_path):
    data = np.stack([VOXELS, VOXELS[::-1] + 100], axis=-1)[:, :, :, None]  # a vector, in NIfTI's fifth axis
    path = write(tmp_path / "a.nii.gz", data, sform=(sheared(QFORM), 1))
    assert read_volume(str(path))[0].shape == (5, 4, 3, 2)
    item = preprocessing(tmp_path)({"image": str(path)})
    restore_and_save("image", str(tmp_path), "x")(item)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "a_x.nii.gz").dataobj), data)


@pytest.mark.parametrize("data_type", ["u1", "i2", ">i2", "i4", "f4", ">f8"])
def test_record_travels_through_loaders_and_workers(tmp_path, data_type):
    data = VOXELS.astype(data_type)
    path = write(tmp_path / "a.nii.gz", data, sform=(QFORM, 1))
    loader = DataLoader(Dataset([{"image": str(path)}], preprocessing(tmp_path)), batch_size=1, num_workers=1)
    (item,) = decollate_batch(next(iter(loader)))
    restore_and_save("image", str(tmp_path), "x")(item)
    after = nib.load(tmp_path / "a_x.nii.gz")
    assert np.allclose(after.get_fdata(), VOXELS, rtol=1e-6) and after.header.get_data_dtype() == data.dtype


def test_largest_integers_of_64_bits_do_not_wrap_around(tmp_path):
    data = VOXELS.astype(np.int64) << 56
    data.flat[data.argmax()] = np.iinfo(np.int64).max
    path = write(tmp_path / "a.nii.gz", data, sform=(QFORM, 1))
    restore_and_save("image", str(tmp_path), "x")(preprocessing(tmp_path)({"image": str(path)}))
    after = np.asarray(nib.load(tmp_path / "a_x.nii.gz").dataobj)
    assert np.corrcoef(after.ravel(), data.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".hdr", ".img", ".mgz", ".mgh"])
def test_formats_that_nibabel_reads(tmp_path, ending):
    kind = nib.MGHImage if ".mg" in ending else nib.Nifti1Pair if ending in (".hdr", ".img") else nib.Nifti1Image
    path = tmp_path / f"a{ending}"
    nib.save(kind(VOXELS, QFORM), path)
    values, affine = VolumeReader(1).get_data(str(path))[0], read_header(str(path)).affine
    assert np.array_equal(values, VOXELS) and np.allclose(affine, QFORM, atol=1e-5)
    restore_and_save("image", str(tmp_path / "out"), "x")(preprocessing(tmp_path)({"image": str(path)}))
    after = nib.load(next((tmp_path / "out").glob("*.nii.gz")))
    assert np.allclose(after.get_fdata(), VOXELS, rtol=1e-6) and np.allclose(after.affine, QFORM, atol=1e-5)


@pytest.mark.parametrize("channels_first", [False, True])
def test_nrrd_with_space_directions(tmp_path, channels_first):
    nrrd = pytest.importorskip("nrrd")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ sheared(QFORM)
    for name, affine in (("left-posterior-superior", lps), ("RAS", sheared(QFORM))):
        directions, data = list(affine[:3, :3].T), VOXELS
        if channels_first:
            directions, data = [np.full(3, np.nan), *directions], np.stack([VOXELS, VOXELS + 60])
        path = tmp_path / f"{name}.nrrd"
        header = {"space": name, "space directions": np.array(directions), "space origin": affine[:3, 3]}
        nrrd.write(str(path), data, header)
        values, found = read_volume(str(path))
        assert np.allclose(found.affine, sheared(QFORM), atol=1e-5)
        assert np.array_equal(values[..., 0] if channels_first else values, VOXELS)


def test_analyze_does_not_say_where_left_is_but_a_matrix_of_spm_does(tmp_path, caplog):
    nib.save(nib.Spm99AnalyzeImage(VOXELS, QFORM), tmp_path / "b.hdr")
    assert np.allclose(read_volume(str(tmp_path / "b.hdr"))[1].affine, QFORM, atol=1e-5)
    assert not caplog.text
    nib.save(nib.AnalyzeImage(VOXELS, None), tmp_path / "a.hdr")
    read_volume(str(tmp_path / "a.hdr"))
    assert "from right to left" in caplog.text


@pytest.mark.parametrize(("unit", "millimetres"), [("meter", 1000), ("micron", 0.001), ("mm", 1), ("unknown", 1)])
@pytest.mark.parametrize("codes", [(1, 1), (0, 1), (0, 0)])
def test_lengths_are_converted_to_mm_and_come_back_in_the_unit_of_the_file(tmp_path, unit, millimetres, codes):
    in_units = np.diag([*3 * [1 / millimetres], 1.0]) @ QFORM
    changed = {"xyzt_units": nib.nifti1.unit_codes[unit] + nib.nifti1.unit_codes["sec"]}
    path = write(tmp_path / "a.nii.gz", VOXELS, qform=(in_units, codes[1]), sform=(in_units, codes[0]), changed=changed)
    lengths = np.linalg.norm(read_header(str(path)).affine[:3, :3], axis=0)
    assert np.allclose(lengths, SPACING, rtol=1e-5)
    assert_comes_back(path, tmp_path, read_header(str(path)).affine)
    latent = nib.load(next((tmp_path / "latents").glob("*.nii.gz")))
    assert latent.header["xyzt_units"] % 8 == changed["xyzt_units"] % 8
    assert np.allclose(np.sort(latent.header.get_zooms()[:3]), np.sort(SPACING / millimetres), rtol=1e-5)


def test_nrrd_units(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    header = {"space": "RAS", "space directions": 1000 * QFORM[:3, :3].T, "space origin": 1000 * QFORM[:3, 3]}
    nrrd.write(str(tmp_path / "a.nrrd"), VOXELS, {**header, "space units": 3 * ["microns"]})
    assert np.allclose(read_volume(str(tmp_path / "a.nrrd"))[1].affine, QFORM, atol=1e-5)
    nrrd.write(str(tmp_path / "b.nrrd"), VOXELS, {**header, "space units": 3 * ["pixel"]})
    assert "`space units` ['pixel']" in str(find_problem(str(tmp_path / "b.nrrd"), 1))


def test_formats_without_orientation_or_reader_are_refused_by_name(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    nrrd.write(str(tmp_path / "a.nrrd"), VOXELS, {"spacings": [1, 1, 1]})
    (tmp_path / "a.mha").write_bytes(b"ObjectType = Image")
    assert "has the `space` None" in str(find_problem(str(tmp_path / "a.nrrd"), 1))
    assert "holds no DICOM image" in str(find_problem(str(tmp_path / "a.mha"), 1))


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz"])
def test_wrong_checksum_is_found(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    noise = np.random.default_rng(0).integers(0, 1000, (32, 32, 32)).astype(np.int16)
    nib.save((nib.MGHImage if ending == ".mgz" else nib.Nifti1Image)(noise, QFORM), path)
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
    assert nib.load(path).get_fdata().shape == noise.shape  # nibabel does not see it
    assert "CRC" in str(find_problem(str(path), 1))
    with pytest.raises(ValueError, match="CRC"):
        read_volume(str(path))


@pytest.mark.parametrize("slope", [0.5, -2.0, 1e-36])
def test_intensity_scale_of_any_size_comes_back(tmp_path, slope):
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(VOXELS, QFORM)
    image.header.set_slope_inter(slope, 0)
    nib.save(image, path)
    before = nib.load(path)
    for after in returned(path, tmp_path):
        assert np.array_equal(after.dataobj.get_unscaled(), VOXELS)
        assert after.dataobj.slope == before.dataobj.slope


def test_intensity_scale_that_could_not_be_decoded_is_refused_before_encoding(tmp_path):
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(VOXELS, QFORM)
    image.header.set_slope_inter(1e-40, 0)
    nib.save(image, path)
    with pytest.raises(RuntimeError) as stopped:
        preprocessing(tmp_path)({"image": str(path)})
    assert "are no window" in str(stopped.value.__cause__)


def test_control_character_in_a_name_is_the_problem_of_that_file_alone(tmp_path):
    path = write(tmp_path / "a\x07.nii", VOXELS, sform=(QFORM, 1))
    items = [{"image": str(path)}]
    assert without_whole_latents(items, str(tmp_path), str(tmp_path / "out"), str(path), {}, {}) == items
    with pytest.raises(RuntimeError) as stopped:
        preprocessing(tmp_path)(items[0])
    assert "`source` is" in str(stopped.value.__cause__)


def test_state_tells_a_replaced_file_also_by_an_older_one_and_in_a_folder(tmp_path):
    path = write(tmp_path / "series" / "slice.nii", VOXELS, sform=(QFORM, 1))
    write(tmp_path / "series" / "other.nii", VOXELS, sform=(QFORM, 1))
    for volume in (path, path.parent):
        before = state_of(str(volume))
        assert state_of(str(volume)) == before
        time = path.stat().st_mtime_ns
        os.utime(path, ns=(time - 10**12, time - 10**12))
        assert state_of(str(volume)) != before
        os.utime(path, ns=(time, time))
        assert state_of(str(volume)) == before
    pair = tmp_path / "pair.hdr"
    nib.save(nib.Nifti1Pair(VOXELS, QFORM), pair)
    before = state_of(str(pair))
    os.utime(pair.with_suffix(".img"), ns=(0, 0))
    assert state_of(str(pair)) != before
