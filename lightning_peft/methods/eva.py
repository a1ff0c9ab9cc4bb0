"""EVA: Parameter Efficient Fine-tuning via Explained Variance Adaptation. Paischer et al., NeurIPS 2025.
https://arxiv.org/abs/2410.07170
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.calibration import CalibrationError, Components, Watched
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.targets import Shape
from lightning_peft.methods.calibrated import CalibratedLoRA, linear_only
from lightning_peft.methods.lora import LoRA


class OfInputs(Watched, LowRank):
    """y = base(x) + s B A x, A the first principal directions of x."""

    whiten = False
    center = True

    def watcher(self) -> Components:
        return Components(len(self.a), self.center)

    @torch.no_grad()
    def settle(self, watch: Components) -> None:
        s, vt = watch.result()
        if len(vt) < len(self.a):
            raise CalibrationError(
                f"{watch.n} rows of input have {len(vt)} directions, and rank={len(self.a)} asks for more. Give more "
                "batches, or choose a lower rank."
            )
        self.a.copy_(scaled(vt, s) if self.whiten else vt)
        self.b.zero_()


def scaled(vt: Tensor, s: Tensor) -> Tensor:
    """V^T / sqrt(S)"""
    return vt / s.clamp_min(torch.finfo(s.dtype).tiny).sqrt()[:, None]


class EVA(CalibratedLoRA, name="eva", family="reparametrisation", paper="2410.07170", mergeable=True):
    """y = W x + (alpha / rank) B A x, A the first principal directions of x over a few batches

    A (rank, d_in) orthonormal, B zero: the base at step 0. The directions are kept up to date batch by batch, about
    the mean of x (center); whiten divides each by the square root of its singular value. Ranks stay as given: there is
    no redistribution among sites (the paper's rho = 1). Until `batches` were seen it is plain LoRA, and `fit` sees them
    first. rank * (d_in + d_out) parameters a site.
    """

    init: Literal["eva"] = "eva"  # type: ignore[assignment]
    whiten: bool = False
    center: bool = True

    def product(self, shape: Shape, rank: int, scale: float) -> LowRank:
        adapter = OfInputs(linear_only(shape, "EVA"), rank, scale, self.dropout, self.lora_bias)
        adapter.whiten, adapter.center = self.whiten, self.center
        return adapter

    def portable(self) -> LoRA:
        """Plain LoRA: the start is no part of what was trained."""
        return self.plain()
