"""Values from outside (JSON files, checkpoints, the command line), checked against type annotations before they are used."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

MAX_BYTES = 2**20  # of a file that describes another one; such files have some thousand

_short = reprlib.Repr()
_short.maxlevel = 2
_short.maxstring = _short.maxother = 80
shortened = _short.repr  # of a value that may be of any size
WORDS: dict[Any, str] = {
    **{int: "an integer", float: "a finite number", bool: "true or false", str: "text", NoneType: "null"},
    **{list: "a list", tuple: "a list"},
}
_hints = functools.cache(get_type_hints)


@dataclass(frozen=True)
class Must:
    """
    Condition of an annotated value, as in ``Annotated[int, Must("an even integer", lambda n: n % 2 == 0)]``: what it must
    be, for the error, and whether a value of the annotated type is that.
    """

    be: str
    holds: Callable[[Any], Any]


PositiveInt = Annotated[int, Must("a positive integer", lambda n: n > 0)]
Count = Annotated[int, Must("an integer from 0 on", lambda n: n >= 0)]
PositiveFloat = Annotated[float, Must("a positive number", lambda x: x > 0)]
Share = Annotated[float, Must("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Sha256 = Annotated[str, Must("a SHA-256 in hexadecimal", re.compile("[0-9a-f]{64}").fullmatch)]


def read_dataclass(path: str | Path, cls: type[T], max_bytes: int = MAX_BYTES) -> T:
    """
    Read a JSON object of at most ``max_bytes`` and check it against the annotations of a dataclass by :py:func:`checked`.
    The ``__post_init__`` of ``cls`` may raise a ValueError, for values that contradict each other.

    Raises:
        OSError: when the file cannot be opened.
        ValueError: when it is no JSON, or not what ``cls`` says, with the file, the field and what was found.
    """
    with open(path, "rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes} bytes, which no such file has.")
    try:
        return checked(json.loads(text), cls)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:  # the last for deeply nested brackets
        raise ValueError(f"{path} is damaged, or not JSON ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def checked(value: Any, kind: Any, name: str = "", expected: str | None = None) -> Any:
    """
    A value from outside, checked against a type annotation.

    Args:
        kind: ``int``, ``float`` (finite, or an integer, which is converted), ``bool`` (which is no number), ``str``,
            ``None``, ``Any``; ``list``, ``tuple`` (made of a list) and ``dict`` of them; ``Literal``, unions, and
            ``Annotated`` with :py:class:`Must`; or a dataclass, which is made of a dictionary: fields with a default may be
            missing in it, and keys that are no field are ignored.
        name: field or argument, for the error.
        expected: what the value must be, for the error; by default ``kind`` in words.

    Raises:
        ValueError: when it is something else, with the place, such as ```affine[0][1]```, and what was found there.
    """
    expected = expected or _in_words(kind)
    base, arguments = get_origin(kind) or kind, get_args(kind)
    if base is Any:
        return value
    if base in (Union, UnionType):
        *others, last = sorted(arguments, key=lambda each: each is not NoneType)  # the error is that of the last
        for each in others:
            with contextlib.suppress(ValueError):
                return checked(value, each, name, expected)
        return checked(value, last, name, expected)
    if base is Annotated:
        value = checked(value, arguments[0], name, expected)
    if not _fits(value, base, arguments):
        raise ValueError(f"{f'`{name}`' if name else 'the content'} is {shortened(value)}; it must be {expected}.")
    if is_dataclass(base):
        return _checked_fields(value, base, name)
    if base is dict and arguments:
        return {key: checked(each, arguments[1], f"{name}.{key}".lstrip(".")) for key, each in value.items()}
    if base in (list, tuple):
        kinds = arguments if _is_fixed(arguments) else [(*arguments, Any)[0]] * len(value)
        return base(checked(each, kinds[i], f"{name}[{i}]") for i, each in enumerate(value))
    return float(value) if base is float else value


def _fits(value: Any, base: Any, arguments: tuple[Any, ...]) -> bool:
    if base is Annotated:
        return all(condition.holds(value) for condition in arguments[1:])
    if base is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if base is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if base is int:
        return type(value) is int and abs(value) < 2**63
    if base is tuple:
        return isinstance(value, (list, tuple)) and (len(value) == len(arguments) or not _is_fixed(arguments))
    return value is None if base in (None, NoneType) else isinstance(value, dict if is_dataclass(base) else base)


def _is_fixed(arguments: tuple[Any, ...]) -> bool:  # a tuple's length
    return len(arguments) > 1 and arguments[-1] is not ...


def _checked_fields(value: dict[str, Any], cls: Any, name: str) -> Any:
    kinds, found = _hints(cls, include_extras=True), {}
    for field in fields(cls):
        place = f"{name}.{field.name}".lstrip(".")
        if field.name in value:
            found[field.name] = checked(value[field.name], kinds[field.name], place)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"`{place}` is missing.")
    return cls(**found)


def _in_words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return arguments[-1].be
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple and _is_fixed(arguments):
        return f"a list of {len(arguments)}"
    return WORDS.get(origin or kind, "an object")


@dataclass(frozen=True)
class _Network:
    """Those arguments of an AutoencoderKL that are used; the others are only compared with another network's."""

    spatial_dims: Literal[1, 2, 3]
    channels: list[PositiveInt]
    downsample_factors: list[list[PositiveInt]]
    initial_downsample_factor: list[PositiveInt]
    initial_mode: str


NetworkArguments = Annotated[
    dict[str, Any], Must("the arguments of an AutoencoderKL", lambda found: checked(found, _Network, "network"))
]


def total_downsample_factor(network: Mapping[str, Any]) -> tuple[int, ...]:
    """The total factor along each axis of the network with these arguments."""
    return tuple(math.prod(along) for along in zip(network["initial_downsample_factor"], *network["downsample_factors"]))
