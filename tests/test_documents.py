"""All files, keys, options, targets and links that README.md and docs/ name exist, and the cheap commands are run."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fire
import pytest
import torch
from fire.parser import DefaultParseValue
from monai import bundle as monai_bundle
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.networks.nets import PatchDiscriminator

from scripts.__main__ import COMMANDS
from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import _bundle_defaults, check_parser
from scripts.planning.self_test import check_configuration
from scripts.training import Muon
from tests.conftest import ROOT, save_volume
from tests.test_architecture import ORDER
from tests.training.test_training import small_network

DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_OPTION = re.compile(r"`(--[a-z_#]+(?: [^`]*)?)`")
COMMENT = re.compile(r"(^|\s)#.*")  # a # within a word is part of a key
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
OTHER_PROGRAMS = {"source", "cd", "(cd", "pip", "mlflow", "tensorboard", "hf"}  # the shell's, and those of dependencies
# whose arguments documents set
NESTED = {"network_def": AutoencoderKL, "adversary#discriminator": PatchDiscriminator, "optimizer": Muon}
MONAI_TOOLS = [monai_bundle.run, monai_bundle.ckpt_export, monai_bundle.onnx_export, monai_bundle.download]
# not config keys
OF_MONAI = {name for tool in MONAI_TOOLS for name in inspect.signature(tool).parameters} | {"tracking_uri"}


def blocks(language: str, document: Path) -> list[str]:
    return [text for found, text in BLOCK.findall(document.read_text()) if found == language]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of every ``bash`` block: (its document, its words)."""
    for document in DOCUMENTS:
        for block in blocks("bash", document):
            for words in in_words(block.replace("\\\n", " ")):
                while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):  # settings of the environment
                    words.pop(0)
                if words:
                    yield document.name, words


def in_words(block: str) -> Iterator[list[str]]:
    """The words of each command, which ends with its line unless a quote is open."""
    command = ""
    for line in block.splitlines():
        command += COMMENT.sub("", line) + "\n"
        if command.count('"') % 2 == 0:
            yield shlex.split(command)
            command = ""


def typed(program: list[str]) -> list:
    """The commands that contain these words in a row; each as a parameter with the words that follow them."""
    found = []
    for document, words in commands():
        for start in range(len(words)):
            if words[start : start + len(program)] == program:
                rest = words[start + len(program) :]
                found.append(pytest.param(rest, id=f"{document}: {' '.join(rest)}"))
    return found


def options(words: list[str]) -> dict:
    """``--key value`` as the command line reads them; a key without a value is a flag."""
    pairs = itertools.zip_longest(words, words[1:], fillvalue="--")
    values = {key[2:]: value for key, value in pairs if key.startswith("--")}
    return {key: True if value.startswith("--") else DefaultParseValue(value) for key, value in values.items()}


def config(files, keys: dict) -> ConfigParser:
    """A config with keys of the command line; raises what training would raise."""
    files = [files] if isinstance(files, str) else files
    ours = [file for file in files if file.startswith("configs/")]  # others are the reader's own
    parser = ConfigParser(ConfigParser.load_config_files([str(ROOT / file) for file in ours]))
    for key in keys:
        owner, nested, argument = key.rpartition("#")
        assert not nested or argument == "_target_" or argument in inspect.signature(NESTED[owner]).parameters, key
    parser.update(keys)
    parser.parse()
    check_parser(parser)
    return parser


def test_every_command_is_of_a_kind_that_is_checked():
    for document, words in commands():
        known = {("python", "-m"), ("make",), ("torchrun",), ("srun",), *((name,) for name in OTHER_PROGRAMS)}
        assert any(tuple(words[: len(start)]) == start for start in known) or words[0].startswith("head="), (document, words)


@pytest.mark.parametrize("words", typed(["-m", "monai.bundle", "run"]))
def test_bundle_command_names_files_and_keys_that_exist(words):
    given = options(words)
    files = given.pop("config_file")
    parser = config(files, {key: value for key, value in given.items() if key not in OF_MONAI})
    assert words[0].startswith("--") or words[0] in parser, f"there is no {words[0]}"
    for key in ("meta_file", "logging_file", "tracking"):
        assert key not in given or given[key] == "mlflow" or (ROOT / given[key]).is_file(), given[key]


def documented_configurations() -> list:
    """The configs that the commands name, with the keys that shape the network, each once as a parameter."""
    definition = ConfigParser.load_config_file(ROOT / "configs/train.json")["network_def"]
    shaping = {value[1:] for value in definition.values() if str(value).startswith("@")}
    found = {}
    for param in typed(["-m", "monai.bundle", "run"]):
        given = options(param.values[0])
        files = [given["config_file"]] if isinstance(given["config_file"], str) else given["config_file"]
        ours = all(file.startswith("configs/") for file in files)  # others are the reader's own
        if ours and files[0] in ("configs/train.json", "configs/inference.json"):  # not those of the generator
            network = [file for file in files if file == files[0] or "/presets/" in file]  # others leave it alone
            keys = {key: value for key, value in given.items() if key in shaping}
            names = [file.removeprefix("configs/").removesuffix(".json") for file in network]
            name = " ".join([" + ".join(names), *(f"--{key} {str(value).replace(' ', '')}" for key, value in keys.items())])
            found[name] = pytest.param(network, keys, id=name)
    return list(found.values())


def test_configurations_are_found_in_the_commands():
    names = {param.id for param in documented_configurations()}
    assert {"train", "train + presets/16x", "inference", "train --downsample_factors [4,2] --latent_channels 64"} <= names


@pytest.mark.parametrize("files, keys", documented_configurations())
def test_documented_configuration_trains_encodes_and_decodes(files, keys):
    assert check_configuration(files, amp=False, **keys).error is None  # in float32, which is fast on every processor


@pytest.mark.parametrize("words", [param for param in typed(["-m", "monai.bundle"]) if param.values[0][0] != "run"])
def test_other_tools_of_monai_have_their_options_and_files(words):
    tool = getattr(monai_bundle, words[0])
    for key, value in options(words).items():
        assert key in inspect.signature(tool).parameters, key
        assert not str(value).startswith("configs/") or (ROOT / value).is_file(), value


@pytest.mark.parametrize("words", typed(["-m", "scripts"]))
def test_planner_command_is_understood(words):
    asked = {}

    def recorder(name):
        return lambda *unexpected, **given: asked.update({name: (unexpected, given)})

    fire.Fire({name: recorder(name) for name in COMMANDS}, command=words)
    ((name, (unexpected, given)),) = asked.items()
    bound = inspect.signature(COMMANDS[name]).bind(*unexpected, **given)
    assert not bound.arguments.get("unexpected")
    config(given.get("config_file", "configs/train.json"), bound.arguments.get("overrides", {}))


@pytest.mark.parametrize("module, words", [
    pytest.param(words[2], words[3:], id=f"{document}: {words[2]}")
    for document, words in commands() if words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks.", "scripts."))
])  # fmt: skip
def test_module_has_the_options_that_are_named(module, words):
    functions = [f for _, f in inspect.getmembers(importlib.import_module(module), inspect.isfunction)]
    if words and not words[0].startswith("--"):
        functions = [f for f in functions if f.__name__ == words[0]]
        assert functions, words[0]
    public = {name for f in functions if f.__module__ == module for name in inspect.signature(f).parameters}
    further = {key: value for key, value in options(words).items() if key not in public}
    assert not further or "overrides" in public, further
    config("configs/train.json", further)


@pytest.mark.parametrize("words", typed(["make"]))
def test_make_has_the_target_and_the_variables(words):
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        start = f"\n{name} ?=" if is_variable else f"\n{name}:"
        assert start in makefile, word


def test_make_weights_starts_from_nothing_and_each_further_part_from_weights_that_it_made():
    listed = subprocess.run(["make", "-n", "weights"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    made: list[str] = []
    for words in in_words(listed.replace("\\\n", " ")):
        if "monai.bundle" not in words:
            continue
        given = {key: value for key, value in options(words).items() if key not in ("meta_file", "logging_file")}
        config(given.pop("config_file"), given)
        assert given["resume"] == "true" and ("pretrained" in given) == ("_" in Path(given["output_dir"]).name)
        assert given.get("pretrained") in (None, *made)
        made.append(f"{given['output_dir']}/checkpoints/model.pt")
    assert len(made) == len(set(made)) == 6


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_the_text_are_keys_with_values_that_are_allowed(document):
    others = OF_MONAI | {name for f in COMMANDS.values() for name in inspect.signature(f).parameters}
    known = _bundle_defaults()
    for inline in INLINE_OPTION.findall(BLOCK.sub("", document.read_text())):
        given = options(shlex.split(inline))
        keys = {key: value for key, value in given.items() if key not in others}
        assert {key.partition("#")[0] for key in keys} <= known.keys(), inline
        config("configs/train.json", {key: value for key, value in keys.items() if " " in inline})  # a name has no value


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in LINK.findall(document.read_text()):
        file, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = document.parent / file if file else document
        assert target.exists(), link
        if anchor:
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in HEADING.findall(target.read_text())}
            assert anchor in slugs, link


def test_architecture_names_packages_files_and_identifiers_that_exist():
    document = ROOT / "docs/architecture.md"
    text, (picture,) = document.read_text(), blocks("mermaid", document)
    packages = re.findall(r"^\| `scripts/(\w+)[^`]*` \|", text, re.MULTILINE)
    assert packages == ORDER
    files = [path for pattern in ("scripts/**/*.py", "configs/**/*.json", "benchmarks/*.py") for path in ROOT.glob(pattern)]
    sources = "\n".join(path.read_text() for path in files)
    words = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    words += re.findall(r"[a-z]+_[a-z_]+|\b[A-Z][a-z]+[A-Z]\w+", picture)
    for word in words:
        exists = (ROOT / word).exists() if "/" in word else re.search(rf"\b{re.escape(word)}\b", sources)
        assert exists, word


# --- cheap commands are run --------------------------------------------------------------------------------------------


def test_python_of_the_guide_and_of_inference_runs():
    names = {"volume": torch.rand(1, 1, 16, 16, 16), "network": small_network()}
    for document in (ROOT / "docs/guide.md", ROOT / "docs/inference.md"):
        for block in blocks("python", document):
            exec(block, found := dict(names))
    assert found["reconstruction"].shape == found["volume"].shape


def test_quickstart_goes_from_volumes_to_a_sample_of_a_diffusion_model(tmp_path, monkeypatch):
    for i in range(2):
        save_volume(tmp_path / "mine" / f"{i}.nii.gz", (24, 24, 30), seed=i)
    latents = tmp_path / "latents"
    flow = ConfigWorkflow(
        config_file=str(ROOT / "configs/inference.json"),
        meta_file=str(ROOT / "configs/metadata.json"),
        logging_file=False,
        workflow_type="infer",
        run_id="encoding",
        bundle_root=str(ROOT),
        dataset_dir=str(tmp_path / "mine"),
        output_dir=str(latents),
        num_workers=0,
        device="cpu",
    )
    flow.initialize()
    flow.run()
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for block in blocks("python", ROOT / "docs/quickstart.md"):
        block = block.replace("/data/latents", str(latents)).replace("eval/mine/checkpoints", "models").replace("1000", "4")
        exec(block, names)
    assert torch.isfinite(names["loss"])
    scaled = names["latent"].std()  # over one of the two volumes, including the padding
    assert 0.5 < scaled < 2
    assert names["volume"].shape == (1, 1, 32, 32, 32)
    assert json.loads((latents / "latent_scale.json").read_text())["volumes"] == 2
