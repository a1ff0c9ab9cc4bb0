"""What is wrong with a config that composes: missing values, values of the wrong type, data that no model takes."""

from __future__ import annotations

import inspect
import pydoc
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from lightning_peft.core.fields import matches, show


class ConfigError(ValueError):
    """A config that cannot be composed, or that no run can be made of."""


def check(config: DictConfig, models: Mapping[str, list[str]]) -> None:
    """Raise ConfigError on the first problem. models: the model configs there are -> what kinds of data they take."""
    if missing := [key for key, node in nodes(config) if node._is_missing()]:
        raise ConfigError(f"No value for {', '.join(missing)}. Give {' '.join(f'{key}=...' for key in missing)}")
    check_kind(config, models)
    for key, node in nodes(config):
        if isinstance(node, DictConfig) and "_target_" in node:
            check_target(key, node)
    check_method(config)
    check_precision(config)


def check_precision(config: DictConfig) -> None:
    """Build the plugin once: it knows its ranges."""
    from lightning_peft.config import build

    if config.get("precision") is not None:
        try:
            build(config.precision)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"precision: {error}") from error


def check_kind(config: DictConfig, models: Mapping[str, list[str]]) -> None:
    """The model must take what the data gives, where both say what it is."""
    kind, kinds = config.get("kind"), config.get("kinds")
    if kind is None or kinds is None or kind in kinds:
        return
    known = ", ".join(name for name, takes in models.items() if kind in takes)
    raise ConfigError(
        f"This data is for {kind}, this model for {', '.join(kinds)}. Models for {kind}: {known}. Choose one with"
        " model=..., or other data with data=..."
    )


def check_method(config: DictConfig) -> None:
    """Build each method once: it knows its ranges."""
    from lightning_peft.config import build

    labels: list[str] = []
    parts = methods_of(config)
    known = [name for name, node in parts.items() if isinstance(node, DictConfig) and "_target_" in node]
    if others := [name for name in parts if name not in known]:
        raise ConfigError(
            f"{others[0]} is no method, and peft is a list of them here: {', '.join(known) or 'none'}. Set the values "
            "of one of these, or choose no experiment that sets those of another."
        )
    for name, node in parts.items():
        try:
            labels.append(build(node).name_on_model)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name}: {error}") from error
    check_rates(config, labels)
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(f"peft: {len(labels)} methods, two of them labelled {twice.pop()!r}. Set label=...")


def check_rates(config: DictConfig, labels: list[str]) -> None:
    """Rates are those of methods that there are, or of heads."""
    from lightning_peft import rates

    given = config.get("rates")
    known = [*labels, rates.HEADS]
    if given is not None and (not isinstance(given, DictConfig) or set(given) - set(known)):
        example = f"rates={{{known[0]}: 0.001}}"
        raise ConfigError(f"rates={given}: rates are those of methods. Write {example}. Known: {', '.join(known)}.")
    try:
        rates.check_rates(given or {})
    except ValueError as error:
        raise ConfigError(str(error)) from None


def methods_of(config: DictConfig) -> dict[str, DictConfig]:
    """key -> node of every method: "peft", or "peft.lora" and "peft.bitfit" of a list."""
    node = config.get("peft")
    if node is None:
        return {}
    return {"peft": node} if "_target_" in node else {f"peft.{name}": part for name, part in node.items()}


# ------------------------------------------------------------------ signatures
def nodes(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, node) of everything in dicts; interpolations are left as they are, only the run can resolve them."""
    for name in map(str, config):
        node: Any = config._get_node(name)
        yield f"{prefix}{name}", node
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_interpolation() or node._is_missing()):
            yield from nodes(node, f"{prefix}{name}.")


def check_target(key: str, node: DictConfig) -> None:
    """The values of a node against the signature of what it builds: a wrong type is an error, where a type is given."""
    target = locate(key, node._target_)
    known, hints = parameters(target), hints_of(target)
    for name in (str(name) for name in node if not str(name).startswith("_")):
        if known is not None and name not in known:
            raise ConfigError(f"{key}.{name}: {node._target_} takes no such argument. Known: {', '.join(known)}.")
        value = raw(node, name)
        if not fits(value, hints.get(name, Any)):
            raise ConfigError(f"{key}.{name}={value!r}: {node._target_} expects {show(hints[name])}.")


def raw(node: DictConfig, name: str) -> Any:
    """A value, or None for an interpolation."""
    if OmegaConf.is_interpolation(node, name):
        return None
    return OmegaConf.to_container(node[name], resolve=False) if OmegaConf.is_config(node[name]) else node[name]


def locate(key: str, path: str) -> Callable[..., Any]:
    """Dotted path -> object"""
    try:
        found = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise ConfigError(f"{key}._target_={path!r} cannot be imported: {error.value}") from error
    if not callable(found):
        raise ConfigError(f"{key}._target_={path!r}: there is no class or function of this name. Give its dotted path.")
    return found


def parameters(target: Callable[..., Any]) -> list[str] | None:
    """The names that a callable takes; None if it takes any."""
    try:
        found = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in found) else [p.name for p in found]


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """argument -> annotation, without those that cannot be evaluated"""
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (TypeError, NameError):
        return {}
    return {name: hint for name, hint in hints.items() if not isinstance(hint, str)}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be meant by an annotation; what is not understood is taken to fit."""
    origin, args = get_origin(hint), get_args(hint)
    if value is None or hint is Any:
        return True  # an interpolation, or what the constructor takes for "not given"
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return value in args
    if hint in (int, float, bool, str):
        return matches(value, hint)
    if origin is not None:
        return isinstance(value, (list, dict)) or not inspect.isclass(origin)
    return isinstance(value, (dict, hint)) if inspect.isclass(hint) and not typing_only(hint) else True


def typing_only(hint: type) -> bool:
    """Protocols and abstract classes, which `isinstance` refuses or cannot decide for plain values."""
    return getattr(hint, "_is_protocol", False)
