"""Several methods on one model from a command line: `peft=[lora,bitfit] peft.lora.rank=4`.

The list is a config of its own, "lora+bitfit", made when it is named, on the command line or in a file of config
(`override /peft: lora+bitfit`): the members under their names, a method that is named again as `lora_2`, which is its
label, too. So a sweep may mix lists and single methods: `peft=lora,[lora,bitfit]`, `peft=choice(lora,[lora,bitfit])`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException

from lightning_peft.checks import ConfigError

GROUP = "peft"
PREFIX = f"{GROUP}="
LIST = re.compile(r"\[([^\[\]]*)\]")
QUOTED = re.compile(r"(['\"])(\[.*\])\1")
JOINED = re.compile(r"[^\s,()\[\]]*\+[^\s,()\[\]]*")
EXAMPLE = "Write names, such as peft=[lora,bitfit]."
Made = TypeVar("Made")


def named(overrides: Sequence[str]) -> list[str]:
    """The overrides with each list of methods as the one config that it stands for."""
    if added := [word for word in overrides if word.startswith(f"+{PREFIX}")]:
        raise ConfigError(f"{added[0]}: one method, or list of methods, is chosen already. {EXAMPLE}")
    return [PREFIX + one(word.removeprefix(PREFIX)) if word.startswith(PREFIX) else word for word in overrides]


def one(given: str) -> str:
    """ "lora,[lora,bitfit]" -> "lora,lora+bitfit"; lists of one are that method."""
    value = LIST.sub(lambda found: "+".join(members(found[0])), QUOTED.sub(r"\2", given))
    if LIST.search(value):
        raise ConfigError(f"{PREFIX}{given} has a list within a list. {EXAMPLE}")
    for option in JOINED.findall(value):
        store(members(option))
    return value


def members(text: str) -> list[str]:
    """The names in "[lora,bitfit]" or "lora+bitfit"."""
    if not (inside := text.strip("[] ")):
        raise ConfigError(f"{PREFIX}{text} names no method. {EXAMPLE} For none: ~{GROUP}.")
    found = [name.strip().strip("'\"") for name in re.split(r"[,+]", inside)]
    if not all(found):
        raise ConfigError(f"{PREFIX}{text} names no method beside a separator. {EXAMPLE}")
    return found


def store(names: Sequence[str]) -> None:
    """Put the config of several methods where Hydra finds it."""
    seen: Counter[str] = Counter()
    defaults: list[str] = []
    node: dict[str, Any] = {}
    for name in names:
        seen[name] += 1
        key = name if seen[name] == 1 else f"{name}_{seen[name]}"
        defaults.append(f"{name}@{key}")
        if key != name:
            node[key] = {"label": key}
    whole = {"defaults": [*defaults, "_self_"], **node}
    ConfigStore.instance().store(group=GROUP, name="+".join(names), node=whole, provider="lightning_peft")


def with_lists(compose: Callable[[], Made]) -> Made:
    """What `compose` gives, when the lists that files of config name are stored."""
    stored: set[str] = set()
    while True:
        try:
            return compose()
        except MissingConfigException as error:
            group, _, name = (error.missing_cfg_file or "").rpartition("/")
            if group != GROUP or "+" not in name or name in stored:
                raise
            stored.add(name)
            store(members(name))
