"""GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning. Jung et al., NeurIPS 2025.
https://arxiv.org/abs/2505.20355
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import check_divides, projection_widths


class Granular(Adapter):
    """y = base(x) + s (G x + B A x), block (j, i) of G being B_ji A_ij of rank r / k.

    down (k, r, d_in / k) holds A_i1, ..., A_ik of each block of inputs under each other; up (k, d_out / k, r) holds
    B_j1, ..., B_jk of each block of outputs side by side.
    """

    additive = True

    def __init__(self, d_in: int, d_out: int, rank: int, k: int, hybrid: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.k, self.hybrid, self.scale, self.dropout = k, hybrid, scale, dropout
        self.down = nn.Parameter(torch.empty(k, rank, d_in // k))
        self.up = nn.Parameter(torch.empty(k, d_out // k, rank))
        if hybrid:
            self.a = nn.Parameter(torch.empty(hybrid, d_in))
            self.b = nn.Parameter(torch.empty(d_out, hybrid))

    def reset(self, draw: Draw) -> None:
        draw.uniform(self.down, self.down.shape[-1] ** -0.5)
        draw.zeros(self.up)
        if self.hybrid:
            draw.kaiming_uniform(self.a)
            draw.zeros(self.b)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        z = torch.einsum("...ic,irc->...ir", x.unflatten(-1, (self.k, -1)), self.down.to(x.dtype))
        z = z.unflatten(-1, (self.k, -1)).transpose(-3, -2).flatten(-2)  # (..., i, j, r / k) -> (..., j, r)
        y = y + torch.einsum("...jr,jor->...jo", self.scale * z, self.up.to(x.dtype)).flatten(-2)
        if self.hybrid:
            y = y + F.linear(self.scale * F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return y

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        down = self.down.to(weight).unflatten(1, (self.k, -1))  # (i, j, r / k, d_in / k)
        up = self.up.to(weight).unflatten(2, (self.k, -1))  # (j, d_out / k, i, r / k)
        out = torch.einsum("joir,ijrc->joic", up, down).reshape(weight.shape)
        return self.scale * (out + self.b.to(weight) @ self.a.to(weight) if self.hybrid else out)


class GraLoRA(PEFT, name="gralora", family="reparametrisation", paper="2505.20355", mergeable=True):
    """y_j = W_j x + (alpha / rank) sum_i B_ji A_ij x_i, each of blocks^2 blocks of W with a product of rank / blocks

    Each A starts Kaiming-uniform, each B at zero: the base at step 0. rank * (d_in + d_out) parameters a site, as LoRA
    of that rank, with a change of rank up to blocks * rank. Two block-wise products and a transposition between them.
    dropout acts on the input.

    hybrid: rank of a LoRA beside it; the scale is then alpha / (rank + hybrid).
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 32
    alpha: float = 64.0
    blocks: int = 2
    hybrid: int = 0
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "rank", "blocks")
        not_negative(self, "alpha", "hybrid")
        probability(self, "dropout")
        if self.rank % self.blocks:
            raise FieldError(
                f"GraLoRA(rank={self.rank}, blocks={self.blocks}): each block has a product of rank rank / blocks. "
                f"Choose a multiple of {self.blocks} as the rank."
            )

    def adapter(self, site: Site) -> Adapter:
        d_in, d_out = projection_widths(site, "GraLoRA")
        for width in (d_in, d_out):
            check_divides(site, "GraLoRA(blocks)", self.blocks, width)
        scale = self.alpha / (self.rank + self.hybrid)
        return Granular(d_in, d_out, self.rank, self.blocks, self.hybrid, scale, self.dropout)
