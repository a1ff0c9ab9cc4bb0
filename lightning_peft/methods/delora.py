"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation. Bini, Girrbach, Akata, ICLR 2025.
https://arxiv.org/abs/2503.18225
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.projection import base_weight
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import Shape, projection_widths


class Bounded(LowRank):
    """y = base(x) + (lambda / r) sum_i b_i (a_i * n)^T x / (|a_i| |b_i|): n (d_in,) the lengths of W's columns."""

    norms: Tensor

    def __init__(self, shape: Shape, rank: int, strength: float, dropout: float) -> None:
        super().__init__(shape, rank, 1.0, dropout)
        self.start = strength
        self.strength = nn.Parameter(torch.empty(1))
        self.register_buffer("norms", torch.ones(shape.d_in))

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        draw.ones(self.strength)
        self.strength.data.mul_(self.start)
        self.measure(base_weight(self.place))

    @torch.no_grad()
    def measure(self, weight: Tensor) -> None:
        if not weight.is_meta and not self.norms.is_meta:
            self.norms.copy_(weight.to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=0))

    def factors(self) -> tuple[Tensor, Tensor]:
        # on (r, d_in) numbers: neither the input nor what comes out is scaled
        lengths = self.a.norm(dim=1).clamp_min(1e-4) * self.b.norm(dim=0).clamp_min(1e-4)
        return (self.strength / len(self.a) / lengths)[:, None] * self.a * self.norms, self.b

    def rebased(self) -> None:
        """Before any training n is that of the weight which the adapter will see; afterwards it stays."""
        if not self.b.is_meta and not self.b.any():
            self.measure(base_weight(self.place))


class DeLoRA(PEFT, name="delora", family="reparametrisation", paper="2503.18225", mergeable=True):
    """y = (W + (lambda / rank) B diag(1 / (|a_i| |b_i|)) A diag(n)) x, n_j = |W_j|

    The direction of each rank-one part is trained apart from its strength lambda, so that the change is bounded by
    lambda, relative to W. A (rank, d_in) starts Kaiming-uniform, B (d_out, rank) at zero: the base at step 0 (lengths
    count as 1e-4 at least). rank * (d_in + d_out) + 1 parameters a site. n, the lengths of W's columns, is measured
    once and goes into the file. Lengths are by column, instead of one norm of W, as the authors' code has it.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    strength: float = 15.0
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "strength")
        probability(self, "dropout")

    def adapter(self, site: Site) -> Adapter:
        return Bounded(Shape(*projection_widths(site, "DeLoRA")), self.rank, self.strength, self.dropout)
