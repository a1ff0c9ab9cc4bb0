"""Several methods on one model from a command line: `peft=[lora,bitfit] peft.lora.rank=4`.

The list is a config of its own, "lora+bitfit", made when it is named: the members under their names, a method that is
named again as `lora_2`, which is its label, too. So a sweep may mix lists and single methods.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore

from lightning_peft.checks import ConfigError

PREFIX = "peft="
LIST = re.compile(r"\[([^\[\]]*)\]")


def named(overrides: Sequence[str]) -> list[str]:
    """The overrides with each list of methods as the one config that it stands for."""
    return [PREFIX + one(word.removeprefix(PREFIX)) if word.startswith(PREFIX) else word for word in overrides]


def one(value: str) -> str:
    """ "lora,[lora,bitfit]" -> "lora,lora+bitfit"; lists of one are that method."""
    value = LIST.sub(lambda found: "+".join(members(found[0])), value)
    for option in value.split(","):
        if "+" in option:
            store(option.strip().split("+"))
    return value


def members(text: str) -> list[str]:
    """The names in "[lora,bitfit]"."""
    found = [name.strip().strip("'\"") for name in text.strip("[]").split(",")]
    if not all(found):
        raise ConfigError(f"peft={text} names no method between two commas. Write names, such as peft=[lora,bitfit].")
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
    ConfigStore.instance().store(group=PREFIX[:-1], name="+".join(names), node=whole, provider="lightning_peft")
