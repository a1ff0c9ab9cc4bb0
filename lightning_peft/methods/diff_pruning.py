"""DiffPruning: Parameter-Efficient Transfer Learning with Diff Pruning. Guo, Rush, Kim, ACL 2021.
https://arxiv.org/abs/2012.07463
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_peft.core.fields import FieldError, not_negative
from lightning_peft.core.hashed import WORD, key_of, uniform
from lightning_peft.core.init import Draw
from lightning_peft.core.method import Method
from lightning_peft.core.scattered import Entries, Scattered, Slice
from lightning_peft.methods.selective import Score, SelectiveTuning

LOW, HIGH, EDGE = -1.5, 1.5, 1e-4  # l, r, and how far u stays from 0 and 1


def gate(alpha: Tensor, u: Tensor | None) -> Tensor:
    """z = clamp(sigmoid(log u - log(1 - u) + alpha) (r - l) + l, 0, 1); without u the noise is zero"""
    noise = 0.0 if u is None else u.log() - (1 - u).log()
    return (torch.sigmoid(alpha + noise) * (HIGH - LOW) + LOW).clamp(0, 1)


class Gated(Entries):
    """v (N,) of all entries times gates z (N,), one more for each tensor where they are structured

    The numbers u are a function of seed, optimizer step and place: a block that is computed again sees the same.
    """

    step: Tensor

    def __init__(
        self, sizes: list[int], slices: dict[int, Slice], start: float, structured: bool, weight: float, seed: int
    ) -> None:
        super().__init__(sizes, 0, slices)
        self.v = nn.Parameter(torch.empty(self.total))
        self.start, self.weight, self.key, self.exact = start, weight, key_of(seed, "diff_pruning"), False
        self.alpha = nn.Parameter(torch.empty(self.total))
        self.group = nn.Parameter(torch.empty(len(sizes))) if structured else None
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def begin(self, draw: Draw) -> None:
        super().begin(draw)
        draw.zeros(self.step)
        for alpha in self.alphas():
            draw.constant(alpha, self.start)

    def alphas(self) -> list[nn.Parameter]:
        return [self.alpha] if self.group is None else [self.alpha, self.group]

    def u(self, start: int, count: int) -> Tensor | None:
        if not self.training or self.exact:
            return None
        second: Any = (self.key[1] ^ self.step) & WORD
        numbers = uniform((self.key[0], second), start, count, self.alpha.device)
        return 0.5 + (0.5 - EDGE) * numbers

    def of(self, number: int) -> tuple[Tensor | None, Tensor] | None:
        found = super().of(number)
        if not self.dense or found is None:
            return found
        first, last = self.rooms[number], self.rooms[number + 1]
        z = gate(self.alpha[first:last], self.u(first, last - first))
        if self.group is not None:
            z = z * gate(self.group[number : number + 1], self.u(self.total + number, 1))
        return found[0], found[1] * z

    def penalty(self) -> Tensor | None:
        """lambda times the expected number of gates that are not zero"""
        if not self.dense or not self.weight:
            return None
        shift = torch.tensor(-LOW / HIGH).log().item()
        open_ = torch.sigmoid(self.alpha - shift)
        if self.group is None:
            return self.weight * open_.sum()
        sizes = torch.tensor(self.rooms, device=open_.device).diff()
        return self.weight * (open_ * torch.sigmoid(self.group - shift).repeat_interleave(sizes)).sum()

    @contextmanager
    def still(self) -> Iterator[None]:  # type: ignore[override]
        before, self.exact = self.exact, True
        try:
            yield
        finally:
            self.exact = before

    @torch.no_grad()
    def delta(self) -> tuple[Tensor, Tensor]:
        """index (K,) and v (K,) of the change as it is: of all gates that are open, or of the choice"""
        if not self.dense:
            return self.index, self.v.detach()
        with self.still():
            change = torch.cat([self.of(number)[1] for number in range(len(self.ends))])  # type: ignore[index]
        index = change.nonzero().flatten() if change.any() else torch.zeros(1, dtype=torch.int64, device=change.device)
        return self.among_all(index.cpu()).to(self.index), change[index]

    def take(self, index: Tensor, values: Tensor) -> None:
        super().take(index, values)
        if not self.dense:  # the gates have done their work
            for alpha in self.alphas():
                alpha.data, alpha.grad = alpha.data.new_zeros(0), None


class GatedScatter(Scattered):
    """theta = theta_0 + z * w for every parameter of one module, then with the entries that were chosen"""

    entries: Gated

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with self.entries.still():
            return super().fold(weight, bias)

    def fold_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        with self.entries.still():
            return iter(list(super().fold_parameters()))

    def collapsed(self) -> dict[str, Tensor]:
        if not self.first:
            return {}
        index, values = self.entries.delta()
        return {"entries.v": values, "entries.index": index}

    def expect(self, tensors: Mapping[str, Tensor]) -> None:
        index = tensors.get("entries.index")
        if index is not None and len(index):
            super().expect(tensors)


class DiffPruning(SelectiveTuning, name="diff_pruning", family="selective", paper="2012.07463", mergeable=True):
    """theta = theta_0 + z * w, z = clamp(sigmoid(log u - log(1 - u) + a) 3 - 1.5, 0, 1), few of them not zero

    w starts at zero: the base at step 0; a at `alpha`, one for each entry, and with `structured` another gate for
    each tensor, whose products they are. `penalty` times the expected number of open gates is added to the loss. u
    is drawn once for each optimizer step; outside of training there is no noise. After the share `priming` of the
    steps of `fit` the entries of largest |z * w|, the share `budget` of all, go on from there alone, with a fresh
    optimizer and without gates. Heads train beside it, outside of the budget. The first part takes three numbers an
    entry beside the optimizer's: w, a, theta_0. The authors train a at a rate of 0.1 and w at 1e-5:
    `diff_pruning_groups`. Files hold the change, sparse, and are loaded as `SelectiveTuning`. Source: section 3.
    """

    score: Score = "change"
    alpha: float = 5.0
    structured: bool = True
    penalty: float = 1.25e-7

    def check(self) -> None:
        super().check()
        not_negative(self, "penalty")
        if self.score != "change" or self.l1:
            raise FieldError(
                f"DiffPruning(score={self.score!r}, l1={self.l1}): gates choose by change. Leave them out."
            )

    def entries(self, sizes: list[int], count: int, slices: dict[int, Slice]) -> Entries:
        return Gated(sizes, slices, self.alpha, self.structured, self.penalty, self.seed)

    def scatter(self, entries: Any, names: dict[str, int], shapes: dict[str, torch.Size]) -> Scattered:
        return GatedScatter(entries, names, shapes)

    def portable(self) -> Method:
        known = {f.name for f in dataclasses.fields(SelectiveTuning)}  # type: ignore[arg-type]
        return SelectiveTuning(**{k: v for k, v in self.config().items() if k in known and k != "score"})

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        entries: Any = self.chooser(pl_module).entries
        entries.step.fill_(self.steps)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        self.chooser(pl_module).keep = True
        super().on_train_batch_end(trainer, pl_module, *rest)


def diff_pruning_groups(module: nn.Module, lr: float, alpha_lr: float = 0.1) -> list[dict[str, Any]]:
    """Groups for an optimizer: w and heads at lr, the gates at alpha_lr without weight decay."""
    gates = [p for m in module.modules() if isinstance(m, Gated) for p in m.alphas()]
    own = {id(p) for p in gates}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    return [{"params": rest, "lr": lr}, {"params": gates, "lr": alpha_lr, "weight_decay": 0.0}]
