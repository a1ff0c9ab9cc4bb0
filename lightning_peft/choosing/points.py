"""What speaks for a method and against it, in points that each reason shows; their sum is the order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from lightning_peft.choosing.base import Base
from lightning_peft.choosing.candidates import Candidate, Reason
from lightning_peft.planning.sizes import show

FEW, MANY = 1_000, 100_000
"""Examples below and from which their number counts; like all points, this library's own."""
BILLION = 10**9
Rule = Callable[[Candidate, Base], Iterator[Reason]]


def ranked(candidate: Candidate, base: Base) -> Candidate:
    """The candidate with its reasons."""
    return dataclasses.replace(candidate, reasons=tuple(r for rule in RULES for r in rule(candidate, base)))


def of_results(c: Candidate, base: Base) -> Iterator[Reason]:
    """What comparisons say, when nothing else counts."""
    if c.start.standing is None:
        yield Reason(1, "no comparison with the others is known here")
        return
    said = {3: "as good as full fine-tuning in comparisons", 2: "close to full fine-tuning in comparisons"}
    yield Reason(2 * c.start.standing, said.get(c.start.standing, "below the others in comparisons"))


def of_inference(c: Candidate, base: Base) -> Iterator[Reason]:
    """What a forward pass costs more."""
    if not base.needs.inference:
        return
    if c.info.overhead == "none":
        into_codes = base.needs.quantised and c.info.name != "qalora" and c.info.storage == "adapter"
        words = "merges into floats only, the base is in codes" if into_codes else "nothing more to compute once merged"
        yield Reason(1 if into_codes else 4, words)
    said = {"products": "computes layers of its own at inference", "tokens": "longer sequences or keys at inference"}
    if c.info.overhead in said:
        yield Reason(-6, said[c.info.overhead])
    if c.info.overhead == "prompt":
        yield Reason(-2, "costs on the prompt, nothing on what is generated after it")


def of_storage(c: Candidate, base: Base) -> Iterator[Reason]:
    """What a task's file holds."""
    if base.needs.storage:
        share = max(c.bytes / (4 * base.parameters), 1e-9)
        points = -8 if c.info.storage == "model" else max(-3, min(6, round(-2 * math.log10(share) - 4)))
        yield Reason(points, f"{show(c.bytes)} a task")


def of_tasks(c: Candidate, base: Base) -> Iterator[Reason]:
    """Several tasks on one base."""
    if base.needs.tasks < 2:
        return
    if c.info.storage == "model":
        yield Reason(-8, f"{base.needs.tasks} whole models")
    elif c.info.batched:
        yield Reason(4, "rows of one batch can be of different tasks")
    else:
        yield Reason(-1, "tasks share the base, not a batch: switched, or merged one at a time")


def of_examples(c: Candidate, base: Base) -> Iterator[Reason]:
    """How much can be learnt from so many."""
    count = base.needs.examples
    if count is not None and count < FEW:
        if c.start.few:
            yield Reason(2, c.start.few)
        elif c.share < 1e-3:
            yield Reason(1, "few parameters for few examples")
        elif c.share > 0.05:
            yield Reason(-4, "many parameters for few examples")
    if count is not None and count >= MANY:
        if c.info.storage == "model":
            yield Reason(2, "enough examples to train everything")
        elif c.share < 1e-4:
            yield Reason(-2, "few parameters for so many examples")


def of_size(c: Candidate, base: Base) -> Iterator[Reason]:
    """What depends on the size of the model."""
    if c.info.name == "prompt_tuning" and base.parameters < BILLION:
        yield Reason(-2, "comes up to fine-tuning with billions of parameters only (2104.08691, abstract)")


def of_codes(c: Candidate, base: Base) -> Iterator[Reason]:
    """What was made for a quantised base."""
    if base.needs.quantised and c.info.name in ("lora", "qalora"):
        yield Reason(1, "made for a base in codes (2305.14314)" if c.info.name == "lora" else "merges into its codes")


RULES: tuple[Rule, ...] = (of_results, of_inference, of_storage, of_tasks, of_examples, of_size, of_codes)
