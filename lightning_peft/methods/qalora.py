"""QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models. Xu et al., ICLR 2024.
https://arxiv.org/abs/2309.14717
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.sites import Site, TargetError
from lightning_peft.core.targets import Shape, projection_widths


class Pooled(LowRank):
    """y = base(x) + s B A p(x): p(x)[l] the sum of x over group l; A (rank, d_in / group), B (d_out, rank)."""

    def __init__(self, shape: Shape, rank: int, scale: float, dropout: float, group: int) -> None:
        self.group = group
        super().__init__(shape, rank, scale, dropout)

    def make(self, shape: Shape, rank: int) -> None:
        self.a = nn.Parameter(torch.empty(rank, shape.d_in // self.group))
        self.b = nn.Parameter(torch.empty(shape.d_out, rank))

    def reset(self, draw: Draw) -> None:
        draw.uniform(self.a, math.sqrt(6 / sum(self.a.shape)))
        draw.zeros(self.b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """As if it were not pooled: every column of A for each input of its group."""
        return self.a.repeat_interleave(self.group, 1), self.b

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        if self.dropout > 0 and self.training:
            x = F.dropout(x, self.dropout)
        pooled = x.unflatten(-1, (-1, self.group)).sum(-1)
        z = self.scale * F.linear(pooled, self.a.to(x.dtype))
        return y + F.linear(z, self.b.to(x.dtype))

    def grouped(self, group: int) -> Tensor | None:
        """s B A, for groups that lie in ours."""
        if self.group % group:
            return None
        return (self.scale * (self.b @ self.a)).repeat_interleave(self.group // group, 1)


class QALoRA(PEFT, name="qalora", family="reparametrisation", paper="2309.14717", mergeable=True):
    """y = Q x + (alpha / rank) B A p(x), p(x)_l = the sum of x over the inputs of group l

    A (rank, d_in / group) starts Xavier-uniform, B (d_out, rank) at zero: the base at step 0. The change of the weight
    is one number for all inputs of a group, so that the zeros of a base in groups of integers take it: over
    `NF4Precision(mode="int4", blocksize=32)` (int3, int2; or `quantise`, or `gptq`) a merge needs no `into`, codes and
    scales stay as they are, and nothing is rounded. group must be a multiple of that blocksize, and divide d_in. On
    floats and other codes it merges as LoRA does. rank * (d_in / group + d_out) parameters a site.
    pool: "sum" is the paper's, "mean" that of the released code, which has the scale divided by group. Source:
    algorithm 1.
    """

    targets: str | list[str] | None = "all-linear"
    rank: int = 64
    alpha: float = 16.0
    group: int = 32
    pool: Literal["sum", "mean"] = "sum"
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "rank")
        positive(self, "group")
        not_negative(self, "alpha")
        probability(self, "dropout")

    def adapter(self, site: Site) -> Adapter:
        d_in, d_out = projection_widths(site, "QALoRA")
        if d_in % self.group:
            raise TargetError(
                f"group={self.group} does not divide the {d_in} inputs of {site.name!r}. Choose a divisor or "
                "exclude it."
            )
        scale = self.alpha / self.rank / (self.group if self.pool == "mean" else 1)
        return Pooled(Shape(d_in, d_out), self.rank, scale, self.dropout, self.group)
