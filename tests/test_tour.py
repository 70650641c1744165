"""The notebook of the tour runs from its folder, and is committed with small outputs that tell nothing of a machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT, save_volume
from tests.test_documents import LINK

TOUR = ROOT / "docs" / "tour.ipynb"
MAX_BYTES = 400_000


@pytest.fixture
def tour() -> nbformat.NotebookNode:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def save_volumes(folder: Path, count: int) -> str:
    """A training list and a validation list of small volumes and label maps, named as the bundle's heads are."""
    lists = {part: [{"image": f"{part}/head_{i:03d}.nii.gz"} for i in range(count)] for part in ("training", "validation")}
    for items in lists.values():
        for seed, item in enumerate(items):
            path = save_volume(folder / item["image"], (32, 30, 24), seed=seed)
            item["label"] = item["image"].replace(".nii.gz", "_label.nii.gz")
            shutil.copy(path, folder / item["label"])
    (folder / "dataset.json").write_text(json.dumps(lists))
    return str(folder)


def test_tour_runs_from_its_folder(tour, tmp_path, monkeypatch):
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "IPYTHONDIR": str(tmp_path / "ipython")}.items():
        monkeypatch.setenv(name, value)
    short = {
        "FOLDER": str(tmp_path / "tour"),
        "VOLUMES": save_volumes(tmp_path / "volumes", 1),
        "EPOCHS": 1,
        "PATCH_SIZE": [16, 16, 16],
        "HEADS": save_volumes(tmp_path / "heads", 2),
        "GENERATOR_EPOCHS": 1,
        "NUM_RECOMMENDATIONS": 1,
    }
    (position,) = (i for i, cell in enumerate(tour.cells) if "parameters" in cell.metadata.get("tags", []))
    names = re.findall(r"^(\w+) = ", tour.cells[position].source, re.MULTILINE)
    assert names == list(short)
    lines = [f"{name} = {value!r}" for name, value in short.items()]
    tour.cells.insert(position + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    assert (tmp_path / "tour/autoencoder/checkpoints/model.pt").is_file()
    assert len(list((tmp_path / "tour/samples").glob("*.nii.gz"))) == 3


def test_tour_is_committed_with_small_outputs_of_no_particular_machine(tour):
    assert TOUR.stat().st_size < MAX_BYTES
    numbers = [cell.execution_count for cell in code_cells(tour)]
    assert numbers == list(range(1, len(numbers) + 1))  # all of one run, from the top
    outputs = [output for cell in code_cells(tour) for output in cell.outputs]
    assert sum("image/jpeg" in output.get("data", {}) or "image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output.output_type == "error"]
    text = "\n".join(str(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)
    text += "\n".join(cell.source for cell in tour.cells)
    assert not re.findall(r"(?<![\w.<*])/(?:home|root|work|tmp|usr|opt|Users|mnt|var)/\S*|[A-Z]:\\\S*|site-packages", text)
    assert not re.findall(r"https?://\S*(?:pypi|index|simple|artifact)\S*", text)


def test_links_of_the_tour_lead_somewhere(tour):
    links = [link for cell in tour.cells if cell.cell_type == "markdown" for link in LINK.findall(cell.source)]
    assert links
    for link in links:
        assert re.match(r"https?:", link) or (TOUR.parent / link.partition("#")[0]).exists(), link
