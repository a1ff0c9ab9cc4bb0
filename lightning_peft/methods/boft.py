"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. Liu et al., ICLR 2024.
https://arxiv.org/abs/2311.06243
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.orthogonal import TurnInput, cayley, skew, turned
from lightning_peft.core.projection import base_bias
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import check_divides, projection_widths


class Butterfly(TurnInput):
    """y = s * (base(R_1 ... R_m x) - bias) + bias: q (m, d_in / b, b (b - 1) / 2), s (d_out,).

    R_i turns blocks of b features, the two halves of which lie 2^(i-1) b / 2 apart.
    """

    def __init__(self, d_in: int, d_out: int, factors: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.q = nn.Parameter(torch.empty(factors, d_in // size, size * (size - 1) // 2))
        self.s = nn.Parameter(torch.empty(d_out))

    def reset(self, draw: Draw) -> None:
        draw.zeros(self.q)
        draw.ones(self.s)

    def turn(self, x: Tensor, transpose: bool = False) -> Tensor:
        changes = cayley(skew(self.q, self.size)).to(x.dtype)
        order = range(len(changes))
        for i in order if transpose else reversed(order):
            change = changes[i].mT if transpose else changes[i]
            x = apart(turned(together(x, 2**i, self.size), change), 2**i, self.size)
        return x

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y, bias = super().forward(base, x), base_bias(self.place)
        return y + (self.s - 1).to(y.dtype) * (y if bias is None else y - bias.to(y.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, s, own = self.turn(weight, transpose=True), self.s.to(weight), base_bias(self.place)
        if bias is not None and own is not None:  # an adapter inside may have changed it
            bias = bias + (s - 1) * (bias - own.detach().to(bias))
        return s[:, None] * weight, bias


def together(x: Tensor, stride: int, size: int) -> Tensor:
    """Half blocks that lie `stride` half blocks apart become neighbours."""
    return x.unflatten(-1, (-1, 2, stride, size // 2)).transpose(-3, -2).flatten(-4) if stride > 1 else x


def apart(x: Tensor, stride: int, size: int) -> Tensor:
    """Undoes `together`."""
    return x.unflatten(-1, (-1, stride, 2, size // 2)).transpose(-3, -2).flatten(-4) if stride > 1 else x


class BOFT(PEFT, name="boft", family="reparametrisation", paper="2311.06243", mergeable=True):
    """y = diag(s) W R_1 ... R_m x + b, R_i block-diagonal and orthogonal under the i-th butterfly permutation

    Each block is (I + Q) (I - Q)^-1 with Q = -Q^T. Q starts at zero, s at one: the base at step 0.
    factors * d_in (block_size - 1) / 2 + d_out parameters a site. The factors are applied one after the other by views
    of the input: no permutation matrix, no product with W. d_in is a multiple of block_size * 2^(factors - 1). In
    rows, x R_m ... R_1.
    """

    targets: str | list[str] | None = "q,v"
    block_size: int = 4
    factors: int = 2

    def check(self) -> None:
        positive(self, "block_size", "factors")
        if self.block_size < 2:
            raise FieldError("BOFT(block_size=1): a block of one feature has no rotation. Choose 2 or more.")
        if self.factors > 1 and self.block_size % 2:
            raise FieldError(
                f"BOFT(block_size={self.block_size}, factors={self.factors}): blocks are made of two halves where "
                "there is more than one factor. Choose an even size, or factors=1."
            )

    def adapter(self, site: Site) -> Adapter:
        d_in, d_out = projection_widths(site, "BOFT")
        check_divides(site, "BOFT(block_size * 2^(factors - 1))", self.block_size * 2 ** (self.factors - 1), d_in)
        return Butterfly(d_in, d_out, self.factors, self.block_size)
