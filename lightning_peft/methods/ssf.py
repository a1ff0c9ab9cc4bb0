"""SSF: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning. Lian et al., NeurIPS 2022.
https://arxiv.org/abs/2210.08823
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter, NotMergeableError
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import projection_widths


class ScaleShift(Adapter):
    """y = gamma * base(x) + beta: both (d_out,), beta absent without `shift`."""

    def __init__(self, d_out: int, shift: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(d_out))
        self.beta = nn.Parameter(torch.empty(d_out)) if shift else None

    def reset(self, draw: Draw) -> None:
        draw.ones(self.gamma)
        if self.beta is not None:
            draw.zeros(self.beta)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        gamma = self.gamma.to(y.dtype)
        return y * gamma if self.beta is None else torch.addcmul(self.beta.to(y.dtype), y, gamma)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gamma = self.gamma.to(weight)
        if self.beta is not None:
            if bias is None:
                raise NotMergeableError(
                    "SSF shifts a projection that has no bias, and such a projection has no place for the shift. Leave "
                    "it attached, or train SSF(shift=False)."
                )
            bias = gamma * bias + self.beta.to(weight)
        elif bias is not None:
            bias = gamma * bias
        return gamma[:, None] * weight, bias


class SSF(PEFT, name="ssf", family="reparametrisation", paper="2210.08823", mergeable=True):
    """y = gamma * (W x + b) + beta

    gamma starts at one, beta at zero: the base at step 0 (the authors draw both with a deviation of 0.02). 2 d_out
    parameters a site. The authors put one after every operation, norms included; here it goes to projections.

    shift: False leaves beta out, so that projections without a bias can be merged too; d_out parameters.
    """

    targets: str | list[str] | None = "all-linear"
    shift: bool = True

    def adapter(self, site: Site) -> Adapter:
        return ScaleShift(projection_widths(site, "SSF")[1], self.shift)
