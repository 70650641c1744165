"""The configs of the bundle: they agree with each other, keep MONAI's property names, and refuse misspelt keys."""

from __future__ import annotations

import json
import re

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow

from scripts.bundle.config import KINDS, NOT_CONFIGS, _bundle_defaults, check_parser
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


def workflow(*files: str, workflow_type: str, **overrides) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(CONFIGS / name) for name in files],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type=workflow_type,
        bundle_root=str(ROOT),
        **overrides,
    )


def test_inference_builds_the_network_that_training_builds():
    train, inference = (ConfigParser.load_config_file(CONFIGS / name) for name in ("train.json", "inference.json"))
    definition = {**train["network_def"], "_target_": "scripts.autoencoderkl.Reconstructor"}
    for key in ("_desc_", "use_checkpoint"):  # which is for training
        definition.pop(key)
    assert inference["network_def"] == definition
    keys = {value[1:] for value in definition.values() if isinstance(value, str) and value.startswith("@")}
    keys |= {"spacing", "intensity_percentiles", "intensity_range", "amp", "amp_dtype", "device", "image_glob"}
    assert {key: inference[key] for key in keys} == {key: train[key] for key in keys}
    assert inference["settings"] == ConfigParser.load_config_file(CONFIGS / "evaluate.json")["settings"]
    of_inference = ("scripts.data.RefuseLabelMapd", "scripts.data.DescribeSourced")
    steps = [step for step in inference["preprocessing"]["transforms"] if step["_target_"] not in of_inference]
    assert steps == train["train"]["deterministic_transforms"]


def test_8x_is_the_default():
    networks = []
    for files in (["train.json"], ["train.json", "presets/8x.json"]):
        parser = ConfigParser()
        parser.read_config([CONFIGS / file for file in files])
        networks.append(parser.get_parsed_content("network_def").arguments)
    assert networks[0] == networks[1]


@pytest.mark.parametrize("preset", sorted(p.name for p in (CONFIGS / "presets").glob("*.json")))
@pytest.mark.parametrize("base", ["train.json", "inference.json"])
def test_presets_build(preset, base):
    parser = ConfigParser()
    parser.read_config([CONFIGS / base, CONFIGS / "presets" / preset])
    network = parser.get_parsed_content("network_def")
    assert {
        "4x.json": (4, 4, 4),
        "8x.json": (8, 8, 8),
        "16x.json": (16, 16, 16),
        "16x_lean.json": (16, 16, 16),
        "32x.json": (32, 32, 32),
        "64x.json": (64, 64, 64),
        "thick_slices.json": (8, 8, 2),
        "maisi.json": (4, 4, 4),
    }[preset] == network.total_downsample_factor
    if network.shortcut is not None:
        assert sum(p.numel() for p in network.shortcut.parameters()) <= 10_000_000


@pytest.mark.parametrize(
    "key, nearest, files",
    [
        ("downsample_factor", "downsample_factors", ["train.json"]),
        ("epoch", "epochs", ["train.json", "evaluate.json"]),
        ("dataset_dirs", "dataset_dir", ["inference.json"]),
        ("handlers_id", "handlers", ["train_diffusion.json"]),  # of the settings of MLflow, which are no config
    ],
)
def test_misspelt_key_is_refused_with_the_nearest(key, nearest, files):
    flow = workflow(*files, workflow_type="train", **{key: 3})
    with pytest.raises(RuntimeError) as error:
        flow.initialize()
    assert f"no config key '{key}'; the nearest one is '{nearest}'" in str(error.value.__cause__)


def test_key_of_an_overlay_that_something_refers_to_is_allowed(tmp_path):
    overlay = tmp_path / "mine.json"
    overlay.write_text(json.dumps({"my_epochs": 7, "epochs": "@my_epochs"}))
    flow = workflow("train.json", str(overlay), workflow_type="train")
    flow.initialize()
    assert flow.max_epochs == 7


@pytest.mark.parametrize("text, value", [("false", False), ("False", False), ("true", True), (True, True)])
def test_flag_given_as_text_means_what_it_says(text, value):
    flow = workflow("train.json", workflow_type="train", fast_dev_run=text)
    flow.initialize()
    assert flow.parser.get_parsed_content("fast_dev_run") is value
    assert ("fast_dev_run" in flow.parser.get_parsed_content("ckpt_dir")) is value


@pytest.mark.parametrize(
    "key, value, parsed",
    [
        ("use_checkpoint", ["true", "False", "false"], [True, False, False]),  # as [true,False,false] arrives
        ("use_checkpoint", "true", True),
        ("pretrained", "False", False),
        ("pretrained", "weights/monai.pt", "weights/monai.pt"),
    ],
)
def test_flag_may_be_one_per_level_or_a_path_where_that_is_its_meaning(key, value, parsed):
    flow = workflow("train.json", workflow_type="train", **{key: value})
    flow.initialize()
    assert flow.parser.get_parsed_content(key) == parsed


@pytest.mark.parametrize(
    "key, text, value, files",
    [
        ("timestep_shift", "null", None, ["train_diffusion.json"]),
        ("memory_gb", "null", None, ["inference.json"]),
        ("spacing", "null", None, ["train.json"]),
        ("perceptual_weights_file", "null", None, ["train.json"]),
        ("image_glob", "null", "null", ["train.json"]),  # a pattern
        ("dataset_dir", 2024, "2024", ["train.json"]),
        ("dataset_dir", "~/data", "HOME/data", ["inference.json"]),
        ("output_dir", "~/out", "HOME/out", ["generate.json"]),
        ("ckpt_dir", "~", "HOME", ["train.json"]),
        ("weights", "~/model.pt", "HOME/model.pt", ["inference.json"]),
        ("guide", "~/model.pt", "HOME/model.pt", ["generate.json"]),
        ("pretrained", "~/model.pt", "HOME/model.pt", ["train.json"]),
    ],
)
def test_value_from_the_command_line_means_what_it_says(monkeypatch, key, text, value, files):
    monkeypatch.setenv("HOME", "HOME")
    flow = workflow(*files, workflow_type="train", **{key: text})
    flow.parser.parse()
    check_parser(flow.parser)
    assert flow.parser.get_parsed_content(key) == value


@pytest.mark.parametrize(
    "key, value, words",
    [
        *(("resume", value, "it must be true or false.") for value in ("maybe", 1, "1", [True], None)),
        ("use_checkpoint", ["true", "no"], "[1]` is 'no'; it must be true or false."),
        ("lr", -1, "it must be a number from 0 on."),
        ("lr", "fast", "it must be a number from 0 on."),
        ("epochs", 1.5, "it must be a positive integer."),
        ("epochs", True, "it must be a positive integer."),
        ("batch_size", 0, "it must be a positive integer."),
        ("seed", -1, "it must be an integer from 0 on."),
        ("mse_weight", -0.1, "it must be a number from 0 on."),
        ("channels", 8, "it must be a list."),
        ("norm", 3, "it must be text."),
        ("dataset_dir", 20.24, "it must be a path or null."),
        ("pretrained", 3.5, "it must be true or false or a path."),
    ],
)
def test_value_that_makes_no_sense_is_refused_with_its_key(key, value, words):
    flow = workflow("train.json", workflow_type="train", **{key: value})
    flow.parser.parse()
    with pytest.raises(ValueError, match=re.escape(f"`{key}") + ".*" + re.escape(words)):
        check_parser(flow.parser)


def test_number_sign_in_a_path_is_refused():
    flow = workflow("train.json", workflow_type="train", output_dir="/data/run#2")
    flow.parser.parse()
    with pytest.raises(ValueError, match="`output_dir` is '/data/run::2'.*'#'"):
        check_parser(flow.parser)


def test_every_key_of_a_config_is_what_it_must_be():
    defaults = _bundle_defaults()
    assert KINDS.keys() <= defaults.keys()
    bases = {"evaluate_diffusion.json": "train_diffusion.json", "inference_exported.json": "inference.json"}
    bases["in_memory.json"] = "inference.json"
    for path in CONFIGS.rglob("*.json"):
        if path.name not in NOT_CONFIGS:
            parser = ConfigParser()
            parser.read_config([CONFIGS / bases.get(path.name, "train.json"), path])
            parser.parse()
            check_parser(parser)


def test_two_levels_and_three_work_as_they_are():
    for channels, factors in (([16, 32], [4]), ([16, 32, 64], [4, 2]), ([16, 32, 64, 64], [2, 2, 2])):
        parser = ConfigParser()
        parser.read_config(CONFIGS / "train.json")
        parser.update({"channels": channels, "downsample_factors": factors})
        assert parser.get_parsed_content("network_def").downsample_factors == tuple((f,) * 3 for f in factors)


def test_fast_dev_run_takes_few_volumes_and_one_epoch(volumes):
    flow = workflow("train.json", workflow_type="train", dataset_dir=str(volumes), fast_dev_run=True, num_workers=0)
    flow.initialize()
    assert flow.max_epochs == 1
    assert len(flow.train_dataset_data) == 2
