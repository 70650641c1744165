"""Sample volumes that need no download: heads of varied contrast and anatomy, synthesised from the MNI152 tissue maps that
come with nilearn, for training; the MNI152 T1 template, which training never sees, for validation.

All of it is the same average brain (ICBM 2009a, Fonov et al., https://doi.org/10.1016/j.neuroimage.2010.07.033), so it shows
that the pipelines work and says nothing about how well a network does on patients.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import (
    Compose,
    DistanceTransformEDT,
    FillHoles,
    Rand3DElastic,
    RandBiasField,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandGibbsNoise,
)

from scripts.bundle.progress import ProgressBar

__all__ = ["prepare_sample_volumes", "t1_template"]

NUM_TRAINING_VOLUMES = 8
SHELLS_MM = ((0.0, 2.0), (2.0, 7.0), (7.0, 12.0))  # outer CSF, skull, scalp: distance from the brain
logger = logging.getLogger(__name__)


def prepare_sample_volumes(folder: str) -> str:
    """
    Write the sample volumes below ``folder``, unless they are there.

    Args:
        folder: where to put them. It appears only when it is complete.

    Returns:
        ``folder``, which then holds ``dataset.json`` (Medical Segmentation Decathlon format), 8 training volumes and
        one validation volume of 197x233x189 voxels at 1 mm.
    """
    target = Path(folder)
    if (target / "dataset.json").is_file():
        return folder
    unfinished = target.with_name(f"{target.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    logger.info(f"preparing the sample volumes in {target}")

    names = [f"synthetic_{i:02d}.nii.gz" for i in range(NUM_TRAINING_VOLUMES)]
    bar = ProgressBar(names, desc="sample volumes", unit="volume")  # the tissues take long too
    template = t1_template()
    _save(template, unfinished / "validation" / "mni152_t1.nii.gz")
    tissues = _tissue_maps()
    for seed, name in enumerate(bar):
        _save(_as_uint8(_synthesise_head(tissues, seed), template.affine), unfinished / "training" / name)

    (unfinished / "dataset.json").write_text(
        json.dumps(
            {
                "name": "MNI152 sample",
                "description": "synthetic heads for training, the ICBM 2009a T1 template for validation",
                "modality": {"0": "MRI"},
                "training": [{"image": f"training/{name}"} for name in names],
                "validation": [{"image": "validation/mni152_t1.nii.gz"}],
            },
            indent=2,
        )
    )
    try:
        unfinished.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
        if not (target / "dataset.json").is_file():
            raise
    return folder


def t1_template() -> nib.Nifti1Image:
    """The ICBM 2009a T1 template, which is for validation: 197x233x189 voxels of 1 mm, 0 to 255."""
    template = _nilearn_volume("t1")
    return _as_uint8(template.get_fdata(), template.affine)


def _nilearn_volume(tissue: str) -> Any:
    name = f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz"
    return nib.load(str(files("nilearn") / "datasets" / "data" / name))


def _as_uint8(volume: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(np.clip(np.rint(volume), 0, 255).astype(np.uint8), affine)


def _save(image: nib.Nifti1Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(image, path)


def _tissue_maps() -> torch.Tensor:
    """Share of grey matter, white matter, inner CSF, outer CSF, skull and scalp in each voxel, 6x197x233x189."""
    grey, white = (torch.from_numpy(_nilearn_volume(t).get_fdata(dtype=np.float32) / 255) for t in ("gm", "wm"))
    brain = FillHoles()((grey + white > 0.2)[None].float())
    inner_csf = (brain[0] - grey - white).clamp(0, 1)
    distance = torch.as_tensor(DistanceTransformEDT()(1 - brain))[0]
    shells = [((distance > low) & (distance <= high)).float() for low, high in SHELLS_MM]
    return torch.stack([grey, white, inner_csf, *shells])


def _synthesise_head(tissues: torch.Tensor, seed: int) -> np.ndarray:
    """Deform the anatomy, give each tissue a random intensity, and add what a scanner adds. Returns values in [0, 255]."""
    random = np.random.RandomState(seed)
    deform = Rand3DElastic(
        sigma_range=(7, 11),
        magnitude_range=(100, 300),
        prob=1.0,
        rotate_range=(0.3, 0.3, 0.3),
        scale_range=(0.15, 0.15, 0.15),
        padding_mode="border",
    )
    scanner = Compose(
        [
            RandGaussianSmooth(sigma_x=(0.2, 0.7), sigma_y=(0.2, 0.7), sigma_z=(0.2, 0.7), prob=0.5),
            RandBiasField(coeff_range=(0.0, 0.1), prob=0.7),
            RandGibbsNoise(alpha=(0.1, 0.5), prob=0.2),
            RandGaussianNoise(std=0.005, prob=0.5),
        ]
    )
    deform.set_random_state(seed)
    scanner.set_random_state(seed)
    intensities = torch.from_numpy(random.uniform(0.1, 1.0, size=len(tissues)).astype(np.float32))
    intensities[4] *= 0.3  # bone is dark
    if random.rand() < 0.5:
        intensities[3:] = 0  # skull-stripped
    deformed = torch.as_tensor(deform(tissues)).clamp(0, 1)
    head = torch.einsum("t,txyz->xyz", intensities, deformed)
    noisy = torch.as_tensor(scanner(head[None] / intensities.max()))[0]
    return (noisy.clamp(0, 1) * 255).numpy()
