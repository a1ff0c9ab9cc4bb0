"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022. https://arxiv.org/abs/2106.09685
rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski, 2023. https://arxiv.org/abs/2312.03732
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter, NotMergeableError
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.method import Scope
from lightning_peft.core.quantised import takes_low_rank
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import per_site, projection_widths


class LowRank(Adapter):
    """y = base(x) + s (B A drop(x) + c): A (rank, d_in), B (d_out, rank), c (d_out,) or absent."""

    additive = True

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        bias: bool = False,
        init: str = "kaiming",
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.empty(d_out, rank))
        self.c = nn.Parameter(torch.empty(d_out)) if bias else None
        self.scale, self.dropout, self.init = scale, dropout, init

    def reset(self, draw: Draw) -> None:
        if self.init == "kaiming":
            draw.kaiming_uniform(self.a)
        else:
            draw.normal(self.a, std=1 / len(self.a))
        draw.zeros(self.b)
        if self.c is not None:
            draw.zeros(self.c)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        dropping = self.dropout > 0 and self.training
        if self.c is None and not dropping and takes_low_rank(base, x):
            return base(x, low_rank=(self.a, self.b, self.scale))
        y = base(x)
        if dropping:
            x = F.dropout(x, self.dropout)
        # on (..., rank): torch.add(alpha=) is lost in a compiled graph
        z = self.scale * F.linear(x, self.a.to(x.dtype))
        return y + F.linear(z, self.b.to(x.dtype), None if self.c is None else self.scale * self.c.to(x.dtype))

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        return self.scale * (self.b.to(weight) @ self.a.to(weight))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.c is not None:
            if bias is None:
                raise NotMergeableError(
                    "LoRA(lora_bias=True) on a projection without a bias cannot be merged; leave it attached."
                )
            bias = bias + self.scale * self.c.to(bias)
        return weight + self.delta(weight), bias


class LoRA(PEFT, name="lora", family="reparametrisation", paper="2106.09685", mergeable=True):
    """y = W x + (alpha / rank) B A x

    A (rank, d_in) starts Kaiming-uniform or Gaussian (sigma = 1 / rank), B (d_out, rank) at zero: the base at step 0.
    rank * (d_in + d_out) parameters a site. `dropout` acts on the adapter's input. Source: section 4.1.

    rslora: scale alpha / sqrt(rank) instead (2312.03732, theorem 3.2). lora_bias: a trained vector beside B.
    bias: which biases of the base train as well: "none", "all", or those of the "adapted" modules.
    ranks, alphas: pattern or role -> value, for the sites it matches; a pattern that matches no site is an error.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian"] = "kaiming"
    rslora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "adapted"] = "none"
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "alpha")
        probability(self, "dropout")
        if bad := {pattern: rank for pattern, rank in self.ranks.items() if rank <= 0}:
            raise FieldError(f"LoRA(ranks={bad!r}): expected ranks above 0. To leave sites out, use exclude=...")
        if bad_alphas := {pattern: a for pattern, a in self.alphas.items() if not 0 <= a < math.inf}:
            raise FieldError(f"LoRA(alphas={bad_alphas!r}): expected numbers of 0 or more.")

    @property
    def scope(self) -> Scope:
        return {"none": "nothing", "all": "model", "adapted": "targets"}[self.bias]  # type: ignore[return-value]

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        ranks, alphas = per_site(sites, self.ranks, self.rank), per_site(sites, self.alphas, self.alpha)
        for site, rank, alpha in zip(sites, ranks, alphas, strict=True):
            width = projection_widths(site, "LoRA")
            yield site, LowRank(*width, rank, self.scale(rank, alpha), self.dropout, self.lora_bias, self.init)

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return name.rpartition(".")[2].endswith("bias")
