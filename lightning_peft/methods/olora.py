"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models. Buyukakyuz, 2024. https://arxiv.org/abs/2406.01775"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.started import Started
from lightning_peft.core.targets import Shape
from lightning_peft.methods.lora import StartedLoRA


class Orthonormal(Started):
    """B0 = Q[:, :r], A0 = R[:r] of W = Q R, with a positive diagonal of R."""

    def start(self, weight: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(weight)
        rank = len(self.a)
        sign = torch.where(r.diagonal()[:rank] < 0, -1.0, 1.0).to(weight)
        return sign[:, None] * r[:rank], q[:, :rank] * sign


class OLoRA(StartedLoRA, name="olora", family="reparametrisation", paper="2406.01775", mergeable=True):
    """y = W x + (alpha / rank) (B A - B0 A0) x, B0 = Q[:, :rank], A0 = R[:rank], W = Q R

    A, B start at A0, B0: the base at step 0. The weight itself is not changed: s B0 A0 is subtracted beside it, or
    taken out of it before it is quantised. rank * (d_in + d_out) parameters a site; files hold plain LoRA of rank 2r.
    """

    init: Literal["olora"] = "olora"  # type: ignore[assignment]

    def product(self, shape: Shape, rank: int, scale: float) -> LowRank:
        return Orthonormal(shape, rank, scale, self.dropout, self.lora_bias)
