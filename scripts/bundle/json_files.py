"""Checks of JSON files, and of other content that was written earlier, before anything in them is used.

What a file must hold is a JSON schema, declared beside the code that uses it. Error messages quote its ``"description"`` as
what the value must be.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

__all__ = ["SHA256", "problem_of_content", "read_json", "shortened"]

MAX_BYTES = 2**20  # of a file that describes another one; such files have some thousand
SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "a SHA-256 in hexadecimal"}

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = 8
_short.maxdict = 4
_short.maxstring = _short.maxother = 80
shortened = _short.repr  # of a value that may be of any size


def read_json(path: str | Path, schema: Mapping[str, Any], advice: str, max_bytes: int = MAX_BYTES) -> Any:
    """
    Read a JSON file and check all that is in it.

    Args:
        path: of the file.
        schema: what it must hold, as in :py:func:`problem_of_content`.
        advice: what to do when it does not, for the error message.
        max_bytes: size of the largest file that is read.

    Raises:
        OSError: when it cannot be opened.
        ValueError: when it is no JSON, or not what ``schema`` says, with the field, what was found, and ``advice``.
    """
    path = Path(path)
    with open(path, "rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes} bytes, which no such file has; {advice}.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter for deeply nested brackets
        raise ValueError(f"{path} is no JSON file or a damaged one ({error}); {advice}.") from error
    problem = problem_of_content(content, schema)
    if problem is not None:
        raise ValueError(f"{path}: {problem}; {advice}.")
    return content


def problem_of_content(content: Any, schema: Mapping[str, Any]) -> str | None:
    """
    What is wrong with content that was read from a file; None when nothing is.

    Args:
        content: of JSON, or of a checkpoint as far as it is made of dictionaries, lists, numbers and text.
        schema: JSON schema (2020-12), in which ``integer`` is one as Python sees it, and ``number`` a finite one.
    """
    error = best_match(Validator(schema).iter_errors(content))
    if error is None:
        return None
    field = _field(error)
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)  # type: ignore[operator,union-attr]
        return f"{field} has no `{missing}`"
    return f"{field} is {shortened(error.instance)}; it must be {_expected(error, schema)}"


def _field(error: ValidationError) -> str:
    """The place of an error, such as ```affine[0][1]```."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path]
    return f"`{''.join(steps).removeprefix('.')}`" if steps else "the content"


def _expected(error: ValidationError, schema: Any) -> str:
    """The description nearest to the part of the schema that an error is about."""
    words = schema.get("description", "as the bundle writes it")
    for step in error.absolute_schema_path:
        schema = schema[step]
        words = schema.get("description", words) if isinstance(schema, dict) else words
    return words


def _is_integer(_: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(_: Any, value: Any) -> bool:
    """No NaN, no infinity, and no integer that is too large for a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


TYPES = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_finite})
Validator = extend(Draft202012Validator, type_checker=TYPES)
