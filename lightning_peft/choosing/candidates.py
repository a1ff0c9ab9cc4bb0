"""What is wanted, what there is, and why: plain data, and its text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.choosing.risks import risks
from lightning_peft.choosing.starts import Kind, Start
from lightning_peft.core.method import Info, Method
from lightning_peft.planning.report import Plan
from lightning_peft.planning.sizes import number, show


class ChooseError(ValueError):
    """A choice that cannot be made of what was given."""


@dataclass(frozen=True)
class Needs:
    """What matters. memory: bytes; examples: of training; inference, storage: whether their cost does; tasks: served
    by one base; quantised: whether the base is in codes.
    """

    memory: int | None = None
    examples: int | None = None
    inference: bool = False
    storage: bool = False
    tasks: int = 1
    quantised: bool = False

    def __post_init__(self) -> None:
        for name in ("examples", "tasks"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ChooseError(f"{name}={value!r} is no number of {name}: give 1 or more.")

    def __str__(self) -> str:
        said = [f"memory {show(self.memory)}"] if self.memory else []
        said += [f"{self.examples:,} examples"] if self.examples else []
        said += ["inference must cost no more"] if self.inference else []
        said += ["storage matters"] if self.storage else []
        said += [f"{self.tasks} tasks on one base"] if self.tasks > 1 else []
        return ", ".join(said + (["quantised base"] if self.quantised else [])) or "no needs named"


@dataclass(frozen=True)
class Reason:
    """Points, and what they are for."""

    points: int
    words: str

    def __str__(self) -> str:
        return f"{self.points:+d} {self.words}" if self.points else self.words


@dataclass(frozen=True)
class Candidate:
    """A method for this model. trained: parameters; share: of all; bytes: that a task's file holds at most;
    overrides: the start as words of a command line; plan: where memory was given; asked: named by the user.
    """

    info: Info
    start: Start
    method: Method
    trained: int = 0
    share: float = 0.0
    reasons: tuple[Reason, ...] = ()
    overrides: tuple[str, ...] = ()
    plan: Plan | None = None
    command: str = ""
    asked: bool = False
    bytes: int = 0

    @property
    def points(self) -> int:
        return sum(reason.points for reason in self.reasons)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"method": self.info.name, "points": self.points, "trained": self.trained, "share": self.share}
        found |= {
            "asked": self.asked,
            "bytes": self.bytes,
            "info": dataclasses.asdict(self.info),
            "source": self.start.source or None,
        }
        found |= {"reasons": [dataclasses.asdict(reason) for reason in self.reasons], "overrides": [*self.overrides]}
        return found | {
            "command": self.command,
            "plan": self.plan and {**self.plan.as_dict(), "total": self.plan.total},
        }


@dataclass(frozen=True)
class Chosen:
    """Candidates, best first; left_out: method that would come before the last -> why it cannot be used here; ranked:
    how many were put in order; risks: of settings that were given.
    """

    model: str
    parameters: int
    kind: Kind
    needs: Needs
    candidates: tuple[Candidate, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    risks: tuple[str, ...] = ()
    ranked: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"model": self.model, "parameters": self.parameters, "kind": self.kind}
        found |= {"needs": dataclasses.asdict(self.needs), "left_out": dict(self.left_out), "risks": [*self.risks]}
        found |= {"ranked": self.ranked}
        return found | {"candidates": [candidate.as_dict() for candidate in self.candidates]}

    def __str__(self) -> str:
        text = [f"{self.model}, {number(self.parameters)} parameters, {self.kind}; {self.needs}"]
        for place, candidate in enumerate(self.candidates, 1):
            text += ["", *lines(place, candidate)]
        text += ["", "nothing fits"] if not self.candidates else []
        text += ["", "left out:"] if self.left_out else []
        for why in dict.fromkeys(self.left_out.values()):
            text.append(f"  {', '.join(name for name, said in self.left_out.items() if said == why)}: {why}")
        more = self.ranked - len(self.candidates) - len(self.left_out)
        text += ["", f"{more} more with --top {self.ranked}; any other with peft=<name>"] if more > 0 else []
        text += [""] if self.risks else []
        return "\n".join([*text, *(f"risky: {line}" for line in self.risks)])


def lines(place: int, c: Candidate) -> list[str]:
    """A candidate for a terminal."""
    facts = [f"trains {c.trained:,} ({100 * c.share:.3g} %)", f"a file of {show(c.bytes)} at most"]
    facts += [f"peak {show(c.plan.total)}"] if c.plan else []
    warned = [f"   risky: {line}" for line in risks(c.method)]
    points = f"{c.points} point{'s' * (c.points != 1)}{', asked for' if c.asked else ''}"
    return [
        f"{place}. {c.info.name} ({points}): {c.info.equation}",
        f"   {', '.join(facts)}",
        f"   {declared(c.info)}",
        *(f"   {reason}" for reason in c.reasons),
        f"   from: {c.start.source or 'the defaults of this library; no published settings are known here'}",
        *warned,
        f"   {c.command}",
    ]


OVERHEAD = {
    "none": "merges: nothing more to compute at inference",
    "products": "layers of its own at inference",
    "tokens": "longer sequences or more keys at inference",
    "prompt": "a cost on the prompt at inference",
}
STORAGE = {
    "adapter": "a task is an adapter",
    "weights": "a task is changed weights",
    "model": "a task is a whole model",
}


def declared(info: Info) -> str:
    """What a method says about itself."""
    through = "backward through the base" if info.backprop else "no backward through the base"
    said = [OVERHEAD[info.overhead], through, STORAGE[info.storage]]
    return "; ".join([*said, *(["a batch can hold several tasks"] if info.batched else [])])
