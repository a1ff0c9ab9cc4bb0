"""The plan of a deep model from steps of two shallow ones: the same numbers, where all of its blocks are alike.

    quick(module, method, batch=batch) == plan(module, method, batch=batch)

Take a block out of a stack of equal ones, and a step is the same but for the operators of that block. What lives at a
moment is affine in the number of blocks, since each has as many weights, activations and gradients as the next. So the
moments of a step with four blocks and of one with five, matched from the first operator of each pass on and from the
last one back, give those of any number, of which the largest is the peak; those of blocks further inside lie between.
Where blocks differ, or operators do not match, the whole step is taken.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import state
from lightning_peft.core.sites import roles
from lightning_peft.planning.planner import Methods, begun, summary, taken
from lightning_peft.planning.report import Plan
from lightning_peft.planning.sizes import PlanError
from lightning_peft.planning.step import Step, fullest, with_kept
from lightning_peft.planning.tracker import LABELS

FEW = 4
"""Blocks of the smaller step: the first and the last may be like no other, and two between show what all those do."""
MANY = 12
"""Blocks of a model up to which the whole step is taken: two small ones have nine."""


class UnlikeError(ValueError):
    """Steps of which one is not the other with a block more."""


def quick(module: nn.Module, method: Methods = None, *, batch: Any, **options: Any) -> Plan:
    """What `plan` says of the same, sooner. options: of `plan`."""
    model, setting = begun(module, method, **options)
    offload = options.get("offload")
    stack = None if offload else repeated(model)
    if stack is not None:
        count, steps = len(stack._modules), []
        try:
            for few in (FEW, FEW + 1):
                with shallow(model, stack, few):
                    steps.append(taken(model, batch, setting))
            return continued(steps, [summary(step.model, step, setting, None, batch) for step in steps], count)
        except (PlanError, UnlikeError):
            pass  # the whole step says what is wrong, or that nothing is
    return summary(model, taken(model, batch, setting), setting, offload, batch)


@contextlib.contextmanager
def shallow(model: nn.Module, stack: nn.Module, count: int) -> Iterator[None]:
    """In this block the stack has its first blocks only, and the records of methods know no others."""
    with contextlib.ExitStack() as back:

        def change(thing: Any, name: str, value: Any) -> None:
            back.callback(setattr, thing, name, getattr(thing, name))
            setattr(thing, name, value)

        change(stack, "_modules", dict([*stack._modules.items()][:count]))
        there = {id(module) for module in model.modules()}
        for applied in state.all_applied(model):
            change(applied, "placements", [place for place in applied.placements if id(place.adapter) in there])
        for registry in state.registries(model):
            change(registry, "flags", [flag for flag in registry.flags if id(flag[0]) in there])
        yield


# ------------------------------------------------------------------ blocks
def repeated(model: nn.Module) -> nn.Module | None:
    """What holds the blocks of the model and nothing else, if there are many and they are alike."""
    blocks = [site.module for site in roles(model).get("block", [])]
    if len(blocks) <= MANY:
        return None
    first, *others = ([*facts(block)] for block in blocks)
    for index, other in enumerate(others, 1):
        if len(first) != len(other) or not all(alike(a, b, index) for a, b in zip(first, other, strict=True)):
            return None
    return next((m for m in model.modules() if [*map(id, m._modules.values())] == [*map(id, blocks)]), None)


def facts(block: nn.Module) -> Iterator[Any]:
    """What a step of the block depends on."""
    for name, module in block.named_modules():
        yield from (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for key, value in vars(module).items():
            if value is None or isinstance(value, (bool, int, float, str)):
                yield from (key, value)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield from (key, tensor.shape, tensor.dtype, tensor.requires_grad)


def alike(first: Any, other: Any, index: int) -> bool:
    """Whether two facts are the same, but for the number of the block, which is 0 in the first."""
    if isinstance(first, str) and isinstance(other, str):
        one, two = (re.split(r"(\d+)", text) for text in (first, other))  # words at even places, numbers between
        numbers = zip(map(int, one[1::2]), map(int, two[1::2]), strict=False)
        return one[::2] == two[::2] and all((m - n) % index == 0 for n, m in numbers)
    return bool(first == other) or (type(first) is type(other) is int and other - first == index)


# ------------------------------------------------------------------ any number of them
def continued(steps: Sequence[Step], plans: Sequence[Plan], count: int) -> Plan:
    """The plan of `count` blocks, of those of `FEW` and one more."""
    one, other = plans
    values = {f.name: along(getattr(one, f.name), getattr(other, f.name), count) for f in fields(Plan)}
    found = {}
    for phase, (start, end) in steps[0].times().items():
        times = (start, end), steps[1].times()[phase]
        calls, courses = [], []
        for step, (begin, stop) in zip(steps, times, strict=True):
            calls.append(step.tracker.calls[begin:stop])
            courses.append(step.tracker.course(begin, stop))
        found[phase] = highest(matched(calls, courses, count))
    kept = 0 if steps[0].setting.accumulates else values["gradients"]
    phase, peak = fullest(with_kept(found, values["optimizer_state"], kept))
    return replace(one, **{**values, "phase": phase, "peak": {label: size for label, size in peak.items() if size}})


def along(one: Any, other: Any, count: int) -> Any:
    """Numbers on the line through two of them; words stay."""
    if isinstance(one, dict):
        return {name: along(one.get(name, 0), other[name], count) for name in other}
    if isinstance(one, (int, Tensor)) and not isinstance(one, bool):
        return one + (count - FEW) * (other - one)
    return one


def matched(calls: Sequence[list[Any]], courses: Sequence[Tensor], count: int) -> Tensor:
    """Moments of a pass over `count` blocks: (n, labels)"""
    one, other = calls
    more = len(other) - len(one)
    head, tail = common(one, other), common(one[::-1], other[::-1])
    if more < 0 or head + tail < len(one) + 3 * more - 1:
        raise UnlikeError(f"{len(one)} operators, {len(other)} with a block more; {head} and {tail} in common.")
    first, last = (head - more + 1, tail - more + 1) if more else (len(one) + 1, 0)
    begin = along(courses[0][:first], courses[1][:first], count)
    end = along(courses[0][len(one) + 1 - last :], courses[1][len(other) + 1 - last :], count)
    return torch.cat([begin, end])


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long two lists are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a is not b), min(len(one), len(other)))


def highest(course: Tensor) -> dict[str, int]:
    """label -> bytes at the first moment with most of them"""
    return dict(zip(LABELS, course[course.sum(1).argmax()].tolist(), strict=True))
