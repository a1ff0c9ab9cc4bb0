"""The registry as a table: what every method is, and how many parameters it trains on a given model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

import lightning_peft.methods  # noqa: F401  fills the registry
from lightning_peft.core import state
from lightning_peft.core.method import REGISTRY, Method, NothingToTrainError
from lightning_peft.core.sites import TargetError

COLUMNS = ("method", "class", "family", "equation", "mergeable", "identity", "paper")
COSTS = ("overhead", "backprop", "storage", "batched")
PAPERS = "https://arxiv.org/abs/"
Row = dict[str, str]
YES = {True: "yes", False: "no"}


def rows(model: nn.Module | None = None, what: Callable[[type[Method]], Row] | None = None) -> list[Row]:
    """One row a method, sorted by family and name; with `model`, the parameters that its defaults train there.

    what: the cells of a row; default `row`.
    """
    classes = sorted(REGISTRY.values(), key=lambda cls: (cls.info.family, cls.info.name))
    return [(what or row)(cls) | ({} if model is None else {"trainable": count(cls, model)}) for cls in classes]


def row(cls: type[Method]) -> Row:
    """What a method says about itself."""
    info = cls.info
    cells = (info.name, cls.__name__, info.family, info.equation, YES[info.mergeable], YES[info.identity], info.paper)
    return dict(zip(COLUMNS, cells, strict=True))


def costs(cls: type[Method]) -> Row:
    """What it costs, as `core.method.Info` defines the words."""
    info = cls.info
    return dict(zip(COSTS, (info.overhead, YES[info.backprop], info.storage, YES[info.batched]), strict=True))


def priced(cls: type[Method]) -> Row:
    """`row` and `costs`."""
    said = row(cls)
    paper = said.pop("paper")
    return said | costs(cls) | {"paper": paper}


def properties(cls: type[Method]) -> Row:
    """Name and costs."""
    return {"method": cls.info.name, "mergeable": YES[cls.info.mergeable]} | costs(cls)


def count(cls: type[Method], model: nn.Module) -> str:
    """Trainable parameters with the method's defaults and the task head; "-" where it does not fit the model."""
    try:
        facts = state.describe(cls().apply(copy.deepcopy(model)))
    except (TargetError, NothingToTrainError):
        return "-"
    return f"{facts['trainable']:,} ({facts['percent']:.2f} %)"


def model_named(name: str) -> nn.Module:
    """A model of conf/model by its name, or one of the Hugging Face hub by its config alone, without weights."""
    from lightning_peft.config import build, load, options

    if name in options("model") and name != "hf":
        config = load("model", name)
        config.kind = config.kinds[0]
        return build(config.model, **({} if config.kind == "causal-lm" else {"num_classes": 2}))
    from lightning_peft.tasks.extras import optional
    from lightning_peft.tasks.hub import reach

    transformers = optional("transformers", f"--model {name}")
    with reach(name), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(name)
        return transformers.AutoModel.from_config(config)


# ------------------------------------------------------------------ text
def markdown(table: Sequence[Row]) -> str:
    """A table for a README; papers are links, equations are code."""
    shown = [{name: cell(name, value) for name, value in cells.items()} for cells in table]
    names = list(shown[0])
    lines = [[*names], ["---"] * len(names), *([cells[n].replace("|", "\\|") for n in names] for cells in shown)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(name: str, value: str) -> str:
    """A value of a column as Markdown."""
    if name in ("method", "class") or (name == "equation" and re.search(r"[=;^]", value)):
        return f"`{value}`"
    return f"[{value}]({PAPERS}{value})" if name == "paper" and value else value


def text(table: Sequence[Row]) -> str:
    """A table for a terminal: a line of facts for each method, its equation below."""
    names = [name for name in table[0] if name not in ("equation", "class")]
    widths = {name: max(len(name), *(len(cells[name]) for cells in table)) for name in names}

    def line(cells: Row) -> str:
        return "  ".join(cells[name].ljust(widths[name]) for name in names).rstrip()

    head = line({name: name for name in names})
    body = [f"{line(cells)}\n    {cells['class']}: {cells['equation']}" for cells in table]
    return "\n".join([head, "-" * len(head), *body])
