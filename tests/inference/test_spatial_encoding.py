"""Spatial conditions are encoded beside their volumes, as planes of their own; what an earlier run made is kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts.bundle.errors import reason
from scripts.bundle.weights import save_weights
from scripts.data.latents import LatentDescription, read_description, read_labels, read_spatial
from scripts.data.spatial_kinds import SpatialKind
from scripts.inference import SpatialEncoder, StreamingInferer
from scripts.layers.resampling import pad_to_multiple
from tests.conftest import head_like, save_volume
from tests.inference.test_volume_runs import run, weights, workflow  # noqa: F401  weights is a fixture

SHAPE = (19, 14, 11)
KEYS: dict[str, Any] = {"spatial_keys": ["dseg", "T2w"], "label_keys": ["dseg"]}
CLASSES = (1, 7)


def save_labels(path: Path, *labels: int) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    for number, label in enumerate(labels):
        mask[4 * number + 2 : 4 * number + 5, 3:9, 2:8] = label
    nib.save(nib.Nifti1Image(mask, np.eye(4)), path)


def make(folder: Path) -> Path:
    """Three subjects with label maps, and two of them with another contrast, in coarser voxels."""
    for i in range(3):
        subject = folder / f"sub-{i}"
        save_volume(subject / f"sub-{i}_T1w.nii.gz", SHAPE, seed=i)
        save_labels(subject / f"sub-{i}_dseg.nii.gz", *CLASSES[: i + 1])
        if i:
            save_volume(subject / f"sub-{i}_T2w.nii.gz", (10, 14, 11), seed=i + 5, affine=np.diag([2.0, 1, 1, 1]))
    return folder


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    folder = tmp_path_factory.mktemp("made")
    run("encoding", make(folder / "volumes"), folder / "latents", weights, **KEYS)
    return folder / "volumes", folder / "latents"


@pytest.fixture
def copied(made, tmp_path) -> tuple[Path, Path]:
    """Volumes and latents, to be changed."""
    shutil.copytree(made[0], tmp_path / "volumes")
    return tmp_path / "volumes", shutil.copytree(made[1], tmp_path / "latents")


def latent(folder: Path, subject: int) -> Path:
    return folder / f"sub-{subject}" / f"sub-{subject}_T1w_latent.nii.gz"


def described(folder: Path, subject: int) -> tuple[Path, LatentDescription]:
    path = latent(folder, subject)
    return path, read_description(path)


def network_of(flow: ConfigWorkflow, weights: Path) -> Any:  # noqa: F811
    network = flow.parser.get_parsed_content("network")
    network.load_state_dict(torch.load(weights / "model.pt", weights_only=True))
    return network.eval()


def test_files_hold_the_latents_of_the_planes_and_the_label_map(made, weights):  # noqa: F811
    volumes, latents = made
    assert sorted(p.name for p in (latents / "sub-1").iterdir()) == [
        "sub-1_T1w_labels-dseg.nii.gz",
        "sub-1_T1w_latent.json",
        "sub-1_T1w_latent.nii.gz",
        "sub-1_T1w_spatial-T2w.nii.gz",
        "sub-1_T1w_spatial-dseg.nii.gz",
    ]
    path, description = described(latents, 1)
    mask = np.asarray(nib.load(volumes / "sub-1" / "sub-1_dseg.nii.gz").dataobj)
    assert np.array_equal(read_labels(path, description, "dseg")[0], mask)
    stored = nib.load(latents / "sub-1" / "sub-1_T1w_labels-dseg.nii.gz")
    assert stored.get_data_dtype() == np.uint8 and np.array_equal(stored.affine, np.eye(4))
    found = read_spatial(path, description, description.spatial)
    assert {key: tuple(z.shape) for key, z in found.items()} == {"dseg": (16, 3, 2, 2), "T2w": (8, 3, 2, 2)}
    network = network_of(workflow("encoding", volumes, latents, weights), weights)
    encode = StreamingInferer(amp=False, amp_dtype="bfloat16", operation="encode")
    for number, label in enumerate(CLASSES):  # by the linear shortcut alone
        plane = pad_to_multiple(torch.from_numpy(mask == label).float()[None, None], network.total_downsample_factor)
        assert torch.equal(found["dseg"][8 * number : 8 * number + 8], network.shortcut.encode(plane)[0])
    image = torch.rand(1, 1, *mask.shape)
    (latent,) = SpatialEncoder(encode, {"T2w": SpatialKind()}).encode_planes({"T2w": image}, network).values()
    assert torch.equal(latent, encode(image, network))
    alone = SpatialEncoder(encode, {"dseg": SpatialKind(CLASSES)}).encode_planes(
        {"dseg": torch.from_numpy(mask.astype(np.int32))[None, None]}, network
    )
    assert torch.equal(alone["dseg"][0], found["dseg"])
    assert list(read_spatial(path, description, ["T2w", "t3"])) == ["T2w"] and not read_spatial(path, description, [])


def test_description_says_what_the_conditions_are(made):
    _, latents = made
    dseg, t2 = (described(latents, 1)[1].spatial[key] for key in ("dseg", "T2w"))
    assert (dseg.kind, dseg.source) == (SpatialKind(CLASSES), "sub-1/sub-1_dseg.nii.gz")
    assert t2.kind == SpatialKind() and not t2.kind.is_label_map and t2.labels_sha256 is None
    values = head_like((10, 14, 11), 6)
    assert t2.intensity_low[0] == values.min() and t2.intensity_high[0] == pytest.approx(np.percentile(values, 99.9))
    of_few = described(latents, 0)[1].spatial
    assert list(of_few) == ["dseg"]  # no other contrast
    assert of_few["dseg"].kind == SpatialKind(CLASSES)  # the classes of all, though it has one of them


def test_images_are_encoded_as_without_conditions(made, weights, tmp_path):  # noqa: F811
    volumes, latents = made
    run("encoding", volumes, tmp_path / "plain", weights, image_glob="**/*_T1w.nii*")
    for i in range(3):
        assert latent(latents, i).read_bytes() == latent(tmp_path / "plain", i).read_bytes()
    assert not [p for p in (tmp_path / "plain").rglob("*") if "spatial" in p.name or "labels" in p.name]
    assert described(tmp_path / "plain", 1)[1].settings == described(latents, 1)[1].settings


def test_decoding_leaves_conditions_aside(made, weights, tmp_path):  # noqa: F811
    run("decoding", made[1], tmp_path, weights)
    assert sorted(p.name for p in tmp_path.rglob("*.nii.gz")) == [f"sub-{i}_T1w_reconstruction.nii.gz" for i in range(3)]


def touch_nothing(volumes: Path, latents: Path) -> None:
    pass


def replace_contrast(volumes: Path, latents: Path) -> None:
    save_volume(volumes / "sub-1" / "sub-1_T2w.nii.gz", SHAPE, seed=20)


def add_contrast(volumes: Path, latents: Path) -> None:
    save_volume(volumes / "sub-0" / "sub-0_T2w.nii.gz", SHAPE, seed=20)


def remove_contrast(volumes: Path, latents: Path) -> None:
    os.remove(volumes / "sub-1" / "sub-1_T2w.nii.gz")


def add_class(volumes: Path, latents: Path) -> None:
    save_labels(volumes / "sub-0" / "sub-0_dseg.nii.gz", 1, 9)


def damage_planes(volumes: Path, latents: Path) -> None:
    path = latents / "sub-2" / "sub-2_T1w_spatial-dseg.nii.gz"
    path.write_bytes(path.read_bytes()[:-10])


def lose_labels(volumes: Path, latents: Path) -> None:
    os.remove(latents / "sub-1" / "sub-1_T1w_labels-dseg.nii.gz")


@pytest.mark.parametrize(
    "change, again",
    [
        (touch_nothing, set()),
        (replace_contrast, {"sub-1"}),
        (add_contrast, {"sub-0"}),
        (remove_contrast, {"sub-1"}),
        (add_class, {"sub-0", "sub-1", "sub-2"}),
        (damage_planes, {"sub-2"}),
        (lose_labels, {"sub-1"}),
    ],
)
def test_only_what_is_not_there_is_encoded_again(copied, weights, change: Callable[[Path, Path], None], again):  # noqa: F811
    volumes, latents = copied
    change(volumes, latents)
    flow = workflow("encoding", volumes, latents, weights, **KEYS)
    assert {Path(item["image"]).parent.name for item in flow.parser.get_parsed_content("encode#dataset").data} == again
    if change is not add_class:
        return
    flow.run()
    path, description = described(latents, 0)
    assert description.spatial["dseg"].kind.classes == (1, 7, 9)
    assert read_spatial(path, description, ["dseg"])["dseg"].shape[0] == 8 * 3


def test_changed_files_are_refused_when_they_are_read(copied):
    _, latents = copied
    damage_planes(*copied)
    with pytest.raises(ValueError, match=r"sub-2_T1w_spatial-dseg.nii.gz is not the file that its description names"):
        read_spatial(*described(latents, 2), ["dseg"])
    with pytest.raises(ValueError, match="labels-T2w.nii.gz is not the file that its description names"):
        read_labels(*described(latents, 1), "T2w")


def test_bad_condition_is_named_and_the_others_are_encoded(copied, weights, tmp_path):  # noqa: F811
    volumes, _ = copied
    nib.save(nib.Nifti1Image(head_like(SHAPE) / 7.0, np.eye(4)), volumes / "sub-1" / "sub-1_dseg.nii.gz")
    with pytest.raises(SystemExit, match=r"(?s)could not be done \(1\).*sub-1_dseg.nii.gz is no label map: it has voxels"):
        run("encoding", volumes, tmp_path / "out", weights, **KEYS)
    assert sorted(p.name for p in (tmp_path / "out").rglob("*_latent.nii.gz")) == [
        "sub-0_T1w_latent.nii.gz",
        "sub-2_T1w_latent.nii.gz",
    ]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"spatial_keys": ["image"]}, r"`spatial_keys\[0\]` is 'image'; it must be a name of letters"),
        ({"spatial_keys": ["../x"]}, r"`spatial_keys\[0\]` is '../x'"),
        ({"spatial_keys": ["T2w", "T2w"]}, "must be a list of different names"),
        ({"spatial_keys": ["dseg"], "label_keys": []}, None),
    ],
)
def test_keys_are_checked(made, weights, tmp_path, overrides, words):  # noqa: F811
    arguments = {**KEYS, **overrides}
    if words is None:  # by its name
        run("encoding", made[0], tmp_path, weights, **arguments)
        assert described(tmp_path, 1)[1].spatial["dseg"].kind.is_label_map
        return
    with pytest.raises(Exception) as caught:
        run("encoding", made[0], tmp_path, weights, **arguments)
    assert re.search(words, str(reason(caught.value)))


@pytest.mark.parametrize("ranges, expected", [({"T2w": None}, None), ({}, (0.0, 2000.0)), ({"T2w": [1, 3]}, (1.0, 3.0))])
def test_range_of_a_condition_is_that_of_its_key(made, weights, tmp_path, ranges, expected):  # noqa: F811
    flow = workflow("encoding", made[0], tmp_path, weights, **KEYS, intensity_range=[0, 2000], spatial_ranges=ranges)
    assert flow.parser.get_parsed_content("encode#kinds")["T2w"].intensity_range == expected


def test_planes_have_the_channels_of_the_network(weights, tmp_path):  # noqa: F811
    heads = np.stack([head_like(SHAPE, seed) for seed in range(2)], -1)
    nib.save(nib.Nifti1Image(heads, np.eye(4)), tmp_path / "a.nii.gz")
    save_labels(tmp_path / "a_label.nii.gz", 3)
    save_volume(tmp_path / "a_t2.nii.gz", SHAPE)
    out, keys = tmp_path / "out", {"spatial_keys": ["label", "t2"], "image_channels": 2}
    flow = workflow("encoding", tmp_path, out, weights, **keys)
    torch.manual_seed(0)
    save_weights(flow.parser.get_parsed_content("network_def"), tmp_path / "model.pt")
    run("encoding", tmp_path, out, tmp_path, **keys)
    found = read_spatial(out / "a_latent.nii.gz", read_description(out / "a_latent.nii.gz"), ["label", "t2"])
    assert [len(z) for z in found.values()] == [8, 8]
