"""Weights of a run are shared, released, downloaded and used."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import verify_net_in_out

from scripts.bundle.files import content_hash, file_hash
from scripts.bundle.weights import save_weights
from scripts.diffusion.generator import describe, load_generator
from scripts.sharing import release
from scripts.sharing import share as sharing
from scripts.sharing.release import NAME, build_release
from scripts.sharing.share import share
from tests.conftest import ROOT, save_volume
from tests.diffusion.runs import KEYS, encode, generate, make_weights, save_untrained_generator, workflow
from tests.sharing.test_release import run_python

SHARE = 0.3  # of the volumes that are held out: two of seven
# what a user does in the downloaded bundle
WORK = """
from monai.bundle import run

common = {"logging_file": "configs/logging.conf", "device": "cpu", "amp": False}
generate = {"num_samples": 2, "num_inference_steps": 2, "conditions": {"sex": "F", "age": 30}}
run("generating", config_file="configs/generate.json", ckpt_dir="models/generator", output_dir="out", **generate, **common)
tune = {"channels": [8, 16], "norm_num_groups": 4, "num_head_channels": 8, "condition_keys": ["age", "sex"]}
run("training", config_file="configs/train_diffusion.json", dataset_dir="../latents", output_dir="tuned", pretrained=True,
    epochs=1, val_interval=1, num_workers=0, **tune, **common)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A bundle with an autoencoder of its own, latents of seven volumes, and a run on five of them that was evaluated."""
    folder = tmp_path_factory.mktemp("shared")
    for name in ("configs", "scripts", "docs"):
        shutil.copytree(ROOT / name, folder / "bundle" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CITATION.cff", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / "bundle" / name)
    weights = make_weights(folder / "bundle" / "models")
    for i in range(7):
        save_volume(folder / "volumes" / f"sub-{i}" / "T1w.nii.gz", (20, 20, 20), i, np.diag([1.0, 1.5, 2.0, 1.0]))
    rows = [f"sub-{i}\t{20 + 5 * i}\t{'FM'[i % 2]}" for i in range(7)]
    (folder / "volumes" / "participants.tsv").write_text("\n".join(["participant_id\tage\tsex", *rows]))
    paths = {"dataset_dir": encode(folder / "volumes", folder / "latents", weights), "output_dir": folder / "run"}
    keys = {**KEYS, "val_fraction": SHARE, "device": "cpu", "condition_keys": ["age", "sex"]}
    workflow("train_diffusion.json", "training", "train", **paths, **keys).run()
    keys = {"device": "cpu", "amp": False, "num_samples": 3, "num_inference_steps": 2, "val_fraction": SHARE}
    overlay = ("train_diffusion.json", "evaluate_diffusion.json")
    workflow(overlay, "evaluating", "train", autoencoder=weights, **paths, **keys).run()
    return folder


@pytest.fixture
def bundle(folder, tmp_path, monkeypatch) -> Path:
    """A copy of the bundle, in which the commands work."""
    bundle = shutil.copytree(folder / "bundle", tmp_path / NAME)
    for module in (sharing, release):
        monkeypatch.setattr(module, "ROOT", bundle)
    monkeypatch.setattr(release, "_torchscript", lambda: b"")  # it takes long, and is not of the generator
    return bundle


def text_of(bundle: Path, *names: str) -> str:
    return "\n".join((bundle / "models/generator" / name).read_text() for name in names)


def test_shared_generator_is_released_downloaded_and_makes_the_same_samples(folder, bundle, tmp_path):
    build_release(str(tmp_path / "without"))
    assert "README.md, metrics.json, model.json, model.pt" in share(str(folder / "run"))
    build_release(str(tmp_path / "dist"))
    (archive,) = (tmp_path / "dist").iterdir()
    zipfile.ZipFile(archive).extractall(tmp_path / "downloaded")
    downloaded = tmp_path / "downloaded" / NAME
    shutil.copytree(folder / "latents", tmp_path / "downloaded" / "latents")
    run_python(downloaded, "-c", WORK, bundle=".")
    conditions = {"conditions": {"sex": "F", "age": 30}, "num_inference_steps": 2}
    generate(folder / "run/checkpoints", folder / "bundle/models/model.pt", tmp_path / "own", **conditions)
    for i in range(2):
        name = f"sample_{i:04d}.nii.gz"
        own, theirs = (nib.load(each / name).get_fdata() for each in (tmp_path / "own", downloaded / "out"))
        assert np.abs(own - theirs).max() <= 1  # int16
    assert load_generator(str(downloaded / "tuned/checkpoints/model.pt")).statistics.conditions.keys.keys() == {"age", "sex"}
    sums = dict(reversed(line.split("  ")) for line in (downloaded / "models/SHA256SUMS").read_text().splitlines())
    assert sums["generator/model.pt"] == content_hash((bundle / "models/generator/model.pt").read_bytes())
    without = zipfile.ZipFile(next((tmp_path / "without").iterdir()))
    assert not [name for name in without.namelist() if name.startswith(f"{NAME}/models/generator")]


def test_shared_network_takes_and_gives_what_monai_verifies(folder, bundle):
    share(str(folder / "run"))
    models = bundle / "models/generator"
    arguments = json.loads((models / "model.json").read_text())["network"]
    latent = {"type": "latent", "format": "latent", "num_channels": arguments["latent_channels"], "dtype": "float32"}
    latent |= {"spatial_shape": ["4*n"] * 3, "value_range": [], "is_patch_data": False, "channel_def": {"0": "latent"}}
    given = {"time": torch.tensor([0.5]), "context": torch.zeros(1, arguments["condition_size"]), "extent": torch.ones(1, 3)}
    keys = {"device": "cpu", "n": 2, "extra_forward_args": given, "ckpt_dir": str(models)}
    keys["_meta_#network_data_format"] = {"inputs": {"image": latent}, "outputs": {"pred": latent}}
    configs = bundle / "configs"
    files = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "generate.json")}
    verify_net_in_out("network_def", **files, **keys)


def test_card_says_what_the_run_recorded(folder, bundle):
    share(str(folder / "run"), data_source="seven ellipsoids", license="CC0-1.0")
    card = text_of(bundle, "README.md")
    known = json.loads(text_of(bundle, "model.json"))
    sets = json.loads((folder / "run/evaluation/metrics.json").read_text())["sets"]
    assert known["sha256"] in card and known["latents"]["autoencoder"]["sha256"] in card
    for words in (
        "Source: seven ellipsoids",
        "Training volumes: 5",
        "Size: 20 x 20 x 20 voxels",
        "Spacing: 1 x 1.5 x 2 mm",
        "`gain`",
        "8 channels, downsampled by 4 x 4 x 4",
        f"Steps: {known['trained']['iteration']}, epochs: 2; validation loss {known['trained']['best_metric']:.4g}",
        "3 samples beside 2 held-out volumes, 2 steps of `midpoint`, `guidance_scale` 1.0",
        "Few volumes are held out: 2",
        "--num_inference_steps 2 --solver midpoint --guidance_scale 1.0",
        "The numbers are those of the weights before they were stored in half precision.",
        "All samples are synthetic.",
        "Not for diagnosis",
        "How often this one does has not been measured.",  # too few volumes are held out
        """--condition_keys "['age', 'sex']"\n```\n""",
        "# License\n\nCC0-1.0",
    ):
        assert words in card, words
    ages, sexes = known["latents"]["conditions"]["keys"].values()
    assert f"`age`: {ages['lowest']:g} to {ages['highest']:g}" in card
    assert all(f"{name} ({count})" in card for name, count in sexes["classes"].items())
    row = next(line for line in card.splitlines() if line.startswith("| ms_ssim"))
    assert f"{sets['samples']['ms_ssim']:.3g}" in row and f"{sets['gaussian']['ms_ssim']:.3g}" in row
    assert not re.search(r"\n\n\n|\{[{%]|\bNone\b", card)


def test_card_says_what_the_spatial_conditions_are(folder, bundle, tmp_path):
    for i in range(2):
        path = save_volume(tmp_path / "volumes" / f"{i}.nii", (20, 20, 20), i)
        for key, values in (("label", np.arange(8000).reshape(20, 20, 20) // 2000 * 3), ("t2", nib.load(path).get_fdata())):
            nib.save(nib.Nifti1Image(values.astype(np.int16), np.eye(4)), path.with_name(f"{i}_{key}.nii"))
    keys = {"spatial_keys": ["label", "t2"]}
    latents = encode(tmp_path / "volumes", tmp_path / "latents", folder / "bundle/models/model.pt", **keys)
    save_untrained_generator(latents, tmp_path / "run", **keys)
    share(str(tmp_path / "run"))
    card = text_of(bundle, "README.md")
    assert "- `label` (in `spatial_keys`): a label map of the classes 3, 6, 9\n" in card
    assert "- `t2` (in `spatial_keys`): an image\n" in card


def test_card_says_how_many_samples_are_close_to_training_volumes(folder, bundle, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    metrics["sets"]["samples"]["close"] = 0.25
    (run / "evaluation/metrics.json").write_text(json.dumps(metrics))
    share(str(run))
    assert "Of the samples 25.0 % are closer to a training volume" in text_of(bundle, "README.md")


def test_card_says_what_guided_the_samples(folder, bundle, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    keys = {"device": "cpu", "amp": False, "num_samples": 3, "num_inference_steps": 2, "val_fraction": SHARE}
    guide = changed_run(folder, tmp_path / "guide") / "checkpoints"
    keys |= {"guide": str(guide / "model.pt"), "guidance_scale": 2, "guidance_interval": [0, 0.6]}
    paths = {"dataset_dir": folder / "latents", "output_dir": run, "autoencoder": folder / "bundle/models/model.pt"}
    workflow(("train_diffusion.json", "evaluate_diffusion.json"), "evaluating", "train", **paths, **keys).run()
    share(str(run))
    card, sha256 = text_of(bundle, "README.md"), json.loads((guide / "model.json").read_text())["sha256"]
    assert "`guidance_scale` 2 at times from 0.0 to 0.6.\n" in card
    assert f"guided this one: its weights, of which the SHA-256 begins with {sha256[:12]}, are not in this bundle." in card
    assert '--guidance_scale 2 --guidance_interval "[0.0, 0.6]" --guide GUIDE\n' in card
    assert not re.search(r"\n\n\n|\{[{%]|\bNone\b", card) and str(tmp_path) not in text_of(
        bundle, "README.md", "metrics.json"
    )


def test_nothing_that_is_shared_names_a_file_or_describes_a_held_out_volume(folder, bundle):
    share(str(folder / "run"))
    files = sorted(path.name for path in (bundle / "models/generator").iterdir())
    assert files == ["README.md", "metrics.json", "model.json", "model.pt"]
    text = text_of(bundle, *files[:-1])
    for words in (str(folder), "sub-", "nii", 'nearest": "', 'dataset_dir":', "<img", "!["):
        assert words not in text.replace("as NIfTI", ""), words
    metrics = json.loads(text_of(bundle, "metrics.json"))
    evaluated = json.loads((folder / "run/evaluation/metrics.json").read_text())
    assert "samples" in evaluated and "samples" not in metrics and metrics["sets"] == evaluated["sets"]
    assert b"sub-" not in (bundle / "models/generator/model.pt").read_bytes()


def changed_run(folder: Path, to: Path, by: float = 1.0) -> Path:
    """A run whose weights are others than those that were evaluated."""
    run = shutil.copytree(folder / "run", to)
    known = load_generator(str(folder / "run/checkpoints/model.pt"))
    with torch.no_grad():
        next(known.network.parameters()).add_(by)
    save_weights(
        known.network, run / "checkpoints/model.pt", describe(known.statistics, known.flow, known.condition_dropout)
    )
    return run


def test_evaluation_of_other_weights_is_left_out(folder, bundle, tmp_path, caplog):
    share(str(folder / "run"))
    assert "README.md, model.json, model.pt" in share(str(changed_run(folder, tmp_path / "run")), license="CC0-1.0")
    assert "is of other weights and is left out" in caplog.text
    said = caplog.text.rpartition("left out")[2]
    assert "`data_source` is not given" in said and "`license` is not given" not in said
    assert not (bundle / "models/generator/metrics.json").exists()
    card = text_of(bundle, "README.md")
    assert "Not evaluated." in card and "has not been measured" in card and "Steps:" not in card
    assert "Source: not stated" in card and not re.search(r"\n\n\n|\bNone\b", card)


def test_what_does_not_belong_together_is_refused(folder, bundle, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    (run / "checkpoints/model.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        share(str(run))
    shutil.copytree(changed_run(folder, tmp_path / "other") / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    shutil.copy(folder / "run/checkpoints/model.json", run / "checkpoints/model.json")
    with pytest.raises(ValueError, match="is not the file that .* describes"):
        share(str(run))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        share(str(tmp_path / "nowhere"))
    share(str(folder / "run"))
    make_weights(bundle / "models", seed=1)
    file_hash.cache_clear()
    for make in (lambda: build_release(str(tmp_path)), lambda: share(str(folder / "run"))):
        with pytest.raises(ValueError, match="is not that of the latents"):
            make()


def test_half_precision_is_the_nearest_to_the_weights_unless_it_cannot_hold_them(folder, bundle, tmp_path):
    share(str(folder / "run"))
    path, run = bundle / "models/generator/model.pt", folder / "run/checkpoints/model.pt"
    shared, own = (load_generator(str(each)).network.state_dict() for each in (path, run))
    assert all(torch.equal(shared[name], value.half().float()) for name, value in own.items())
    assert path.stat().st_size < 0.75 * run.stat().st_size
    share(str(folder / "run"), half=False)
    assert path.read_bytes() == run.read_bytes()
    large = changed_run(folder, tmp_path / "large", 1e5)
    with pytest.raises(ValueError, match="has weights above 65504.*`half`"):
        share(str(large))


def test_autoencoder_is_shared_with_a_card(bundle, tmp_path):
    weights = make_weights(tmp_path / "run/checkpoints", seed=2)
    known = json.loads(weights.with_suffix(".json").read_text())
    means = {"weights_sha256": known["sha256"], "mean": {"psnr": 31.25, "ssim": None}}
    means = {"codecs": {"reconstruction": means}, "volumes": {"sub-1/T1w.nii.gz": {}}}
    (tmp_path / "run/evaluation").mkdir()
    (tmp_path / "run/evaluation/metrics.json").write_text(json.dumps(means))
    said = share(str(tmp_path / "run"), data_source="seven ellipsoids", license="CC0-1.0")
    assert "README.md, metrics.json, model.json, model.pt" in said
    shared, own = (torch.load(path, weights_only=True) for path in (bundle / "models/model.pt", weights))
    assert all(torch.equal(shared[name], value.half()) for name, value in own.items())
    stored = json.loads((bundle / "models/model.json").read_text())
    assert stored["network"] == known["network"] and stored["sha256"] == content_hash(
        (bundle / "models/model.pt").read_bytes()
    )
    card = (bundle / "models/README.md").read_text()
    for words in ("Source: seven ellipsoids", stored["sha256"], "8 channels, downsampled by 4 x 4 x 4", "31.25", "CC0-1.0"):
        assert words in card, words
    assert "sub-1" not in card + (bundle / "models/metrics.json").read_text() and not re.search(r"\n\n\n|\bNone\b", card)
    build_release(str(tmp_path / "dist"))
    names = zipfile.ZipFile(next((tmp_path / "dist").iterdir())).namelist()
    assert {f"{NAME}/models/{name}" for name in ("README.md", "model.safetensors", "model.ts")} <= set(names)
