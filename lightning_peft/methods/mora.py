"""MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning. Jiang et al., 2024. https://arxiv.org/abs/2405.12130"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import projection_widths

Type = Literal[1, 2, 3, 4, 6]
Rounding = Literal["nearest", "floor"]
STRIDED_IN, STRIDED_OUT = (1, 4), (1, 3)  # the types that compress, and decompress, by position modulo the size of M


def square(d_in: int, d_out: int, rank: int, type: int, rounding: Rounding) -> int:
    """The size of M with about the numbers of a LoRA of this rank; even where its columns are rotated in pairs."""
    size = int(math.sqrt((d_in + d_out) * rank) + (0.5 if rounding == "nearest" else 0.0))
    return max(size // 2 * 2, 2) if type == 6 else size


def wrapped(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x (..., d) as rows (..., n, size) and the last row (..., size), which goes on with the first features of x."""
    full, rest = divmod(x.shape[-1], size)
    rows = x[..., : full * size].unflatten(-1, (full, size))
    if not rest:
        return rows[..., :-1, :], rows[..., -1, :]
    tail = x[..., full * size :]
    copies = -(-(size - rest) // x.shape[-1])
    return rows, torch.cat([tail, *[x] * copies], -1)[..., :size]


def grouped(width: int, size: int) -> tuple[int, int]:
    """The first m of `size` neighbouring groups have n + 1 members, the others n -> (m, n)."""
    return width % size, width // size


def rotation(rows: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (rows, size) of t 10000^(-2 j / size), both halves of a row alike"""
    exact = torch.promote_types(like.dtype, torch.float32)
    j = torch.arange(0, size, 2, device=like.device, dtype=exact)
    angle = torch.arange(rows, device=like.device, dtype=exact)[:, None] * 10000 ** (-j / size)
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


class Square(Adapter):
    """y = base(x) + decompress(M compress(drop(x))): M (size, size)."""

    additive = True

    def __init__(self, d_in: int, d_out: int, size: int, kind: int, dropout: float) -> None:
        super().__init__()
        self.d_in, self.d_out, self.size, self.kind, self.dropout = d_in, d_out, size, kind, dropout
        self.m = nn.Parameter(torch.empty(size, size))

    def reset(self, draw: Draw) -> None:
        draw.zeros(self.m)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        x = F.dropout(x, self.dropout) if self.dropout > 0 and self.training else x
        return y + self.decompress(F.linear(self.compress(x), self.m.to(x.dtype)))

    def compress(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., size), or (..., rows, size) where rows are rotated
        if self.kind == 6:
            rows, last = wrapped(x, self.size)
            rows = torch.cat([rows, last[..., None, :]], -2)
            cos, sin = rotation(rows.shape[-2], self.size, x)
            left, right = rows.chunk(2, -1)
            return rows * cos + torch.cat([-right, left], -1) * sin
        if self.kind in STRIDED_IN:
            rows, last = wrapped(x, self.size)
            return rows.sum(-2) + last
        more, few = grouped(self.d_in, self.size)
        cut = more * (few + 1)
        first = x[..., :cut].unflatten(-1, (more, few + 1)).sum(-1)
        return torch.cat([first, x[..., cut:].unflatten(-1, (self.size - more, few)).sum(-1)], -1)

    def decompress(self, h: Tensor) -> Tensor:  # -> (..., d_out)
        if self.kind == 6:
            h = h.flatten(-2)
        elif self.kind not in STRIDED_OUT:
            more, few = grouped(self.d_out, self.size)
            first = h[..., :more, None].expand(*h.shape[:-1], more, few + 1).flatten(-2)
            return torch.cat([first, h[..., more:, None].expand(*h.shape[:-1], -1, few).flatten(-2)], -1)
        copies = -(-self.d_out // h.shape[-1])
        return h[..., None, :].expand(*h.shape[:-1], copies, -1).flatten(-2)[..., : self.d_out]

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        eye, m = torch.arange(self.size, device=weight.device), self.m.to(weight)
        padded = torch.arange(-(-self.d_in // self.size) * self.size, device=weight.device)
        if self.kind == 6:
            columns = self.rotated(m, len(padded) // self.size)
            source = padded
        elif self.kind in STRIDED_IN:
            columns, source = m.repeat(1, len(padded) // self.size), padded
        else:
            columns = m.repeat_interleave(members(self.d_in, eye), 1)
            source = padded[: self.d_in]
        change = columns.new_zeros(len(columns), self.d_in).index_add_(1, source % self.d_in, columns)
        if self.kind in (2, 4):
            return change.repeat_interleave(members(self.d_out, eye), 0)
        return change.repeat(-(-self.d_out // len(change)), 1)[: self.d_out]

    def rotated(self, m: Tensor, rows: int) -> Tensor:
        """Blocks M diag(cos_t) + M~ diag(sin_t) along the diagonal, M~ = [M_right, -M_left]."""
        cos, sin = rotation(rows, self.size, m)
        left, right = m.chunk(2, 1)
        return torch.block_diag(*(m * c + torch.cat([right, -left], 1) * s for c, s in zip(cos, sin, strict=True)))


def members(width: int, groups: Tensor) -> Tensor:
    more, few = grouped(width, len(groups))
    return few + (groups < more).long()


class MoRA(PEFT, name="mora", family="reparametrisation", paper="2405.12130", mergeable=True, batched=True):
    """y = W x + decompress(M compress(x)), M square

    M (n, n), n = round(sqrt(rank (d_in + d_out))), starts at zero: the base at step 0. n^2 parameters a site, about
    those of a LoRA of this rank, in a change whose rank is n (types 1 to 4) or up to that of W (type 6). Merging is
    exact.

    type: how x comes down to n numbers and back. 1: features of one position modulo n are summed, and the result is
    tiled; 2: neighbours are summed, and each result repeated; 3: down as 2, back as 1; 4: down as 1, back as 2; 6: x in
    rows of n, each turned by an angle of its own, M applied to each. The input
    goes on with its first features where n does not divide it. The paper pairs neighbours for the rotation; here, as in
    its code, the halves of a row are the pairs, which is a permutation of M's columns.
    rounding: the code rounds n to the "nearest" number, the paper down ("floor"); with type 6 it is made even.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    type: Type = 6
    dropout: float = 0.0
    rounding: Rounding = "nearest"

    def check(self) -> None:
        positive(self, "rank")
        probability(self, "dropout")

    def adapter(self, site: Site) -> Adapter:
        d_in, d_out = projection_widths(site, "MoRA")
        size = square(d_in, d_out, self.rank, self.type, self.rounding)
        return Square(d_in, d_out, size, self.type, self.dropout)

    def switch(self, model: nn.Module, type: Type) -> None:
        """Go on with another way down and back, one of types 1 to 4; M keeps its shape (ReMoRA zeroes it first)."""
        if 6 in (self.type, type) or type not in (1, 2, 3, 4):
            raise FieldError(
                f"MoRA(type={self.type}) cannot be switched to {type!r}: only types 1, 2, 3, 4 share their M."
            )
        for placement in state.get_applied(model, self.label or self.info.name).placements:
            placement.adapter.kind = type  # type: ignore[assignment]
        self.type = type
