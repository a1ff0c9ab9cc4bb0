"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022. https://arxiv.org/abs/2106.09685
rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski, 2023. https://arxiv.org/abs/2312.03732
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.method import Scope
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import matrix_shape, per_site


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
            shape = matrix_shape(site, type(self).__name__)
            yield site, LowRank(shape, rank, self.scale(rank, alpha), self.dropout, self.lora_bias, self.init)

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return name.rpartition(".")[2].endswith("bias")
