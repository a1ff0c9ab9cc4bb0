"""Checks on the fields of a method: plain values of the annotated type, so that they survive YAML, JSON and
checkpoints.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal, get_args, get_origin

PLAIN = (str, int, float, bool, type(None))


class FieldError(ValueError):
    """A value that a method's field cannot take."""


def unknown_field(cls: type, given: set[str]) -> None:
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for name in sorted(given - set(known)):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{cls.__name__} has no field {name!r}.{hint} Known: {', '.join(known)}.")


def check_fields(method: Any) -> None:
    """Raise on the first field whose value is no plain value of the annotated type."""
    hints = typing.get_type_hints(type(method))
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if not is_plain(value):
            raise FieldError(
                f"{type(method).__name__}({f.name}=...) got a {type(value).__name__}; fields hold plain values "
                f"(str, int, "
                "float, bool, None, list, dict). Convert first: OmegaConf.to_container(config, resolve=True), or put "
                "`_convert_: all` beside `_target_`."
            )
        if not matches(value, hints[f.name]):
            raise FieldError(f"{type(method).__name__}({f.name}={value!r}): expected {show(hints[f.name])}.")


def is_plain(value: Any) -> bool:
    if type(value) is list or type(value) is tuple:
        return all(is_plain(item) for item in value)
    if type(value) is dict:
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    return type(value) in PLAIN


def matches(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, (list, tuple)) and all(matches(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches(k, args[0]) and matches(v, args[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint if hint is not None else type(None))


def show(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(arg) for arg in get_args(hint))
    return getattr(hint, "__name__", None) if isinstance(hint, type) and not get_args(hint) else str(hint)  # type: ignore[return-value]


def positive(method: Any, *names: str) -> None:
    for name in names:
        value = getattr(method, name)
        if not 0 < value < math.inf:
            raise FieldError(f"{type(method).__name__}({name}={value!r}): expected a number above 0.")


def not_negative(method: Any, *names: str) -> None:
    for name in names:
        value = getattr(method, name)
        if not 0 <= value < math.inf:
            raise FieldError(f"{type(method).__name__}({name}={value!r}): expected 0 or more.")


def probability(method: Any, *names: str) -> None:
    for name in names:
        value = getattr(method, name)
        if not 0 <= value < 1:
            raise FieldError(f"{type(method).__name__}({name}={value!r}): expected a probability, 0 <= p < 1.")
