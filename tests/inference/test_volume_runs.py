"""Whole volumes in the inference pipelines: results have the form of the input files, and decoding needs only latents."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts.autoencoderkl import Reconstructor
from scripts.bundle.weights import save_weights
from scripts.data.latents import read_description
from scripts.data.volume_reader import NiftiHeader
from tests.conftest import ROOT, head_like, save_volume
from tests.processes import bundle_run

NETWORK = {"channels": [4, 8, 8], "latent_channels": 8, "device": "cpu", "num_workers": 0, "amp": False}
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([-1.0, 1.0, 2.0]), [10.0, -20.0, 30.0])


def workflow(run_id: str, dataset_dir: Path, output_dir: Path, ckpt_dir: Path, **overrides) -> ConfigWorkflow:
    found = ConfigWorkflow(
        str(ROOT / "configs" / "inference.json"),
        workflow_type="infer",
        run_id=run_id,
        logging_file=False,
        bundle_root=str(ROOT),
        dataset_dir=str(dataset_dir),
        output_dir=str(output_dir),
        ckpt_dir=str(ckpt_dir),
        **{**NETWORK, **overrides},
    )
    found.initialize()
    return found


def run(*args, **overrides) -> None:
    workflow(*args, **overrides).run()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with weights of a small untrained network, whose linear shortcut gives a fair reconstruction."""
    folder = tmp_path_factory.mktemp("weights")
    flow = ConfigWorkflow(
        str(ROOT / "configs" / "inference.json"), workflow_type="infer", logging_file=False, bundle_root=str(ROOT), **NETWORK
    )
    torch.manual_seed(0)
    network = flow.parser.get_parsed_content("network_def")
    assert isinstance(network, Reconstructor)
    save_weights(network, folder / "model.pt")
    return folder


def save_as(
    path: Path, data: np.ndarray, affine: np.ndarray, endianness: str = "<", slope: tuple[float, float] | None = None
):
    header = nib.Nifti1Header(endianness=endianness)
    header.set_data_dtype(data.dtype.newbyteorder(endianness))
    header.set_xyzt_units("mm", "sec")
    image = nib.Nifti1Image(data, affine, header)
    if slope is not None:
        image.header.set_slope_inter(*slope)
    nib.save(image, path)


HEAD = head_like((21, 26, 19))
LABELS = {"lps_uint8": 5, "slope": 3}  # volumes of two processes and the label that their label maps have
KINDS = {
    "oblique_int16": (HEAD, OBLIQUE),
    "lps_uint8": ((HEAD / HEAD.max() * 255).clip(0).astype(np.uint8), np.diag([-1.0, -1.0, 1.0, 1.0])),
    "ras_float64": (HEAD / 1000.0, np.eye(4)),
    "big_endian": (HEAD, np.diag([2.0, 1.0, 1.0, 1.0]), ">"),
    "slope": (HEAD, np.eye(4), "<", (0.5, -100.0)),
    "turned": (HEAD, np.array([[0, 0, 1.5, 3], [1, 0, 0, 4], [0, -1, 0, 5], [0, 0, 0, 1]], dtype=float)),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """One file of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, arguments in KINDS.items():
        save_as(folder / f"{name}.nii.gz", *arguments)
    return folder


@pytest.fixture(scope="module")
def reconstructed(kinds, weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reconstructed")
    run("evaluating", kinds, folder, weights)
    return folder


@pytest.fixture(scope="module")
def encoded(kinds, weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    run("encoding", kinds, folder, weights)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_has_the_form_of_its_volumes_file(kinds, reconstructed, kind):
    before, after = nib.load(kinds / f"{kind}.nii.gz"), nib.load(reconstructed / f"{kind}_reconstruction.nii.gz")
    assert after.shape == before.shape
    assert np.allclose(after.affine, before.affine, atol=1e-6)
    assert after.get_data_dtype() == before.get_data_dtype()
    assert after.header.endianness == before.header.endianness
    assert after.header.get_xyzt_units() == before.header.get_xyzt_units()
    assert (after.dataobj.slope, after.dataobj.inter) == (before.dataobj.slope, before.dataobj.inter)
    assert [int(after.header[code]) for code in ("qform_code", "sform_code")] == [
        int(before.header[code]) for code in ("qform_code", "sform_code")
    ]
    image, reconstruction = before.get_fdata(), after.get_fdata()
    assert np.corrcoef(image.ravel(), reconstruction.ravel())[0, 1] > 0.8
    assert abs(image.mean() - reconstruction.mean()) < 0.1 * image.std()


def test_decoded_latent_equals_the_reconstruction_bit_for_bit(encoded, weights, reconstructed, tmp_path):
    latents = shutil.copytree(encoded, tmp_path / "elsewhere")
    run("decoding", latents, tmp_path / "out", weights)
    names = sorted(path.name for path in reconstructed.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (reconstructed / name).read_bytes(), name


def test_resampled_and_streamed_volumes_are_decoded_to_the_same_bits_too(weights, tmp_path):
    source = save_volume(tmp_path / "in" / "thick.nii.gz", (24, 20, 9), affine=np.diag([1.0, 1.0, 3.0, 1.0]))
    settings = {"spacing": [1.5, 1.5, 1.5], "memory_gb": 1e-4}
    run("evaluating", tmp_path / "in", tmp_path / "whole", weights, **settings)
    run("encoding", tmp_path / "in", tmp_path / "latents", weights, **settings)
    run("decoding", tmp_path / "latents", tmp_path / "decoded", weights, **settings)
    name = "thick_reconstruction.nii.gz"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "decoded" / name).read_bytes()
    before, after = nib.load(source), nib.load(tmp_path / "whole" / name)
    assert after.shape == before.shape and np.array_equal(after.affine, before.affine)
    assert np.corrcoef(before.get_fdata().ravel(), after.get_fdata().ravel())[0, 1] > 0.8


@pytest.mark.parametrize("spacing", [None, [1.4, 1.0, 1.2]])
def test_voxels_without_a_measurement_come_back_as_they_were(weights, tmp_path, spacing):
    turned, outside = KINDS["turned"][1], np.hypot(*np.ogrid[-1:1:21j, -1:1:26j])[..., None] > np.ones(19)
    masked = np.where(outside, np.nan, HEAD).astype(np.float32)
    masked[10, 12, 9:12] = np.inf, -np.inf, -1e9  # the last one is a voxel like others, and clipped
    (tmp_path / "in").mkdir()
    save_as(tmp_path / "in" / "masked.nii.gz", masked, turned)
    save_as(tmp_path / "in" / "padded.nii.gz", np.where(outside, -3024, HEAD - 1024).astype(np.int16), turned)
    run("evaluating", tmp_path / "in", tmp_path / "out", weights, spacing=spacing)
    run("encoding", tmp_path / "in", tmp_path / "latents", weights, spacing=spacing)
    run("decoding", tmp_path / "latents", tmp_path / "out2", weights)
    for name, missing in {"masked": ~np.isfinite(masked), "padded": outside}.items():
        before = nib.load(tmp_path / "in" / f"{name}.nii.gz").get_fdata()
        for folder in ("out", "out2"):
            after = nib.load(tmp_path / folder / f"{name}_reconstruction.nii.gz").get_fdata()
            assert np.array_equal(after[missing], before[missing], equal_nan=True)
            measured = ~missing & (before > -1e9)
            assert after[~missing].min() >= before[measured].min() - 1
            assert np.corrcoef(before[measured], after[measured])[0, 1] > 0.8
        assert (tmp_path / "out" / f"{name}_reconstruction.nii.gz").read_bytes() == (
            tmp_path / "out2" / f"{name}_reconstruction.nii.gz"
        ).read_bytes()


def test_latent_lies_over_its_volume_and_says_where_it_comes_from(kinds, encoded):
    latent = nib.load(encoded / "oblique_int16_latent.nii.gz")
    volume = nib.as_closest_canonical(nib.load(kinds / "oblique_int16.nii.gz"))
    assert latent.shape == (3, 4, 3, 8)  # channels last
    first_block = nib.affines.apply_affine(volume.affine, [3.5, 3.5, 3.5])
    assert np.allclose(latent.affine[:3, 3], first_block, atol=1e-5)
    assert np.allclose(latent.affine[:3, :3], 8 * volume.affine[:3, :3], atol=1e-5)
    described = json.loads((encoded / "oblique_int16_latent.json").read_text())
    assert described["source"] == "oblique_int16.nii.gz"
    assert described["preprocessed_shape"] == [21, 26, 19]
    assert read_description(encoded / "oblique_int16_latent.nii.gz").stored["data_type"] == "<i2"
    assert described["network"]["latent_channels"] == 8
    assert described["clipped_below"] == 0  # the default window goes to the 99.9th percentile
    assert 0 < described["clipped_above"] < 0.01


def test_latent_scale_gives_the_data_set_unit_deviation(encoded):
    latents = [nib.load(path).get_fdata().ravel() for path in encoded.glob("*_latent.nii.gz")]
    scale = json.loads((encoded / "latent_scale.json").read_text())["latent_scale"]
    assert scale * np.concatenate(latents).std() == pytest.approx(1, rel=1e-4)


def test_interrupted_encoding_ends_with_the_files_of_an_undisturbed_one(kinds, encoded, weights, tmp_path):
    out = shutil.copytree(encoded, tmp_path / "out")
    (out / "slope_latent.json").unlink()  # killed between the two files
    (out / "turned_latent.nii.gz").write_bytes((out / "turned_latent.nii.gz").read_bytes()[:-10])
    (out / "big_endian_latent.json").write_text('{"half')
    (out / "latent_scale.json").unlink()
    untouched = out / "lps_uint8_latent.nii.gz"
    before = untouched.stat().st_mtime_ns
    flow = workflow("encoding", kinds, out, weights)
    left = flow.parser.get_parsed_content("encode#dataset").data
    assert sorted(Path(item["image"]).name for item in left) == ["big_endian.nii.gz", "slope.nii.gz", "turned.nii.gz"]
    flow.run()
    assert untouched.stat().st_mtime_ns == before
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in encoded.iterdir())
    for path in encoded.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_killed_encoding_ends_with_the_files_of_an_undisturbed_one(weights, tmp_path):
    data, out, undisturbed = tmp_path / "in", tmp_path / "out", tmp_path / "undisturbed"
    for i in range(40):
        save_volume(data / f"{i:02d}.nii.gz", (16, 18, 20), seed=i)
    command = [sys.executable, "-m", "monai.bundle", "run", "encoding", "--config_file", "configs/inference.json"]
    keys = {"dataset_dir": data, "output_dir": out, "ckpt_dir": weights, **NETWORK}
    command += [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        deadline = time.monotonic() + 240
        while len(list(out.glob("*.json"))) < 3 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        job.kill()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*_latent.json")}
    assert job.returncode == -signal.SIGKILL and 3 <= len(done) < 40
    run("encoding", data, out, weights)
    run("encoding", data, undisturbed, weights)
    assert {path: path.stat().st_mtime_ns for path in done} == done  # complete latents are not written again
    names = sorted(path.name for path in undisturbed.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names and len(names) == 81
    for name in names:
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.parametrize("change", [{"intensity_percentiles": [0.0, 99.0]}, {"amp": True}])
def test_latents_of_other_settings_are_made_again(kinds, encoded, weights, tmp_path, change):
    out = shutil.copytree(encoded, tmp_path / "out")
    assert len(workflow("encoding", kinds, out, weights, **change).parser.get_parsed_content("encode#dataset")) == len(KINDS)


def test_latents_of_other_weights_are_refused(encoded, weights, tmp_path, capsys):
    network = Reconstructor(**json.loads((weights / "model.json").read_text())["network"])
    save_weights(network, tmp_path / "other" / "model.pt")
    with pytest.raises(SystemExit) as stopped:
        run("decoding", encoded, tmp_path / "out", tmp_path / "other")
    assert "could not be done (6)" in str(stopped.value)
    assert "was made with other weights than" in str(stopped.value)
    assert not list((tmp_path / "out").iterdir())


def test_latents_of_another_network_are_refused_with_what_differs(encoded, tmp_path):
    arguments = json.loads((encoded / "slope_latent.json").read_text())["network"]
    other = Reconstructor(**{**arguments, "downsample_factors": [4, 2]})
    save_weights(other, tmp_path / "model.pt")
    with pytest.raises(SystemExit, match="`downsample_factors` is .* there and .* here"):
        run("decoding", encoded, tmp_path / "out", tmp_path, downsample_factors=[4, 2])


def test_latents_with_false_descriptions_are_named_and_the_good_ones_decoded(encoded, weights, reconstructed, tmp_path):
    latents, out = shutil.copytree(encoded, tmp_path / "a" / "b" / "latents"), tmp_path / "a" / "b" / "out"
    false = {
        "big_endian": ({"source": "../../../x/y.nii.gz"}, "`source` is '../../../x/y.nii.gz'"),
        "lps_uint8": ({"source": f"{tmp_path}/x/y.nii.gz"}, "`source` is '/"),
        "oblique_int16": ({"header": "O"}, "`header` is not that of a NIfTI file"),
        "slope": ({"header": NiftiHeader.of_affine(np.eye(4), [30000] * 3).header}, "`header` does not lie where"),
        "turned": (None, "is damaged, or not JSON"),
    }
    for name, (change, _) in false.items():
        path = latents / f"{name}_latent.json"
        path.write_text("[" * 10**5 if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    keys = {
        key: str(value) for key, value in {**NETWORK, "dataset_dir": latents, "output_dir": out, "ckpt_dir": weights}.items()
    }
    process = bundle_run("decoding", "inference.json", check=False, **keys)
    lines = process.stdout.rstrip().splitlines()[-6:]
    assert process.returncode == 1 and lines[0] == "could not be done (5):"
    for line, (name, (_, words)) in zip(lines[1:], false.items()):
        assert f"{name}_latent.nii.gz: " in line and words in line, line
    assert {path for path in tmp_path.rglob("*") if path.is_file()} - before == {out / "ras_float64_reconstruction.nii.gz"}
    name = "ras_float64_reconstruction.nii.gz"
    assert (out / name).read_bytes() == (reconstructed / name).read_bytes()


def test_bad_files_are_named_and_the_good_ones_done(weights, tmp_path):
    data, out = tmp_path / "in", tmp_path / "out"
    save_volume(data / "good.nii.gz", (12, 20, 17))
    (data / "text.nii.gz").write_text("no volume")
    whole = save_volume(data / "truncated.nii", (8, 8, 8)).read_bytes()
    (data / "truncated.nii").write_bytes(whole[:600])
    save_as(data / "zeros.nii.gz", np.zeros((8, 8, 8), np.int16), np.eye(4))
    save_as(data / "thin.nii.gz", head_like((8, 8, 1)), np.eye(4))
    save_as(data / "series.nii.gz", np.stack([head_like((8, 8, 8))] * 3, axis=-1), np.eye(4))
    save_as(data / "nan.nii.gz", np.full((8, 8, 8), np.nan, np.float32), np.eye(4))
    for run_id in ("evaluating", "encoding"):
        with pytest.raises(SystemExit) as stopped:
            run(run_id, data, out / run_id, weights)
        lines = str(stopped.value).splitlines()
        assert lines[0] == "could not be done (6):"
        words = {
            "nan.nii.gz": "NaN, infinite or padding in 100.0%",
            "series.nii.gz": "has the shape (8, 8, 8, 3)",
            "text.nii.gz": "cannot be read to its end",
            "thin.nii.gz": "a 2D slice",
            "truncated.nii": "cannot be read to its end",
            "zeros.nii.gz": "is constant",
        }
        for line, (name, reason) in zip(lines[1:], words.items()):
            assert name in line and reason in line, line
        assert len(list((out / run_id).glob("good_*.nii.gz"))) == 1


def test_empty_folder_and_read_only_output_are_errors_at_the_start(weights, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "file").write_text("")
    for out, words in (("file/out", "Not a directory"), ("out", "no volume below `dataset_dir`")):
        with pytest.raises(RuntimeError) as stopped:  # MONAI's, raised from the error of an expression of the config
            run("encoding", tmp_path / "in", tmp_path / out, weights)
        assert words in str(stopped.value.__cause__) or words in str(stopped.value.__cause__.__cause__)


def test_dicom_series_are_folders_and_become_nifti(weights, tmp_path):
    dicom_files = pytest.importorskip("tests.dicom_files")
    data = tmp_path / "in"
    names = ("3.000000-CT THIN 1.25-11111", "3.000000-CT THIN 1.25-22222", "[PET]")
    for name in names:
        dicom_files.save_series(
            data / "patient" / name, HEAD.astype(np.int16), orientation=dicom_files.TILTED, intercept=-1000
        )
    (data / "patient" / "notes").mkdir()
    (data / "patient" / "notes" / "text").write_text("no volume")
    for run_id in ("evaluating", "encoding"):
        with pytest.raises(SystemExit) as stopped:
            run(run_id, data, tmp_path / run_id, weights, image_glob="**/")
        assert "could not be done (1)" in str(stopped.value) and "holds no DICOM image (1 other files)" in str(stopped.value)
    run("decoding", tmp_path / "encoding", tmp_path / "decoding", weights)
    for name in names:
        path = f"patient/{name}_reconstruction.nii.gz"
        result = nib.load(tmp_path / "evaluating" / path)
        assert result.shape == HEAD.shape
        assert np.allclose(result.affine, dicom_files.affine(dicom_files.TILTED), atol=1e-4)
        hounsfield = HEAD - 1000.0
        assert np.corrcoef(hounsfield.ravel(), result.get_fdata().ravel())[0, 1] > 0.8
        assert abs(hounsfield.mean() - result.get_fdata().mean()) < 0.1 * hounsfield.std()
        assert (tmp_path / "decoding" / path).read_bytes() == (tmp_path / "evaluating" / path).read_bytes()


def test_read_only_output_folder_is_an_error_at_the_start():
    from scripts.inference.volume_runs import join_processes

    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        out = Path(folder) / "out"
        out.mkdir()
        os.chmod(folder, 0o755)
        os.chmod(out, 0o555)
        user = os.geteuid()
        if user == 0:  # root may write everywhere
            os.seteuid(65534)
        try:
            with pytest.raises(OSError, match="Permission denied: .*/out/"):
                join_processes(str(out))
        finally:
            os.seteuid(user)


def test_volumes_of_one_name_keep_their_endings(weights, tmp_path):
    for name in ("a.nii", "a.nii.gz", "b.NII.gz", "a.nii.nii"):
        save_volume(tmp_path / "in" / name, HEAD.shape)
    for verb, source, postfix in (
        ("evaluating", tmp_path / "in", "reconstruction"),
        ("encoding", tmp_path / "in", "latent"),
        ("decoding", tmp_path / "encoding", "reconstruction"),
    ):
        run(verb, source, tmp_path / verb, weights)
        found = {path.name for path in (tmp_path / verb).glob("*.nii.gz")}
        assert found == {f"{name}_{postfix}.nii.gz" for name in ("a.nii", "a.nii.gz", "b", "a.nii.nii")}


def test_label_map_without_a_telling_name_is_left_out_and_told(weights, tmp_path, caplog):
    save_volume(tmp_path / "in" / "a.nii", HEAD.shape)
    nib.save(nib.Nifti1Image((HEAD > 0).astype(np.uint8), np.eye(4)), tmp_path / "in" / "b.nii")
    run("evaluating", tmp_path / "in", tmp_path / "out", weights)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_reconstruction.nii.gz"]
    assert "b.nii is left out: it looks like a label map" in caplog.text
    run("evaluating", tmp_path / "in", tmp_path / "out", weights, image_glob="*.nii")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_results_inside_the_folder_of_volumes_are_no_input(weights, tmp_path):
    save_volume(tmp_path / "a.nii", HEAD.shape)
    for _ in range(2):
        run("evaluating", tmp_path, tmp_path / "out", weights)
        run("encoding", tmp_path, tmp_path / "latents", weights)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_reconstruction.nii.gz"]
    assert len(list((tmp_path / "latents").rglob("*.nii.gz"))) == 1


def test_two_processes_share_the_volumes_and_fail_together(kinds, encoded, weights, tmp_path):
    data = shutil.copytree(kinds, tmp_path / "in")
    (data / "text.nii.gz").write_text("no volume")
    for name, label in LABELS.items():
        nib.save(nib.Nifti1Image(np.full(HEAD.shape, label, np.uint8), KINDS[name][1]), data / f"{name}_label.nii.gz")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "monai.bundle"]
    command += ["run", "encoding", "--config_file", "configs/inference.json", "--dataset_dir", str(data)]
    command += ["--output_dir", str(tmp_path / "out"), "--ckpt_dir", str(weights)]
    command += ["--logging_file", "configs/logging.conf"]
    command += [part for key, value in {**NETWORK, "spatial_keys": ["label"]}.items() for part in (f"--{key}", str(value))]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1
    assert "could not be done (1)" in process.stdout
    further = [f"{name}_{kind}-label.nii.gz" for name in LABELS for kind in ("labels", "spatial")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*further, *(p.name for p in encoded.iterdir())])
    for name in LABELS:
        kind = read_description(tmp_path / "out" / f"{name}_latent.nii.gz").spatial["label"].kind
        assert kind.classes == tuple(sorted(LABELS.values()))
    for path in encoded.glob("*.nii.gz"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
        assert process.stdout.count(f"{path.name}: ") == 1  # each is written once


def test_latents_and_their_scale_suit_monais_latent_diffusion(encoded, weights):
    from monai.inferers import LatentDiffusionInferer
    from monai.networks.nets import DiffusionModelUNet
    from monai.networks.schedulers import DDIMScheduler

    network = Reconstructor(**json.loads((weights / "model.json").read_text())["network"])
    scale = json.loads((encoded / "latent_scale.json").read_text())["latent_scale"]
    latent = torch.from_numpy(nib.load(encoded / "slope_latent.nii.gz").get_fdata(dtype=np.float32)).movedim(-1, 0)[None]
    unet = DiffusionModelUNet(3, 8, 8, channels=(8, 8), num_res_blocks=1, attention_levels=(False, False), norm_num_groups=2)
    scheduler = DDIMScheduler(num_train_timesteps=10)
    scheduler.set_timesteps(2)
    inferer = LatentDiffusionInferer(scheduler, scale_factor=scale)
    latent = latent[..., :2, :2, :2]
    sample = inferer.sample(torch.randn_like(latent), network, unet, scheduler, verbose=False)
    assert sample.shape == (1, 1, 16, 16, 16)
    with torch.no_grad():
        image = network.decode_stage_2_outputs(latent * scale / inferer.scale_factor)
    assert 0.2 < image.std() < 5 * latent.std()
