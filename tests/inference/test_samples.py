"""Samples of configs/generate.json: files that say what they are, the same whoever makes them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import verify_net_in_out

from scripts.bundle.weights import save_weights
from scripts.diffusion.generator import describe, load_generator
from scripts.diffusion.preconditioning import Denoiser
from scripts.diffusion.sampler import Sampler
from tests.conftest import ROOT, save_volume
from tests.diffusion.runs import encode, generate, make_weights, save_untrained_generator, workflow
from tests.inference.test_exported_networks import run_documented
from tests.training_run import free_port

SIZE, SPACING = (14, 18, 10), (1.0, 1.5, 2.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_weights(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def generator(weights, tmp_path_factory) -> Path:
    """A folder with a generator that has learned nothing, of latents with conditions."""
    folder = tmp_path_factory.mktemp("generator")
    for i in range(4):
        save_volume(folder / "volumes" / f"sub-{i}" / "T1w.nii.gz", SIZE, i, np.diag([*SPACING, 1.0]))
    rows = [f"sub-{i}\t{20 + 5 * i}\t{'FM'[i % 2]}" for i in range(4)]
    (folder / "volumes" / "participants.tsv").write_text("\n".join(["participant_id\tage\tsex", *rows]))
    latents = encode(folder / "volumes", folder / "latents", weights)
    return save_untrained_generator(latents, folder, condition_keys=["age", "sex"])


@pytest.fixture(scope="module")
def samples(generator, weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    generate(generator, weights, folder, num_samples=3)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_sample_is_a_volume_that_says_what_it_is(samples, generator, weights):
    assert [path.name for path in sorted(samples.glob("*.nii.gz"))] == [f"sample_{i:04d}.nii.gz" for i in range(3)]
    image = nib.load(samples / "sample_0001.nii.gz")
    assert image.shape == SIZE
    assert np.allclose(nib.affines.voxel_sizes(image.affine), SPACING)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert np.allclose(image.affine @ [6.5, 8.5, 4.5, 1], [0, 0, 0, 1])
    assert image.get_data_dtype() == np.int16 and image.header.get_xyzt_units()[0] == "mm"
    assert b"synthetic" in image.header["descrip"].tobytes()
    known = json.loads((samples / "sample_0001.json").read_text())
    assert known["synthetic"] is True and (known["seed"], known["index"]) == (0, 1)
    assert known["num_inference_steps"] == 3 and known["conditions"] == {}
    assert known["autoencoder_sha256"] == json.loads((weights.with_suffix(".json")).read_text())["sha256"]
    assert known["generator_sha256"] == json.loads((generator / "model.json").read_text())["sha256"]
    values = image.get_fdata()
    assert values.std() > 10 and values.min() >= known["intensity_low"][0] - 1
    assert values.max() <= known["intensity_high"][0] + 1 and 1000 < known["intensity_high"][0] < 3000


def test_same_seed_gives_the_same_bytes_and_another_one_others(samples, generator, weights, tmp_path):
    generate(generator, weights, tmp_path / "again", num_samples=3)
    assert content_of(tmp_path / "again") == content_of(samples)
    generate(generator, weights, tmp_path / "other", num_samples=1, seed=1)
    images = [
        content_of(tmp_path / "other")["sample_0000.nii.gz"],
        *(content_of(samples)[f"sample_000{i}.nii.gz"] for i in range(3)),
    ]
    assert len(set(images)) == 4


class WildOutside(torch.nn.Module):
    """A network whose estimates of the padding are far from any latent."""

    def __init__(self, network: Denoiser, size: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.size, self.multiple = network, size, network.multiple

    def forward(self, x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        estimate = self.network(x, *args)
        wild = torch.full_like(estimate, 1e4)
        inside = (..., *(slice(n) for n in self.size))
        wild[inside] = estimate[inside]
        return wild


def test_what_the_network_makes_of_the_padding_does_not_matter(generator):
    known, size = load_generator(str(generator / "model.pt")), (4, 5, 3)
    noise = torch.randn(1, 8, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    context = torch.zeros(1, known.network.arguments["condition_size"])
    plain, wild = (
        Sampler(replace(known, network=network), 3)(noise, context, size, 0)
        for network in (known.network, WildOutside(known.network, size))
    )
    assert plain.shape[2:] == size and plain.std() > 0.01
    assert torch.equal(plain, wild)


def command(generator: Path, weights: Path, output_dir: Path, **keys) -> list[str]:
    paths = {"ckpt_dir": generator, "autoencoder": weights, "output_dir": output_dir}
    keys = {**paths, "device": "cpu", "amp": "false", "num_samples": 3, "num_inference_steps": 3, **keys}
    words = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    return ["-m", "monai.bundle", "run", "generating", "--config_file", "configs/generate.json", *words]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_two_processes_share_the_work_and_make_the_same_bytes(samples, generator, weights, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    job = subprocess.run(
        start + command(generator, weights, tmp_path / "out"),
        cwd=ROOT,
        env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stdout
    assert content_of(tmp_path / "out") == content_of(samples)


def test_killed_run_goes_on_and_leaves_whole_samples_alone(generator, weights, tmp_path):
    out = tmp_path / "out"
    words = command(generator, weights, out, num_samples=40)
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        deadline = time.monotonic() + 240
        while len(list(out.glob("*.json"))) < 2 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        job.kill()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert job.returncode == -signal.SIGKILL and 2 <= len(done) < 40
    number = max(len(done), 3) + 2
    generate(generator, weights, out, num_samples=number)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    generate(generator, weights, tmp_path / "undisturbed", num_samples=number)
    found = {name: content for name, content in content_of(out).items() if not name.endswith(".unfinished")}
    assert found == content_of(tmp_path / "undisturbed")


def test_damaged_samples_and_those_of_other_settings_are_made_again(samples, generator, weights, tmp_path, caplog):
    out = shutil.copytree(samples, tmp_path / "out")
    (out / "sample_0000.json").unlink()
    (out / "sample_0001.nii.gz").write_bytes(b"half")
    before = (out / "sample_0002.nii.gz").stat().st_mtime_ns
    generate(generator, weights, out, num_samples=3)
    assert content_of(out) == content_of(samples)
    assert (out / "sample_0002.nii.gz").stat().st_mtime_ns == before
    caplog.clear()
    generate(generator, weights, out, num_samples=2)
    assert "samples of other settings" not in caplog.text
    generate(generator, weights, out, num_samples=2, num_inference_steps=4)
    assert "samples of other settings" in caplog.text
    generate(generator, weights, out, num_samples=3, num_inference_steps=4)
    assert not any(content_of(out)[name] == content for name, content in content_of(samples).items())


def test_other_sizes_and_spacings_work_with_a_warning(generator, weights, tmp_path, caplog):
    keys = {"num_samples": 1, "spatial_size": [21, 18, 30], "spacing": 1}
    generate(generator, weights, tmp_path, **keys)
    image = nib.load(tmp_path / "sample_0000.nii.gz")
    assert image.shape == (21, 18, 30) and np.allclose(nib.affines.voxel_sizes(image.affine), 1)
    assert "size 21 x 18 x 30 voxels; training saw 14 x 18 x 10" in caplog.text
    assert "spacing 1 x 1 x 1 mm; training saw 1 x 1.5 x 2" in caplog.text


def test_decoding_within_little_memory_makes_nearly_the_same_volume(samples, generator, weights, tmp_path):
    generate(generator, weights, tmp_path, num_samples=1, memory_gb=1e-4)
    whole, streamed = (nib.load(folder / "sample_0000.nii.gz").get_fdata() for folder in (samples, tmp_path))
    assert np.abs(whole - streamed).max() <= 1  # int16


def test_conditions_and_guidance_change_the_sample(samples, generator, weights, tmp_path):
    found = [content_of(samples)["sample_0000.nii.gz"]]
    for i, keys in enumerate([{}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}]):
        generate(generator, weights, tmp_path / str(i), num_samples=1, conditions={"age": 25, "sex": "M"}, **keys)
        found.append(content_of(tmp_path / str(i))["sample_0000.nii.gz"])
        known = json.loads((tmp_path / str(i) / "sample_0000.json").read_text())
        assert known["conditions"] == {"age": 25.0, "sex": "M"}
    assert len(set(found)) == 4


def voxels(folder: Path) -> np.ndarray:
    return np.asarray(nib.load(folder / "sample_0000.nii.gz").dataobj, float)


def test_a_guide_changes_the_sample_where_it_predicts_something_else(samples, generator, weights, tmp_path):
    known = load_generator(str(generator / "model.pt"))
    for name, size in (("same", 1e-9), ("other", 0.02)):
        for key, parameter in known.network.named_parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
        guide = tmp_path / f"{name}.pt"
        save_weights(known.network, guide, describe(known.statistics, known.flow, known.condition_dropout))
        keys = {"guide": str(guide), "guidance_scale": 2, "guidance_interval": [0, 0.8]}
        generate(generator, weights, tmp_path / name, num_samples=1, **keys)
        settings = json.loads((tmp_path / name / "sample_0000.json").read_text())
        assert settings["guide_sha256"] == load_generator(str(guide)).sha256
        assert (settings["guidance_scale"], settings["guidance_interval"]) == (2, [0, 0.8])
    plain, same, other = (voxels(folder) for folder in (samples, tmp_path / "same", tmp_path / "other"))
    assert abs(same - plain).max() <= 1 < abs(other - plain).max()


def test_what_cannot_be_is_refused_by_name(generator, weights, tmp_path):
    for keys, words in [
        ({"conditions": {"sex": "X"}}, "sex 'X'; training saw F, M"),
        ({"conditions": {"weight": 70}}, "names 'weight'; this generator was trained with the conditions age, sex"),
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"solver": "heun"}, "`solver` is 'heun'"),
        ({"spatial_size": [16, 16]}, "`spatial_size` is .*; it must be 3 positive numbers"),
        ({"spatial_size": 2}, "has the size 2 x 2 x 2 voxels; training saw 14 x 18 x 10"),
        ({"guidance_scale": -1}, "`guidance_scale` is -1"),
        ({"guidance_interval": 0.5}, "`guidance_interval` is 0.5"),
    ]:
        with pytest.raises(RuntimeError) as error:
            generate(generator, weights, tmp_path, **keys)
        cause: BaseException = error.value
        while cause.__cause__ is not None:
            cause = cause.__cause__
        assert isinstance(cause, ValueError) and re.search(words, str(cause)), cause


def test_bundle_finds_every_property(generator, weights, tmp_path):
    keys = {"ckpt_dir": generator, "autoencoder": weights, "output_dir": tmp_path, "device": "cpu"}
    assert workflow("generate.json", "generating", "infer", **keys).check_properties() == []


def test_network_is_exported_by_the_documented_command(generator, tmp_path, monkeypatch):
    network = load_generator(str(generator / "model.pt")).network
    monkeypatch.chdir(ROOT)
    files = {
        "eval/diffusion/checkpoints/model.pt": str(generator / "model.pt"),
        "eval/diffusion/generator.ts": str(tmp_path / "generator.ts"),
    }
    run_documented("ckpt_export", files, "--ckpt_dir", str(generator))
    exported = torch.jit.load(tmp_path / "generator.ts")
    for size in ((4, 6, 8), (10, 2, 6)):
        x, context = torch.randn(2, 8, *size), torch.randn(2, network.arguments["condition_size"])
        inputs = (x, torch.tensor([0.03, 0.9]), context, torch.rand(2, 3) / 2 + 0.5)
        with torch.no_grad():
            assert torch.allclose(exported(*inputs), network(*inputs), atol=1e-6, rtol=1e-6)
            assert torch.allclose(exported(*inputs[:3]), network(*inputs[:3]), atol=1e-6, rtol=1e-6)


def test_network_takes_and_gives_latents(generator):
    network = load_generator(str(generator / "model.pt")).network
    known = {"time": torch.tensor([0.5]), "context": torch.zeros(1, network.arguments["condition_size"])}
    files = {"meta_file": str(ROOT / "configs/metadata.json"), "config_file": str(ROOT / "configs/generate.json")}
    channels = {f"_meta_#network_data_format#{end}#num_channels": 8 for end in ("inputs#image", "outputs#pred")}
    for size in (network.multiple, 3 * network.multiple):
        keys = {"device": "cpu", "any": size, "extra_forward_args": known, "ckpt_dir": str(generator), **channels}
        verify_net_in_out("network_def", **files, **keys)
