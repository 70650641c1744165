"""Shared pieces: the bundle's root, and small volumes on disk."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# a network and patches that train in seconds; every other key is the bundle's default
SMALL = {"channels": "[4,8,8]", "latent_channels": "8", "patch_size": "[16,16,16]", "num_workers": "0", "device": "cpu"}


def head_like(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A bright ellipsoid with structure in dark air, brighter towards one corner, int16."""
    random = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = sum(a**2 for a in axes) < 0.8
    waves = sum(np.sin(random.uniform(2, 6) * a + random.uniform(0, 6)) for a in axes)
    slope = 300 * axes[0] + 200 * axes[1] + 100 * axes[2]
    return np.where(inside, 900 + slope + 80 * waves + random.normal(0, 10, shape), 0).astype(np.int16)


def save_volume(path: Path, shape: tuple[int, ...], seed: int = 0, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(head_like(shape, seed), np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """A user's folder: volumes of different sizes, some of them odd, one smaller than a patch, and a segmentation."""
    folder = tmp_path / "volumes"
    for i, shape in enumerate([(24, 24, 24), (21, 26, 19), (12, 20, 17), (33, 18, 24)]):
        save_volume(folder / f"sub-{i:02d}" / f"sub-{i:02d}_T1w.nii.gz", shape, seed=i)
    save_volume(folder / "sub-00" / "sub-00_dseg.nii.gz", (24, 24, 24))
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """A headless Chromium, which is skipped where there is none."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1300,1400", "--force-device-scale-factor=1"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()
