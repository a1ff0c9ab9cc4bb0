"""MultiLoRA: Democratizing LoRA for Better Multi-Task Learning. Wang et al., 2023. https://arxiv.org/abs/2311.11501"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import Shape, projection_widths


class Parallels(LowRank):
    """y = base(x) + s sum_n g_n * (B_n A_n drop(x)): g (modules, d_out), all A_n and B_n beside each other.

    One product of rank `modules` * rank, the gains beside B.
    """

    def __init__(self, shape: Shape, rank: int, modules: int, scale: float, dropout: float) -> None:
        super().__init__(shape, modules * rank, scale, dropout)
        self.g = nn.Parameter(torch.empty(modules, shape.d_out))

    def reset(self, draw: Draw) -> None:
        draw.kaiming_uniform(self.a)
        draw.uniform(self.b, bound=(self.b.shape[1] // len(self.g)) ** -0.5)  # of each B_n by itself
        draw.zeros(self.g)

    def factors(self) -> tuple[Tensor, Tensor]:
        b = self.b.unflatten(1, (len(self.g), -1)) * self.g.T[:, :, None]  # (d_out, modules, rank)
        return self.a, b.flatten(1)


class MultiLoRA(PEFT, name="multilora", family="reparametrisation", paper="2311.11501", mergeable=True, batched=True):
    """y = W x + (alpha / rank) sum_n g_n * (B_n A_n x)

    `modules` products beside each other; all A_n (rank, d_in) and B_n (d_out, rank) are Kaiming-uniform, the gains
    g_n (d_out,) zero: the base at step 0, where only the gains have a gradient. modules (rank (d_in + d_out) + d_out)
    parameters a site.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    modules: int = 3
    alpha: float = 16.0
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "rank", "modules")
        not_negative(self, "alpha")
        probability(self, "dropout")

    def adapter(self, site: Site) -> Adapter:
        shape = Shape(*projection_widths(site, "MultiLoRA"))
        return Parallels(shape, self.rank, self.modules, self.alpha / self.rank, self.dropout)
