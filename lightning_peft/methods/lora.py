"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022. https://arxiv.org/abs/2106.09685
rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski, 2023. https://arxiv.org/abs/2312.03732
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.experts import ExpertLowRank, owners, stack_site, stacks
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.method import Scope
from lightning_peft.core.sites import Site, Sites, TargetError, tokens
from lightning_peft.core.targets import Shape, matrix_shape, per_site


class LoRA(PEFT, name="lora", family="reparametrisation", paper="2106.09685", mergeable=True, batched=True):
    """y = W x + (alpha / rank) B A x

    A (rank, d_in) starts Kaiming-uniform or Gaussian (sigma = 1 / rank), B (d_out, rank) at zero: the base at step 0.
    init="orthogonal" starts both at random with B A = 0; its rank is even. An embedding starts with A at zero and B
    Gaussian; a convolution has A as a kernel of its size and B as one of size 1. rank * (d_in + d_out) parameters a
    site. `dropout` acts on the adapter's input. Source: section 4.1.

    rslora: scale alpha / sqrt(rank) instead (2312.03732, theorem 3.2). lora_bias: a trained vector beside B.
    bias: which biases of the base train as well: "none", "all", or those of the "adapted" modules.
    experts: globs of parameters (experts, ., .) that a module holds for all its experts, such as
    "*.experts.gate_up_proj": factors of its own for each expert, experts * rank * (d_in + d_out) parameters, without
    dropout. With targets=None nothing but these.
    ranks, alphas: pattern or role -> value, for the sites it matches; a pattern that matches no site is an error.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    rslora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "adapted"] = "none"
    experts: str | list[str] | None = None
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
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.rank, *self.ranks.values())):
            raise FieldError(f"LoRA(init='orthogonal', rank={self.rank}, ranks={self.ranks}): the ranks must be even.")

        plain = type(self).product is LoRA.product and not self.dropout and not self.lora_bias
        if self.experts is not None and (not plain or self.init == "orthogonal"):
            raise FieldError(
                f"{type(self).__name__}(experts={self.experts!r}): the weights of experts take plain LoRA, without "
                "dropout, lora_bias or another start. List a method of its own: LoRA(targets=None, experts=..., "
                "label='experts')."
            )

    @property
    def places(self) -> str | list[str]:
        named = [] if self.targets is None else tokens(self.targets, "targets")
        if not named and self.experts is None:
            name = type(self).__name__
            raise TargetError(f"{name}(targets=None) has no place to act. Name roles or modules, such as 'q,v'.")
        return self.targets or [] if self.experts is None else [*named, *owners(self.experts)]

    @property
    def scope(self) -> Scope:
        return {"none": "nothing", "all": "model", "adapted": "targets"}[self.bias]  # type: ignore[return-value]

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def product(self, shape: Shape, rank: int, scale: float) -> LowRank:
        """The adapter of one site."""
        return LowRank(shape, rank, scale, self.dropout, self.lora_bias, self.init)

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        ranks, alphas = per_site(sites, self.ranks, self.rank), per_site(sites, self.alphas, self.alpha)
        held = {} if self.experts is None else stacks(sites.model, self.experts)
        for site, rank, alpha in zip(sites, ranks, alphas, strict=True):
            for name, weight in held.get(id(site.module), {}).items():
                flipped = bool(getattr(site.module, "is_transposed", False))
                scale = self.scale(rank, alpha)
                yield stack_site(site, name), ExpertLowRank(weight.shape, rank, scale, self.init, flipped)
            if id(site.module) in held:
                continue
            yield site, self.product(matrix_shape(site, type(self).__name__), rank, self.scale(rank, alpha))

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return name.rpartition(".")[2].endswith("bias")


class StartedLoRA(LoRA):
    """LoRA whose product starts elsewhere than at zero (`core.started.Started`); files hold plain LoRA."""

    def check(self) -> None:
        super().check()
        positive(self, "alpha")
        if bad := {pattern: a for pattern, a in self.alphas.items() if a <= 0}:
            raise FieldError(f"{type(self).__name__}(alphas={bad!r}): expected numbers above 0.")

    def portable(self) -> LoRA:
        """Plain LoRA of twice the rank and the same scale."""
        more = math.sqrt(2) if self.rslora else 2
        ranks = {"rank": 2 * self.rank, "ranks": {k: 2 * r for k, r in self.ranks.items()}}
        alphas = {"alpha": more * self.alpha, "alphas": {k: more * a for k, a in self.alphas.items()}}
        return self.plain(**ranks, **alphas)

    def plain(self, **changed: Any) -> LoRA:
        """The fields of LoRA but the start, some of them changed."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(LoRA) if f.name != "init"}
        return LoRA(**{**own, **changed})
