"""A latent from elsewhere is decoded into the output folder and within memory, or refused with an error that names it."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, LoadImaged, Orientationd

from scripts.autoencoderkl import Reconstructor
from scripts.bundle.errors import reason
from scripts.bundle.weights import save_weights
from scripts.data import DescribeSourced, LoadLatentd, RestoreVolumed, SaveImageOfRecordd, SaveLatentd, ScaleIntensityWindowd
from scripts.data.file_names import output_path
from scripts.data.latents import find_latents, save_latent_scale, without_whole_latents
from tests.conftest import save_volume

NAME = "head_latent"
CASES = 400
OUTSIDE = [
    "../../../x/y.nii.gz",
    "/x/y.nii.gz",
    "..",
    "a/../../y.nii.gz",
    "..\\..\\y.nii.gz",
    "C:\\x\\y.nii.gz",
    "C:y.nii.gz",
    "\\\\host\\x\\y.nii.gz",
    "a/.. /y.nii.gz",  # Windows ignores the space
    ".",
    "",
    "a\0.nii.gz",
    "a\x1b[2J.nii.gz",
    "\ud800.nii.gz",
]
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, 2**31, 2**63, -(2**63), 10**400, 1e-320, 1e308, float("inf"), float("nan")),
    *("a", "x" * 300, "x/" * 300, "x/" * 3000, *OUTSIDE),
    *("O", "<c8", "<U1000000000", "V8", "i4,f4", "<f2", "<f16", "datetime64[s]", ">i2", "<f4"),
    *([], [1], [0, 0, 0], [-1, 2, 3], [8, 8, 8], [32767] * 3, [10**6] * 3, [1000] * 3, [1.0, 2.0, 3.0], [[]], [[[[[[1]]]]]]),
    *([[0] * 4] * 4, [[float("nan")] * 4] * 4, np.eye(4).tolist(), (1e300 * np.eye(4)).tolist(), np.ones((4, 4)).tolist()),
    *({}, {"a": 1}, ["a"], ["a", "b", "c"], [None] * 3),
]


def restore_and_save(key: str, output_dir: str, postfix: str) -> Compose:
    return Compose([RestoreVolumed(key), SaveImageOfRecordd(key, output_dir, postfix)])


class Encoded:
    """A network, its weights, and a latent that it made of a volume."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.network = Reconstructor(
            3,
            channels=(4, 4),
            num_res_blocks=1,
            attention_levels=(False, False),
            norm_num_groups=1,
            downsample_factors=[2],
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        ).eval()
        self.latents, self.weights = folder / "latents", str(folder / "model.pt")
        save_weights(self.network, self.weights)
        save_volume(folder / "volumes" / "head.nii.gz", (9, 8, 6), affine=np.diag([-1.0, 1.0, 2.0, 1.0]))
        item = Compose(
            [
                LoadImaged("image", reader="scripts.data.VolumeReader", ensure_channel_first=True),
                Orientationd("image", "RAS", labels=None),
                ScaleIntensityWindowd("image", [0.0, 99.9]),
                DescribeSourced("image", str(folder / "volumes")),
            ]
        )({"image": str(folder / "volumes" / "head.nii.gz")})
        padded = torch.nn.functional.pad(item["image"].as_tensor()[None], (0, 0, 0, 0, 0, 1))
        with torch.no_grad():
            item["pred"] = self.network.encode(padded)[0][0]
        SaveLatentd("pred", str(self.latents), self.network, self.weights, {})(item)

    def decode(self, latents: Path, output_dir: Path) -> Path:
        item = LoadLatentd("image", self.network, self.weights, str(latents))({"image": str(latents / f"{NAME}.nii.gz")})
        with torch.no_grad():
            item["pred"] = self.network.decode(item["image"][None])[0]
        restore_and_save("pred", str(output_dir), "reconstruction")(item)
        return output_dir / "head_reconstruction.nii.gz"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Encoded:
    return Encoded(tmp_path_factory.mktemp("encoded"))


@pytest.fixture
def latents(encoded, tmp_path) -> Path:
    return shutil.copytree(encoded.latents, tmp_path / "a" / "b" / "c" / "latents")


def described(latents: Path, **changes: Any) -> dict[str, Any]:
    """The description of the latent, with changes written to it."""
    path = latents / f"{NAME}.json"
    description = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(description))
    return description


def header(affine: Any, shape: list[int], data_type: Any = np.int16) -> str:
    """A NIfTI header, as descriptions have it."""
    found = nib.Nifti1Header()
    found.set_data_dtype(data_type)
    found.set_data_shape(shape)
    found.set_sform(affine, 1)
    return found.binaryblock.hex()


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shape", ["relative", "absolute"])
def test_source_cannot_leave_the_output_folder(encoded, latents, tmp_path, shape):
    source = {"relative": "../../../x/y.nii.gz", "absolute": f"{tmp_path}/x/y.nii.gz"}[shape]
    described(latents, source=source)
    before = files_below(tmp_path)
    with pytest.raises(ValueError, match=rf"{NAME}\.json: `source` is .*; it must be a path within a folder"):
        encoded.decode(latents, tmp_path / "a" / "b" / "c" / "out")
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("source", OUTSIDE, ids=range(len(OUTSIDE)))
def test_path_outside_of_a_folder_is_refused_wherever_a_result_is_named(source):
    with pytest.raises(ValueError, match="outside of `output_dir`"):
        output_path("out", source, "reconstruction")


INSIDE = ["a.nii.gz", "sub-01/anat/T1w.nii", "1.2.840/10.5", "..a/b..nii.gz", "ä/b c.nii", "\udce4.nii"]


@pytest.mark.parametrize("source", INSIDE, ids=range(len(INSIDE)))
def test_path_within_a_folder_is_kept(source):
    assert output_path("out", source, "x").parent == Path("out", source).parent


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"header": header(np.diag([-9 / 2e4, 8 / 2e4, 12 / 2e4, 1]), [20000] * 3)}, r"take [\d,]+ GiB, and this"),
        ({"header": header(np.diag([-1, 1, 2, 1]), [30000, 8, 6])}, "does not lie where `preprocessed_affine` does"),
        ({"preprocessed_shape": [32767] * 3}, "does not lie where|take .* GiB"),
        ({"preprocessed_shape": [8, 8, 6]}, r"has the shape \(5, 4, 3, 3\); .* it must be \(4, 4, 3, 3\)"),
        ({"network": {"spatial_dims": 3}}, "`network.channels` is missing"),
        ({"header": "O"}, "`header` is not that of a NIfTI file"),
        ({"header": "00" * 348}, "`header` is"),
        ({"header": header(np.diag([-1, 1, 2, 1]), [9, 8, 6], np.complex64)}, "`header` is that of no volume: 'c'"),
        ({"header": header(np.diag([-1, 0, 2, 1]), [9, 8, 6])}, "`header` is that of no volume: .* affine"),
        ({"header": header(np.diag([-1, 1, 2, 1]), [9, 8])}, "`header` is that of no volume"),
        ({"preprocessed_affine": np.ones((4, 4)).tolist()}, "`preprocessed_affine` is .* must be an affine"),
        ({"intensity_low": [0.0, 1.0]}, "`intensity_low` or `intensity_high` is not of"),
        ({"intensity_low": [5.0], "intensity_high": [5.0]}, "are no window"),
        ({"intensity_low": [0.0], "intensity_high": [1e308]}, "are no window"),
    ],
)
def test_fields_that_disagree_are_named(encoded, latents, tmp_path, changes, words):
    described(latents, **changes)
    with pytest.raises(ValueError, match=rf"{NAME}.*({words})"):
        encoded.decode(latents, tmp_path / "out")


def test_false_claim_and_infinite_values_in_the_latent_itself_are_refused(encoded, latents, tmp_path):
    from scripts.bundle.files import content_hash

    path = latents / f"{NAME}.nii.gz"
    image = nib.load(path)
    values = image.get_fdata()
    values[0, 0, 0, 0] = np.inf
    nib.save(nib.Nifti1Image(values.astype(np.float32), image.affine), path)
    described(latents, latent_sha256=content_hash(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{NAME}\.nii\.gz has values that are NaN or infinite"):
        encoded.decode(latents, tmp_path / "out")
    header = image.header.copy()
    header["dim"][1:5], header["vox_offset"] = (30000, 30000, 30000, 3), 352
    with nib.openers.Opener(str(path), "wb") as file:
        file.write(header.binaryblock)
    described(latents, latent_sha256=content_hash(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{NAME}\.nii\.gz has the shape \(30000, 30000, 30000, 3\)"):
        encoded.decode(latents, tmp_path / "out")


def test_scale_of_latents_leaves_out_descriptions_that_are_false(encoded, latents):
    save_latent_scale(str(latents), encoded.weights)
    scale = (latents / "latent_scale.json").read_bytes()
    shutil.copy(latents / f"{NAME}.nii.gz", latents / "other_latent.nii.gz")
    (latents / "other_latent.json").write_text(json.dumps({**described(latents), "count": 10**400}))
    save_latent_scale(str(latents), encoded.weights)
    assert (latents / "latent_scale.json").read_bytes() == scale


def test_latent_of_another_program_is_decoded_in_its_own_place(encoded, latents, tmp_path):
    own = nib.load(latents / f"{NAME}.nii.gz")
    for name in ("sample.nii.gz", "head.nii.gz"):
        nib.save(nib.Nifti1Image(own.get_fdata(dtype=np.float32), own.affine), latents / name)
    (latents / "other_latent.nii.gz.unfinished").touch()  # of a run that was killed
    items = find_latents(str(latents))
    assert [(Path(item["image"]).name, item["keep_ending"]) for item in items] == [
        ("head.nii.gz", True),  # the volume of the other latent has the name already
        (f"{NAME}.nii.gz", False),
        ("sample.nii.gz", False),
    ]
    before = nib.load(encoded.decode(latents, tmp_path / "own"))
    for window in (None, [-1000, 1000]):
        item = LoadLatentd("image", encoded.network, encoded.weights, str(latents), window)(items[2])
        with torch.no_grad():
            item["pred"] = encoded.network.decode(item["image"][None])[0]
        restore_and_save("pred", str(tmp_path / "out"), "x")(item)
        after = nib.load(tmp_path / "out" / "sample_x.nii.gz")
        assert after.shape == (10, 8, 6)
        assert np.allclose(after.affine, nib.as_closest_canonical(before).affine, atol=1e-5)
        low, high = window or (0, 1)
        expected = item["pred"][0].clamp(0, 1).numpy() * (high - low) + low
        assert np.allclose(after.get_fdata(), expected, atol=1e-3)


def test_latents_of_conditions_are_known_by_their_names_whatever_the_name_of_a_volume(latents):
    for name in ("head_spatial-t2", "head_labels-dseg", "sub-1_spatial-MNI_T1w_latent", "labels-1"):
        shutil.copy(latents / f"{NAME}.nii.gz", latents / f"{name}.nii.gz")
    names = ["head_latent.nii.gz", "labels-1.nii.gz", "sub-1_spatial-MNI_T1w_latent.nii.gz"]
    assert [Path(item["image"]).name for item in find_latents(str(latents))] == names


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 2), (3, 5, 4, 2)])
def test_volume_that_is_no_latent_of_the_network_is_refused(encoded, latents, shape):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), latents / "sample.nii.gz")
    with pytest.raises(ValueError, match="the last axis must be the 3 channels of the network"):
        LoadLatentd("image", encoded.network, encoded.weights, str(latents))({"image": str(latents / "sample.nii.gz")})


def test_latent_counts_as_made_until_its_volume_is_replaced(encoded, latents):
    volumes = encoded.latents.parent / "volumes"
    items = [{"image": str(volumes / "head.nii.gz")}]

    def left() -> list[dict[str, str]]:
        return without_whole_latents(items, str(volumes), str(latents), encoded.weights, {}, {})

    time = (volumes / "head.nii.gz").stat().st_mtime_ns
    assert left() == []
    os.utime(volumes / "head.nii.gz", ns=(0, 0))  # an older file
    assert left() == items
    os.utime(volumes / "head.nii.gz", ns=(time, time))
    assert left() == []


def mutated(description: dict[str, Any], chance: random.Random) -> bytes:
    """A changed description, or text that is not a description."""
    kind = chance.randrange(8)
    if kind == 0:
        text = bytearray(json.dumps(description).encode())
        for _ in range(chance.randint(1, 3)):
            text[chance.randrange(len(text))] = chance.randrange(256)
        return bytes(text)
    if kind == 1:
        return chance.choice([b"", b"[" * 10**5, b"\xff", b"NaN", b"null", b"[]", b'"a"', b" " * 2**21, b'{"a":' * 10**5])
    description = json.loads(json.dumps(description))
    for name in chance.sample(sorted(description), chance.randint(1, 3)):
        value = description[name]
        if kind == 2:
            del description[name]
        elif kind == 3 and isinstance(value, list):
            value[chance.randrange(len(value))] = chance.choice(NASTY)
        elif kind == 4 and isinstance(value, (int, float)):
            description[name] = value * chance.choice([-1, 0, 2, 1e6, 1e-6, 1e300])
        elif kind == 5 and isinstance(value, list):
            factor = chance.choice([-1, 0, 2, 10, 1000])
            description[name] = (np.array(value) * factor).tolist()
        else:
            description[name] = chance.choice(NASTY)
    if kind == 6:
        description["source"] = chance.choice(OUTSIDE)
    return json.dumps(description).encode()


def test_no_mutated_description_writes_elsewhere_or_takes_memory_or_fails_without_a_name(encoded, latents, tmp_path):
    chance = random.Random(0)
    out = tmp_path / "a" / "b" / "c" / "out"
    before, description, refused = files_below(tmp_path), described(latents), 0
    tracemalloc.start()
    for i in range(CASES):
        text = mutated(description, chance)
        (latents / f"{NAME}.json").write_bytes(text)
        try:
            encoded.decode(latents, out)
        except Exception as raised:
            refused, error = refused + 1, reason(raised)
            assert isinstance(error, (ValueError, OSError)), (i, text[:2000], error)
            assert NAME in str(error) or str(out) in str(error), (i, text[:2000], error)
            assert len(str(error)) < 10_000, (i, error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert not Path("/x").exists()
    elsewhere = {path for path in files_below(tmp_path) if out not in path.parents}
    assert elsewhere == before
    assert CASES // 2 < refused < CASES - 5  # some changes are harmless
