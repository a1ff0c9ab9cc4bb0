"""Which method to use: candidates in order, with reasons, settings to begin with and the command that starts a run.

    print(choose(model, examples=500, inference=True))
    lightning-peft choose model=minilm --examples 500 --inference

The order is a sum of points that each reason shows. What a method costs is what it declares about itself
(`core.method.Info`) and what it trains on this model; what it is worth, and its settings, are in `choosing.starts`.
Memory is that of `planning`. Nothing is asked, trained or downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_peft.choosing.base import Base, command, in_codes, kind_of, known
from lightning_peft.choosing.candidates import Candidate, ChooseError, Chosen, Needs
from lightning_peft.choosing.memory import fitting
from lightning_peft.choosing.points import ranked
from lightning_peft.choosing.starts import Kind
from lightning_peft.planning.sizes import parse


def choose(
    model: nn.Module,
    *,
    memory: str | int | None = None,
    examples: int | None = None,
    inference: bool = False,
    storage: bool = False,
    tasks: int = 1,
    quantised: bool | None = None,
    kind: Kind | None = None,
    top: int = 5,
    batch: Any = None,
    words: Sequence[str] = (),
    methods: Sequence[str] = (),
    **settings: Any,
) -> Chosen:
    """Methods for `model`, best first, with reasons and settings to begin with; the model is not changed

    model: real, or on the meta device; its task's LightningModule, if memory is given. memory: of the device, such as
    "24GiB"; needs `batch`, what a step is given (`planning.text_batch`). examples: of training. inference, storage:
    whether what a method costs there matters; tasks: how many are served by one base. quantised: whether the base is in
    codes; None sees for itself. kind: of the data; None tells it by the model's class. top: candidates, at most.
    words: of a command line that the starts are added to. methods: names of those that are wanted in any case, beyond
    `top` and beyond the table. settings: of `plan`, such as precision, optimizer, device.
    Errors: ChooseError; PlanError on a size that is none.
    """
    codes = in_codes(model, settings.get("precision")) if quantised is None else quantised
    size = None if memory is None else parse(memory)
    needs = Needs(size, examples, inference, storage, tasks, codes)
    check(size, batch, top)
    wanted = known(methods)
    base = Base(model, kind or kind_of(model), needs)
    found = [dataclasses.replace(c, asked=c.info.name in wanted) for c in base.candidates(wanted)]
    if examples is not None or storage:  # which go by counts; a count takes as long as a copy of the model
        found = [counted for c in found if (counted := base.counted(c)) is not None]
    found = sorted((ranked(c, base) for c in found), key=lambda c: -c.points)  # stable: the table's order
    number = len(found) + len(base.left_out)
    chosen = first(found, base, top) if size is None else fitting(found, base, top, {"batch": batch, **settings})
    named = (dataclasses.replace(c, command=command(c.overrides, words)) for c in chosen)
    return Chosen(base.title, base.parameters, base.kind, needs, tuple(named), base.left_out, ranked=number)


def check(size: int | None, batch: Any, top: int) -> None:
    """Raise where values make no sense."""
    if size is not None and batch is None:
        raise ChooseError("memory=... needs batch=..., what a step is given, such as planning.text_batch(8, 128).")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ChooseError(f"top={top!r} is no number of candidates: give 1 or more.")


def first(found: Sequence[Candidate], base: Base, top: int) -> list[Candidate]:
    """The first `top` that can be applied, and those that are asked for."""
    kept: list[Candidate] = []
    for candidate in found:
        if len(kept) < top or candidate.asked:
            counted = candidate if candidate.trained else base.counted(candidate)
            kept += [counted] if counted is not None else []
    return kept
