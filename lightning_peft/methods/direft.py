"""DiReFT: ReFT: Representation Finetuning for Language Models. Wu et al., NeurIPS 2024.
https://arxiv.org/abs/2404.03592
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.init import Draw
from lightning_peft.core.representation import Edit
from lightning_peft.methods.loreft import ReFT


class DirectEdit(Edit):
    """e(h) = W2^T (W1 h + b): W1 and W2 (r, d), b (r,)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(rank, width))
        self.w2 = nn.Parameter(torch.empty(rank, width))
        self.b = nn.Parameter(torch.empty(rank))

    def reset(self, draw: Draw, identity: bool) -> None:
        draw.kaiming_uniform(self.w1)
        draw.uniform(self.b, bound=self.w1.shape[1] ** -0.5)
        if identity:
            draw.zeros(self.w2)
        else:
            draw.kaiming_uniform(self.w2)

    def forward(self, h: Tensor) -> Tensor:  # (batch, time, d) -> (batch, time, d)
        return F.linear(h, self.w1.to(h.dtype), self.b.to(h.dtype)) @ self.w2.to(h.dtype)


class DiReFT(ReFT, name="direft", family="representation", paper="2404.03592", identity=False, overhead="prompt"):
    """h' = h + W2^T (W1 h + b)

    LoReFT (see there for positions, places and fields) without orthogonality and without the difference: LoRA on a
    representation. Linear layers' initial tensors; identity=True starts with W2 = 0 (not in the paper). L (2 r d + r)
    parameters when tied. pyreft's class of this name keeps orthonormal rows; the paper does not. Source: section 3.2,
    equation 3.
    """

    def edit(self, width: int) -> Edit:
        return DirectEdit(width, self.rank)
