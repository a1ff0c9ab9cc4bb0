"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation. Wang, Yu & Li, NeurIPS 2024.
https://arxiv.org/abs/2407.05000
"""

from __future__ import annotations

from typing import Literal

import torch

from lightning_peft.core.calibration import CalibrationError, Gradient, Watched
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw, leading
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.projection import base_weight
from lightning_peft.core.started import Started
from lightning_peft.core.targets import Shape
from lightning_peft.methods.calibrated import CalibratedLoRA, linear_only


class OfGradient(Watched, Started):
    """A0, B0 singular vectors of dL/dW, so that the first step is near that of full fine-tuning."""

    size = "stable"
    gamma = 16.0

    def reset(self, draw: Draw) -> None:
        self.reset_plain(draw)

    def watcher(self) -> Gradient:
        return Gradient()

    @torch.no_grad()
    def settle(self, watch: Gradient) -> None:
        gradient, rank = watch.result(), len(self.a)
        if 2 * rank > min(gradient.shape):
            raise CalibrationError(
                f"LoRA-GA uses 2 rank = {2 * rank} singular vectors, and a gradient of {tuple(gradient.shape)} has "
                f"{min(gradient.shape)}. Choose a rank of at most {min(gradient.shape) // 2}."
            )
        u, _, vt = leading(gradient, 2 * rank)
        factor = self.factor(len(gradient), rank)
        self.begin(factor * vt[:rank], factor * u[:, rank:])

    def factor(self, d_out: int, rank: int) -> float:
        """What A0 and B0 are multiplied with."""
        if self.size == "stable":
            return float(d_out**0.25 / self.gamma**0.5)
        if self.size == "weight":
            singular = torch.linalg.svdvals(base_weight(self.place).float())[:rank]
            return float((singular / self.scale).sqrt().mean())
        return 1.0


class LoRAGA(CalibratedLoRA, name="lora_ga", family="reparametrisation", paper="2407.05000", mergeable=True):
    """y = W x + (alpha / rank) (B A - B0 A0) x, A0 ~ V[:, :rank]^T, B0 ~ U[:, rank:2 rank] of dL/dW = U S V^T

    The gradient is the mean over a few batches. size="stable" multiplies both with d_out^(1/4) / sqrt(gamma), "weight"
    with the mean root of W's largest singular values over s, "unit" with one. A, B start at A0, B0: the base at step 0.
    Until `batches` were seen it is plain LoRA, and `fit` sees them first. rank * (d_in + d_out) parameters a site;
    files
    hold plain LoRA of rank 2r.
    """

    init: Literal["lora_ga"] = "lora_ga"  # type: ignore[assignment]
    size: Literal["stable", "weight", "unit"] = "stable"
    gamma: float = 16.0

    def check(self) -> None:
        super().check()
        positive(self, "gamma")

    def product(self, shape: Shape, rank: int, scale: float) -> LowRank:
        adapter = OfGradient(linear_only(shape, "LoRAGA"), rank, scale, self.dropout, self.lora_bias)
        adapter.size, adapter.gamma = self.size, self.gamma
        return adapter
