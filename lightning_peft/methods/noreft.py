"""NoReFT, the ablation of LoReFT without orthogonality: ReFT. Wu et al., NeurIPS 2024.
https://arxiv.org/abs/2404.03592
"""

from __future__ import annotations

from torch import Tensor

from lightning_peft.core.init import Draw
from lightning_peft.core.representation import Edit
from lightning_peft.methods.loreft import LowRankEdit, ReFT


class FreeEdit(LowRankEdit):
    """e(h) = R^T (W h + b - R h): R (r, d) of any kind, W (r, d), b (r,)."""

    def start(self, draw: Draw) -> None:
        draw.kaiming_uniform(self.r)

    def rotation(self) -> Tensor:
        return self.r


class NoReFT(ReFT, name="noreft", family="representation", paper="2404.03592", identity=False, overhead="prompt"):
    """h' = h + R^T (W h + b - R h)

    LoReFT (see there for positions, places and fields) with any R: no decomposition in the forward. R and W start as
    those of a linear layer. L (2 r d + r) parameters when tied. identity=True starts with W = R, b = 0.
    """

    def edit(self, width: int) -> Edit:
        return FreeEdit(width, self.rank)
