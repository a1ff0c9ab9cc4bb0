"""Folding adapters into weights: in fp32, cast once, and back from a snapshot, bit for bit."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.core import projection
from lightning_peft.core.adapter import NotMergeableError
from lightning_peft.core.state import Applied, Placement, applied_to

log = logging.getLogger("lightning_peft")


class MergeError(RuntimeError):
    """A merge or unmerge at the wrong time or place."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: how many places, into which dtypes, and the largest relative error that the final cast made.

    rounding = max over places of |(W_cast - W) x| / |W x| for one random x; 0 where the weight holds fp32 or better.
    """

    label: str
    places: int
    dtypes: tuple[str, ...]
    rounding: float


def merge(model: nn.Module, applied: Applied) -> MergeReport:
    _check(model, applied)
    folded = [(stack, *_fold(stack)) for stack in _by_place(applied)]  # all computed before any is written
    errors = [0.0]
    for stack, weight, bias in folded:
        place = stack[0].place
        stack[0].original = projection.snapshot(place)
        stored = projection.views(place)[0].dtype
        projection.write(place, weight, bias)
        errors.append(_rounding(place, weight) if stored != weight.dtype else 0.0)
    applied.cell.set(merged=True)
    applied.turn = 1 + max((a.turn for a in applied_to(model).values()), default=0)
    dtypes = tuple(sorted({str(projection.views(p.place)[0].dtype).removeprefix("torch.") for p in applied.placements}))
    report = MergeReport(applied.label, len(folded), dtypes, max(errors))
    if report.rounding:
        log.info(
            "merged %r into %s: output changed by %.2e (relative) through rounding",
            report.label,
            dtypes,
            report.rounding,
        )
    return report


def _by_place(applied: Applied) -> list[list[Placement]]:
    stacks: dict[int, list[Placement]] = {}
    for placement in applied.placements:
        stacks.setdefault(id(placement.place), []).append(placement)
    return list(stacks.values())


def _fold(stack: list[Placement]) -> tuple[Tensor, Tensor | None]:
    weight, bias = projection.read(stack[0].place)
    with torch.no_grad():
        for placement in stack:
            weight, bias = placement.adapter.fold(weight, bias)
    if not torch.isfinite(weight).all():
        raise MergeError(f"Folding {stack[0].site!r} gives values that are not finite; nothing was merged.")
    return weight, bias


def _check(model: nn.Module, applied: Applied) -> None:
    if applied.cell.merged:
        raise MergeError(f"{applied.label!r} is merged already. Call unmerge first, or unload to make it permanent.")
    if not applied.cell.enabled:
        raise MergeError(f"{applied.label!r} is switched off, so merging would change the output. Enable it first.")
    if not applied.method.info.mergeable:
        raise NotMergeableError(
            f"{applied.method.info.name} changes more than weights, so it cannot be merged. Keep it attached "
            f"(enabled(False) "
            "switches it off, remove takes it away). `lightning-peft methods` lists what can be merged."
        )
    _check_tied(model, applied)


def _check_tied(model: nn.Module, applied: Applied) -> None:
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(name)
    for placement in applied.placements:
        for parameter in projection.parameters_of(placement.place):
            names = owners.get(id(parameter), set())
            if len(names) > 1:
                raise MergeError(
                    f"The weight at {placement.site!r} is tied ({', '.join(sorted(names))}): merging would change "
                    f"them all. "
                    "Untie it first (a copy as its own nn.Parameter), or leave the adapter attached."
                )


def _rounding(place: nn.Module, exact: Tensor) -> float:
    x = torch.randn(exact.shape[1], generator=torch.Generator().manual_seed(0)).to(exact)
    y = exact @ x
    return float(((projection.read(place)[0] - exact) @ x).norm() / y.norm().clamp_min(torch.finfo(y.dtype).tiny))


def unmerge(model: nn.Module, applied: Applied) -> None:
    if not applied.cell.merged:
        raise MergeError(f"{applied.label!r} is not merged, so there is nothing to undo.")
    places = {id(p.place) for p in applied.placements}
    for other in applied_to(model).values():
        if other.cell.merged and other.turn > applied.turn and places & {id(p.place) for p in other.placements}:
            raise MergeError(f"{other.label!r} was merged into the same weights later; unmerge {other.label!r} first.")
    for placement in applied.placements:
        if placement.original is not None:
            projection.write(placement.place, *placement.original)
            placement.original = None
    applied.cell.set(merged=False)
