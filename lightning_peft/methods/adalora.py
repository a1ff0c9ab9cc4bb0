"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al., ICLR 2023.
https://arxiv.org/abs/2303.10512
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT, LifeCycleError
from lightning_peft.checkpoint import CheckpointError
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.budget import budget, in_steps, largest, score, smooth
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import Shape, matrix_shape


class Triplets(LowRank):
    """y = base(x) + s P diag(l) Q x: P (d_out, rank), l (rank,), Q (rank, d_in); `kept`: whose l may differ from 0"""

    kept: Tensor

    def __init__(self, shape: Shape, rank: int, scale: float, dropout: float, weight: float, squared: bool) -> None:
        super().__init__(shape, rank, scale, dropout)
        self.weight, self.squared = weight, squared

    def make(self, shape: Shape, rank: int) -> None:
        self.p = nn.Parameter(torch.empty(shape.d_out, rank))
        self.l = nn.Parameter(torch.empty(rank))
        self.q = nn.Parameter(torch.empty(rank, shape.d_in))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))

    def reset(self, draw: Draw) -> None:
        draw.normal(self.p, 0.02)
        draw.normal(self.q, 0.02)
        draw.zeros(self.l)
        self.kept.fill_(True)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.l[:, None] * self.q, self.p

    def penalty(self) -> Tensor | None:
        if not self.weight:
            return None
        eye = torch.eye(len(self.l), dtype=self.q.dtype, device=self.q.device)
        gaps = self.p.T @ self.p - eye, self.q @ self.q.T - eye
        return self.weight * sum(gap.square().sum() if self.squared else gap.norm() for gap in gaps)  # type: ignore[return-value]


class AdaLoRA(PEFT, name="adalora", family="reparametrisation", paper="2303.10512", mergeable=True):
    """y = W x + (alpha / rank) P diag(l) Q x, the sum of ranks falls from rank to target a site

    l (rank,) starts at zero, P (d_out, rank) and Q (rank, d_in) at N(0, 0.02^2): the base at step 0. rank * (d_in +
    d_out + 1) parameters a site.

    After each optimizer step the sensitivity |w dL/dw| of every entry and its variability are averaged (beta1, beta2);
    every `interval` steps the triplets of least mean * variability, over all sites together, get l = 0, as many as the
    budget asks for; P and Q stay, so that a triplet can come back. The budget falls from rank to target along a cubic
    curve between the first `warmup` and the last `final` steps, in which the ranks stay what they are. Both are shares
    of the run (below 1) or numbers of steps. total_steps: of the run, where the Trainer cannot know it.
    orthogonality: weight of |P^T P - I|^2 + |Q Q^T - I|^2, summed over the sites; penalty="norm" takes the mean of
    |.| without the square over all P and Q, as the authors' code and peft do.
    """

    targets: str | list[str] | None = "all-linear"
    rank: int = 12
    target: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    warmup: float = 0.1
    final: float = 0.3
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    penalty: Literal["squared", "norm"] = "squared"
    total_steps: int | None = None

    def check(self) -> None:
        positive(self, "rank", "target", "interval", *(["total_steps"] if self.total_steps is not None else []))
        not_negative(self, "alpha", "warmup", "final", "orthogonality")
        probability(self, "dropout")
        probability(self, "beta1")
        probability(self, "beta2")
        if self.target > self.rank:
            raise FieldError(f"AdaLoRA(rank={self.rank}, target={self.target}): ranks fall from rank to target.")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        squared = self.penalty == "squared"
        weight = self.orthogonality if squared else self.orthogonality / (2 * len(sites))
        for site in sites:
            shape = matrix_shape(site, "AdaLoRA")
            yield site, Triplets(shape, self.rank, self.alpha / self.rank, self.dropout, weight, squared)

    # -------------------------------------------------------------- in a run
    @property
    def allocator(self) -> Allocator:
        """What the schedule knows at this moment."""
        return vars(self).setdefault("_allocator", Allocator(self))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            vars(self)["_allocator"] = Allocator(self)
        self.allocator.start(state.get_applied(pl_module, self.name_on_model), trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.allocator.notice(optimizer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        if self.allocator.act():
            pl_module.log(f"{self.name_on_model}/ranks", float(self.allocator.budget))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "allocator": self.allocator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        vars(self)["_allocator"] = Allocator(self, state_dict["allocator"])


class Allocator:
    """The schedule of one run: optimizer steps, averages of the importance of every entry, and who keeps its l."""

    def __init__(self, method: AdaLoRA, saved: dict[str, Any] | None = None) -> None:
        self.method, self.saved = method, saved
        self.step = self.done = (saved or {}).get("step", 0)
        self.mean: list[Tensor] = []
        self.spread: list[Tensor] = []
        self.adapters: list[Triplets] = []
        self.gradients: list[Tensor | None] = []

    def start(self, applied: state.Applied, trainer: pl.Trainer) -> None:
        self.adapters = [placement.adapter for placement in applied.placements]  # type: ignore[misc]
        self.weights: list[Tensor] = [w for a in self.adapters for w in (a.p, a.l, a.q)]
        steps = self.method.total_steps or trainer.estimated_stepping_batches
        if not math.isfinite(steps) or not (0 <= self.warmup(steps) < steps - self.final(steps) <= steps):
            raise LifeCycleError(
                f"AdaLoRA(warmup={self.method.warmup}, final={self.method.final}) in a run of {steps} steps leaves no "
                "step in which ranks could fall. Shorten them, or give a run with an end: max_steps, max_epochs, or "
                "AdaLoRA(total_steps=...)."
            )
        self.steps = int(steps)
        if self.saved and len(self.saved["mean"]) not in (0, len(self.weights)):
            raise CheckpointError(
                f"The checkpoint holds averages for {len(self.saved['mean'])} tensors of AdaLoRA, this model has "
                f"{len(self.weights)}. Resume with the targets of the checkpoint."
            )
        if not self.mean and self.step < self.end:
            given = self.saved if self.saved and self.saved["mean"] else None
            for name, own in (("mean", self.mean), ("spread", self.spread)):
                values = given[name] if given else [torch.zeros_like(w) for w in self.weights]
                own.extend(v.to(w, copy=True) for v, w in zip(values, self.weights, strict=True))
        self.saved = None

    def warmup(self, steps: float) -> int:
        return in_steps(self.method.warmup, steps)

    def final(self, steps: float) -> int:
        return in_steps(self.method.final, steps)

    @property
    def end(self) -> int:
        """The step from which on ranks stay what they are."""
        return self.steps - self.final(self.steps)

    @property
    def budget(self) -> int:
        count = len(self.adapters)
        first, last = self.method.rank * count, self.method.target * count
        return budget(self.step, first, last, self.steps, self.warmup(self.steps), self.final(self.steps))

    def notice(self, optimizer: Any) -> None:
        """Before a step: keep hold of the gradients, which the module may let go of before the batch is over."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(w) in held for w in self.weights):
            self.step += 1
            self.gradients = [w.grad for w in self.weights]

    def act(self) -> bool:
        """After a batch -> whether there was a step in it, or several"""
        before, self.done = self.done, self.step
        if before == self.step:
            return False
        if self.step < self.end:
            self.average()
        interval = self.method.interval
        due = self.warmup(self.steps) < self.step < self.end and self.step // interval > before // interval
        if due or (self.step >= self.end and self.mean):
            self.allocate()
        if due or self.step >= self.end:
            self.mask()
        self.gradients = []
        return True

    def average(self) -> None:
        seen = [(i, g) for i, g in enumerate(self.gradients) if g is not None]
        if not seen:
            return
        mean, spread, weights = ([tensors[i] for i, _ in seen] for tensors in (self.mean, self.spread, self.weights))
        finite = torch.stack(torch._foreach_norm([g for _, g in seen])).isfinite().all()
        gradients = [torch.where(finite, g, 0) for _, g in seen]  # of a step that a scaler left out
        smooth(mean, spread, weights, gradients, self.method.beta1, self.method.beta2)

    @torch.no_grad()
    def allocate(self) -> None:
        """Choose the triplets that the budget has room for; for good at the end of the schedule."""
        entries = [m * s for m, s in zip(self.mean, self.spread, strict=True)]
        scores = [score(*entries[i : i + 3]) for i in range(0, len(entries), 3)]
        for adapter, kept in zip(self.adapters, largest(scores, self.budget), strict=True):
            adapter.kept.copy_(kept)
        if self.step >= self.end:
            self.mean, self.spread = [], []

    @torch.no_grad()
    def mask(self) -> None:
        for adapter in self.adapters:
            adapter.l.masked_fill_(~adapter.kept, 0)

    def state_dict(self) -> dict[str, Any]:
        """Averages as tensors in the order of the sites; which triplets are kept is in the adapters' own buffers."""
        return self.saved or {"step": self.step, "mean": list(self.mean), "spread": list(self.spread)}


def ranks(model: nn.Module, label: str | None = None) -> dict[str, int]:
    """site -> how many triplets it keeps."""
    placements = state.get_applied(model, label).placements
    return {x.site if x.role is None else f"{x.site}:{x.role}": int(x.adapter.kept.sum()) for x in placements}  # type: ignore[operator, arg-type]
