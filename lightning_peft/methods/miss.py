"""MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure. Kang, Yin, 2024.
https://arxiv.org/abs/2409.15371
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, TargetError
from lightning_peft.core.targets import check_divides, projection_widths


class SharedShards(Adapter):
    """y = base(x) + (B, B, ...) sum_k x_k, x_k the k-th run of r features: B (r's rows are outputs, r)."""

    additive = True

    def __init__(self, rows: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.b = nn.Parameter(torch.empty(rows, rank))

    def reset(self, draw: Draw) -> None:
        draw.zeros(self.b)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y, rank = base(x), self.b.shape[1]
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if x.shape[-1] % rank:
            x = F.pad(x, (0, -x.shape[-1] % rank))
        z = F.linear(x.unflatten(-1, (-1, rank)).sum(-2), self.b.to(x.dtype))  # (..., rows)
        if z.shape[-1] == y.shape[-1]:
            return y + z
        return (y.unflatten(-1, (-1, z.shape[-1])) + z.unsqueeze(-2)).flatten(-2)

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        d_out, d_in = weight.shape
        rows, rank = self.b.shape
        return self.b.to(weight).repeat(d_out // rows, -(-d_in // rank))[:, :d_in]


class MiSS(PEFT, name="miss", family="reparametrisation", paper="2409.15371", mergeable=True):
    """y = W x + B sum_k x_k, x_k the k-th run of `rank` features

    W's columns fall into shards of `rank`, all of which get the same change B (d_out, rank): a product of rank `rank`
    of which only one factor trains and the other is a sum. B starts at zero: the base at step 0. rank * d_out
    parameters a site. The last shard may be shorter.

    rows: B has only so many rows, repeated down the outputs; rank * rows parameters. dropout acts on the input.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 64
    rows: int | None = None
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "rank", *(("rows",) if self.rows is not None else ()))
        probability(self, "dropout")

    def adapter(self, site: Site) -> Adapter:
        d_in, d_out = projection_widths(site, "MiSS")
        if self.rank > d_in:
            raise TargetError(
                f"MiSS(rank={self.rank}) is more than the {d_in} input features of {site.name!r}. Choose at most that."
            )
        if self.rows is not None:
            check_divides(site, "MiSS(rows)", self.rows, d_out)
        return SharedShards(self.rows or d_out, self.rank, self.dropout)
