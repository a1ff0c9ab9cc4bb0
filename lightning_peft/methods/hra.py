"""HRA: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation.
Yuan, Liu, Xu, NeurIPS 2024. https://arxiv.org/abs/2405.17484
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, not_negative, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.orthogonal import TurnInput
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import projection_widths


class Reflections(TurnInput):
    """y = base(H_1 ... H_r x), H_i = I - 2 u_i u_i^T / |u_i|^2: u (rank, d_in).

    Two neighbours a and b = a + d of length 1 make H_a H_b = I + 2 a d^T - 2 (d + |d|^2 a) b^T, which is I to the bit
    where they are equal. With these factors as columns, P = (2 a, -2 (d + |d|^2 a), ...) and S = (d, b, ...), the chain
    is I + P M^-1 S^T, M = I - (blocks of S^T P above the diagonal): compact WY, without a d_in x d_in matrix.
    """

    def __init__(self, d_in: int, rank: int, orthogonality: float) -> None:
        super().__init__()
        self.orthogonality = orthogonality
        self.u = nn.Parameter(torch.empty(rank, d_in))

    def reset(self, draw: Draw) -> None:
        half = torch.empty_like(self.u[::2], requires_grad=False)
        draw.uniform(half, len(half) ** -0.5)
        with torch.no_grad():
            self.u.copy_(half.repeat_interleave(2, 0))

    def unit(self) -> Tensor:
        """u_i / |u_i|, in fp32 or better"""
        u = self.u.to(torch.promote_types(self.u.dtype, torch.float32))
        return u / u.norm(dim=1, keepdim=True)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """P and S as rows (rank, d_in), and M (rank, rank)"""
        a, b = self.unit().unflatten(0, (-1, 2)).unbind(1)
        d = b - a
        p = torch.stack([2 * a, -2 * (d + d.square().sum(1, keepdim=True) * a)], 1).flatten(0, 1)
        s = torch.stack([d, b], 1).flatten(0, 1)
        pair = torch.arange(len(p), device=p.device) // 2
        with torch.autocast(p.device.type, enabled=False):
            return p, s, torch.eye(len(p), dtype=p.dtype, device=p.device) - (s @ p.T) * (pair[:, None] < pair)

    def turn(self, x: Tensor, transpose: bool = False) -> Tensor:
        p, s, m = self.factors()
        first, last = (p, s) if transpose else (s, p)
        inner = torch.linalg.solve_triangular(m.mT if transpose else m, first, upper=not transpose)
        return x + x @ inner.to(x.dtype).T @ last.to(x.dtype)

    def penalty(self) -> Tensor | None:
        if not self.orthogonality:
            return None
        u = self.unit()
        return self.orthogonality * (u @ u.T - torch.eye(len(u), dtype=u.dtype, device=u.device)).square().sum()


class HRA(PEFT, name="hra", family="reparametrisation", paper="2405.17484", mergeable=True):
    """y = W H_1 ... H_r x, H_i = I - 2 u_i u_i^T / |u_i|^2

    The rank is even and neighbours start equal (Kaiming-uniform), so that they undo each other: the base at step 0.
    rank * d_in parameters a site.

    orthogonality: weight of the penalty |U^T U - I|^2 on unit vectors, which leads from a chain of any reflections to
    one of orthogonal ones.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    orthogonality: float = 0.0

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "orthogonality")
        if self.rank % 2:
            raise FieldError(
                f"HRA(rank={self.rank}): an odd number of reflections cannot start as the identity. Choose "
                f"{self.rank + 1}."
            )

    def adapter(self, site: Site) -> Adapter:
        return Reflections(projection_widths(site, "HRA")[0], self.rank, self.orthogonality)
