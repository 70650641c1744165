"""DICOM series and multi-frame files for tests, built slice by slice from a known volume and affine."""

from pathlib import Path

import numpy as np
import pydicom

SHAPE = (20, 24, 12)  # columns, rows, slices
VOLUME = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 997).astype(np.int16)
AXIAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]
TILTED = [1, 0, 0, 0, np.cos(np.radians(20)), -np.sin(np.radians(20))]
FIRST, STEP, SPACING = np.array([-10.0, -20.0, 30.0]), np.array([0.0, 0.0, 1.5]), [1.2, 0.8]  # of rows, then of columns
UID = "1.2.77"


def affine(orientation=AXIAL, step=STEP):
    lps = np.eye(4)
    lps[:3] = np.stack([np.array(orientation[:3]) * 0.8, np.array(orientation[3:]) * 1.2, step, FIRST], axis=1)
    return np.diag([-1, -1, 1, 1]) @ lps


def data_set(sop_class):
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = sop_class
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    image.SeriesInstanceUID, image.FrameOfReferenceUID, image.SeriesDescription = UID, "1.2.3", "T1 axial"
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 1
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    return image


def save_series(
    folder: Path, volume=VOLUME, change=None, slices=None, prefix="I", orientation=AXIAL, step=STEP, intercept=0
):
    """A file for each slice, named in the opposite order; ``change(image, k)`` edits each."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(volume.shape[2]) if slices is None else slices:
        image = data_set(pydicom.uid.CTImageStorage)
        image.InstanceNumber = k + 1
        image.ImagePositionPatient = [round(float(value), 6) for value in FIRST + k * step]
        image.ImageOrientationPatient = [round(float(value), 9) for value in orientation]
        image.PixelSpacing = SPACING
        image.Columns, image.Rows = volume.shape[:2]
        image.RescaleSlope, image.RescaleIntercept = 1, intercept
        image.PixelData = volume[:, :, k].T.astype("<i2").tobytes()
        if change is not None:
            change(image, k)
        image.save_as(folder / f"{prefix}{volume.shape[2] - 1 - k:03d}.dcm", enforce_file_format=True)


def save_multiframe(path: Path, order=range(SHAPE[2]), slope=lambda k: 1, orientation=lambda k: AXIAL):
    image = data_set(pydicom.uid.EnhancedMRImageStorage)
    image.NumberOfFrames, (image.Columns, image.Rows) = len(order), SHAPE[:2]

    def sequence(**values):
        item = pydicom.Dataset()
        item.update(values)
        return pydicom.Sequence([item])

    shared = {"PixelMeasuresSequence": sequence(PixelSpacing=SPACING, SliceThickness=9.0)}
    image.SharedFunctionalGroupsSequence = sequence(**shared)
    image.PerFrameFunctionalGroupsSequence = [
        sequence(
            PlanePositionSequence=sequence(ImagePositionPatient=[float(value) for value in FIRST + k * STEP]),
            PlaneOrientationSequence=sequence(ImageOrientationPatient=[float(value) for value in orientation(k)]),
            FrameContentSequence=sequence(StackID="1", InStackPositionNumber=k + 1),
            PixelValueTransformationSequence=sequence(RescaleSlope=slope(k), RescaleIntercept=0, RescaleType="US"),
        )[0]
        for k in order
    ]
    image.PixelData = np.stack([VOLUME[:, :, k].T for k in order]).astype("<i2").tobytes()
    image.save_as(path, enforce_file_format=True)
