"""Samples on the grids of spatial conditions: pairs of volumes and label maps to train on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist

from scripts.inference.samples import Samples
from tests.conftest import save_volume
from tests.diffusion.runs import encode, generate, make_weights, save_untrained_generator, workflow

SIZE, SPACING = (14, 18, 10), (1.0, 1.5, 2.0)
MASK = np.zeros(SIZE, np.uint8)
MASK[3:9, 4:12, 2:8] = 1
MASK[4:6, 5:9, 3:6] = 4


def save_mask(path: Path, values: np.ndarray = MASK, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([*SPACING, 1.0]) if affine is None else affine), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_weights(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def generator(weights, tmp_path_factory) -> Path:
    """A folder with a generator that has learned nothing, of latents with label maps and a condition."""
    folder = tmp_path_factory.mktemp("generator")
    for i in range(3):
        path = save_volume(folder / "volumes" / f"sub-{i}" / f"sub-{i}_T1w.nii.gz", SIZE, i, np.diag([*SPACING, 1.0]))
        save_mask(path.with_name(f"sub-{i}_T1w_label.nii.gz"))
    (folder / "volumes" / "participants.tsv").write_text("participant_id\tage\nsub-0\t20\nsub-1\t30\nsub-2\t40")
    latents = encode(folder / "volumes", folder / "latents", weights, spatial_keys=["label"])
    keys = {"condition_keys": ["age"], "spatial_keys": ["label"], "val_fraction": 0.34}
    return save_untrained_generator(latents, folder, **keys)


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """Two masks, the second stored with its axes turned."""
    folder = tmp_path_factory.mktemp("masks")
    save_mask(folder / "one.nii.gz")
    turned = np.ascontiguousarray(MASK.transpose(2, 0, 1)[:, ::-1])
    affine = np.array([[0, -1.0, 0, 13.0], [0, 0, 1.5, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    save_mask(folder / "two.nii", turned, affine)
    return folder


@pytest.fixture(scope="module")
def pairs(generator, weights, masks, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("pairs")
    generate(generator, weights, output_dir, dataset_dir=masks, spatial_keys=["label"], seed=1)
    return output_dir


def test_each_sample_lies_on_the_grid_of_its_mask_with_the_mask_beside_it(pairs, masks):
    items = load_decathlon_datalist(str(pairs / "dataset.json"))
    assert [Path(item["image"]).name for item in items] == [
        f"{name}_sample_0{i}_0000.nii.gz" for name in ("one", "two") for i in (0, 1)
    ]
    for item, mask in zip(items, ["one.nii.gz", "one.nii.gz", "two.nii", "two.nii"]):
        source, image, label = (nib.load(path) for path in (masks / mask, item["image"], item["label"]))
        assert image.shape == source.shape and np.array_equal(image.affine, source.affine)
        assert np.array_equal(np.asarray(label.dataobj), np.asarray(source.dataobj))
        assert np.array_equal(label.affine, source.affine) and label.get_data_dtype() == np.uint8
        assert b"synthetic" in image.header["descrip"].tobytes()
        described = json.loads(Path(item["image"].replace(".nii.gz", ".json")).read_text())
        assert described["spatial"] == {"label": mask} and described["spacing"] == list(SPACING)


def test_folder_is_one_that_nnunet_trains_on(pairs):
    content = json.loads((pairs / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "image"} and content["file_ending"] == ".nii.gz"
    assert content["labels"] == {"background": 0, "class 1": 1, "class 4": 4} and content["numTraining"] == 4
    cases = {path.name.removesuffix("_0000.nii.gz") for path in (pairs / "imagesTr").glob("*.nii.gz")}
    assert cases == {path.name.removesuffix(".nii.gz") for path in (pairs / "labelsTr").iterdir()}


def test_two_masks_of_the_same_place_differ_only_in_how_they_are_stored(generator, weights, masks, tmp_path):
    """The orientation of a file changes nothing but the order of the voxels in the sample."""
    folder = tmp_path / "masks"
    folder.mkdir()
    shutil.copy(masks / "one.nii.gz", folder / "case.nii.gz")
    generate(generator, weights, tmp_path / "one", dataset_dir=folder, spatial_keys=["label"], num_samples=1)
    (folder / "case.nii.gz").unlink()
    shutil.copy(masks / "two.nii", folder / "case.nii")
    generate(generator, weights, tmp_path / "two", dataset_dir=folder, spatial_keys=["label"], num_samples=1)
    one, two = (nib.load(tmp_path / name / "imagesTr" / "case_sample_00_0000.nii.gz") for name in ("one", "two"))
    assert np.array_equal(nib.as_closest_canonical(two).get_fdata(), one.get_fdata())


def test_samples_follow_the_mask_and_each_other_mask_changes_nothing(generator, weights, pairs, masks, tmp_path):
    folder = tmp_path / "masks"
    save_mask(folder / "one.nii.gz")
    generate(generator, weights, tmp_path / "alone", dataset_dir=folder, spatial_keys=["label"], seed=1)
    name = Path("imagesTr") / "one_sample_01_0000.nii.gz"
    assert (tmp_path / "alone" / name).read_bytes() == (pairs / name).read_bytes()
    save_mask(folder / "one.nii.gz", MASK[::-1].copy())
    generate(generator, weights, tmp_path / "other", dataset_dir=folder, spatial_keys=["label"], seed=1)
    assert (tmp_path / "other" / name).read_bytes() != (pairs / name).read_bytes()


def test_second_run_makes_only_what_is_missing(generator, weights, pairs, masks, tmp_path, caplog):
    mine = shutil.copytree(pairs, tmp_path / "pairs")
    (mine / "labelsTr" / "two_sample_01.nii.gz").unlink()
    caplog.set_level("INFO")
    generate(generator, weights, mine, dataset_dir=masks, spatial_keys=["label"], seed=1)
    assert "3 of 4 samples are there already" in caplog.text
    assert (mine / "labelsTr" / "two_sample_01.nii.gz").read_bytes() == (
        pairs / "labelsTr/two_sample_01.nii.gz"
    ).read_bytes()


def test_what_training_did_not_see_is_refused_by_name(generator, weights, masks, tmp_path, caplog):
    folder = tmp_path / "masks"
    other = MASK.copy()
    other[0, 0, 0] = 7
    save_mask(folder / "a_unknown.nii.gz", other)
    save_mask(folder / "b_fine.nii.gz", affine=np.diag([0.3, 1.5, 2.0, 1.0]))
    save_mask(folder / "c.nii.gz")
    with pytest.raises(SystemExit, match=r"could not be done \(2\)"):
        generate(generator, weights, tmp_path / "out", dataset_dir=folder, spatial_keys=["label"])
    assert "a_unknown.nii.gz: has labels that are not among the classes: [7]; known are [0, 1, 4]" in caplog.text
    assert "b_fine.nii.gz: has the spacing 0.3 x 1.5 x 2 mm; training saw 1 x 1.5 x 2" in caplog.text
    made = json.loads((tmp_path / "out" / "dataset.json").read_text())["training"]
    assert [Path(item["image"]).name for item in made] == ["c_sample_00_0000.nii.gz", "c_sample_01_0000.nii.gz"]
    for keys, message in (
        ({"spatial_keys": ["t2"]}, "has the spatial conditions label"),
        ({"spatial_size": 32}, "leave it out"),
    ):
        with pytest.raises((ValueError, RuntimeError)) as error:
            generate(generator, weights, tmp_path / "out", **{"dataset_dir": folder, "spatial_keys": ["label"], **keys})
        assert message in str(error.value.__cause__ or error.value)


def test_a_label_map_without_a_label_is_named_and_used(generator, weights, tmp_path, caplog):
    folder = tmp_path / "masks"
    empty = save_mask(folder / "a.nii.gz", np.zeros_like(MASK))
    save_mask(folder / "b.nii.gz")
    generate(generator, weights, tmp_path / "out", dataset_dir=folder, spatial_keys=["label"], num_samples=1)
    warnings = [record.getMessage() for record in caplog.records if "background" in record.getMessage()]
    assert warnings == [f"{empty}: the label map 'label' has no label but the background"]
    assert len(json.loads((tmp_path / "out" / "dataset.json").read_text())["training"]) == 2


def test_another_spacing_gives_samples_and_labels_on_that_grid(generator, weights, masks, tmp_path):
    generate(generator, weights, tmp_path, dataset_dir=masks, spatial_keys=["label"], num_samples=1, spacing=[1.0, 1.5, 1.5])
    image = nib.load(tmp_path / "imagesTr" / "one_sample_00_0000.nii.gz")
    label = nib.load(tmp_path / "labelsTr" / "one_sample_00.nii.gz")
    assert np.allclose(nib.affines.voxel_sizes(image.affine), [1, 1.5, 1.5], atol=0.06) and image.shape == label.shape
    assert np.array_equal(image.affine, label.affine) and set(np.unique(label.dataobj)) == {0, 1, 4}


def test_conditions_of_the_case_are_used_and_those_asked_for_come_first(generator, weights, tmp_path):
    folder = tmp_path / "data"
    save_mask(folder / "sub-9" / "sub-9_T1w_label.nii.gz")
    (folder / "participants.tsv").write_text("participant_id\tage\nsub-9\t33")
    keys = {"dataset_dir": folder, "spatial_keys": ["label"], "num_samples": 1}
    for name, conditions, age in (("own", {}, 33), ("asked", {"age": 25}, 25)):
        generate(generator, weights, tmp_path / name, conditions=conditions, **keys)
        (described,) = (tmp_path / name / "imagesTr").glob("*.json")
        assert json.loads(described.read_text())["conditions"] == {"age": age}


def test_a_label_map_of_another_key_is_the_label_of_the_pairs(generator, weights, tmp_path):
    flow = workflow("generate.json", "generating", "infer", ckpt_dir=generator, autoencoder=weights, output_dir=tmp_path)
    sampler = flow.parser.get_parsed_content("sampler")
    kind = sampler.generator.statistics.spatial["label"]
    for keys, names in (
        (["dseg", "rois"], {"dseg": "label", "rois": "rois"}),
        (["rois", "label"], {"rois": "rois", "label": "label"}),
    ):
        for key in keys:
            sampler.generator.statistics.spatial[key] = kind
            save_mask(tmp_path / "masks" / f"case_{key}.nii.gz")
        samples = Samples(sampler, str(tmp_path), 1, spatial_keys=keys, dataset_dir=str(tmp_path / "masks"))
        assert samples.label_names == names
        (sample,) = samples.samples
        assert [sample.labels[key].parent.name for key in keys] == [f"{names[key]}sTr" for key in keys]


def test_another_contrast_is_made_on_the_grid_of_the_given_one(weights, tmp_path):
    """The commands of the manual: from the T1 of each patient, in coarser voxels, to the T2."""
    for i in range(3):
        anat = tmp_path / "bids" / f"sub-{i}" / "anat"
        save_volume(anat / f"sub-{i}_T2w.nii.gz", SIZE, i, np.diag([*SPACING, 1.0]))
        save_volume(anat / f"sub-{i}_T1w.nii.gz", (14, 18, 5), i + 5, np.diag([1.0, 1.5, 4.0, 1.0]))
    keys = {"spatial_keys": ["T1w"]}
    latents = encode(tmp_path / "bids", tmp_path / "latents", weights, image_glob="**/*_T2w.nii.gz", **keys)
    assert sorted(path.name for path in latents.rglob("sub-0_*.nii.gz")) == [
        "sub-0_T2w_latent.nii.gz",
        "sub-0_T2w_spatial-T1w.nii.gz",
    ]
    generator = save_untrained_generator(latents, tmp_path / "contrast", val_fraction=0.34, **keys)
    affine, made = np.array([[0, -1.5, 0, 9.0], [1.0, 0, 0, -2], [0, 0, 2.0, 5], [0, 0, 0, 1]]), []
    for seed in (1, 2):
        given = save_volume(tmp_path / str(seed) / "sub-9_T1w.nii.gz", SIZE, seed, affine)
        generate(generator, weights, tmp_path / "out" / str(seed), dataset_dir=given.parent, num_samples=1, **keys)
        made.append(nib.load(tmp_path / "out" / str(seed) / "imagesTr" / "sub-9_sample_00_0000.nii.gz"))
        assert made[-1].shape == SIZE and np.array_equal(made[-1].affine, affine)
    assert not np.array_equal(made[0].get_fdata(), made[1].get_fdata())  # the T1 decides
