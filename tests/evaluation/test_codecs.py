"""Codecs of a comparison: files of every origin give the results of their networks, and what cannot be used is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import AutoencoderKL as MonaiAutoencoderKL

from scripts.autoencoderkl import Reconstructor
from scripts.bundle.weights import save_weights
from scripts.evaluation.codecs import BlockDCT, read_codecs

LEVELS = {"channels": [4, 8, 8], "num_res_blocks": 1, "norm_num_groups": 1, "attention_levels": [False] * 3}
PLAIN = {
    "spatial_dims": 3,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    **LEVELS,
}
X = torch.arange(32) + 0.5
WAVE = 0.5 + 0.4 * torch.cos(torch.pi * 3 * X / 8)  # two of a block's 512 coefficients
NARROW = {"channels": [8, 16, 32], "norm_num_groups": 8}


def of_bundle() -> Reconstructor:
    torch.manual_seed(0)
    return Reconstructor(**PLAIN, latent_channels=8, initial_downsample_factor=2, linear_shortcut=True).eval()


def of_monai() -> MonaiAutoencoderKL:
    torch.manual_seed(0)
    return MonaiAutoencoderKL(**PLAIN, latent_channels=3).eval()


def of_maisi() -> AutoencoderKlMaisi:
    torch.manual_seed(0)
    return AutoencoderKlMaisi(3, 1, 1, [2, 2, 2], NARROW["channels"], [False] * 3, 4, norm_num_groups=8, num_splits=1).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights of this bundle, its TorchScript, and weights of MONAI and of MAISI without a description."""
    folder = tmp_path_factory.mktemp("codecs")
    save_weights(of_bundle(), folder / "mine" / "model.pt")
    torch.jit.save(torch.jit.script(of_bundle()), folder / "network.ts")
    torch.save(of_monai().state_dict(), folder / "monai.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in of_maisi().state_dict().items()}}, folder / "maisi.pt")
    (folder / "code.pt").write_bytes(b"no weights")
    return folder


def read(entry, image_channels: int = 1):
    return read_codecs({"one": entry}, image_channels, "cpu")["one"]


@torch.no_grad()
def test_every_origin_gives_the_results_of_its_network(folder):
    ours, monai, maisi = of_bundle(), of_monai(), of_maisi()
    entries = {
        "folder": str(folder / "mine"),
        "file": str(folder / "mine" / "model.pt"),
        "TorchScript": str(folder / "network.ts"),
        "plain": {"weights": str(folder / "monai.pt"), "network": of_monai()},
        "in ours": {"weights": str(folder / "monai.pt"), "preset": "4x", **LEVELS, "latent_channels": 3},
        "maisi": {"weights": str(folder / "maisi.pt"), **NARROW},
        "its class": {"weights": str(folder / "maisi.pt"), "network": of_maisi()},
    }
    image = torch.rand(1, 1, 17, 24, 21)
    padded = torch.nn.functional.pad(image, (0, 3, 0, 0, 0, 3), mode="replicate")
    monais, maisis = (net.decode(net.encode(padded)[0])[..., :17, :24, :21] for net in (monai, maisi))
    expected = dict.fromkeys(["folder", "file", "TorchScript"], (ours(image), (8, 8, 8), 8, 64))
    expected |= dict.fromkeys(["plain", "in ours"], (monais, (4, 4, 4), 3, 64 / 3))
    expected |= dict.fromkeys(["maisi", "its class"], (maisis, (4, 4, 4), 4, 16))
    found = read_codecs(entries, 1, "cpu")
    assert list(found) == list(entries)
    for name, (result, factors, channels, voxels) in expected.items():
        codec = found[name]
        assert torch.allclose(codec.network.reconstruct(image), result, atol=1e-5), name
        assert (codec.network.total_downsample_factor, codec.network.latent_channels) == (factors, channels), name
        assert codec.voxels_per_value == pytest.approx(voxels)


def test_exported_file_stays_in_float32_under_autocast(folder):
    image = torch.rand(1, 1, 16, 16, 16)
    codec = read(str(folder / "network.ts"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = codec.network.reconstruct(image)
    with torch.no_grad():
        assert torch.equal(mixed, codec.network.reconstruct(image))


def test_latents_of_an_exported_file_that_does_not_know_them_are_given_or_described_beside_it(folder, tmp_path):
    for path in (tmp_path / "lonely.ts", tmp_path / "model.ts"):
        torch.jit.save(torch.jit.script(torch.nn.Identity()), path)
    (tmp_path / "model.json").write_text((folder / "mine" / "model.json").read_text())
    sizes = {"total_downsample_factor": [8, 8, 4], "latent_channels": 16}
    for entry, expected in (
        ({"weights": str(tmp_path / "lonely.ts"), **sizes}, ((8, 8, 4), 16)),
        (str(tmp_path / "model.ts"), ((8, 8, 8), 8)),
        ({"weights": str(tmp_path / "model.ts"), **sizes}, ((8, 8, 4), 16)),
    ):
        codec = read(entry)
        assert (codec.network.total_downsample_factor, codec.network.latent_channels) == expected
    with pytest.raises(ValueError, match="does not say `total_downsample_factor` and `latent_channels`"):
        read(str(tmp_path / "lonely.ts"))


@pytest.mark.parametrize(
    "entry, words",
    [
        ("nowhere", "there are no weights at nowhere"),
        ("nowhere.ts", "there is no exported network at nowhere.ts"),
        ("code.pt", "code.pt cannot be loaded"),
        ("monai.pt", "cannot be loaded into this network: "),
        ({"weights": "monai.pt", "preset": "nothing"}, "No such file or directory: .*nothing.json"),
        ({"weights": "monai.pt", "preset": "8x"}, "cannot be loaded into this network: "),
        ({"weights": "monai.pt", "chanels": [4, 8, 8]}, "no config key 'chanels'; the nearest one is 'channels'"),
        ({"weights": "mine", "preset": "16x"}, "model.json says which network it is; give `weights` alone"),
        ({"weights": "maisi.pt", "network": of_monai()}, "MAISI's network.*presets/maisi.json"),
        ({"weights": "network.ts", "channels": [4, 8]}, "unexpected keyword argument 'channels'"),
    ],
    ids=str,
)
def test_codec_that_cannot_be_used_is_named_with_what_is_wrong(folder, monkeypatch, entry, words):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=rf"the codec 'one' cannot be used: .*{words}"):
        read(entry)


def test_codec_for_other_channels_is_named(folder):
    with pytest.raises(ValueError, match="'one' cannot be used: .*to have 1 channels, but got 2 channels"):
        read(str(folder / "mine"), image_channels=2)


def test_weights_that_were_changed_are_refused(folder, tmp_path):
    description = json.loads((folder / "mine" / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**description, "sha256": "0" * 64, "sha256_before": "0" * 64}))
    (tmp_path / "model.pt").write_bytes((folder / "mine" / "model.pt").read_bytes())
    with pytest.raises(ValueError, match="'one' cannot be used: .*changed or damaged"):
        read(str(tmp_path))


def test_block_dct_keeps_what_a_volume_has_most_of():
    image = WAVE.expand(1, 1, 20, 24, 32)
    assert torch.allclose(BlockDCT([8, 8, 8], 2).reconstruct(image), image, atol=1e-5)
    assert (BlockDCT([8, 8, 8], 1).reconstruct(image) - 0.5).abs().max() < 1e-5  # the mean is the stronger one


def test_channels_share_the_coefficients_of_a_block():
    image = torch.stack([WAVE.expand(20, 21, 32), torch.full((20, 21, 32), 0.25)])[None]
    assert torch.allclose(BlockDCT([8, 8, 8], 3).reconstruct(image), image, atol=1e-5)
    two = BlockDCT([8, 8, 8], 2).reconstruct(image)
    assert torch.allclose(two[:, 0], image[:, 0], atol=1e-5)
    assert two[:, 1].abs().max() < 1e-5  # its mean is the weakest of the three
