"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.
Liu et al., NeurIPS 2022. https://arxiv.org/abs/2205.05638
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import per_site, projection_widths


class ScaleOutput(Adapter):
    """y = l * base(x): l (d_out,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.empty(width))

    def reset(self, draw: Draw) -> None:
        draw.ones(self.l)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        return y * self.l.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = self.l.to(weight)
        return gain[:, None] * weight, None if bias is None else gain * bias


class ScaleInput(ScaleOutput):
    """y = base(l * x): l (d_in,)."""

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        return base(x * self.l.to(x.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.l.to(weight), bias


class IA3(PEFT, name="ia3", family="additive", paper="2205.05638", mergeable=True):
    """k = l_k * W_k x, v = l_v * W_v x, f = W_down (l_ff * g(x))

    Keys and values (self- and cross-attention) are scaled after their projection, bias included and before any
    rotation of positions; the feed-forward layer's inner activation is scaled before the down projection (after gate
    * up where there is a gate). All vectors start at one: the base at step 0. Merging is exact. inputs: targets that
    scale their input instead of their output. Source: section 3.3.
    """

    targets: str | list[str] | None = "k,v,cross.k?,cross.v?,down"
    inputs: str = "down?"

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        turned = per_site(sites, {self.inputs: True}, False)
        for site, before in zip(sites, turned, strict=True):
            d_in, d_out = projection_widths(site, "IA3")
            yield site, ScaleInput(d_in) if before else ScaleOutput(d_out)
