"""What fits on a card: batch size, gradient checkpointing, precision and rank, found with few steps without memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from lightning_peft.core.method import Method
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.sites import TargetError
from lightning_peft.gradient_checkpointing import GradientCheckpointing
from lightning_peft.planning.planner import Methods, plan
from lightning_peft.planning.precision import arithmetic
from lightning_peft.planning.report import Plan
from lightning_peft.planning.shadow import resized
from lightning_peft.planning.sizes import PlanError, need, parse, show

MOST = 1024
"""The largest batch that is looked for."""
RANKS = (8, 64)
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "nf4")
FIRST = (2, 4)
"""Batch sizes that are tried first; a batch of one is laid out in a way of its own."""
Measure = Callable[[int], Plan]


@dataclass(frozen=True)
class Choice:
    """Settings that fit, with the largest batch that does; rank is None where the method has none."""

    batch_size: int
    checkpointing: bool
    precision: str
    rank: int | None
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "plan": self.plan.as_dict()}


def fit(
    module: nn.Module,
    method: Methods = None,
    size: str | int = "24GiB",
    *,
    batch: Any,
    precisions: Sequence[Any] | None = None,
    ranks: Sequence[int] | None = None,
    checkpointing: Sequence[bool | GradientCheckpointing] = (False, True),
    say: Callable[[str], object] = lambda line: None,
    **options: Any,
) -> list[Choice]:
    """Settings with which `plan` fits a device of `size`, largest batch first; each is a plan that was made

    batch: an example, whose rows are repeated. precisions: default those of `PRECISIONS` that differ for this module;
    ranks: for methods that have one, default its own and `RANKS`. options: of `plan`. say: is told of progress.
    """
    limit = parse(size)
    found: list[Choice] = []
    if need(0) >= limit:
        return found
    for precision, rank, recompute in product(precisions or known(module), ranks_of(method, ranks), checkpointing):
        chosen = with_rank(method, rank)

        def measure(count: int, how: tuple[Any, ...] = (chosen, precision, recompute)) -> Plan:
            kind = {"precision": how[1], "checkpointing": how[2], **options}
            return plan(module, how[0], batch=resized(batch, count), **kind)

        name = f"{arithmetic(precision).name}, rank {rank}, {'with' if recompute else 'without'} checkpointing"
        try:
            best = largest(measure, limit)
        except (QuantisationError, TargetError) as error:  # nothing to quantise, no blocks
            say(f"{name}: {error}")
            continue
        say(f"{name}: {'nothing fits' if best is None else f'batch {best[0]}, {show(best[1].total)}'}")
        if best is not None:
            found.append(Choice(best[0], bool(recompute), best[1].precision, rank, best[1]))
    return sorted(found, key=lambda c: (-c.batch_size, c.checkpointing, c.plan.total))


def largest(measure: Measure, limit: int) -> tuple[int, Plan] | None:
    """The largest batch whose plan fits, and the plan; None where one example is too much.

    Bytes are the largest of several affine functions of the batch size, hence convex: beyond two sizes they are on the
    line through them or above it, between two sizes below. So most often the third plan is the answer.
    """
    plans: dict[int, Plan] = {}

    def fits(count: int) -> bool:
        plans[count] = measure(count)
        return need(plans[count].total) <= limit

    before, best = FIRST
    if not fits(before):
        return (1, plans[1]) if fits(1) else None
    top = MOST + 1 if fits(best) else best  # too much, or not looked for
    best, before = (best, before) if top > best else (before, before)
    while best + 1 < top:
        guess = best + 1 if before == best else meets(plans, before, best, limit)
        if guess <= best:
            break
        if guess >= top:
            guess = max(meets(plans, best, top, limit), (best + top) // 2) if top in plans else top - 1
        if fits(guess):
            before, best = best, guess
        else:
            top = guess
    return best, plans[best]


def meets(plans: dict[int, Plan], one: int, other: int, limit: int) -> int:
    """The last whole number at which the line through two measured sizes is within the limit."""
    low, high = need(plans[one].total), need(plans[other].total)
    return MOST if high <= low else one + (limit - low) * (other - one) // (high - low)


def known(module: nn.Module, own: Any = None) -> Sequence[Any]:
    """Precisions that differ: a model that is in 16 bits already has only those left, and 4.

    own: a plugin that quantises, which stands for its mode.
    """
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    names = PRECISIONS if torch.float32 in dtypes else PRECISIONS[2:]
    return names if own is None else [*(name for name in names if name != arithmetic(own).name), own]


def methods_of(method: Methods) -> Iterator[Method]:
    """One, several or none."""
    yield from [method] if isinstance(method, Method) else (method or ())


def ranks_of(method: Methods, ranks: Sequence[int] | None) -> Sequence[int | None]:
    """The ranks to try."""
    own: list[int] = [m.rank for m in methods_of(method) if hasattr(m, "rank")]
    if not own:
        if ranks:
            raise PlanError(f"ranks={list(ranks)}: no method here has a rank.")
        return [None]
    return sorted({*ranks} if ranks else {*own, *RANKS})


def with_rank(method: Methods, rank: int | None) -> Methods:
    """The methods, those that have a rank with this one."""
    if rank is None:
        return method
    return [dataclasses.replace(m, rank=rank) if hasattr(m, "rank") else m for m in methods_of(method)]  # type: ignore[call-arg]


def text(choices: Sequence[Choice], size: str | int) -> str:
    """A table of choices."""
    lines = [f"{'batch':>6}  {'checkpointing':<14}{'precision':<12}{'rank':>5}{'total':>24}"]
    for c in choices:
        how = "yes" if c.checkpointing else "no"
        lines.append(f"{c.batch_size:>6}  {how:<14}{c.precision:<12}{c.rank or '-':>5}{show(c.plan.total):>24}")
    return "\n".join(
        [f"Settings that fit {size}, reserve included, by the largest batch of each (at most {MOST}):", *lines]
    )
