"""CorDA: Context-Oriented Decomposition Adaptation of Large Language Models. Yang et al., NeurIPS 2024.
https://arxiv.org/abs/2406.05223
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.calibration import Covariance, Watched
from lightning_peft.core.init import Draw, leading
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.projection import base_weight
from lightning_peft.core.started import Started
from lightning_peft.core.targets import Shape
from lightning_peft.methods.calibrated import CalibratedLoRA, linear_only


class ContextOriented(Watched, Started):
    """s B0 A0 = U S V^T C^-1 of W C = U S V^T, C the covariance of x; a part of the components."""

    mode = "knowledge"

    def reset(self, draw: Draw) -> None:
        self.reset_plain(draw)

    def watcher(self) -> Covariance:
        return Covariance()

    @torch.no_grad()
    def settle(self, watch: Covariance) -> None:
        weight = base_weight(self.place).float()
        covariance = regular(watch.result())
        rank = len(self.a)
        u, s, vt = leading(weight @ covariance, min(weight.shape))
        part = slice(0, rank) if self.mode == "instruction" else slice(len(s) - rank, len(s))
        half = (s[part] / self.scale).sqrt()
        turned = torch.linalg.solve(covariance, vt[part].T).T  # V^T C^-1, C symmetric
        self.begin(half[:, None] * turned, u[:, part] * half)


def regular(covariance: Tensor) -> Tensor:
    """C with a mean of 1 on its diagonal, and as much more there as a well-posed inverse needs (0.01, 0.02, 0.04,
    ...)
    """
    c = covariance / covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)
    identity = torch.eye(len(c), dtype=c.dtype, device=c.device)
    more = 0.01
    while (torch.linalg.inv(c + more * identity) @ (c + more * identity) - identity).norm() >= 0.05:
        more *= 2
    return c + more * identity


class CorDA(CalibratedLoRA, name="corda", family="reparametrisation", paper="2406.05223", mergeable=True):
    """y = W x + (alpha / rank) (B A - B0 A0) x, s B0 A0 = U S V^T C^-1 of W C = U S V^T, C = E[x x^T] over a few
    batches

    mode="knowledge" starts at the smallest components, so that what matters on these batches stays in W; "instruction"
    at the largest, so that what matters on them is adapted. A, B start at A0, B0: the base at step 0. Until `batches`
    were seen it is plain LoRA, and `fit` sees them first. rank * (d_in + d_out) parameters a site; files hold plain
    LoRA
    of rank 2r.
    """

    init: Literal["corda"] = "corda"  # type: ignore[assignment]
    mode: Literal["knowledge", "instruction"] = "knowledge"

    def product(self, shape: Shape, rank: int, scale: float) -> LowRank:
        adapter = ContextOriented(linear_only(shape, "CorDA"), rank, scale, self.dropout, self.lora_bias)
        adapter.mode = self.mode
        return adapter
