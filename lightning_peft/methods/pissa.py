"""PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models. Meng et al., NeurIPS 2024.
https://arxiv.org/abs/2404.02948
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_peft.core.fields import FieldError
from lightning_peft.core.init import Draw, leading
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.started import Started
from lightning_peft.core.targets import Shape
from lightning_peft.methods.lora import StartedLoRA


class Principal(Started):
    """B0 = U sqrt(S / s), A0 = sqrt(S / s) V^T of the largest singular values of W."""

    iterations: int | None = None

    def start(self, weight: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        u, s, vt = leading(weight, len(self.a), self.iterations, draw)
        half = (s / self.scale).sqrt()
        return half[:, None] * vt, u * half


class PiSSA(StartedLoRA, name="pissa", family="reparametrisation", paper="2404.02948", mergeable=True):
    """y = W x + (alpha / rank) (B A - B0 A0) x, s B0 A0 = U_r S_r V_r^T: the largest singular values of W

    A, B start at A0, B0: the base at step 0. The weight itself is not changed: B0 A0 is subtracted beside it, which is
    the paper's W_res = W - s B0 A0. Where the base is quantised around it (`NF4Precision`, or `quantise` after `apply`)
    the codes are those of W_res: QPiSSA. rank * (d_in + d_out) parameters a site; files hold plain LoRA of rank 2r.
    iterations: of a randomised decomposition, such as 4 or 16; None decomposes exactly. Source: sections 3 and 4.
    """

    init: Literal["pissa"] = "pissa"  # type: ignore[assignment]
    alpha: float = 8.0
    iterations: int | None = None

    def check(self) -> None:
        super().check()
        if self.iterations is not None and self.iterations < 0:
            raise FieldError(f"PiSSA(iterations={self.iterations}): expected 0 or more, or None to decompose exactly.")

    def product(self, shape: Shape, rank: int, scale: float) -> LowRank:
        adapter = Principal(shape, rank, scale, self.dropout, self.lora_bias)
        adapter.iterations = self.iterations
        return adapter
