"""LoHa: FedPara, Low-Rank Hadamard Product for Communication-Efficient Federated Learning. Hyeon-Woo et al., ICLR 2022.
https://arxiv.org/abs/2108.06098. In LyCORIS: Yeh et al., ICLR 2024. https://arxiv.org/abs/2309.14859
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import Shape, matrix_shape


class Hadamard(LowRank):
    """y = base(x) + s ((B_1 A_1) * (B_2 A_2)) drop(x): A_n (rank, d_in), B_n (d_out, rank).

    Exactly a product of rank^2: its factors are the Khatri-Rao products of the A_n and of the B_n.
    """

    def make(self, shape: Shape, rank: int) -> None:
        self.a1, self.a2 = (nn.Parameter(torch.empty(rank, shape.d_in)) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(torch.empty(shape.d_out, rank)) for _ in range(2))

    def reset(self, draw: Draw) -> None:
        for random in (self.b1, self.a1, self.b2):
            draw.kaiming_uniform(random)
        draw.zeros(self.a2)

    def factors(self) -> tuple[Tensor, Tensor]:
        a = (self.a1[:, None] * self.a2).flatten(0, 1)  # (rank^2, d_in)
        b = (self.b1[:, :, None] * self.b2[:, None]).flatten(1)  # (d_out, rank^2)
        return a, b


class LoHa(PEFT, name="loha", family="reparametrisation", paper="2108.06098", mergeable=True):
    """y = W x + (alpha / rank) ((B_1 A_1) * (B_2 A_2)) x

    B_1, A_1 and B_2 are Kaiming-uniform, A_2 zero: the base at step 0. The elementwise product has a rank of up to
    rank^2; 2 rank (d_in + d_out) parameters a site. FedPara, as LyCORIS has it.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "alpha")
        probability(self, "dropout")

    def adapter(self, site: Site) -> Adapter:
        return Hadamard(matrix_shape(site, "LoHa"), self.rank, self.alpha / self.rank, self.dropout)
