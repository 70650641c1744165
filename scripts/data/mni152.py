"""The MNI152 average brain that comes with nilearn: its T1 template, and maps of its tissues.

ICBM 2009a, Fonov et al., https://doi.org/10.1016/j.neuroimage.2010.07.033.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import DistanceTransformEDT, FillHoles

__all__ = ["as_uint8", "t1_template", "tissue_maps"]

SHELLS_MM = ((0.0, 2.0), (2.0, 7.0), (7.0, 12.0))  # outer CSF, skull, scalp: distance from the brain


def t1_template() -> nib.Nifti1Image:
    """The T1 template, which is for validation: 197x233x189 voxels of 1 mm, 0 to 255."""
    template = _nilearn_volume("t1")
    return as_uint8(template.get_fdata(), template.affine)


def tissue_maps() -> torch.Tensor:
    """Share of grey matter, white matter, inner CSF, outer CSF, skull and scalp in each voxel, 6x197x233x189."""
    grey, white = (torch.from_numpy(_nilearn_volume(t).get_fdata(dtype=np.float32) / 255) for t in ("gm", "wm"))
    brain = FillHoles()((grey + white > 0.2)[None].float())
    inner_csf = (brain[0] - grey - white).clamp(0, 1)
    distance = torch.as_tensor(DistanceTransformEDT()(1 - brain))[0]
    shells = [((distance > low) & (distance <= high)).float() for low, high in SHELLS_MM]
    return torch.stack([grey, white, inner_csf, *shells])


def as_uint8(volume: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """An image of a volume with values in [0, 255]."""
    return nib.Nifti1Image(np.clip(np.rint(volume), 0, 255).astype(np.uint8), affine)


def _nilearn_volume(tissue: str) -> Any:
    name = f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz"
    return nib.load(str(files("nilearn") / "datasets" / "data" / name))
