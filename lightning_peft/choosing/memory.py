"""Which candidates fit the memory, and what has to be done for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_peft.choosing.base import Base, first_sentence
from lightning_peft.choosing.candidates import Candidate, Reason
from lightning_peft.core.method import REGISTRY, NothingToTrainError
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.sites import TargetError
from lightning_peft.planning.planner import plan
from lightning_peft.planning.sizes import PlanError, need, show

CHECKPOINTING, CODES = "gradient_checkpointing=true", "precision=nf4"
STEPS: tuple[tuple[str, ...], ...] = ((), (CHECKPOINTING,), (CHECKPOINTING, CODES))
"""What is tried, one after the other, until a run fits the memory; each costs a point."""
MISSES = 3
"""Methods that go through the backbone and do not fit, after which no more of them are planned."""


def fitting(found: list[Candidate], base: Base, top: int, settings: dict[str, Any]) -> list[Candidate]:
    """The first `top` that fit the memory, with their plans; what it takes costs points, what saves most gains some.

    A plan of a large model takes seconds. So what one method needed is where the next one begins, if both go through
    the backbone.
    """
    kept: list[Candidate] = []
    waiting, tries, missed = list(found), [*steps(base, settings)], 0
    while waiting and len(kept) < top:
        candidate = waiting.pop(0)
        if missed == MISSES and candidate.info.backprop:
            base.left_out[candidate.info.name] = "not planned, as others that go through the backbone do not fit"
            continue
        made, needed = planned(
            candidate, base, settings, tries if candidate.info.backprop else [*steps(base, settings)]
        )
        kept += [made] if made is not None else []
        missed += made is None and candidate.info.backprop
        if needed and candidate.info.backprop:
            tries = tries[needed:] or tries[-2:]
            waiting = sorted((lean(c) for c in waiting), key=lambda c: -c.points)
    return sorted(kept, key=lambda c: -c.points)


def lean(c: Candidate) -> Candidate:
    """Where memory is tight, a method that keeps nothing of the backbone for the backward pass gains points, once."""
    reason = Reason(3, "keeps no activations of the backbone, and memory is tight")
    return c if c.info.backprop or reason in c.reasons else dataclasses.replace(c, reasons=(*c.reasons, reason))


def planned(
    c: Candidate, base: Base, settings: dict[str, Any], tries: list[tuple[str, ...]]
) -> tuple[Candidate | None, int]:
    """The candidate with the first of `tries` that fits, None where none does, and how many did not."""
    totals = []
    for place, step in enumerate(tries):
        how = dict(settings)
        how |= {"checkpointing": settings.get("checkpointing") or True} if CHECKPOINTING in step else {}
        how |= {"precision": "nf4"} if CODES in step else {}
        try:
            made = plan(base.model, REGISTRY[c.info.name](**c.start.settings), **how)
        except (PlanError, TargetError, QuantisationError, NothingToTrainError) as error:
            base.left_out[c.info.name] = first_sentence(error)
            continue
        totals.append(need(made.total) if made.device == "cuda" else made.total)
        if totals[-1] <= (base.needs.memory or 0):
            base.left_out.pop(c.info.name, None)
            said = Reason(-len(step), f"fits with {', '.join(step)}") if step else Reason(0, "fits")
            return dataclasses.replace(c, plan=made, reasons=(*c.reasons, said), overrides=(*c.overrides, *step)), place
    if totals:
        base.left_out[c.info.name] = f"needs {show(min(totals))} at least"
    return None, len(tries)


def steps(base: Base, settings: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Of `STEPS`, what changes something."""
    for step in STEPS:
        done = {CHECKPOINTING: bool(settings.get("checkpointing")), CODES: base.needs.quantised}
        if not step or not all(done[each] for each in step):
            yield tuple(each for each in step if not done[each])
