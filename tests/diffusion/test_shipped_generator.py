"""The shipped generator makes the heads that it is asked for."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from scripts.bundle.files import content_hash
from scripts.diffusion.generator import load_generator
from tests.conftest import ROOT
from tests.diffusion.runs import generate

FEW_STEPS = {"num_samples": 1, "num_inference_steps": 4, "guidance_scale": 1.5}


def head(folder: Path, skull: str) -> np.ndarray:
    generate(ROOT / "models/generator", ROOT / "models/model.pt", folder, conditions={"skull": skull}, **FEW_STEPS)
    image = nib.load(folder / "sample_0000.nii.gz")
    assert image.header.get_zooms() == (3, 3, 3)
    return np.asarray(image.dataobj)


def test_it_belongs_to_the_shipped_autoencoder():
    generator = load_generator(str(ROOT / "models/generator/model.pt"))
    assert generator.statistics.autoencoder.sha256 == content_hash((ROOT / "models/model.pt").read_bytes())


def test_it_is_stored_in_half_precision_and_computes_in_single_precision():
    stored = torch.load(ROOT / "models/generator/model.pt", weights_only=True)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    generator = load_generator(str(ROOT / "models/generator/model.pt"))
    assert {value.dtype for value in generator.network.state_dict().values()} == {torch.float32}
    assert generator.sha256 in (ROOT / "models/generator/README.md").read_text()


def test_heads_lie_in_the_middle_and_have_the_skull_that_was_asked_for(tmp_path):
    whole, stripped = (head(tmp_path / skull, skull) > 40 for skull in ("whole", "stripped"))
    assert whole.shape == stripped.shape == (64, 80, 64)
    for filled in (whole, stripped):
        middle = filled[20:44, 26:54, 24:48].mean()
        corners = filled[::63, ::79, ::63].mean()
        assert middle > 0.9 and corners == 0
    assert whole.mean() > 1.3 * stripped.mean()
