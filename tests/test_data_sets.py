"""A data set as people have it is divided, encoded and sampled with the right conditions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.diffusion.training_data import latent_lists
from tests.conftest import save_volume
from tests.diffusion.runs import encode, generate, make_weights, save_untrained_generator, workflow

ROWS = [  # with what people and R write: spaces, an unpaired quotation mark, NA, a short row, sessions, no volume
    "participant_id \t age\tsex\tsession_id\tnotes",
    'sub-NDAR-INV01 \t 20\tF\t\t5" scar',
    "sub-NDAR-INV02\tNA\tM\t\t",
    "sub-NDAR-INV03\t30\tF\tses-1\t",
    "sub-NDAR-INV03\t35\tF\tses-2\t",
    "sub-NDAR-INV04\t40",
    "sub-NDAR-INV05\t50\tM\t\t",
    "sub-NDAR-INV06\t60\tF\t\t",
    "sub-NDAR-INV09\t70\tM\t\t",
]
EXPECTED = {
    "NDAR-INV01": {"age": 20, "notes": '5" scar', "sex": "F"},
    "NDAR-INV02": {"sex": "M"},
    "NDAR-INV03_ses-1": {"age": 30, "sex": "F"},
    "NDAR-INV03_ses-2": {"age": 35, "sex": "F"},
    "NDAR-INV04": {"age": 40},
    "NDAR-INV05": {"age": 50, "sex": "M"},
    "NDAR-INV06": {"age": 60, "sex": "F"},
    "NDAR-INV07": {},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """BIDS under DataLad: each volume is a link into ``.git/annex``; one was not fetched, and a Mac left a file behind."""
    folder = tmp_path / "data"
    for seed, name in enumerate(EXPECTED):
        stored = save_volume(folder / f".git/annex/objects/{seed}/MD5E-s{seed}.nii.gz", (16, 18, 20), seed)
        path = folder.joinpath(f"sub-{name}".replace("_", "/"), "anat", f"sub-{name}_T1w.nii.gz")
        path.parent.mkdir(parents=True)
        path.symlink_to(stored)
    (path.parent / "sub-NDAR-INV07_T2w.nii.gz").symlink_to("../../.git/annex/objects/9/gone.nii.gz")
    (path.parent / "._sub-NDAR-INV07_T1w.nii.gz").write_bytes(b"Mac OS X")
    (folder / "participants.tsv").write_text("\r\n".join(ROWS), encoding="utf-8-sig")
    return folder


def subject(path: str) -> str:
    return next(part for part in Path(path).parts if part.startswith("sub-"))


def test_bids_data_set_under_datalad(data, tmp_path, caplog):
    caplog.set_level("INFO")
    latents, weights = tmp_path / "latents", make_weights(tmp_path)
    encode(data, latents, weights)
    assert "links that lead nowhere (sub-NDAR-INV07/anat/sub-NDAR-INV07_T2w.nii.gz)" in caplog.text
    found = {path.name: json.loads(path.read_text())["conditions"] for path in latents.rglob("*_latent.json")}
    assert found == {f"sub-{name}_T1w_latent.json": conditions for name, conditions in EXPECTED.items()}

    lists = workflow("train.json", "training", "train", dataset_dir=data, val_fraction=0.25)
    sides = {
        name: {subject(item["image"]) for item in items}
        for name, items in lists.parser.get_parsed_content("data#lists").items()
    }
    assert not sides["training"] & sides["validation"] and len(sides["training"] | sides["validation"]) == 7
    for name, items in latent_lists(str(latents), 0.25, 0).items():
        assert {subject(item["image"]) for item in items} == sides[name]

    generator = save_untrained_generator(latents, tmp_path / "generator", condition_keys=["age", "sex"])
    generate(generator, weights, tmp_path / "samples", num_samples=1, conditions={"age": 40, "sex": "F"})
    (sample,) = (tmp_path / "samples").glob("*.json")
    assert json.loads(sample.read_text())["conditions"] == {"age": 40, "sex": "F"}
