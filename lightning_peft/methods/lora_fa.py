"""LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning. Zhang et al., 2023.
https://arxiv.org/abs/2308.03303
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.basis import Basis
from lightning_peft.core.fields import not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.targets import Shape, matrix_shape


class FrozenDown(LowRank):
    """y = base(x) + s B drop(A x): A (rank, d_in) frozen, so that of x nothing is kept but A x."""

    a: Tensor  # type: ignore[assignment]

    def __init__(self, shape: Shape, rank: int, scale: float, dropout: float, basis: Basis | None) -> None:
        super().__init__(shape, rank, scale, dropout)
        self.basis = basis
        if basis is None:
            self.register_buffer("a", torch.empty(rank, shape.d_in))

    def make(self, shape: Shape, rank: int) -> None:
        self.b = nn.Parameter(torch.empty(shape.d_out, rank))

    def reset(self, draw: Draw) -> None:
        if self.basis is not None:
            self.basis.fill()
        else:
            draw.kaiming_uniform(self.a)
        draw.zeros(self.b)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a if self.basis is None else self.basis.a, self.b  # type: ignore[return-value]

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        if not self.dropping:
            return super().forward(base, x)
        y = base(x)
        return y + self.term(x, *self.factors(), y.dtype, rank_dropout=self.dropout)


class LoRAFA(PEFT, name="lora_fa", family="reparametrisation", paper="2308.03303", mergeable=True, batched=True):
    """y = W x + (alpha / rank) B A x, A frozen

    A (rank, d_in) is drawn Kaiming-uniform and stays, B (d_out, rank) starts at zero: the base at step 0. rank * d_out
    parameters a site. Of x nothing of width d_in is kept for the backward pass, which is why `dropout` acts on A x.
    Source: section 3.2.

    projection: A is "saved" with the adapter, or "drawn" again from the seed wherever it is loaded.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    projection: Literal["saved", "drawn"] = "saved"

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "alpha")
        probability(self, "dropout")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for index, site in enumerate(sites):
            shape = matrix_shape(site, "LoRA-FA")
            if shape.kind == "embedding":
                raise TargetError(
                    f"{site.name!r} is an Embedding, whose tokens a frozen A would mix at random. Exclude it, or take "
                    "LoRA."
                )
            basis = None
            if self.projection == "drawn":
                basis = Basis(f"{self.seed}/{index}", a=((self.rank, shape.d_in), Draw.kaiming_uniform))
            yield site, FrozenDown(shape, self.rank, self.alpha / self.rank, self.dropout, basis)
