"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., ICML 2024. https://arxiv.org/abs/2402.09353"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.derived import Derived
from lightning_peft.core.fields import not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.projection import base_bias, base_weight, parameters_of
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import Shape, matrix_shape


class Decomposed(LowRank):
    """y = g * (W x + s B A x) + b, g = m / |W + s B A|: m (d_out,), norms of rows, b the base's bias.

    Of any `LowRank`: put it before the one that has `factors`. The norms of W are kept until W changes.
    """

    additive = False
    reads_weight = True
    detached = True  # no gradient through the norm (section 4.3)

    def make(self, shape: Shape, rank: int) -> None:
        super().make(shape, rank)
        self.m = nn.Parameter(torch.empty(shape.d_out))
        self.squares, self.gain = Derived(), Derived()
        self.first: Tensor | None = None  # the m of step 0

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """m as the norms of W + s B A; not while there is no memory"""
        if not self.m.is_meta and not parameters_of(self.place)[0].is_meta:
            self.m.copy_(self.present_norm(*self.factors()))
            self.first = self.m.detach().clone()

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        place: Any = self.place
        bias, space = base_bias(place), place.weight.dim() - 2 if self.shape.kind == "convolution" else 0
        more = self.growth().view(-1, *[1] * space)
        if not self.dropping:
            y = summed = super().forward(base, x)
        else:  # the same dropped x for what is scaled of W x (peft and the authors' code)
            y, dropped = base(x), self.dropped(x)
            term = self.term(dropped, *self.factors(), y.dtype)
            y, summed = y + term, base(dropped) + term
        if bias is not None:
            summed = summed - bias.to(y.dtype).view(-1, *[1] * space)
        return torch.addcmul(y, summed, more.to(y.dtype))

    def growth(self) -> Tensor:
        """g - 1, (d_out,); kept between forwards that train nothing"""
        if self.training or torch.is_grad_enabled():
            self.gain.clear()
            return self.ratio(self.current_norm()) - 1
        sources = [*self.parameters(), parameters_of(self.place)[0]]
        return self.gain(sources, lambda: self.ratio(self.current_norm()) - 1, trained=True)

    def ratio(self, norm: Tensor) -> Tensor:
        """m / |V|; 1 where a row of V is zero: its direction may grow first, and m follows"""
        zero = norm == 0
        return torch.where(zero, 1.0, self.m.to(norm.dtype) / norm.masked_fill(zero, 1.0))

    def current_norm(self) -> Tensor:
        a, b = self.factors()
        if not self.detached and torch.is_grad_enabled():  # a weight made from codes is made again, not kept
            return checkpoint(self.present_norm, a, b, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        with torch.no_grad():
            return self.present_norm(a, b)

    def present_norm(self, a: Tensor, b: Tensor) -> Tensor:
        weight = base_weight(self.place)
        squares = self.squares(parameters_of(self.place)[:1], lambda: row_squares(weight))
        return self.norm(weight, squares, a, b)

    def norm(self, weight: Tensor, squares: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """|W + s B A| of each row, (d_out,), without that sum:

        sqrt(|W|^2 + 2s <W A^T, B> + s^2 <B A A^T, B>)
        """
        dtype = torch.promote_types(squares.dtype, b.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            across = torch.mm(weight, a.to(weight.dtype).T).to(dtype)  # (d_out, rank)
            a, b = a.to(dtype), b.to(dtype)
            cross = ((2 * across + self.scale * (b @ (a @ a.T))) * b).sum(1)
        total = squares.to(dtype) + self.scale * cross
        positive = total > 0
        return torch.where(positive, total.where(positive, 1.0).sqrt(), 0.0)

    def rebased(self) -> None:
        """An untrained m follows the weight into its codes, so that step 0 is the quantised base."""
        if self.first is not None and torch.equal(self.m, self.first.to(self.m)):
            self.start()

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = self.ratio(self.norm(weight, row_squares(weight), *self.factors())).to(weight)
        return gain[:, None] * (weight + LowRank.delta(self, weight)), bias

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        return self.fold(weight, None)[0] - weight


def row_squares(weight: Tensor) -> Tensor:
    """Sums of squares of the rows, in fp32 or better: (d_out, d_in) -> (d_out,)"""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()


class DoRA(PEFT, name="dora", family="reparametrisation", paper="2402.09353", mergeable=True):
    """y = m / |W + s B A| * (W + s B A) x + b, s = alpha / rank

    The norms are of rows: one magnitude m (d_out,) for each output feature, which starts as that of W; A is
    Kaiming-uniform, B zero: the base at step 0. rank * (d_in + d_out) + d_out parameters a site. The bias is not
    scaled. `dropout` acts on all but W x itself. Source: sections 4.1 and 4.3.

    detach_norm: no gradient through the norm, which is 4.3.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    detach_norm: bool = True

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "alpha")
        probability(self, "dropout")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for site in sites:
            adapter = Decomposed(matrix_shape(site, "DoRA"), self.rank, self.alpha / self.rank, self.dropout)
            adapter.detached = self.detach_norm
            yield site, adapter
