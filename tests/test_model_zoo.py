"""The checks of the Model Zoo's ci/verify_bundle.py in its full mode, without exemptions. TorchScript is tested in
inference/test_exported_networks.py."""

from __future__ import annotations

import json
import re
import shutil
import urllib.error

import ignite.distributed as idist
import pytest
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out

from tests.conftest import ROOT

CONFIGS = ROOT / "configs"
METADATA = json.loads((CONFIGS / "metadata.json").read_text())
LARGEST_FILE = 25 * 2**20  # that the Model Zoo accepts
SCHEMA = ROOT.parent / "shared" / "meta_schema_20240725.json"


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "configs/metadata.json",
        "configs/inference.json",
        "configs/train.json",
        "configs/logging.conf",
        "models/model.pt",
        "models/16x/model.pt",
        "models/generator/model.pt",
        "docs/README.md",
        "docs/data_license.txt",
    ],
)
def test_file_is_there_and_not_too_large(name):
    assert 0 < (ROOT / name).stat().st_size <= LARGEST_FILE


def test_version_is_the_last_of_every_changelog():
    version = METADATA["version"]
    assert version == list(METADATA["changelog"])[-1]
    assert f"## {version}\n" == re.search(r"^## .*\n", (ROOT / "docs/CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()


def test_required_packages_are_those_that_the_bundle_installs():
    listed = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    names = set(re.findall(r'^ +"([a-z0-9-]+)', listed, re.MULTILINE))
    assert set(METADATA["required_packages_version"]) == names - {"monai", "torch"}  # which have keys of their own


def test_metadata_follows_the_schema(tmp_path):
    if SCHEMA.is_file():
        assert METADATA["schema"].endswith(f"/{SCHEMA.name}")
        shutil.copy(SCHEMA, tmp_path / "schema.json")  # an existing file is not downloaded
    try:
        verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(tmp_path / "schema.json"))
    except urllib.error.URLError as error:
        pytest.skip(f"MONAI's schema cannot be downloaded: {error}")


@pytest.mark.parametrize(
    "files, workflow_type",
    [
        (["train.json"], "train"),
        (["train.json", "presets/16x.json", "evaluate.json"], "train"),
        (["train.json", "persistent_cache.json"], "train"),
        (["train.json", "synthetic_patches.json"], "train"),
        (["train.json", "multi_gpu_train.json"], "train"),
        (["inference.json"], "infer"),
        (["inference.json", "presets/16x.json"], "infer"),
    ],
    ids=str,
)
def test_no_property_is_missing(files, workflow_type, volumes, tmp_path, monkeypatch):
    process = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in process.items():  # as torchrun says it to the only process
        monkeypatch.setenv(name, str(value))
    flow = ConfigWorkflow(
        config_file=[str(CONFIGS / name) for name in files],
        logging_file=False,
        workflow_type=workflow_type,
        bundle_root=str(ROOT),
        dataset_dir=str(volumes),
        output_dir=str(tmp_path),
        num_workers=0,
        **({"cache_dir": str(tmp_path)} if "persistent_cache.json" in files else {}),
    )
    flow.initialize()
    try:
        assert flow.check_properties() == []
    finally:
        assert idist.get_world_size() == 1
        idist.finalize()  # leave no process group to the tests that follow


@pytest.mark.parametrize("size", [1, 16, 21])
def test_network_takes_and_gives_what_the_metadata_says(size):
    assert METADATA["network_data_format"]["inputs"]["image"]["spatial_shape"] == ["*", "*", "*"]
    files = {"meta_file": str(CONFIGS / "metadata.json"), "config_file": str(CONFIGS / "inference.json")}
    verify_net_in_out("network_def", device="cpu", any=size, bundle_root=str(ROOT), **files)
