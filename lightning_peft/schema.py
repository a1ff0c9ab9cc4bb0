"""Hydra configs of the methods, made from the registry: a typed schema of each, and the text of conf/peft/<name>.yaml.

    python -m lightning_peft.schema            # write conf/peft/*.yaml again, after a method has changed

A schema lives in Hydra's ConfigStore as `schema/peft/<name>`; the YAML file takes it as its first default, so that a
wrong type and an unknown key are refused when the config is composed. What a schema cannot say (choices, ranges) is
checked by `config.check`, before anything runs.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import lightning_peft.methods  # noqa: F401  fills the registry
from lightning_peft.core.method import REGISTRY, Method

GROUP = "schema/peft"
PAPERS = "https://arxiv.org/abs/"
WIDTH = 110
STORED: dict[str, type[Method]] = {}
"""What `register` has put into Hydra's store, which takes longer than composing a config."""


# ------------------------------------------------------------------ types
def config_type(hint: Any) -> Any:
    """The annotation of a field -> the nearest one that OmegaConf knows; Any where there is none."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return literal_type(args)
    if origin in (typing.Union, types.UnionType):
        return union_type(args)
    if origin is list:
        return list[config_type(args[0])]  # type: ignore[misc]
    if origin is dict:
        return dict[args[0], config_type(args[1])]  # type: ignore[misc,valid-type]
    return hint if hint in (str, int, float, bool) else Any


def literal_type(choices: tuple[Any, ...]) -> Any:
    """Literal["a", "b"] -> str; Any for choices of several types."""
    kinds = {type(choice) for choice in choices}
    return kinds.pop() if len(kinds) == 1 else Any


def union_type(args: tuple[Any, ...]) -> Any:
    """X | None -> Optional[X]; Any for the other unions."""
    rest = [config_type(arg) for arg in args if arg is not type(None)]
    if len(rest) != 1 or rest[0] is Any or len(rest) == len(args):
        return Any
    return typing.Optional[rest[0]]  # noqa: UP045  made at run time, where a type is no string


def method_fields(cls: type[Method]) -> list[dataclasses.Field[Any]]:
    """The fields of a method that its constructor takes."""
    return [field for field in dataclasses.fields(cls) if field.init]


def default(field: dataclasses.Field[Any]) -> Any:
    """The default value of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def target(cls: type[Method]) -> str:
    """The dotted path of a method's class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def schema(cls: type[Method]) -> DictConfig:
    """A method -> its fields with their types and defaults, `_target_` and `_convert_: all`; tables take new keys."""
    hints = typing.get_type_hints(cls)
    fields: list[Any] = [
        ("_target_", str, dataclasses.field(default=target(cls))),
        ("_convert_", str, dataclasses.field(default="all")),
    ]
    for f in method_fields(cls):
        value = default(f)
        fields.append((f.name, config_type(hints[f.name]), dataclasses.field(default_factory=partial(copy, value))))
    made: DictConfig = OmegaConf.structured(dataclasses.make_dataclass(cls.__name__, fields))
    for name in made:
        if isinstance(made._get_node(name), DictConfig):
            OmegaConf.set_struct(made[name], False)
    return made


def register() -> None:
    """Put the schema of every registered method into Hydra's ConfigStore, those that are there already but once."""
    store = ConfigStore.instance()
    for name, cls in REGISTRY.items():
        if STORED.get(name) is not cls:
            store.store(group=GROUP, name=name, node=schema(cls), provider="lightning_peft")
            STORED[name] = cls


# ------------------------------------------------------------------ text
def comments(cls: type[Method]) -> dict[str, str]:
    """field -> what the class docstrings say about it in the form "field: words" or "field, field: words"."""
    names = {field.name for field in method_fields(cls)}
    found: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if issubclass(c, Method)]):
        for paragraph in inspect.cleandoc(vars(base).get("__doc__") or "").split("\n\n"):
            found |= dict(notes(" ".join(paragraph.split()), names))
    return found


def notes(paragraph: str, names: set[str]) -> Iterator[tuple[str, str]]:
    """The pairs (field, words) of one paragraph."""
    starts = [
        match
        for match in re.finditer(r"(?:^|(?<=[.;] ))((?:\w+, )*\w+): ", paragraph)
        if set(match[1].split(", ")) <= names
    ]
    ends = [*(match.start() for match in starts), len(paragraph)][1:]
    for match, end in zip(starts, ends, strict=False):
        words = paragraph[match.end() : end].strip().rstrip(".;").partition(" Source: ")[0]
        yield from ((name, words.rstrip(".;")) for name in match[1].split(", "))


def choices(hint: Any) -> str:
    """ "one of a, b" for a Literal, else nothing."""
    return "one of " + ", ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else ""


def value_text(value: Any) -> str:
    """A plain value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()


def field_text(cls: type[Method]) -> Iterator[str]:
    """The lines of all fields, with their comments above them."""
    said, hints = comments(cls), typing.get_type_hints(cls)
    for field in method_fields(cls):
        note = "; ".join(filter(None, [said.get(field.name, ""), choices(hints[field.name])]))
        yield from textwrap.wrap(note, WIDTH, initial_indent="# ", subsequent_indent="#   ")
        yield f"{field.name}: {value_text(default(field))}"


def example(cls: type[Method]) -> str:
    """A command that uses the method, with its first number spelled out."""
    inherited = {field.name for field in dataclasses.fields(Method)}
    own = [f for f in method_fields(cls) if f.name not in inherited and type(default(f)) in (int, float)]
    first = f" peft.{own[0].name}={default(own[0])}" if own else ""
    return f"lightning-peft train peft={cls.info.name}{first}"


def yaml_text(cls: type[Method]) -> str:
    """conf/peft/<name>.yaml: equation, paper, an example command, and every field with its default."""
    head = textwrap.wrap(f"{cls.__name__}: {cls.info.equation}", WIDTH, initial_indent="# ", subsequent_indent="#   ")
    paper = [f"# {PAPERS}{cls.info.paper}"] if cls.info.paper else []
    defaults = ["defaults:", f"  - /{GROUP}/{cls.info.name}@_here_", "  - _self_"]
    lines = [*head, *paper, f"# {example(cls)}", "", *defaults, "", *field_text(cls)]
    return "\n".join(lines) + "\n"


def write(folder: Path) -> list[Path]:
    """(Re)write the file of every registered method in `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, cls in sorted(REGISTRY.items()):
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml_text(cls), encoding="utf-8")
    return paths


if __name__ == "__main__":
    from lightning_peft.config import conf_dir

    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else conf_dir() / "peft"):
        print(path)
