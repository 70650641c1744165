"""Values and affines of DICOM series and multi-frame files are those of their construction."""

import logging
import shutil

import numpy as np
import pytest

from scripts.data.dicom_series import read_dicom
from scripts.data.volume_checks import find_problem

pydicom = pytest.importorskip("pydicom")
from tests.dicom_files import AXIAL, SAGITTAL, SHAPE, TILTED, VOLUME, affine, data_set, save_multiframe, save_series  # noqa: E402


def is_volume(read, volume=VOLUME, expected=None):
    """Whether each voxel has its value at its place, and float32."""
    values, matrix = read
    np.testing.assert_allclose(values, volume, rtol=1e-6)
    np.testing.assert_allclose(matrix, affine() if expected is None else expected, atol=1e-4)
    return values.dtype == np.float32


def without(*names):
    def change(image, k):
        for name in names:
            delattr(image, name)

    return change


def setting(name, value):
    return lambda image, k: setattr(image, name, value(k) if callable(value) else value)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(setting("InstanceNumber", lambda k: (k * 5 + 3) % 12), id="random"),
        pytest.param(setting("InstanceNumber", 1), id="equal"),
        pytest.param(setting("InstanceNumber", ""), id="empty"),
        pytest.param(lambda image, k: delattr(image, "InstanceNumber") if k % 2 else None, id="missing"),
    ],
)
def test_slices_are_ordered_by_position_whatever_their_numbers(change, tmp_path):
    save_series(tmp_path, change=change)
    assert is_volume(read_dicom(str(tmp_path)))


def test_oblique_and_sagittal_series_have_their_affine(tmp_path):
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    for name, orientation, normal in (
        ("oblique", axes[:2].ravel(), np.cross(axes[0], axes[1])),
        ("sagittal", SAGITTAL, np.array([-1.0, 0, 0])),
    ):
        save_series(tmp_path / name, orientation=orientation, step=1.5 * normal)
        assert is_volume(read_dicom(str(tmp_path / name)), expected=affine(orientation, 1.5 * normal))


def test_gantry_tilt_keeps_its_sheared_affine(tmp_path):
    save_series(tmp_path / "series", orientation=TILTED)
    save_multiframe(tmp_path / "frames.dcm", orientation=lambda k: TILTED)
    for name in ("series", "frames.dcm"):
        assert is_volume(read_dicom(str(tmp_path / name)), expected=affine(TILTED))


def test_positions_rounded_by_a_scanner_are_one_spacing(tmp_path):
    save_series(
        tmp_path, change=lambda image, k: setattr(image, "ImagePositionPatient", [-10, -20, round(30 + 0.625 * k, 2)])
    )
    matrix = read_dicom(str(tmp_path))[1]
    assert np.isclose(np.linalg.norm(matrix[:3, 2]), 0.625, atol=1e-3)


def test_each_slice_has_its_rescale_slope_and_intercept(tmp_path):
    def change(image, k):
        image.RescaleSlope, image.RescaleIntercept = f"{1 + 0.37 * k:.2f}", -k

    save_series(tmp_path, change=change)
    k = np.arange(12)
    assert is_volume(read_dicom(str(tmp_path)), VOLUME * (1 + 0.37 * k) - k)


def test_values_are_stored_ones_rescaled_not_those_for_display(tmp_path):
    def change(image, k):
        image.PhotometricInterpretation, image.PresentationLUTShape = "MONOCHROME1", "INVERSE"
        image.WindowCenter, image.WindowWidth = 100, 10
        image.add_new((0x2005, 0x0010), "LO", "Philips MR Imaging DD 005")
        image.add_new((0x2005, 0x100E), "FL", 0.25)

    save_series(tmp_path, change=change)
    assert is_volume(read_dicom(str(tmp_path)))


def test_exact_duplicates_are_left_out_with_a_note(tmp_path, caplog):
    save_series(tmp_path)
    for name in ("I003", "I004", "I010"):
        shutil.copy(tmp_path / f"{name}.dcm", tmp_path / f"{name}(1).dcm")
    with caplog.at_level(logging.INFO):
        assert is_volume(read_dicom(str(tmp_path)))
    assert "left out 3 exact duplicates" in caplog.text


def test_what_is_no_image_is_left_out_and_counted(tmp_path, caplog):
    save_series(tmp_path)
    report = data_set(pydicom.uid.BasicTextSRStorage)
    report.save_as(tmp_path / "report.dcm", enforce_file_format=True)
    save_series(tmp_path, VOLUME > 500, slices=[3], prefix="S", change=setting("Modality", "SEG"))
    directory = data_set(pydicom.uid.MediaStorageDirectoryStorage)
    directory.DirectoryRecordSequence = []
    directory.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    (tmp_path / "notes.txt").write_text("no volume " * 50)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    save_series(tmp_path / "sub-folder", -VOLUME)
    with caplog.at_level(logging.INFO):
        for _ in range(2):  # epochs
            assert is_volume(read_dicom(str(tmp_path)))
    assert caplog.text.count("left out 5 files that hold no image") == 1


def test_folder_without_an_image_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no volume")
    with pytest.raises(ValueError, match=r"^holds no DICOM image \(1 other files\)"):
        read_dicom(str(tmp_path))


def test_several_series_are_refused_with_their_list(tmp_path):
    save_series(tmp_path)
    save_series(tmp_path, slices=range(5), prefix="J", change=setting("SeriesInstanceUID", "1.2.78"))
    with pytest.raises(ValueError) as refused:
        read_dicom(str(tmp_path))
    assert find_problem(str(tmp_path), 1) == str(refused.value)
    for words in (
        "1.2.77 'T1 axial', 12 axial slices",
        "1.2.78 'T1 axial', 5 axial slices",
        "folder of its own",
        "dcm2niix",
    ):
        assert words in str(refused.value)


@pytest.mark.parametrize("volume", [VOLUME[:, :, :3], VOLUME[:10, :12, :3]], ids=["same matrix", "other matrix"])
def test_localizer_of_the_same_series_is_named(volume, tmp_path):
    save_series(tmp_path)
    save_series(tmp_path, volume, prefix="L", orientation=SAGITTAL, step=np.array([10.0, 0, 0]))
    with pytest.raises(ValueError, match="holds 2 volumes.* 12 axial slices.* 3 sagittal slices of"):
        read_dicom(str(tmp_path))


def test_phases_of_a_series_are_refused_with_what_differs(tmp_path):
    save_series(tmp_path, change=setting("EchoTime", 4.6))
    save_series(tmp_path, VOLUME + 1, prefix="J", change=setting("EchoTime", 9.2))
    with pytest.raises(ValueError, match="24 slices lie at 12 positions, as several phases do.*dcm2niix"):
        read_dicom(str(tmp_path))


@pytest.mark.parametrize("slices", [[0, 1, 2, 3, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]])
def test_missing_slices_are_refused_with_the_positions_of_the_gap(slices, tmp_path):
    save_series(tmp_path / "series", slices=slices)
    save_multiframe(tmp_path / "frames.dcm", order=slices)
    gap = "4.5 mm between 34.5 and 39" if 4 not in slices else "3 mm between 43.5 and 46.5"
    for name in ("series", "frames.dcm"):
        with pytest.raises(ValueError, match=f"missing or not on one line: 1.5 mm apart along their normal, but {gap};"):
            read_dicom(str(tmp_path / name))


def test_slices_of_two_distances_and_slices_beside_their_line_are_refused(tmp_path):
    def far(image, k):
        image.ImagePositionPatient = [-10, -20, 30 + 1.5 * k + 3 * max(0, k - 6)]

    def aside(image, k):
        image.ImagePositionPatient = [-10 + 5 * (k == 4), -20, 30 + 1.5 * k]

    save_series(tmp_path / "far", change=far)
    with pytest.raises(ValueError, match="1.5 mm apart along their normal, but 4.5 mm between 39 and 43.5; "):
        read_dicom(str(tmp_path / "far"))
    save_series(tmp_path / "aside", change=aside)
    with pytest.raises(ValueError, match="not on one line"):
        read_dicom(str(tmp_path / "aside"))


def test_multiframe_has_its_geometry_and_the_slope_of_each_frame(tmp_path):
    order = [3, 0, 7, 11, 1, 2, 10, 9, 4, 8, 6, 5]
    save_multiframe(tmp_path / "frames.dcm", order, slope=lambda k: 1.0 + k)
    assert is_volume(read_dicom(str(tmp_path / "frames.dcm")), VOLUME * (1 + np.arange(12)))
    assert is_volume(read_dicom(str(tmp_path)), VOLUME * (1 + np.arange(12)))


def test_multiframe_of_several_phases_or_orientations_is_refused(tmp_path):
    save_multiframe(tmp_path / "phases.dcm", order=[*range(12), *range(12)])
    with pytest.raises(ValueError, match="24 slices lie at 12 positions"):
        read_dicom(str(tmp_path / "phases.dcm"))
    save_multiframe(tmp_path / "planes.dcm", orientation=lambda k: SAGITTAL if k > 8 else AXIAL)
    with pytest.raises(ValueError, match="frames of several orientations"):
        read_dicom(str(tmp_path / "planes.dcm"))
    with pytest.raises(ValueError, match="holds 2 volumes"):
        read_dicom(str(tmp_path))


@pytest.mark.parametrize("name", ["PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"])
def test_series_without_geometry_is_refused(name, tmp_path):
    save_series(tmp_path, change=without(name))
    with pytest.raises(ValueError, match=f"no {name}, so the geometry is unknown"):
        read_dicom(str(tmp_path))


def test_frames_without_functional_groups_are_refused(tmp_path):
    save_series(
        tmp_path, slices=[0], change=lambda image, k: image.update({"NumberOfFrames": 2, "PixelData": 2 * image.PixelData})
    )
    with pytest.raises(ValueError, match="2 axial slices.*: no ImagePositionPatient .* so the geometry is unknown"):
        read_dicom(str(tmp_path))


def test_series_of_one_slice_is_as_thick_as_its_slice(tmp_path):
    save_series(tmp_path / "thick", slices=[0], change=setting("SliceThickness", 1.5))
    assert is_volume(read_dicom(str(tmp_path / "thick")), VOLUME[:, :, :1])
    save_series(tmp_path / "unknown", slices=[0])
    with pytest.raises(ValueError, match="a slice without SliceThickness"):
        read_dicom(str(tmp_path / "unknown"))


def test_file_of_a_series_is_refused_in_favour_of_its_folder(tmp_path):
    save_series(tmp_path)
    with pytest.raises(ValueError, match='one slice of a series; give the folder .*"\\*\\*/"'):
        read_dicom(str(tmp_path / "I003.dcm"))


def test_mosaic_and_colour_are_refused_by_name(tmp_path):
    save_series(tmp_path / "mosaic", change=setting("ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]))
    with pytest.raises(ValueError, match="Siemens mosaic; convert it with dcm2niix"):
        read_dicom(str(tmp_path / "mosaic"))

    def colour(image, k):
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "RGB", 0
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
        image.PixelData = bytes(3 * SHAPE[0] * SHAPE[1])

    save_series(tmp_path / "colour", change=colour)
    with pytest.raises(ValueError, match="pixels of RGB; only gray values are read"):
        read_dicom(str(tmp_path / "colour"))


def test_brackets_in_the_name_missing_preamble_and_missing_references_do_not_matter(tmp_path):
    folder = tmp_path / "[PET] 3.000000-CT"
    save_series(folder, change=without("FrameOfReferenceUID", "SeriesInstanceUID"))
    for file in folder.iterdir():
        image = pydicom.dcmread(file)
        del image.file_meta
        image.preamble = None
        implicit = file.name > "I005"
        image.save_as(file, enforce_file_format=False, implicit_vr=implicit, little_endian=True)
        assert not pydicom.misc.is_dicom(file)
    assert is_volume(read_dicom(str(folder)))


def test_compressed_pixels_are_decoded(tmp_path):
    gdcm = pytest.importorskip("gdcm")
    for name in ("JPEGLosslessProcess14_1", "JPEG2000Lossless", "JPEGLSLossless", "RLELossless"):
        save_series(tmp_path / name)
        for file in (tmp_path / name).iterdir():
            reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
            reader.SetFileName(str(file))
            assert reader.Read()
            change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
            change.SetInput(reader.GetImage())
            assert change.Change()
            writer.SetFileName(str(file))
            writer.SetFile(reader.GetFile())
            writer.SetImage(change.GetOutput())
            assert writer.Write()
            assert pydicom.dcmread(file).file_meta.TransferSyntaxUID.is_compressed
        assert is_volume(read_dicom(str(tmp_path / name)))


def test_pixels_that_no_decoder_reads_and_files_cut_short_are_named(tmp_path):
    def change(image, k):
        image.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        image.PixelData = pydicom.encaps.encapsulate([bytes(10)])

    save_series(tmp_path / "coded", change=change)
    with pytest.raises(ValueError, match=r"I011.dcm cannot be decoded \(High-Throughput JPEG 2000"):
        read_dicom(str(tmp_path / "coded"))
    for size in (300, 20):
        save_series(tmp_path / "cut")
        file = tmp_path / "cut" / "I005.dcm"
        file.write_bytes(file.read_bytes()[:-size])
        with pytest.raises(ValueError, match=r"I005.dcm"):
            read_dicom(str(tmp_path / "cut"))
