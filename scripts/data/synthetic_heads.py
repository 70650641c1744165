"""Heads that never existed: the tissue maps of an average brain, deformed at random, with an intensity for each tissue and
what a scanner adds.

The brain is the MNI152 average that comes with nilearn: ICBM 2009a, Fonov et al.,
https://doi.org/10.1016/j.neuroimage.2010.07.033.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import (
    Compose,
    DistanceTransformEDT,
    FillHoles,
    Rand3DElastic,
    RandAffine,
    RandBiasField,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandGibbsNoise,
    RandSmoothDeform,
)

SHELLS_MM = ((0.0, 2.0), (2.0, 7.0), (7.0, 12.0))  # outer CSF, skull, scalp: distance from the brain
T1_INTENSITIES = ((0.5, 0.7), (0.8, 1.0), (0.15, 0.35), (0.1, 0.3), (0.05, 0.2), (0.6, 0.95))
"""Ranges for grey matter, white matter, inner CSF, outer CSF, skull and scalp."""
NUM_BRAIN_TISSUES = 3  # the first ones; a stripped head has no others
CONTROL_POINTS_APART = 16  # voxels between the points whose displacement is drawn


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


def synthesise_head(tissues: torch.Tensor, seed: int) -> np.ndarray:
    """A head of any contrast, stripped or not, for an autoencoder: ``HxWxD`` in [0, 255], from :py:func:`tissue_maps`."""
    random = np.random.RandomState(seed)
    deform = Rand3DElastic(
        sigma_range=(7, 11),
        magnitude_range=(100, 300),
        prob=1.0,
        rotate_range=(0.3, 0.3, 0.3),
        scale_range=(0.15, 0.15, 0.15),
        padding_mode="border",
    )
    deform.set_random_state(seed)
    intensities = torch.from_numpy(random.uniform(0.1, 1.0, size=len(tissues)).astype(np.float32))
    intensities[4] *= 0.3  # bone is dark
    if random.rand() < 0.5:
        intensities[3:] = 0  # skull-stripped
    deformed = torch.as_tensor(deform(tissues)).clamp(0, 1)
    head = torch.einsum("t,txyz->xyz", intensities, deformed)
    return _scan(head / intensities.max(), seed)


def synthesise_similar_head(
    tissues: torch.Tensor, seed: int, stripped: bool, spatial_size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """
    A T1-weighted head and its label map: moderate variation, which a small generator can learn in minutes.

    Args:
        tissues: shares of the six tissues, ``6xHxWxD``, of any voxel size.
        seed: of everything that is random.
        stripped: whether skull and scalp are missing.
        spatial_size: of the head, cut from the middle or padded; multiples of 16.

    Returns:
        the head, ``HxWxD`` of ``spatial_size``, values in [0, 255]; and the tissue with the largest share in each voxel,
        1 to 6 in the order of ``tissues``, 0 for none of those that are visible, uint8.
    """
    low, high = zip(*T1_INTENSITIES)
    intensities = torch.from_numpy(np.random.RandomState(seed).uniform(low, high).astype(np.float32))
    visible = NUM_BRAIN_TISSUES if stripped else len(tissues)
    intensities[visible:] = 0
    move = RandAffine(
        prob=1.0,
        rotate_range=(0.15, 0.15, 0.15),
        scale_range=(0.1, 0.1, 0.1),
        spatial_size=spatial_size,
        padding_mode="border",
    )
    deform = RandSmoothDeform(
        spatial_size=spatial_size,
        rand_size=[size // CONTROL_POINTS_APART for size in spatial_size],
        field_mode="trilinear",
        align_corners=True,
        prob=1.0,
        def_range=0.06,  # 3 % of the size
        grid_mode="bilinear",
        grid_align_corners=True,
    )
    anatomy = Compose([move, deform])
    anatomy.set_random_state(seed)
    head = torch.einsum("t,txyz->xyz", intensities, tissues)
    deformed = torch.as_tensor(anatomy(torch.cat([head[None] / intensities.max(), tissues[:visible]])))
    background = 1 - deformed[1:].sum(0, keepdim=True)
    labels = torch.cat([background, deformed[1:]]).numpy().argmax(0)
    return _scan(deformed[0], seed), labels.astype(np.uint8)


def _scan(head: torch.Tensor, seed: int) -> np.ndarray:
    scanner = Compose(
        [
            RandGaussianSmooth(sigma_x=(0.2, 0.7), sigma_y=(0.2, 0.7), sigma_z=(0.2, 0.7), prob=0.5),
            RandBiasField(coeff_range=(0.0, 0.1), prob=0.7),
            RandGibbsNoise(alpha=(0.1, 0.5), prob=0.2),
            RandGaussianNoise(std=0.005, prob=0.5),
        ]
    )
    scanner.set_random_state(seed)
    noisy = torch.as_tensor(scanner(head[None]))[0]
    return (noisy.clamp(0, 1) * 255).numpy()
