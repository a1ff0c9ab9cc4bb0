"""What each entry of a model matters, and the choice of those that matter most.

Scores are lists, one flat tensor for each candidate, in their order. Looking at a model changes nothing of it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.core.calibration import CalibrationError, Run, distributed
from lightning_peft.core.candidates import Candidate
from lightning_peft.core.gradients import examples, expected, gradients, my_share, squared, summed, untouched
from lightning_peft.core.init import Draw
from lightning_peft.core.scattered import Entries, Scattered, rechosen

log = logging.getLogger("lightning_peft")
Scores = list[Tensor]
Over = Literal["weights", "rows", "tensors", "blocks"]
Within = Literal["model", "block", "tensor"]
TINY = 1e-8  # beside a tensor of zeros
FROM_DATA = ("gradient", "sensitivity", "movement", "relative", "fisher")


# ------------------------------------------------------------------ scores
def measure(kind: str, values: Scores, found: Scores, seed: int = 0) -> Scores:
    """The score of each entry; values: theta, found: what `watch` gave, for the scores that need it"""
    if kind == "magnitude":
        return [t.abs() for t in values]
    if kind == "random":
        return [random(seed, number, t) for number, t in enumerate(values)]
    if kind == "fisher":
        return found
    pairs = list(zip(values, found, strict=True))
    if kind == "movement":
        return [-t * g for t, g in pairs]
    if kind == "relative":
        return [g.abs() / (t.abs() + TINY) for t, g in pairs]
    return [g.abs() if kind == "gradient" else (t * g).abs() for t, g in pairs]


def random(seed: int, number: int, like: Tensor) -> Tensor:
    scores = torch.empty(like.shape)
    Draw(seed, f"scores/{number}").uniform(scores, 1.0)
    return scores.to(like.device)


def watch(
    model: nn.Module,
    candidates: list[Candidate],
    batches: Iterable[Any],
    run: Run,
    samples: int | None = None,
    expect: bool = False,
) -> tuple[Scores, int]:
    """The mean gradient over batches, (n,) each; with `samples` the mean of squares over so many single examples.

    expect: of an example the mean of squares over the labels that the model expects; `run` then gives logits.
    """
    parts, look = iter(batches), gradients
    if samples is not None:
        parts = itertools.islice((one for batch in parts for one in examples(batch)), my_share(samples))
        look = expected if expect else squared
    places = [c.adapter.place for c in candidates]
    with untouched(model), called(places) as seen:
        totals, count = summed(run, parts, [source(c) for c in candidates], look)
    scores = [c.take(total) / max(count, 1) for c, total in zip(candidates, totals, strict=True)]
    for c, place, score in zip(candidates, places, scores, strict=True):
        if place not in seen and bool(score.any()):
            log.warning(
                "%s.%s is used without a call of its module, where nothing moves it: not chosen", c.name, c.attribute
            )
            score.zero_()
    if not any(bool(score.any()) for score in scores):
        raise CalibrationError(f"{count} batches gave no gradient to what may be chosen. Give batches with labels.")
    return scores, count


@contextmanager
def called(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Those of the modules that are called meanwhile."""
    seen = set[nn.Module]()
    hooks = [m.register_forward_pre_hook(lambda module, _: seen.add(module)) for m in set(modules)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def source(c: Candidate) -> Tensor:
    """What to differentiate by, while the model is `untouched`."""
    if not c.codes:
        return c.parameter.requires_grad_(True)
    zeros = torch.zeros(c.shape, device=c.device, requires_grad=True)
    c.adapter.probes = {**c.adapter.probes, c.attribute: zeros}
    return zeros


# ------------------------------------------------------------------ choices
@dataclass(frozen=True)
class Choice:
    """How entries are chosen from scores: `count` of them at most; with a threshold only scores above it."""

    count: int
    over: Over = "weights"
    within: Within = "model"
    threshold: float | None = None
    mean: bool = True

    def __call__(self, candidates: list[Candidate], scores: Scores, norms: Scores | None = None) -> Tensor:
        """(K,) ascending: the chosen entries of all candidates, laid one after the other.

        norms: the scores are ratios of two norms over a unit, theirs and these.
        """
        if any(not s.isfinite().all() for s in scores):
            raise CalibrationError("Scores are not finite: the batches give infinite or undefined gradients.")
        local: list[list[Tensor]] = [[] for _ in candidates]
        for members, count in self.shares(candidates):
            part, mine = [candidates[i] for i in members], [scores[i] for i in members]
            if self.over == "weights":
                chosen = top(mine, count, self.threshold)
            else:
                chosen = self.units(part, mine, None if norms is None else [norms[i] for i in members], count)
            for i, one in zip(members, chosen, strict=True):
                local[i].append(one.cpu())
        start, out = 0, list[Tensor]()
        for c, ones in zip(candidates, local, strict=True):
            out += [found + start for found in ones]
            start += c.size
        return torch.cat(out) if out else torch.zeros(0, dtype=torch.int64)

    def shares(self, candidates: list[Candidate]) -> list[tuple[list[int], int]]:
        """Groups of candidates, and what each may have: by size, the parts of the whole left over to the largest."""
        groups: dict[object, list[int]] = {}
        for i, c in enumerate(candidates):
            key = {"model": "", "block": c.block or f"outside {c.name}", "tensor": i}[self.within]
            groups.setdefault(key, []).append(i)
        total = sum(c.size for c in candidates)
        exact = [self.count * sum(candidates[i].size for i in g) / total for g in groups.values()]
        counts = [int(e) for e in exact]
        order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in order[: self.count - sum(counts)]:
            counts[i] += 1
        return list(zip(groups.values(), counts, strict=True))

    def units(self, candidates: list[Candidate], scores: Scores, norms: Scores | None, count: int) -> list[Tensor]:
        """Whole units, the best first, each that still fits."""
        keys, sizes, totals, numbers = unit_scores(candidates, scores, self.over, norms, self.mean)
        order = totals.sort(descending=True, stable=True).indices.tolist()
        taken, left = torch.zeros(keys, dtype=torch.bool), count
        whole, value = sizes.tolist(), totals.tolist()
        for unit in order:
            if self.threshold is not None and value[unit] <= self.threshold:
                break
            if 0 < whole[unit] <= left:
                taken[unit], left = True, left - whole[unit]
        return [taken[n].nonzero().flatten() if isinstance(n, Tensor) else everything(c, bool(taken[n]))
                for c, n in zip(candidates, numbers, strict=True)]  # fmt: skip


def everything(candidate: Candidate, chosen: bool) -> Tensor:
    return torch.arange(candidate.size if chosen else 0)


def unit_scores(
    candidates: list[Candidate], scores: Scores, over: Over, norms: Scores | None, mean: bool
) -> tuple[int, Tensor, Tensor, list[Any]]:
    """How many units, their sizes and scores, and for each candidate the unit of its entries: one for all, or each."""
    known: dict[object, int] = {}
    numbers: list[Any] = []
    count = 0
    for i, c in enumerate(candidates):
        key: object = {"rows": c.outputs, "tensors": i, "blocks": c.block or f"outside {c.name}"}[over]
        if key not in known:
            known[key] = count
            count += c.rows if over == "rows" else 1
        numbers.append(known[key] + c.row_of() if over == "rows" else known[key])
    sizes, totals, below = torch.zeros(count), torch.zeros(count, dtype=torch.float64), torch.zeros(count).double()
    for i, (c, n) in enumerate(zip(candidates, numbers, strict=True)):
        index = n if isinstance(n, Tensor) else torch.full((c.size,), n)
        sizes.index_add_(0, index, torch.ones(c.size))
        own = scores[i].cpu().double()
        totals.index_add_(0, index, own.square() if norms is not None else own)
        if norms is not None:
            below.index_add_(0, index, norms[i].cpu().double().square())
    if norms is not None:
        totals = totals.sqrt() / (below.sqrt() + TINY)
    elif mean:
        totals = totals / sizes.clamp(min=1)
    return count, sizes.long(), totals, numbers


def top(scores: Scores, count: int, threshold: float | None = None) -> list[Tensor]:
    """Indices of the `count` largest of all together, ascending in each; equal scores by their place.

    The least of them is found from the largest of each tensor, so that nothing of the size of all is made.
    """
    count = min(count, sum(len(s) for s in scores))
    if threshold is not None:
        count = min(count, sum(int((s > threshold).sum()) for s in scores))
    if not count:
        return [torch.zeros(0, dtype=torch.int64) for _ in scores]
    best = torch.cat([s.topk(min(count, len(s))).values.cpu() for s in scores])
    least = best.topk(count).values[-1]
    above = [s > least.to(s) for s in scores]
    left = count - sum(int(a.sum()) for a in above)
    out = []
    for s, mask in zip(scores, above, strict=True):
        equal = (s == least.to(s)).nonzero().flatten()[:left]
        left -= len(equal)
        mask[equal] = True
        out.append(mask.nonzero().flatten())
    return out


# ------------------------------------------------------------------ who chooses
class Chooser:
    """The candidates of a method, their scores and its choice; one object for all adapters of a label."""

    def __init__(self, entries: Entries, kind: str, choice: Choice, seed: int) -> None:
        self.entries, self.kind, self.choice, self.seed = entries, kind, choice, seed
        self.candidates: list[Candidate] = []
        self.last: Scattered | None = None
        self.keep = False  # whether a choice by change goes on from it, and not from the base

    def drawn(self, adapter: Scattered, draw: Draw) -> None:
        """With the last adapter, choose by what needs no data; on meta, entries of all tensors stand for the choice."""
        if adapter is self.last and self.entries.v.is_meta and not self.entries.dense:
            self.entries.spread()
        ready = adapter is self.last and not any(p.is_meta for c in self.candidates for p in c.adapter.parameters())
        if ready and self.kind in ("magnitude", "random") and not any(c.device.type == "meta" for c in self.candidates):
            self.entries.index = self.entries.index[:0]  # what was there may have lost its memory
            self.choose([])

    @torch.no_grad()
    def choose(self, found: Scores, optimizers: Iterable[Any] = ()) -> Scores:
        """Score and choose anew; what stays chosen keeps its change. The scores, for a picture of them."""
        values = [c.value() for c in self.candidates]
        ratio = self.kind == "relative" and self.choice.over != "weights"
        scores = found if ratio else measure(self.kind, values, found, self.seed)
        self.settle(self.choice(self.candidates, scores, values if ratio else None), optimizers)
        return measure(self.kind, values, found, self.seed) if ratio else scores

    def settle(self, index: Tensor, optimizers: Iterable[Any] = (), values: Tensor | None = None) -> None:
        if not len(index):
            raise CalibrationError(
                f"No entry has a score above {self.choice.threshold}, or no unit fits into {self.choice.count} entries."
                " Lower the threshold, raise the budget, or choose over smaller units."
            )
        if distributed():  # equal sums may still be ordered otherwise on another device
            held = [index]
            dist.broadcast_object_list(held, 0)
            index = held[0]
        values = None if values is None else values[index.to(values.device)]
        index = self.entries.among_all(index)
        if self.entries.settled:
            rechosen(self.entries, index, optimizers)
        else:
            self.entries.choose(index, values)

    @torch.no_grad()
    def by_change(self) -> Scores:
        """Scores |theta - theta_0| after a run in which every entry trained."""
        with self.entries.still():
            changes = [self.entries.of(number)[1].detach() for number in range(len(self.candidates))]  # type: ignore[index]
        scores = [change.abs() for change in changes]
        self.settle(self.choice(self.candidates, scores), values=torch.cat(changes) if self.keep else None)
        return scores
