"""Volumes that need no download: synthetic heads for training an autoencoder, with the MNI152 T1 template, which training
never sees, for validation; and smaller, more similar heads for training a generator.

All of it is the same average brain, so it shows that the pipelines work and says nothing about how well a network does on
patients.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from torch.nn.functional import avg_pool3d

from scripts.bundle.progress import ProgressBar
from scripts.data.synthetic_heads import as_uint8, synthesise_head, synthesise_similar_head, t1_template, tissue_maps

NUM_TRAINING_VOLUMES = 8
NUM_TRAINING_HEADS, NUM_HELD_OUT_HEADS = 320, 32
DEMONSTRATION_SPACING = 3  # mm, a multiple of the template's 1
DEMONSTRATION_SIZE = (64, 80, 64)
TISSUES = ("grey matter", "white matter", "inner CSF", "outer CSF", "skull", "scalp")
logger = logging.getLogger(__name__)


def prepare_sample_volumes(folder: str) -> str:
    """
    Write the sample volumes below ``folder``, unless they are there.

    Args:
        folder: Where to put them. It appears only when it is complete.

    Returns:
        ``folder``, which then holds ``dataset.json`` (Medical Segmentation Decathlon format), 8 training volumes and
        one validation volume of 197x233x189 voxels at 1 mm.
    """
    if not (Path(folder) / "dataset.json").is_file():
        with _whole_folder(Path(folder)) as unfinished:
            names = [f"training/synthetic_{i:02d}.nii.gz" for i in range(NUM_TRAINING_VOLUMES)]
            bar = ProgressBar(names, desc="sample volumes", unit="volume")  # the tissue maps take long too
            template, tissues = t1_template(), tissue_maps()
            _save(template, unfinished / "validation" / "mni152_t1.nii.gz")
            for seed, name in enumerate(bar):
                _save(as_uint8(synthesise_head(tissues, seed), template.affine), unfinished / name)
            _save_lists(
                unfinished,
                name="MNI152 sample",
                description="synthetic heads for training, the ICBM 2009a T1 template for validation",
                training=[{"image": name} for name in names],
                validation=[{"image": "validation/mni152_t1.nii.gz"}],
            )
    return folder


def prepare_demonstration_heads(folder: str, num_training: int | None = None) -> str:
    """
    Write heads for training a small generator below ``folder``, unless they are there.

    Args:
        folder: Where to put them. It appears only when it is complete.
        num_training: Number of heads for training; None for 320, or as many as are there. A larger number adds heads and
            leaves the others as they are.

    Returns:
        ``folder``, which then holds the training heads and 32 for validation, of 64x80x64 voxels at 3 mm, and
        ``dataset.json``, in which ``label`` names the label map of each, ``labels`` its tissues, and ``skull`` says whether
        the head is ``"whole"`` or ``"stripped"``; half of each list are stripped.

    Raises:
        ValueError: where the folder holds another number of training heads than was asked for.
    """
    lists_file = Path(folder) / "dataset.json"
    if lists_file.is_file():
        present = len(json.loads(lists_file.read_text())["training"])
        if num_training not in (None, present):
            raise ValueError(f"{folder} holds {present} training heads, not {num_training}; name another folder.")
        return folder
    with _whole_folder(Path(folder)) as unfinished:
        counts = {"validation": NUM_HELD_OUT_HEADS, "training": num_training or NUM_TRAINING_HEADS}
        numbered = [(part, i) for part, count in counts.items() for i in range(count)]
        bar = ProgressBar(numbered, desc="demonstration heads", unit="volume")
        tissues = avg_pool3d(tissue_maps(), DEMONSTRATION_SPACING)
        affine = _affine_of_middle(t1_template().affine, tissues.shape[1:])
        lists: dict[str, list[dict[str, str]]] = {part: [] for part in counts}
        for seed, (part, i) in enumerate(bar):
            files = {"image": f"{part}/head_{i:03d}.nii.gz", "label": f"{part}/head_{i:03d}_label.nii.gz"}
            item = {**files, "skull": "stripped" if i % 2 else "whole"}
            volumes = synthesise_similar_head(tissues, seed, item["skull"] == "stripped", DEMONSTRATION_SIZE)
            for file, volume in zip(files.values(), volumes):
                _save(as_uint8(volume, affine), unfinished / file)
            lists[part].append(item)
        _save_lists(
            unfinished,
            name="MNI152 demonstration heads",
            description="synthetic heads for training a generator, further ones for validation; skull: whole or stripped",
            labels={str(label): name for label, name in enumerate(("background", *TISSUES))},
            **lists,
        )
    return folder


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write to that takes the place of ``target`` at the end, unless another process was faster."""
    logger.info(f"preparing {target}")
    unfinished = target.with_name(f"{target.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    try:
        unfinished.rename(target)
    except OSError:
        shutil.rmtree(unfinished)
        if not (target / "dataset.json").is_file():
            raise


def _affine_of_middle(affine: np.ndarray, spatial_size: tuple[int, ...]) -> np.ndarray:
    """From voxels of an unmoved demonstration head to mm: it lies in the middle of the shrunk template."""
    to_shrunk = nib.affines.from_matvec(np.eye(3), np.subtract(spatial_size, DEMONSTRATION_SIZE) / 2)
    to_template = nib.affines.from_matvec(DEMONSTRATION_SPACING * np.eye(3), [(DEMONSTRATION_SPACING - 1) / 2] * 3)
    return affine @ to_template @ to_shrunk


def _save(image: nib.Nifti1Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(image, path)


def _save_lists(folder: Path, **content: Any) -> None:
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, **content}, indent=2))
