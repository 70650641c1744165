"""The shipped generator makes the heads that it is asked for."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from scripts.bundle.files import content_hash
from scripts.bundle.shared_generator import shared_generator
from tests.conftest import ROOT
from tests.diffusion.runs import generate

FEW_STEPS = {"num_samples": 1, "num_inference_steps": 4, "guidance_scale": 1.5}


def head(folder: Path, skull: str) -> np.ndarray:
    generate(ROOT / "models/generator", ROOT / "models/model.pt", folder, conditions={"skull": skull}, **FEW_STEPS)
    image = nib.load(folder / "sample_0000.nii.gz")
    assert image.header.get_zooms() == (3, 3, 3)
    return np.asarray(image.dataobj)


def test_it_belongs_to_the_shipped_autoencoder():
    files, _ = shared_generator(ROOT, content_hash((ROOT / "models/model.pt").read_bytes()))
    assert "models/generator/metrics.json" in files


def test_heads_lie_in_the_middle_and_have_the_skull_that_was_asked_for(tmp_path):
    whole, stripped = (head(tmp_path / skull, skull) > 40 for skull in ("whole", "stripped"))
    assert whole.shape == stripped.shape == (64, 80, 64)
    for filled in (whole, stripped):
        middle = filled[20:44, 26:54, 24:48].mean()
        corners = filled[::63, ::79, ::63].mean()
        assert middle > 0.9 and corners == 0
    assert whole.mean() > 1.3 * stripped.mean()
