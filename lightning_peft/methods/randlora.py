"""RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models. Albert et al., ICLR 2025.
https://arxiv.org/abs/2502.00987
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.basis import Basis
from lightning_peft.core.fields import not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import BothSides, LowRank
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import Shape, projection_widths


class FullRank(LowRank):
    """y = base(x) + s sum_n B_n diag(l_n) A diag(g_n) drop(x): l (bases, rank), g (bases, the smaller width).

    A (rank, smaller), B (larger, bases, rank) are the first numbers of a basis; transposed where d_out is the smaller.
    """

    def __init__(self, shape: Shape, rank: int, scale: float, dropout: float, basis: Basis) -> None:
        super().__init__(shape, rank, scale, dropout)
        self.basis = basis

    def make(self, shape: Shape, rank: int) -> None:
        smaller = min(shape.d_in, shape.d_out)
        self.l = nn.Parameter(torch.empty(-(-smaller // rank), rank))
        self.g = nn.Parameter(torch.empty(-(-smaller // rank), smaller))

    def reset(self, draw: Draw) -> None:
        self.basis.fill()
        draw.zeros(self.l)
        draw.constant(self.g, 1 / max(self.g.shape))

    def factors(self) -> tuple[Tensor, Tensor]:
        smaller, larger = self.g.shape[1], max(self.shape.d_in, self.shape.d_out)
        a = BothSides.apply(self.l, self.basis.a[:, :smaller], self.g).flatten(0, 1)  # type: ignore[index]
        b = self.basis.b[:larger, : len(self.l)].flatten(1)  # type: ignore[index]
        return (a, b) if smaller == self.shape.d_in else (b.T, a.T)


class RandLoRA(PEFT, name="randlora", family="reparametrisation", paper="2502.00987", mergeable=True):
    """y = W x + (alpha / rank) sum_n B_n diag(l_n) A diag(g_n) x, A and B_n frozen and random

    As many products of `rank` as give full rank. A (rank, d) and B_n (D, rank), d and D the smaller and the larger of
    the widths, are uniform of unit variance, one basis for all sites, drawn from the seed and kept in no file. l_n
    (rank,) starts at zero, g_n (d,) at a constant: the base at step 0. ceil(d / rank) (rank + d) parameters a site.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 32
    alpha: float = 640.0
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "alpha")
        probability(self, "dropout")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        shapes = [Shape(*projection_widths(site, "RandLoRA")) for site in sites]
        smaller = max(min(shape.d_in, shape.d_out) for shape in shapes)
        larger = max(max(shape.d_in, shape.d_out) for shape in shapes)
        law = partial(Draw.uniform, bound=3**0.5)
        basis = Basis(self.seed, a=((self.rank, smaller), law), b=((larger, -(-smaller // self.rank), self.rank), law))
        for site, shape in zip(sites, shapes, strict=True):
            yield site, FullRank(shape, self.rank, self.alpha / self.rank, self.dropout, basis)
