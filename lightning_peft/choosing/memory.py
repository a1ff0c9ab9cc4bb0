"""Which candidates fit the memory, and what has to be done for it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from lightning_peft.choosing.base import Base, first_sentence, precision_of
from lightning_peft.choosing.candidates import Candidate, Reason
from lightning_peft.core.method import REGISTRY, NothingToTrainError
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.sites import TargetError
from lightning_peft.planning.precision import arithmetic
from lightning_peft.planning.repeated import quick
from lightning_peft.planning.sizes import PlanError, need, show

CHECKPOINTING, CODES = "gradient_checkpointing=true", "precision=nf4"
STEPS: tuple[tuple[str, ...], ...] = ((), (CHECKPOINTING,), (CHECKPOINTING, CODES))
"""What is tried, one after the other, until a run fits the memory; each costs a point."""
MISSES = 3
"""Methods that go through the backbone and do not fit, after which no more of them are planned."""


def fitting(found: list[Candidate], base: Base, top: int, settings: dict[str, Any]) -> list[Candidate]:
    """The first `top` that fit the memory, and those that are asked for, with their plans.

    What it takes costs points, and what saves most gains some where others do not fit as they are.
    """
    kept: list[Candidate] = []
    ways = [*Ways(base, settings)]
    waiting, missed = list(found), 0
    while waiting:
        candidate = waiting.pop(0)
        if len(kept) >= top and not candidate.asked:
            continue
        if missed >= MISSES and candidate.info.backprop and not candidate.asked:
            base.left_out[candidate.info.name] = "not planned, as others that go through the backbone do not fit"
            continue
        counted = candidate if candidate.trained else base.counted(candidate)
        if counted is None:
            continue
        made = planned(counted, base, ways)
        kept += [made] if made is not None else []
        missed += made is None and candidate.info.backprop
        if candidate.info.backprop and (made is None or made.reasons[-1].points):
            waiting = sorted((lean(c) for c in waiting), key=lambda c: -c.points)
    return sorted(kept, key=lambda c: -c.points)


def lean(c: Candidate) -> Candidate:
    """Where memory is tight, a method that keeps nothing of the backbone for the backward pass gains points, once."""
    reason = Reason(3, "keeps no activations of the backbone, and memory is tight")
    return c if c.info.backprop or reason in c.reasons else dataclasses.replace(c, reasons=(*c.reasons, reason))


@dataclasses.dataclass(frozen=True)
class Way:
    """Words that a run gets, the settings of a plan that they stand for, and what the base's weights take alone."""

    words: tuple[str, ...]
    settings: dict[str, Any]
    weights: int


class Ways:
    """Of `STEPS`, those that change something."""

    def __init__(self, base: Base, settings: dict[str, Any]) -> None:
        self.base, self.settings = base, settings

    def __iter__(self) -> Iterator[Way]:
        done = {CHECKPOINTING: bool(self.settings.get("checkpointing")), CODES: self.base.needs.quantised}
        for step in STEPS:
            words = tuple(each for each in step if not done[each])
            how = dict(self.settings)
            how |= {"checkpointing": self.settings.get("checkpointing") or True} if CHECKPOINTING in step else {}
            how |= {"precision": "nf4"} if CODES in words else {}
            if not step or words:
                try:
                    yield Way(words, how, self.weights(how.get("precision")))
                except QuantisationError:  # nothing that could be in codes
                    return

    def weights(self, precision: Any) -> int:
        """Bytes of the base: less than any plan."""
        model = copy.deepcopy(self.base.shadow)
        arithmetic(precision).convert(model)
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def planned(c: Candidate, base: Base, ways: list[Way]) -> Candidate | None:
    """The candidate in the first way that fits; None, and a word on why, where none does."""
    limit, totals = base.needs.memory or 0, []
    own = {} if (codes := precision_of(c.start.run)) is None else {"precision": codes}
    for way in ways:
        total, made = way.weights, None
        if total <= limit:
            try:
                made = quick(base.model, REGISTRY[c.info.name](**c.start.settings), **{**way.settings, **own})
            except (PlanError, TargetError, QuantisationError, NothingToTrainError) as error:
                base.left_out[c.info.name] = first_sentence(error)
                continue
            total = made.total
        totals.append(need(total) if way.settings.get("device", "cuda") == "cuda" else total)
        if made is not None and totals[-1] <= limit:
            base.left_out.pop(c.info.name, None)
            said = Reason(-len(way.words), f"fits with {', '.join(way.words)}") if way.words else Reason(0, "fits")
            return dataclasses.replace(c, plan=made, reasons=(*c.reasons, said), overrides=(*c.overrides, *way.words))
    if totals:
        base.left_out[c.info.name] = f"needs {show(min(totals))} at least"
    return None
