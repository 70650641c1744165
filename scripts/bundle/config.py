"""Checks of a bundle config that MONAI leaves out: misspelt keys, and flags that arrive as text."""

from __future__ import annotations

import difflib
import inspect
import logging
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

__all__ = ["ROOT", "check_config", "check_parser"]

ROOT = Path(__file__).resolve().parent.parent.parent  # wherever the run was started, and whatever `bundle_root` says
CONFIGS = ROOT / "configs"
NOT_CONFIGS = ("metadata.json", "mlflow.json", "mlflow_diffusion.json")
MLFLOW: Any = DEFAULT_MLFLOW_SETTINGS["configs"]  # keys that `--tracking` adds
ADDED_BY_MONAI = {ConfigParser.meta_key, *MLFLOW}
FLAGS = {"true": True, "false": False}
FLAGS_BY_EXPRESSION = ("amp",)  # their default depends on the machine
ONE_PER_LEVEL = ("use_checkpoint",)  # a flag, or a list of them
FLAG_OR_PATH = ("pretrained",)
logger = logging.getLogger(__name__)


def check_config() -> None:
    """Check the config that is being run, see :py:func:`check_parser`. To be called from its ``initialize``."""
    check_parser(_calling_parser())


def check_parser(parser: ConfigParser) -> None:
    """
    Check a config.

    A top-level key that no config of the bundle has, and that nothing refers to, is refused: MONAI would add it silently,
    and a run with a misspelt key would train the default. A flag that arrives as text (``--resume false`` is the string
    ``"false"``, which Python takes as true) is converted to a boolean.

    Args:
        parser: of the config, with its overrides. The keys and the flags are those of the bundle's ``configs/*.json``.

    Raises:
        ValueError: for an unknown key, with the nearest one that exists, and for a flag that is neither true nor false.
    """
    defaults = _bundle_defaults()
    _refuse_unknown_keys(parser, defaults)
    for key, default in defaults.items():
        if (isinstance(default, bool) or key in FLAGS_BY_EXPRESSION) and key in parser:
            _read_flag(parser, key)


def _bundle_defaults() -> dict[str, Any]:
    files = [path for path in sorted(CONFIGS.glob("*.json")) if path.name not in NOT_CONFIGS]
    defaults: dict[str, Any] = {}
    for path in files:
        for key, value in ConfigParser.load_config_file(path).items():
            defaults.setdefault(key.split("#")[0].lstrip("+"), value)
    return defaults


def _calling_parser() -> ConfigParser:
    """The parser that evaluates the calling expression. MONAI hands it no reference, so look for it on the stack."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ConfigParser):
            return frame.f_locals["self"]
        frame = frame.f_back
    raise RuntimeError("check_config is for an expression of a bundle config")


def _refuse_unknown_keys(parser: ConfigParser, defaults: dict[str, Any]) -> None:
    config: dict[str, Any] = parser.get()
    referred = {id.split(ReferenceResolver.sep)[0] for id in _references(config)}
    known = defaults.keys() | referred | ADDED_BY_MONAI
    for key in config.keys() - known:
        nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no config key {key!r}; the nearest one is {nearest!r}.")


def _references(config: Any) -> set[str]:
    """Ids that ``config`` refers to by ``@``, at any depth."""
    if isinstance(config, str):
        return set(ReferenceResolver.match_refs_pattern(config))
    if isinstance(config, (dict, list)):
        return set().union(*(_references(v) for v in (config.values() if isinstance(config, dict) else config)))
    return set()


def _read_flag(parser: ConfigParser, key: str) -> None:
    value = parser[key]
    per_level = key in ONE_PER_LEVEL and isinstance(value, list)
    flags = [FLAGS.get(flag.lower(), flag) if isinstance(flag, str) else flag for flag in (value if per_level else [value])]
    if not all(isinstance(flag, bool) for flag in flags):
        if isinstance(value, str) and (value[:1] in ("$", "@") or key in FLAG_OR_PATH):
            return  # an expression, which has no value yet, or a path
        raise ValueError(f"`{key}` is {value!r}; it must be true or false{' or a path' * (key in FLAG_OR_PATH)}.")
    # the item as well as the config, which has been parsed already
    parser.config[key] = flags if per_level else flags[0]  # type: ignore[index]
    parser.ref_resolver.items[key].update_config(parser.config[key])  # type: ignore[index]
