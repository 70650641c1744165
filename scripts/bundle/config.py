"""Checks of a bundle config that MONAI leaves out: misspelt keys, and values that make no sense."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from scripts.bundle.json_files import Count, Must, PositiveInt, checked

ROOT = Path(__file__).resolve().parent.parent.parent  # wherever the run was started, and whatever `bundle_root` says
CONFIGS = ROOT / "configs"
NOT_CONFIGS = ("metadata.json", "mlflow.json")
MLFLOW: Any = DEFAULT_MLFLOW_SETTINGS["configs"]  # keys that `--tracking` adds
WORDS = {"true": True, "false": False, "null": None}  # JSON's, which the command line takes for text
PATHS = (
    *("dataset_dir", "further_dir", "output_dir", "run_dir", "ckpt_dir", "cache_dir", "evaluation_dir"),
    *("weights", "autoencoder", "guide", "pretrained", "perceptual_weights_file"),
)
FilePath = Annotated[str, Must("a path", len)]
Amount = Annotated[float, Must("a number from 0 on", lambda x: x >= 0)]
NAME = re.compile("(?!image$)[a-zA-Z0-9][a-zA-Z0-9_-]*")
SpatialKey = Annotated[str, Must("a name of letters, digits, '-' and '_', other than 'image'", NAME.fullmatch)]
SpatialKeys = Annotated[list[SpatialKey], Must("a list of different names", lambda names: len({*names}) == len(names))]
KINDS: dict[str, Any] = {  # of the keys of which their default does not say it
    **dict.fromkeys(PATHS, FilePath | None),
    "pretrained": bool | FilePath,
    "use_checkpoint": bool | list[bool],
    "amp": bool,
    **dict.fromkeys(
        ("view_worst", "view_nearest", "repeats", "further_repeats", "head_patches", "procedural_volumes"), Count
    ),
    **dict.fromkeys(("spatial_keys", "label_keys"), SpatialKeys),
    **dict.fromkeys(("initial_downsample_factor", "num_res_blocks", "patch_size"), PositiveInt | list),
}


def check_config() -> None:
    """Check the config that is being run, see :py:func:`check_parser`. To be called from its ``initialize``."""
    check_parser(_calling_parser())


def check_parser(parser: ConfigParser) -> None:
    """
    Refuse a top-level key that no config of the bundle has and that nothing refers to: MONAI would add it silently, and a
    run with a misspelt key would train the default. Refuse a value that is not of the type of the key's default, or not what
    :py:data:`KINDS` says. The words ``true``, ``false`` and ``null``, which arrive as text from the command line, are
    converted (``"false"`` is true for Python), paths are text, and a ``~`` in front of them is the home folder.

    Raises:
        ValueError: for an unknown key, with the nearest one that exists, and for a value that makes no sense, with its key.
    """
    defaults = _bundle_defaults()
    config: dict[str, Any] = parser.get()
    known = {ConfigParser.meta_key, *MLFLOW, *defaults, *(id.split(ReferenceResolver.sep)[0] for id in _references(config))}
    for key in config.keys() - known:
        nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no config key {key!r}; the nearest one is {nearest!r}.")
    for key in config.keys() & defaults.keys():
        config[key] = value = _meant(config[key], defaults[key], is_path=key in PATHS)
        parser.ref_resolver.items[key].update_config(value)  # the item as well, which has been parsed already
        if has_expression(value):
            continue
        if key in PATHS and ReferenceResolver.sep in str(value):
            raise ValueError(f"`{key}` is {value!r}: a path must have no '#', of which MONAI makes '::'.")
        checked(value, KINDS.get(key, _kind_of(defaults[key])), key)


def executed_config() -> dict[str, Any]:
    """The config that is being run, with its overlays and overrides, as JSON has it. To be called from one of its values."""
    config: dict[str, Any] = _calling_parser().get()
    return json.loads(json.dumps({key: value for key, value in config.items() if key != ConfigParser.meta_key}, default=str))


def _calling_parser() -> ConfigParser:
    """The parser that evaluates the calling expression. MONAI hands it no reference, so look for it on the stack."""
    frames = (info.frame for info in inspect.stack(context=0))
    return next(found for frame in frames if isinstance(found := frame.f_locals.get("self"), ConfigParser))


def _bundle_defaults() -> dict[str, Any]:
    """The keys of the bundle's configs with their values; of those of which overlays change a part, an empty dictionary."""
    defaults: dict[str, Any] = {}
    for path in sorted(CONFIGS.glob("*.json")):
        for key, value in ConfigParser.load_config_file(path).items() if path.name not in NOT_CONFIGS else ():
            name = key.split("#")[0].lstrip("+")
            defaults.setdefault(name, value if name == key else {})
    return defaults


def _meant(value: Any, default: Any, is_path: bool) -> Any:
    """What a value from the command line means."""
    if isinstance(value, list):
        return [_meant(each, None, is_path=False) for each in value]
    is_text = isinstance(default, str) and not has_expression(default) and not is_path
    if isinstance(value, str) and not is_text and value.lower() in WORDS:
        return WORDS[value.lower()]
    if is_path and isinstance(value, (str, os.PathLike)):
        return os.path.expanduser(value)
    return str(value) if is_path and type(value) is int else value  # a folder called 2024


def has_expression(value: Any) -> bool:
    """Whether a value is known only when the config is evaluated."""
    if isinstance(value, (dict, list)):
        return any(map(has_expression, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def _kind_of(default: Any) -> Any:
    """The annotation of a key by its default value."""
    if default is None or isinstance(default, dict) or has_expression(default):
        return Any
    if isinstance(default, int) and not isinstance(default, bool):
        return PositiveInt if default else Count
    return Amount if isinstance(default, float) else type(default)


def _references(config: Any) -> set[str]:
    """Ids that ``config`` refers to by ``@``, at any depth."""
    if isinstance(config, str):
        return set(ReferenceResolver.match_refs_pattern(config))
    if isinstance(config, (dict, list)):
        return set().union(*map(_references, config.values() if isinstance(config, dict) else config))
    return set()
