"""Training that starts from weights: those of MONAI's network, under any of their names, and those of other factors."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.networks.nets import AutoencoderKL as MonaiAutoencoderKL

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.weights import load_weights, save_weights
from scripts.planning.autoencoder_estimates import read_plan
from scripts.training.initial_weights import load_pretrained
from tests.conftest import ROOT, save_volume
from tests.test_autoencoderkl import as_generative_models
from tests.training.test_checkpoints import RunsCode
from tests.training.test_training import small_network

TRAINING = ["$@train#trainer.run()"]  # without the estimate of its memory
OWN = (
    "downsample_factors",
    "initial_downsample_factor",
    "initial_mode",
    "linear_shortcut",
    "upsample_mode",
    "norm",
)  # arguments that MONAI lacks


def weights_of(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in network.state_dict().values()])


def randomised(network):
    """With weights that no constructor would make."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def plain(**arguments) -> AutoencoderKL:
    """MONAI's network, two levels, in one convolution and out of one."""
    return small_network(**{"initial_downsample_factor": 1, "linear_shortcut": False, **arguments})


def messages(caplog, start: str = "not taken over: ") -> list[str]:
    return [record.message.removeprefix(start) for record in caplog.records if record.message.startswith(start)]


@pytest.fixture(autouse=True)
def log_everything(caplog):
    caplog.set_level(logging.INFO)


# --- in a training run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    for i in range(2):
        save_volume(folder / f"sub-{i}" / "T1w.nii.gz", (16, 20, 24), seed=i)
    return folder


def training(data, output_dir, *presets: str, **keys) -> ConfigWorkflow:
    """The training of configs/train.json, ready to run. ``flow.first`` will have the first validation's image and result."""
    flow = ConfigWorkflow(
        config_file=[str(ROOT / "configs" / name) for name in ("train.json", *presets)],
        meta_file=str(ROOT / "configs/metadata.json"),
        logging_file=False,
        workflow_type="train",
        run_id="training",
        bundle_root=str(ROOT),
        dataset_dir=str(data),
        output_dir=str(output_dir),
        num_workers=0,
        device="cpu",
        amp=False,
        patch_size=[16, 16, 16],
        val_fraction=0.5,
        **{"validate#handlers": [], "validate#postprocessing": None, "training": TRAINING, **keys},
    )
    flow.initialize()
    flow.first = []

    def remember(evaluator):
        item = evaluator.state.output[0]
        flow.first += [item[key].as_tensor()[None].clone() for key in ("image", "pred") if len(flow.first) < 2]

    flow.evaluator.add_event_handler(Events.ITERATION_COMPLETED, remember)
    return flow


@pytest.fixture(scope="module")
def of_monai() -> MonaiAutoencoderKL:
    """MONAI's own network with the arguments of the preset 4x."""
    arguments = read_plan([str(ROOT / "configs/train.json"), str(ROOT / "configs/presets/4x.json")]).network.arguments
    torch.manual_seed(3)
    return MonaiAutoencoderKL(**{key: value for key, value in arguments.items() if key not in OWN}).eval()


def test_validation_before_the_first_step_is_that_of_monais_network(of_monai, data, tmp_path, caplog):
    torch.save(of_monai.state_dict(), tmp_path / "monai.pt")
    flow = training(data, tmp_path / "eval", "presets/4x.json", pretrained=str(tmp_path / "monai.pt"), fast_dev_run=True)
    flow.run()
    image, prediction = flow.first
    with torch.no_grad():
        expected = of_monai.reconstruct(image)
    assert prediction.std() > 0 and torch.allclose(prediction, expected, atol=1e-5)
    assert not messages(caplog) and "19 of 19 layers taken over" in caplog.text


@pytest.mark.parametrize(
    "form",
    [
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"autoencoder_state_dict": {f"module.{key}": value for key, value in state.items()}, "step": 1},
        lambda state: {**{f"autoencoder.{key}": value for key, value in state.items()}, "discriminator.weight": state},
        as_generative_models,
        lambda state: {"state_dict": as_generative_models(state)},
    ],
)
def test_weights_of_monais_network_are_found_in_every_form(form, tmp_path, caplog):
    arguments = {"attention_levels": (False, True), "with_encoder_nonlocal_attn": True}
    source, target = randomised(plain(**arguments)), plain(**arguments)
    torch.save(form(source.state_dict()), tmp_path / "monai.pt")
    load_pretrained(target, tmp_path / "monai.pt")
    assert torch.equal(weights_of(target), weights_of(source))
    assert not messages(caplog)


def test_shipped_weights_keep_their_shortcut_though_a_run_fits_it_and_resuming_wins(data, tmp_path, caplog):
    keys = {"pretrained": "true", "fit_shortcut": True, "epochs": 2}  # the first step has a learning rate of 0
    flow = training(data, tmp_path / "eval", **keys)
    flow.run()
    assert "principal components" not in caplog.text
    image, prediction = flow.first
    shipped = AutoencoderKL(**flow.network_def.arguments).eval()
    load_weights(shipped, ROOT / "models/model.pt")
    with torch.no_grad():
        assert torch.allclose(prediction, shipped.reconstruct(image), atol=1e-5)

    trained = weights_of(flow.network_def)
    caplog.clear()
    resumed = training(data, tmp_path / "eval", resume=True, **keys)
    resumed.run()
    assert "resumed" in caplog.text and "training starts from" not in caplog.text
    assert torch.equal(weights_of(resumed.network_def), trained)
    assert not torch.equal(trained, weights_of(shipped))


# --- layer by layer --------------------------------------------------------------------------------------------------


def test_layers_of_other_factors_are_left_out_though_their_shapes_agree(tmp_path, caplog):
    save_weights(randomised(plain()), tmp_path / "model.pt")
    target = plain(downsample_factors=[1])
    before = target.state_dict()["encoder.blocks.2.conv.conv.weight"].clone()
    load_pretrained(target, tmp_path / "model.pt")
    assert messages(caplog) == ["encoder.blocks.2, decoder.blocks.2"]
    source, found = randomised(plain()).state_dict(), target.state_dict()
    assert torch.equal(found["encoder.blocks.2.conv.conv.weight"], before)
    assert all(torch.equal(found[key], source[key]) for key in found if ".blocks.2." not in key)


@pytest.mark.parametrize(
    "arguments, left_out",
    [
        ({"downsample_factors": [4]}, ["encoder.blocks.2", "decoder.blocks.2"]),
        ({"initial_downsample_factor": 2}, ["encoder.blocks.0", "decoder.blocks.5"]),
        ({"initial_downsample_factor": 2, "initial_mode": "conv"}, ["encoder.blocks.0", "decoder.blocks.5"]),
        ({"norm": "rms"}, ["encoder.blocks.1", "encoder.blocks.3"]),
        ({"latent_channels": 5}, ["encoder.blocks.5", "quant_conv_mu", "decoder.blocks.0"]),
        ({"in_channels": 2}, ["encoder.blocks.0"]),
        ({"use_convtranspose": True}, ["decoder.blocks.2"]),
        ({"num_res_blocks": 2}, ["encoder.blocks.1", "encoder.blocks.5"]),
        ({"channels": (4,), "attention_levels": (False,), "downsample_factors": []}, ["decoder.blocks.0"]),
        ({"channels": (4, 8, 8), "attention_levels": (False,) * 3, "downsample_factors": [2, 4]}, ["encoder.blocks.4"]),
    ],
)
def test_every_layer_that_fits_is_taken_over_and_the_others_are_named(arguments, left_out, tmp_path, caplog):
    save_weights(randomised(plain()), tmp_path / "model.pt")
    target = plain(**arguments)
    own = {key: value.clone() for key, value in target.state_dict().items()}
    load_pretrained(target, tmp_path / "model.pt")
    (line,) = messages(caplog)
    assert set(left_out) <= set(line.split(", "))
    for key, value in target.state_dict().items():
        is_named = any(key.startswith(f"{layer}.") for layer in line.split(", "))
        assert torch.equal(value, own[key]) == is_named, key


def test_blocks_are_matched_by_their_order_where_numbers_differ(tmp_path):
    source = randomised(plain())
    save_weights(source, tmp_path / "model.pt")
    target = plain(num_res_blocks=2)
    load_pretrained(target, tmp_path / "model.pt")
    here, there = target.state_dict(), source.state_dict()
    # encoder: convolution, 2 residual, step, 2 residual | 1, step, 1
    for number, number_there in ((0, 0), (2, 1), (3, 2), (4, 3)):
        for key in [key for key in here if key.startswith(f"encoder.blocks.{number}.")]:
            assert torch.equal(here[key], there[key.replace(f".{number}.", f".{number_there}.", 1)]), key


def test_weights_without_a_shortcut_start_as_a_small_correction_of_one(tmp_path, caplog):
    """Their last layers make the image; added to the shortcut's, it would be there twice."""
    save_weights(randomised(small_network(linear_shortcut=False)), tmp_path / "model.pt")
    target = small_network()
    image = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        linear = target.shortcut(image)
        load_pretrained(target, tmp_path / "model.pt")
        assert torch.equal(target.shortcut(image), linear)
        assert (target.reconstruct(image) - linear).abs().mean() < 0.2 * linear.abs().mean()
    assert "decoder.blocks.5" in messages(caplog)[0].split(", ")


def test_weights_of_monais_network_are_not_loaded_into_one_with_another_norm(tmp_path):
    """A norm of each voxel has the tensors of a group norm, and computes something else with them."""
    torch.save(randomised(plain()).state_dict(), tmp_path / "monai.pt")
    with pytest.raises(ValueError, match=r'no JSON file beside it.*MONAI\'s network.*presets/4x.json, or `norm` "group"'):
        load_weights(plain(norm="rms"), tmp_path / "monai.pt")


def test_json_file_of_another_program_is_not_a_description(tmp_path):
    source, target = randomised(plain()), plain()
    torch.save(source.state_dict(), tmp_path / "monai.pt")
    (tmp_path / "monai.json").write_text('{"psnr": 30}')
    load_pretrained(target, tmp_path / "monai.pt")
    assert torch.equal(weights_of(target), weights_of(source))
    (tmp_path / "monai.json").write_text("{half")
    with pytest.raises(ValueError, match="monai.json is damaged, or not JSON"):
        load_pretrained(target, tmp_path / "monai.pt")


def test_checkpoint_of_a_run_knows_its_arguments(tmp_path, caplog):
    source = randomised(plain(downsample_factors=[4]))
    torch.save({"arguments": source.arguments, "network": source.state_dict()}, tmp_path / "checkpoint_00000001.pt")
    target = plain(downsample_factors=[4])
    load_pretrained(target, tmp_path / "checkpoint_00000001.pt")
    assert torch.equal(weights_of(target), weights_of(source))


@pytest.mark.parametrize(
    "content, error, words",
    [
        (None, FileNotFoundError, "no weights at .*model.pt"),
        (b"not a file of torch", ValueError, "model.pt cannot be loaded: it is damaged, or holds code"),
        ({"weight": RunsCode()}, ValueError, "cannot be loaded: it is damaged, or holds code, which was not run"),
        ([1, 2], ValueError, "no weights of an AutoencoderKL.*list"),
        ({"fc.weight": torch.zeros(2)}, ValueError, "no weights of an AutoencoderKL.*fc.weight"),
        ({"encoder.blocks.0.conv.weight": torch.zeros(9, 9)}, ValueError, "does not hold what its network has.*Missing"),
    ],
)
def test_bad_files_are_named(content, error, words, tmp_path):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    target = plain()
    before = weights_of(target)
    with pytest.raises(error, match=words) as raised:
        load_pretrained(target, path)
    assert "weights_only" not in str(raised.value)  # torch's own advice would run the code
    assert torch.equal(weights_of(target), before)


def test_weights_that_are_not_what_their_arguments_say_are_refused(tmp_path):
    state = {key: value for key, value in plain().state_dict().items() if "quant_conv_mu" not in key}
    torch.save({"arguments": plain().arguments, "network": state}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="(?s)does not hold what its network has.*Missing.*quant_conv_mu"):
        load_pretrained(plain(), tmp_path / "model.pt")
